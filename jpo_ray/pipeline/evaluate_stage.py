"""The evaluate stage: samples against gold responses, models against each other, and what training did to policies."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from jpo_ray import records, shards
from jpo_ray.cache import cache_folder
from jpo_ray.config import EvaluateConfig, RunConfig
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.engine.tracking import tracked, trackers_of
from jpo_ray.errors import InputError
from jpo_ray.feedback.tally import invalid_reasons, require_verdicts
from jpo_ray.files import write_json
from jpo_ray.pipeline.annotating import annotator_inputs
from jpo_ray.pipeline.console import progress_bar
from jpo_ray.pipeline.context import Context, Spec
from jpo_ray.pipeline.judge_stage import run_annotator
from jpo_ray.pipeline.model_stages import sft_model


def evaluate_specs(context: Context) -> list[Spec]:
    config = context.config.evaluate
    if config is None:
        return []
    inputs = {name: context.standing(name, name).fingerprint for name in ("items", "sample")}
    judge = evaluation_judge(context.config, config)
    inputs |= annotator_inputs(judge)
    slice_ = {
        "evaluate": config.model_dump(exclude={"judge", "tournament", "policies"}),
        "judge": judge.decisive(),
        "seed": context.config.seed,
    }

    def make(out: Path) -> dict[str, Any]:
        from jpo_ray.evaluation.length_control import controlled_win_rates
        from jpo_ray.evaluation.win_rates import judge_samples

        samples = records.read_table(context.path("sample") / "samples.parquet", records.SAMPLES)
        golds = gold_responses(context)
        with (
            run_annotator(context, judge, stage="evaluate") as annotator,
            progress_bar(context.console, "judging samples against gold") as bar,
        ):
            bar.begin(samples.num_rows)
            rows = judge_samples(
                samples,
                golds,
                annotator,
                lambda share, note: bar.to(int(share * samples.num_rows), note=note),
            )
        warning = require_verdicts(rows)
        table = records.write_table(out / "judgments.parquet", rows, records.SAMPLE_JUDGMENTS)
        result = controlled_win_rates(table, samples, golds, config.bootstrap_samples, context.config.seed)
        write_json(out / "win_rates.json", result)
        _track(context, result["models"], out.name)
        empty = sum(entry["empty"] for entry in result["models"].values())
        return {"judgments": len(rows), "empty responses": empty} | _invalid(rows, warning)

    specs = [Spec("evaluate", "evaluate", inputs, slice_, make)]
    if config.tournament is not None:
        played = slice_ | {"tournament": config.tournament.model_dump()}
        specs.append(
            Spec("tournament", "evaluate", inputs, played, lambda out: _tournament(context, config, judge, out))
        )
    if config.policies:
        specs.append(_policies_spec(context))
    return specs


def _track(context: Context, models: Mapping[str, Any], key: str) -> None:
    """The models' win rates to the trackers; a tracker that fails is said and left out: what was judged stands."""
    left = trackers_of(context.config.report_to)
    for name, found in models.items():
        while left:
            try:
                _track_model(context, name, found, key, left)
                break
            except Exception as error:
                context.console.print(
                    f"  warning: win rates of {name}, and of models after it, are not in {left[-1]} ({error}). They "
                    "stand in evaluate/win_rates.json; mend it, delete that folder and run `jpo evaluate` again to "
                    "have them there too",
                    style="yellow", highlight=False, markup=False, soft_wrap=True,
                )  # fmt: skip
                left = left[:-1]


def _track_model(context: Context, name: str, found: Mapping[str, Any], key: str, trackers: tuple[str, ...]) -> None:
    """A model's win rates, at the step where its training ended."""
    assert context.config.sample is not None
    manifest = context.run.manifest("sft" if name == "sft" else f"train/{name}")
    rates = found["win_rate"] | {"length_controlled": found.get("length_controlled", {}).get("rate")}
    prefix = "test" if context.config.sample.split == "test" else "eval"
    entry = {f"{prefix}_win_rate/{of}": rate for of, rate in rates.items()}
    entry["step"] = manifest.counts.get("steps", 0) if manifest else 0  # no SFT: the base model
    with tracked(replace(context.tracking(f"{name}/evaluate", key), report_to=trackers), []) as write:
        write(entry)


