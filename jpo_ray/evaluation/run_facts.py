"""What a run directory holds: the artifacts that stand, their counts, seconds and versions, and what is missing."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jpo_ray import shards
from jpo_ray.artifacts import Manifest
from jpo_ray.config import RunConfig
from jpo_ray.files import read_json
from jpo_ray.records import PROTOCOLS, SPLITS
from jpo_ray.runs import RunDir

MOST_SHOWN = 2**20  # values that a histogram is made of
IN_ROUNDS = ("pairs", "judge", "reference")
# A config section that can be null, and what its absence means.
OFF = {
    "sft": "no SFT: `sft` is off in the config, the base model is the SFT model",
    "sample": "not sampled: `sample` is off in the config",
    "evaluate": "not evaluated: `evaluate` is off in the config",
} | dict.fromkeys(IN_ROUNDS, "each round has its own, below `rounds/`")
PENDING = {
    "items": "no items yet: run `jpo items`",
    "pairs": "no pairs yet: run `jpo pairs`",
    "judge": "not judged yet: run `jpo judge`",
    "sft": "no SFT model yet: run `jpo sft`",
    "reference": "no reference log-probs yet: run `jpo reference`",
    "sample": "not sampled yet: run `jpo sample`",
    "evaluate": "not evaluated yet: run `jpo evaluate`",
    "tournament": "models not compared with each other yet: run `jpo evaluate`",
    "policies": "no scores under the models yet: run `jpo evaluate`",
}


# Artifacts beside the stages' own, made only where needed: the tiny base model, the instructions' embeddings.
EXTRA = {"base": "items", "embeddings": "pairs"}  # name -> the stage it belongs to


def planned_artifacts(config: RunConfig) -> list[str]:
    """The artifacts this config makes, in the order of the stages."""
    before = [stage for stage in ("items", "pairs", "judge", "sft", "reference") if stage not in off_stages(config)]
    after = [stage for stage in ("sample", "evaluate") if stage not in off_stages(config)]
    asked = config.evaluate
    if asked is not None:
        after += [name for name, on in (("tournament", asked.tournament), ("policies", asked.policies)) if on]
    return [*before, *(f"train/{entry.name}" for entry in config.trained), *after]


def off_stages(config: RunConfig) -> list[str]:
    """Stages this config leaves out."""
    in_rounds = IN_ROUNDS if config.rounds else ()
    sections = (("sft", config.sft), ("sample", config.sample), ("evaluate", config.evaluate))
    return [*in_rounds, *(stage for stage, section in sections if section is None)]


def standing_manifests(run: RunDir, config: RunConfig) -> dict[str, Manifest]:
    """Manifests of the planned artifacts that exist. What an earlier config left behind is not this run's."""
    names = planned_artifacts(config)
    for extra, stage in EXTRA.items():
        if stage in names:
            names.insert(names.index(stage) + (extra != "embeddings"), extra)
    found = {artifact: run.manifest(artifact) for artifact in names}
    return {artifact: manifest for artifact, manifest in found.items() if manifest is not None}


def missing_stages(config: RunConfig, standing: Mapping[str, Manifest]) -> dict[str, str]:
    """Why each planned artifact that does not exist, or stage that is off, is missing, as sentences."""
    missing = {stage: OFF[stage] for stage in off_stages(config)}
    for artifact in planned_artifacts(config):
        if artifact not in standing and artifact not in missing:
            pending = f"{artifact.removeprefix('train/')} is not trained yet: run `jpo train`"
            missing[artifact] = PENDING.get(artifact, pending)
    return missing


def stage_seconds(standing: Mapping[str, Manifest]) -> dict[str, float]:
    """Seconds per artifact, and of all training entries together under `train`."""
    seconds = {artifact: manifest.seconds for artifact, manifest in standing.items()}
    training = [value for artifact, value in seconds.items() if artifact.startswith("train/")]
    return seconds | ({"train": round(sum(training), 3)} if training else {})


