"""The stages that make models: sft, reference, train."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jpo_ray import records, shards
from jpo_ray.config_training import TrainConfig
from jpo_ray.data.tokens import tokenize, tokenizer_hash
from jpo_ray.errors import InputError
from jpo_ray.files import read_json
from jpo_ray.pairs.members import short_items
from jpo_ray.pipeline.base_model import base_facts, base_model, base_specs
from jpo_ray.pipeline.console import Bar, progress_bar
from jpo_ray.pipeline.context import Context, Spec

TRAINED = ("comparisons", "validation_comparisons", "items_per_comparison", "truncated")  # facts of a training


def sft_model(context: Context) -> tuple[Path, str]:
    """Folder and fingerprint of the SFT model: the base model itself where `sft` is off."""
    if context.config.sft is None:
        if base_specs(context):
            context.standing("base", "sft")
        return base_model(context)
    return context.path("sft"), context.standing("sft", "sft").fingerprint


def sft_specs(context: Context) -> list[Spec]:
    before = base_specs(context)
    config = context.config.sft
    if config is None:
        return before
    seeded = config.model_copy(update={"seed": context.seed(config.seed)})
    items = context.standing("items", "items").fingerprint
    base = before[0].fingerprint if before else base_model(context)[1]

    def make(out: Path) -> dict[str, Any]:
        from jpo_ray.cluster.training import Work, run_training
        from jpo_ray.engine.jobs import train_sft

        folder = context.path("base") if before else base_model(context)[0]
        about = {"model": context.config.model.model_dump(), "sft": seeded.model_dump()}
        tracking = context.tracking("sft", out.name, about)
        data = context.path("items").resolve()
        work = Work(train_sft, (folder.resolve(), data, context.config.model, seeded, tracking))
        with progress_bar(context.console, "fine-tuning on D_S") as bar:
            alone = context.cluster("sft").model_copy(update={"trainings_at_once": 1})
            state = run_training(context.ray(), alone, "sft", work, out.resolve(), _shower(bar))
        return _facts(state, ("items", "truncated")) | base_facts(context)

    slice_ = {"sft": seeded.model_dump(), "model": _model_slice(context, "load_in_4bit")}
    return [*before, Spec("sft", "sft", {"items": items, "base": base}, slice_, make, keep_partial=True)]


def reference_specs(context: Context) -> list[Spec]:
    """Nothing where no objective compares with the reference and nobody else asks for it; rounds have their own."""
    from jpo_ray.engine.reading import readers

    if context.config.rounds is not None:
        return []
    evaluate = context.config.evaluate
    entries = [_seeded(context, entry) for entry in context.config.train if "reference" in entry.reads]
    if not entries and not (evaluate and evaluate.policies):
        return []
    inputs = {name: context.standing(name, name).fingerprint for name in ("items", "judge")}
    inputs["sft"] = sft_model(context)[1]
    matching = [entry for entry in entries if "mismatched" in entry.reads]
    slice_ = {
        "model": _model_slice(context),
        "read": list(readers(entries)),
        "mismatched": list(readers(matching)),
        **(_partners_slice(context) if matching else {}),
    }
    return [Spec("reference", "reference", inputs, slice_, lambda out: _reference(context, out, entries, matching))]


def _seeded(context: Context, entry: TrainConfig) -> TrainConfig:
    return entry.model_copy(update={"seed": context.seed(entry.seed)})


def _partners_slice(context: Context) -> dict[str, Any]:
    """What decides, besides the items, whose responses mismatched items have."""
    limit = context.config.pairs.max_item_characters
    layout = _model_slice(context) if limit else {}
    return {"seed": context.config.seed, "max_item_characters": limit, "layout": layout}


def _reference(
    context: Context, out: Path, entries: Sequence[TrainConfig], matching: Sequence[TrainConfig]
) -> dict[str, Any]:
    """Score what the entries read; of `matching` ones the mismatched items too."""
    from jpo_ray.cache import cache_folder
    from jpo_ray.cluster.reference import reference_scores
    from jpo_ray.engine.jobs import layout_of
    from jpo_ray.engine.model import load_tokenizer, weights_hash
    from jpo_ray.engine.reading import items_read
    from jpo_ray.engine.reference import reference_key

    model, cache = context.config.model, cache_folder()
    folder = sft_model(context)[0]
    table = records.read_table(context.path("items") / "items.parquet", records.ITEMS)
    table = short_items(table, context.config.pairs.max_item_characters, model)  # longer ones are compared with nothing
    files = shards.files_of(context.path("judge") / "preferences.parquet")
    ids = table["item_id"].combine_chunks()
    read = items_read(files, ids, entries)
    matched = items_read(files, ids, matching) if matching else np.zeros_like(read)
    rows, sources = reference_rows(table, context.config.seed, read, matched)
    if not rows and entries:
        raise InputError("reference: no decisive preferences to train on; check pairs, judge and train.protocols")
    if not rows:  # asked for by `evaluate.policies` alone, with nothing held out
        records.write_table(out / "reference.parquet", [], records.REFERENCE)
        return {"items": 0}
    tokenizer = load_tokenizer(folder)
    layout = layout_of(model)
    tokens = tokenize(tokenizer, layout, [row["instruction"] for row in rows], [row["response"] for row in rows])
    key = reference_key(
        weights=weights_hash(folder, cache),
        tokenizer=tokenizer_hash(tokenizer),
        layout=layout,
        dtype=model.dtype,
        load_in_4bit=model.load_in_4bit,
    )
    with progress_bar(context.console, "scoring items under the reference") as bar:
        scores, scored = reference_scores(
            context.ray(),
            context.cluster("reference"),
            tokens,
            model=folder.resolve(),
            dtype=model.dtype,
            load_in_4bit=model.load_in_4bit,
            cache=cache,
            key=key,
            begin=bar.begin,
            advance=bar.advance,
        )
    if not scored:
        context.console.print("  every item was in the reference cache: no forward pass", highlight=False)
    scored_rows = [
        {
            "item_id": row["item_id"],
            "response_of": source,
            "instruction_logprob": float(score[0]),
            "response_logprob": float(score[1]),
            "instruction_tokens": int(instruction),
            "response_tokens": int(response),
        }
        for row, source, score, instruction, response in zip(
            rows, sources, scores, tokens.instruction_tokens, tokens.response_tokens, strict=True
        )
    ]
    records.write_table(out / "reference.parquet", scored_rows, records.REFERENCE)
    return {
        "items": int(read.sum()),
        "mismatched items": int(matched.sum()),
        "scored now": scored,
        "truncated": tokens.truncated,
        "tokens": int(tokens.lengths.sum()),
    }


def reference_rows(
    items: pa.Table, seed: int, read: npt.NDArray[np.bool_], matched: npt.NDArray[np.bool_]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows that the reference scores: the items that are `read`, then each of the `matched` ones' instruction with the
    response of an item of another one (for KTO); and the ids of the items whose responses they have.
    """
    from jpo_ray.engine.dataset import mismatched_rows

    every = items.to_pylist()
    rows, twins = ([row for row, wanted in zip(every, some, strict=True) if wanted] for some in (read, matched))
    partners = _partners(every, seed) if twins else {}
    sources = [row["item_id"] for row in rows] + [partners[row["item_id"]] for row in twins]
    return rows + mismatched_rows(twins, partners, {row["item_id"]: row for row in every}), sources