def _invalid(rows: Sequence[dict[str, Any]], warning: str) -> dict[str, Any]:
    """Counts of the verdicts that are none, and why."""
    invalid = sum(row["verdict"] == "invalid" for row in rows)
    return {"invalid": invalid, "invalid because": invalid_reasons(rows), "warning": warning}


def _policies_spec(context: Context) -> Spec:
    names = ("items", "judge", "reference", "sample")
    inputs = {name: context.standing(name, name).fingerprint for name in names} | {"sft": sft_model(context)[1]}
    trained = [entry.name for entry in context.config.trained]
    inputs |= {name: context.standing(f"train/{name}", "train").fingerprint for name in trained}
    return Spec("policies", "evaluate", inputs, {}, lambda out: _policies(context, trained, out))


def _policies(context: Context, trained: list[str], out: Path) -> dict[str, Any]:
    """What each trained model does to held-out preferences and to its own samples; `policies.json` in `out`."""
    import numpy as np

    from jpo_ray.cluster.policy import policy_facts
    from jpo_ray.data.tokens import tokenize
    from jpo_ray.engine.jobs import layout_of
    from jpo_ray.engine.model import load_tokenizer
    from jpo_ray.evaluation.policy_metrics import kl_of_samples, preference_metrics, sample_metrics

    held_out = [
        row
        for file in shards.files_of(context.path("judge") / "preferences.parquet")
        if any(split == "validation" for split, _ in shards.kinds_of(file))
        for row in records.read_table(file, records.PREFERENCES).to_pylist()
        if row["split"] == "validation"
    ]
    reference = {
        row["item_id"]: (row["instruction_logprob"], row["response_logprob"])
        for row in records.read_table(context.path("reference") / "reference.parquet", records.REFERENCE).to_pylist()
        if row["response_of"] == row["item_id"]
    }
    ids = list(dict.fromkeys(item for row in held_out for item in (row["chosen"], row["rejected"])))
    items = records.read_table(context.path("items") / "items.parquet", records.ITEMS).to_pylist()
    texts = {row["item_id"]: (row["instruction"], row["response"]) for row in items}
    samples = records.read_table(context.path("sample") / "samples.parquet", records.SAMPLES).to_pylist()
    own = [row for row in samples if row["temperature"] == 1.0 and row["model"] in trained]
    pairs = [*(texts[item] for item in ids), *((row["instruction"], row["response"]) for row in own)]
    if not pairs:
        raise InputError(
            "evaluate.policies: neither held-out preferences (items.validation) nor samples at temperature 1 to score"
        )
    base, model = sft_model(context)[0].resolve(), context.config.model
    instructions, responses = (list(side) for side in zip(*pairs, strict=True))
    ended = [*([True] * len(ids)), *(row["finish_reason"] != "length" for row in own)]  # what was cut drew no EOS
    tokens = tokenize(load_tokenizer(base), layout_of(model), instructions, responses, ended=ended)
    own_rows = {
        name: np.array(
            [number for number, row in enumerate(own, start=len(ids)) if row["model"] == name], dtype=np.intp
        )
        for name in trained
    }
    held_out_rows = np.arange(len(ids))
    with progress_bar(context.console, "scoring held-out items and samples under the models") as bar:
        ratios = policy_facts(
            context.ray(), context.cluster("evaluate"), "evaluate", tokens, base=base, dtype=model.dtype, bar=bar,
            policies=[
                (_policy(context, name, base), np.concatenate([held_out_rows, own_rows[name]]))
                for name in trained
            ],
            fact="log_ratio", load_in_4bit=model.load_in_4bit,
        )  # fmt: skip
    place = {item: number for number, item in enumerate(ids)}
    sides = ("chosen", "rejected")
    chosen, rejected = (np.array([place[row[side]] for row in held_out], dtype=np.int64) for side in sides)
    joint = np.array([row["protocol"] == "joint" for row in held_out], dtype=bool)
    under_reference = np.array([reference[item] for item in ids]).reshape(-1, 2)
    found = {}
    for name, ratio in zip(trained, ratios, strict=True):
        found[name] = preference_metrics(ratio[: len(ids)].astype(float), under_reference, chosen, rejected, joint)
        drawn = [row["instruction_id"] for row in own if row["model"] == name]
        found[name] |= kl_of_samples(ratio[len(ids) :, 1].astype(float), drawn)
    for name in ("sft", *trained):
        given = [row["response"] for row in samples if row["model"] == name]
        found[name] = found.get(name, {}) | sample_metrics(given)
    write_json(out / "policies.json", found)
    displaced = [name for name in trained if found[name]["displacement"]]
    warning = f"the chosen responses grew less likely under {', '.join(displaced)}" if displaced else ""
    counts = {"models": len(trained), "held-out comparisons": len(held_out)}
    if tokens.truncated:
        counts["texts cut to model.max_length"] = tokens.truncated
    return counts | {"warning": warning}