def package_versions(standing: Mapping[str, Manifest]) -> dict[str, str]:
    """Version of each package; all of them where stages were made with different ones."""
    seen: dict[str, dict[str, None]] = {}
    for manifest in standing.values():
        for package, version in manifest.versions.items():
            seen.setdefault(package, {})[version] = None
    return {package: ", ".join(versions) for package, versions in sorted(seen.items())}


def trainer_state(run: RunDir, artifact: str, standing: Mapping[str, Manifest]) -> dict[str, Any]:
    """The training's history; empty where there is none."""
    path = run.path(artifact) / "trainer_state.json"
    return read_json(path) if artifact in standing and path.exists() else {}


def read_columns(run: RunDir, file: str, columns: list[str]) -> pa.Table | None:
    """Columns of a table such as `pairs/pairs.parquet`; None where the file does not exist."""
    artifact, name = file.rsplit("/", 1)
    path = run.path(artifact) / name
    return pq.read_table(path, columns=columns) if path.exists() else None


def spent(run: RunDir, standing: Mapping[str, Manifest]) -> dict[str, dict[str, Any]]:
    """Judgments, tokens and US dollars of each artifact that judges."""
    found = {}
    for artifact in ("judge", "evaluate", "tournament"):
        path = run.path(artifact) / "judgments.parquet"
        if artifact in standing and path.exists():
            each = [_spent_in(file) for file in shards.files_of(path)]
            found[artifact] = {name: sum(one[name] for one in each) for name in ("judgments", "tokens", "cost")}
    return found


def _spent_in(file: Path) -> dict[str, Any]:
    table = pq.read_table(file, columns=["tokens", "cost"])
    return {"judgments": len(table)} | {name: pc.sum(table[name]).as_py() or 0 for name in ("tokens", "cost")}


def funnel(run: RunDir, standing: Mapping[str, Manifest]) -> dict[str, Any]:
    """From instructions to preferences: counts per split, and per protocol and split. Absent stages give no keys."""
    counts: dict[str, Any] = {}
    if "items" in standing:
        counts |= _item_counts(run)
    if "pairs" in standing:
        counts["comparisons"] = _comparison_counts(run, judged="judge" in standing)
    if counts:
        counts["steps"] = _steps(counts, standing)
    return counts


