"""On-policy rounds: sample the policy on the training instructions, judge, train on the verdicts, and again.

A round is a run like any other, in `RUN_DIR/rounds/N`, whose items are what the policy of the round before said (in
`drawn/`). What it trains becomes the artifact `train/NAME-N` of the whole run, which samples and evaluates the models
of all rounds together.
"""

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jpo_ray import records
from jpo_ray.config import RunConfig, SampleConfig, Source
from jpo_ray.config_rounds import RoundsConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.errors import InputError
from jpo_ray.evaluation.generation import SampledModel
from jpo_ray.files import read_json
from jpo_ray.pipeline.base_model import base_facts
from jpo_ray.pipeline.context import Context, Spec, build, show
from jpo_ray.pipeline.model_stages import sft_model
from jpo_ray.pipeline.sample_stage import draw, sampled_model
from jpo_ray.runs import RunDir, open_run

STAGES = ("items", "pairs", "judge", "sft", "reference", "train", "report")
DRAWN = "drawn"
ITEMS = "items.jsonl"
# Keys of the judge that rounds do not depend on.
NOT_JUDGING: dict[str, Any] = {
    **dict.fromkeys(("timeout_s", "concurrency", "actors", "tensor_parallel_size"), True),
    "also": {"__all__": {"tensor_parallel_size"}},
}


def round_specs(context: Context) -> list[Spec]:
    """A model for each round, made from the one before it: another number of rounds leaves earlier ones standing."""
    from jpo_ray.cluster.sampling import choose_engine

    config, rounds = context.config, _rounds(context)
    sampling = config.sample or SampleConfig()
    before = {"items": context.standing("items", "items").fingerprint, "sft": sft_model(context)[1]}
    shared = {
        "rounds": rounds.model_dump(exclude={"count"}),
        "pairs": config.pairs.model_dump(),
        "judge": config.judge.model_dump(exclude=NOT_JUDGING),
        "model": config.model.model_dump(exclude={"model_name_or_path"}),
        "sample": sampling.model_dump(include={"max_new_tokens", "stop"}) | {"engine": choose_engine(sampling.engine)},
    }
    specs: list[Spec] = []
    for number, entry in enumerate(config.trained, start=1):
        inputs = before | ({"before": specs[-1].fingerprint} if specs else {})
        seeded = entry.model_copy(update={"seed": context.seed(entry.seed) + number})
        slice_ = shared | {"train": seeded.model_dump(), "round": number, "seed": config.seed}
        specs.append(Spec(f"train/{entry.name}", "train", inputs, slice_, partial(_make, context, number, seeded)))
    return specs


def _rounds(context: Context) -> RoundsConfig:
    assert context.config.rounds is not None
    return context.config.rounds


def _make(context: Context, number: int, entry: TrainConfig, out: Path) -> dict[str, Any]:
    """Carry out a round below the run directory, and take over what it trained."""
    from jpo_ray.engine.merging import merge_adapter
    from jpo_ray.pipeline import run_stages

    context.ray()  # one session for all that the round runs
    rounds, where = _rounds(context), context.run.below(f"rounds/{number}")
    context.console.print(f"[bold]round {number} of {rounds.count}[/bold]", highlight=False)
    policy = _policy(context, number)
    drawn = _draw(context, where, number, policy)
    config = _round_config(context, number, entry, policy, RunDir(where).path(DRAWN).resolve())
    run_stages(config, where, STAGES, context.console, summary=False)
    trained, state = RunDir(where).path(f"train/{entry.name}"), "trainer_state.json"
    if entry.use_peft and rounds.reference == "moved":
        merge_adapter(trained, policy.path, out, context.config.model.dtype)
        shutil.copy2(trained / state, out / state)
    else:
        own = shutil.ignore_patterns("manifest.json", "checkpoint-*")
        shutil.copytree(trained, out, ignore=own, dirs_exist_ok=True)
    facts: dict[str, Any] = read_json(trained / "manifest.json")["counts"]
    return {"round": number, "sampled": drawn["samples"]} | facts | base_facts(context)


def _policy(context: Context, number: int) -> SampledModel:
    """The model that the round samples: the SFT model, later what the round before it trained."""
    base = sft_model(context)[0].resolve()
    name = "sft" if number == 1 else context.config.trained[number - 2].name
    return sampled_model(context, name, base)