def _partners(items: Sequence[dict[str, Any]], seed: int) -> dict[str, str]:
    """Of each item the one whose response stands with its instruction."""
    from jpo_ray.engine.dataset import mismatched_partners

    partners: dict[str, str] = {}
    for split in ("train", "validation"):  # no response of one enters the other, not even in the reference point
        here = [row for row in items if row["split"] == split]
        order = mismatched_partners([row["instruction_id"] for row in here], seed)
        partners |= {row["item_id"]: here[other]["item_id"] for row, other in zip(here, order, strict=True)}
    return partners


def train_specs(context: Context) -> list[Spec]:
    if context.config.rounds is not None:
        from jpo_ray.pipeline.rounds import round_specs

        return round_specs(context)
    return [_train_spec(context, entry) for entry in context.config.train]


def _train_spec(context: Context, entry: TrainConfig) -> Spec:
    seeded = _seeded(context, entry)
    inputs = {name: context.standing(name, name).fingerprint for name in ("items", "judge")}
    inputs["sft"] = sft_model(context)[1]
    compares = "reference" in entry.reads
    if compares:  # which is a function of items and SFT model, so it is no input
        context.standing("reference", "reference")
    embeds = "embedding" in entry.reads
    if embeds:
        inputs["embeddings"] = context.standing("embeddings", "pairs").fingerprint
    like = context.config.train_entry(entry.steps_like) if entry.steps_like else None
    if entry.continue_from is not None:
        inputs["continue_from"] = _to_go_on_from(context, entry)

    def make(out: Path) -> dict[str, Any]:
        from jpo_ray.cache import cache_folder
        from jpo_ray.cluster.training import Work, run_here, run_training
        from jpo_ray.engine.jobs import PreferenceInputs, train_preferences
        from jpo_ray.engine.model import weights_hash

        def folder(name: str) -> Path:
            return context.path(name).resolve()

        base = sft_model(context)[0].resolve()
        where = PreferenceInputs(
            base,
            folder("items"),
            folder("judge"),
            folder("reference") if compares else None,
            folder("embeddings") if embeds else None,
            weights_hash(base, cache_folder()),
        )
        steps = _steps_of(context, like) if like else None
        about = {"model": context.config.model.model_dump(), "train": seeded.model_dump()}
        tracking = context.tracking(entry.name, out.name, about)
        before = (Path(entry.continue_from),) if entry.continue_from else ()
        work = Work(train_preferences, (where, context.config.model, seeded, steps, tracking), before)
        ray, cluster = context.ray(), context.cluster("train")
        if context.in_trial and cluster.num_workers == 1:
            state = run_here(ray, cluster, work, out.resolve())
        else:
            with progress_bar(context.console, f"training {entry.name}") as bar:
                state = run_training(ray, cluster, f"train-{entry.name}", work, out.resolve(), _shower(bar))
        return _facts(state, TRAINED) | base_facts(context)

    slice_ = {
        "train": seeded.model_dump(exclude={"continue_from"}),
        "steps_like": like.model_dump() if like else None,
        "model": _model_slice(context),
    }
    if "mismatched" in entry.reads:
        slice_["mismatched"] = _partners_slice(context)
    return Spec(f"train/{entry.name}", "train", inputs, slice_, make, keep_partial=True)