def _steps(counts: Mapping[str, Any], standing: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """How many of the train split are left at each step from items to what each model was trained on."""
    found = [("items", counts["items"]["train"])] if "train" in counts.get("items", {}) else []
    rows = [row for row in counts.get("comparisons", []) if row["split"] == "train"]
    for name in ("pairs", "judged", "decisive", "preferences"):
        if rows and name in rows[0]:
            found.append((name, sum(row[name] for row in rows)))
    for artifact, manifest in standing.items():
        if artifact.startswith("train/") and "comparisons" in manifest.counts:
            found.append((f"used by {artifact.removeprefix('train/')}", manifest.counts["comparisons"]))
    return [{"step": name, "count": count} for name, count in found]


def _item_counts(run: RunDir) -> dict[str, Any]:
    items = read_columns(run, "items/items.parquet", ["instruction_id", "split", "sft", "gold"])
    labels = read_columns(run, "items/labels.parquet", ["verdict"])
    if items is None:
        return {}
    per_split = items.group_by("split").aggregate(
        [("instruction_id", "count_distinct"), ("split", "count"), ("sft", "sum"), ("gold", "sum")]
    )
    rows = {row["split"]: row for row in per_split.to_pylist()}
    splits = [split for split in SPLITS if split in rows]
    return {
        "instructions": {split: rows[split]["instruction_id_count_distinct"] for split in splits},
        "items": {split: rows[split]["split_count"] for split in splits},
        "sft_items": {split: rows[split]["sft_sum"] or 0 for split in splits},
        "gold_items": {split: rows[split]["gold_sum"] or 0 for split in splits},
        "labels": 0 if labels is None else labels.num_rows,
    }


def _comparison_counts(run: RunDir, judged: bool) -> list[dict[str, Any]]:
    """Rows of protocol and split; without judgments only the pairs are counted. Shard by shard."""
    pairs = run.path("pairs") / "pairs.parquet"
    if not pairs.exists():
        return []
    totals = shards.kinds_of_all(shards.files_of(pairs))
    verdicts: dict[str, Counter[shards.Kind]] = {}
    judgments = run.path("judge") / "judgments.parquet"
    if judged and judgments.exists():
        for name in shards.shard_names(judgments):
            found = _verdict_counts(
                pairs if name is None else pairs / name, judgments if name is None else judgments / name
            )
            verdicts = {kind: verdicts.get(kind, Counter()) + counts for kind, counts in found.items()}
        preferences = run.path("judge") / "preferences.parquet"
        verdicts["preferences"] = (
            shards.kinds_of_all(shards.files_of(preferences)) if preferences.exists() else Counter()
        )
    kinds = [(protocol, split) for protocol in PROTOCOLS for split in SPLITS if totals[split, protocol]]
    return [
        {"protocol": protocol, "split": split, "pairs": totals[split, protocol]}
        | {name: counts[split, protocol] for name, counts in verdicts.items()}
        for protocol, split in kinds
    ]


def _verdict_counts(pairs: Path, judgments: Path) -> dict[str, Counter[shards.Kind]]:
    """Of one shard; preferences are the first annotator's, others judge the same pairs."""
    judged = pq.read_table(judgments, columns=["pair_id", "annotator", "verdict", "verdict_ab", "verdict_ba"])
    if len(judged):
        judged = judged.filter(pc.equal(judged["annotator"], judged["annotator"][0]))
    of_pair = pq.read_table(pairs, columns=["pair_id", "protocol", "split"])
    judged = of_pair.join(judged, keys="pair_id", join_type="inner")
    verdict, first, second = (judged.column(name) for name in ("verdict", "verdict_ab", "verdict_ba"))
    answered = pc.and_(pc.not_equal(first, "invalid"), pc.not_equal(second, "invalid"))
    flipped = pc.and_(answered, pc.not_equal(first, second))  # null, so dropped, where one order was shown
    return {
        "judged": shards.kinds_in(judged),
        "decisive": shards.kinds_in(judged.filter(pc.is_in(verdict, pa.array(["a", "b"])))),
        "ties": shards.kinds_in(judged.filter(pc.equal(verdict, "tie"))),
        "invalid": shards.kinds_in(judged.filter(pc.equal(verdict, "invalid"))),
        "flipped": shards.kinds_in(judged.filter(flipped)),
    }


def joint_similarities(run: RunDir, standing: Mapping[str, Manifest]) -> NDArray[np.float32]:
    """Cosine similarities of the instructions of joint pairs; of millions, those of every so many."""
    path = run.path("pairs") / "pairs.parquet"
    if "pairs" not in standing or not path.exists():
        return np.empty(0, dtype=np.float32)
    step = -(-shards.row_count(path) // MOST_SHOWN)
    found = [np.empty(0, dtype=np.float32)]
    for file in shards.files_of(path):
        pairs = pq.read_table(file, columns=["protocol", "similarity"])
        joint = pairs.filter(pc.equal(pairs.column("protocol"), "joint")).column("similarity").drop_null()
        found.append(joint.filter(pc.is_finite(joint)).to_numpy()[:: max(1, step)])
    return np.concatenate(found)


def win_rates_of(run: RunDir, config: RunConfig, standing: Mapping[str, Manifest]) -> dict[str, Any]:
    """Win rates by model, `sft` first, then as the config lists them; empty where not evaluated."""
    path = run.path("evaluate") / "win_rates.json"
    if "evaluate" not in standing or config.sample is None or not path.exists():
        return {}
    models: dict[str, Any] = read_json(path)["models"]  # sorted by name: JSON files are written with sorted keys
    return {name: models[name] for name in in_order(config, models) if name in models}


def in_order(config: RunConfig, others: Iterable[str]) -> list[str]:
    """`sft`, the config's models, then any other that an artifact names."""
    return list(dict.fromkeys(["sft", *(entry.name for entry in config.trained), *others]))