def _policy(context: Context, name: str, base: Path) -> Path:
    """Folder of a trained model. Raises `InputError` for an adapter that is not of `base`, the SFT model's folder."""
    from jpo_ray.engine.adapters import CONFIG, check_base

    folder = context.path(f"train/{name}").resolve()
    if (folder / CONFIG).exists():
        check_base(folder, base, f"evaluate.policies: {name}", cache_folder())
    return folder


def _tournament(context: Context, config: EvaluateConfig, judge: AnnotatorConfig, out: Path) -> dict[str, Any]:
    """Judge the models against each other; `out` gets the judgments, the matrix and the ranking."""
    from jpo_ray.evaluation.ranking import agreement_with_win_rates, ranking
    from jpo_ray.evaluation.tournament import (
        TOURNAMENT,
        conditional_matches,
        joint_matches,
        judge_matches,
        matrix,
    )

    assert config.tournament is not None
    seed, resamples = context.config.seed, config.bootstrap_samples
    samples = records.read_table(context.path("sample") / "samples.parquet", records.SAMPLES)
    one_each = samples.filter(_is_first(samples))
    matches = [
        *conditional_matches(one_each, seed, config.tournament.instructions),
        *joint_matches(one_each, config.tournament.joint_per_pair, seed),
    ]
    if not matches:
        raise InputError("evaluate.tournament: needs two models; `sample.models` has one")
    with (
        run_annotator(context, judge, stage="evaluate") as annotator,
        progress_bar(context.console, "judging models against each other") as bar,
    ):
        bar.begin(len(matches))
        rows = judge_matches(matches, annotator, lambda share, note: bar.to(int(share * len(matches)), note=note))
    warning = require_verdicts(rows)
    table = records.write_table(out / "judgments.parquet", rows, TOURNAMENT)
    against_gold = records.read_table(context.path("evaluate") / "judgments.parquet", records.SAMPLE_JUDGMENTS)
    result = {
        "matrix": matrix(table, resamples, seed),
        "ranking": ranking(table, resamples, seed),
        "agreement": agreement_with_win_rates(table, against_gold, resamples, seed),
    }
    write_json(out / "tournament.json", result)
    further = samples.num_rows - one_each.num_rows
    return {"comparisons": len(rows), "further samples not played": further} | _invalid(rows, warning)


def _is_first(samples: pa.Table) -> list[bool]:
    """Of each model, temperature and instruction the first sample only."""
    seen: set[tuple[Any, ...]] = set()
    keys = zip(*(samples[name].to_pylist() for name in ("model", "temperature", "instruction_id")), strict=True)
    return [not (key in seen or seen.add(key)) for key in keys]  # type: ignore[func-returns-value]


def evaluation_judge(config: RunConfig, evaluate: EvaluateConfig) -> AnnotatorConfig:
    """The judge of samples. Raises `InputError` where it could only answer `invalid`."""
    judge = evaluate.judge or AnnotatorConfig(**config.judge.model_dump(include=set(AnnotatorConfig.model_fields)))
    if judge.annotator in ("labels", "ratings"):
        raise InputError(
            f"evaluate: ready-made {judge.annotator} cannot judge new samples; set evaluate: null, or evaluate.judge "
            "to another annotator"
        )
    return judge


def gold_responses(context: Context) -> dict[str, str]:
    items: pa.Table = records.read_table(context.path("items") / "items.parquet", records.ITEMS)
    return {item["instruction_id"]: item["response"] for item in items.to_pylist() if item["gold"]}