def _draw(context: Context, where: Path | str, number: int, policy: SampledModel) -> dict[str, Any]:
    """The artifact `drawn` of the round: samples, and the same as data. Returns its counts."""
    from jpo_ray.cluster.sampling import choose_engine

    rounds = _rounds(context)
    texts = _instructions(context, number)
    config = (context.config.sample or SampleConfig()).model_copy(
        update={"temperatures": [rounds.temperature], "samples_per_instruction": rounds.samples_per_instruction}
    )
    engine = choose_engine(config.engine)
    before = context.config.trained[number - 2].name if number > 1 else None
    inputs = {
        "items": context.standing("items", "items").fingerprint,
        "sft": sft_model(context)[1],
        "policy": context.standing(f"train/{before}", "train").fingerprint if before else "",
    }
    slice_ = {
        "rounds": rounds.model_dump(exclude={"count", "reference"}),
        "sample": config.model_dump(include={"max_new_tokens", "stop"}) | {"engine": engine},
        "model": context.config.model.model_dump(exclude={"model_name_or_path", "load_in_4bit"}),
        "seed": context.config.seed + number,
        "round": number,
    }

    def make(out: Path) -> dict[str, Any]:
        rows = draw(context, config, engine, texts, [policy], context.config.seed + number, out)
        records.write_table(out / "samples.parquet", rows, records.SAMPLES)
        with (out / ITEMS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in _data_rows(rows, texts))
        return {
            "samples": len(rows),
            "instructions": len(texts),
            "empty responses": sum(not row["response"].strip() for row in rows),
            "cut at max_new_tokens": sum(row["finish_reason"] == "length" for row in rows),
        }

    spec = Spec(DRAWN, DRAWN, inputs, slice_, make, keep_partial=True)
    with open_run(where, wait_s=context.config.cluster.lease_wait_s) as run:
        manifest, built = build(replace(context, run=run), spec)
    show(context, manifest, built)
    return manifest.counts


def _instructions(context: Context, number: int) -> dict[str, str]:
    """Training instructions of a round, id -> text: all, or the next so many in an order drawn once."""
    rows = records.read_table(context.path("items") / "items.parquet", records.ITEMS).to_pylist()
    texts = {row["instruction_id"]: row["instruction"] for row in rows if row["split"] == "train"}
    if not texts:
        raise InputError("rounds: no training instructions to sample; check items.train")
    count, ids = _rounds(context).instructions, list(texts)
    if count is None or count >= len(ids):
        return texts
    random.Random(f"rounds-{context.config.seed}").shuffle(ids)
    first = (number - 1) * count
    return {ids[place % len(ids)]: texts[ids[place % len(ids)]] for place in range(first, first + count)}


def _data_rows(rows: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of the UltraFeedback format, without ratings: each instruction with its responses, empty ones left out."""
    completions: dict[str, list[dict[str, str]]] = {identity: [] for identity in texts}
    for row in rows:
        if row["response"].strip():
            completions[row["instruction_id"]].append({"response": row["response"]})
    return [{"instruction": texts[identity], "completions": given} for identity, given in completions.items() if given]


def _round_config(context: Context, number: int, entry: TrainConfig, policy: SampledModel, drawn: Path) -> RunConfig:
    """The run that a round is: its items are the samples in `drawn`, its SFT model is the reference."""
    config, moved = context.config, _rounds(context).reference == "moved"
    reference = policy.path if moved else sft_model(context)[0].resolve()
    goes_on = None if moved or number == 1 else str(policy.path)
    samples = Source(path=str(drawn / ITEMS), format="ultrafeedback")
    items = config.items.model_copy(update={"train": [samples], "test": [], "sft": []})
    return config.model_copy(
        update={
            "seed": config.seed + number,
            "items": items,
            "model": config.model.model_copy(update={"model_name_or_path": str(reference)}),
            "sft": None,
            "train": [entry.model_copy(update={"continue_from": goes_on})],
            "rounds": None,
            "sample": None,
            "evaluate": None,
            "cluster": config.cluster.model_copy(update={"trainings_at_once": 1}),
        }
    )