def _to_go_on_from(context: Context, entry: TrainConfig) -> str:
    """Hash of what `continue_from` names. Raises `InputError` unless it is what the entry trains, of the SFT model."""
    from jpo_ray.cache import cache_folder
    from jpo_ray.engine.adapters import CONFIG, check_base
    from jpo_ray.engine.model import model_hash, resolve_model

    assert entry.continue_from is not None
    key, folder = f"train.{entry.name}.continue_from", Path(entry.continue_from)
    if entry.use_peft:
        check_base(folder, sft_model(context)[0], key, cache_folder())
        if (rank := read_json(folder / CONFIG).get("r")) != entry.lora_r:
            raise InputError(f"{key}: {folder} has rank {rank}; set lora_r: {rank}")
    else:
        resolve_model(str(folder), key)
    return model_hash(folder, cache_folder())


def _steps_of(context: Context, entry: TrainConfig) -> int:
    """Steps of another entry, from its epochs and the number of its comparisons in each shard."""
    from jpo_ray.engine.schedules import count_steps

    kinds = map(shards.kinds_of, shards.files_of(context.path("judge") / "preferences.parquet"))
    sizes = [sum(of_shard["train", protocol] for protocol in entry.protocols) for of_shard in kinds]
    if not any(sizes):
        raise InputError(f"train.{entry.name}: no decisive {' or '.join(entry.protocols)} preferences to train on")
    return count_steps([size for size in sizes if size], entry)


def _model_slice(context: Context, *without: str) -> dict[str, Any]:
    """The model section, less its path: the inputs hold the weights' own hash."""
    return context.config.model.model_dump(exclude={"model_name_or_path", *without})


def _shower(bar: Bar) -> Any:
    def show(done: int, total: int, metrics: dict[str, float]) -> None:
        notes = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
        if "workers" in metrics:  # fewer than asked for
            notes.insert(0, f"on {metrics['workers']:.0f} worker(s), the others' node is lost,")
        if "rewards/accuracies" in metrics:
            notes.append(f"accuracy {metrics['rewards/accuracies']:.2f}")
        if "joint/items_per_second" in metrics:
            notes.append(f"{metrics['joint/items_per_second']:.0f} items/s")
        if "joint/comparisons_per_second" in metrics:
            notes.append(f"{metrics['joint/comparisons_per_second']:.0f} comparisons/s")
        if "tokens_per_second" in metrics:
            notes.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in metrics:
            notes.append(f"MFU {metrics['mfu']:.0%}")
        bar.to(done, total, " ".join(notes))

    return show


def _facts(state: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    last: dict[str, Any] = next((entry for entry in reversed(state["log_history"]) if "eval_loss" in entry), {})
    found = {name: state[name] for name in names} | {"steps": state["global_step"]}
    for ours, theirs in (("held-out loss", "eval_loss"), ("held-out accuracy", "eval_rewards/accuracies")):
        if theirs in last:
            found[ours] = last[theirs]
    if state["warmup_steps"] >= state["global_step"]:
        found["warning"] = (
            f"the warm-up of {state['warmup_steps']} steps is as long as the training or longer, so learning_rate is "
            "never reached; lower warmup_steps"
        )
    return found
