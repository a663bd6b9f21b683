"""`jpo plan`: what a run will take and what is missing for it, without downloading, loading or starting anything."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jpo_ray import records
from jpo_ray.config import SANDBOX, TINY, RunConfig, Source
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.data.items import ItemTables, build_items
from jpo_ray.data.sources import SourceRows, is_remote, source_name
from jpo_ray.data.tokens import CHAT, Layout, prompt_ids
from jpo_ray.errors import InputError
from jpo_ray.pipeline.evaluate_stage import evaluation_judge
from jpo_ray.pipeline.item_stage import read_rows, split_sources
from jpo_ray.planning.costs import stage_costs
from jpo_ray.planning.counts import Counts, count_all
from jpo_ray.planning.judging import judge_costs, judging_stage
from jpo_ray.planning.machine import stated_speeds, this_machine
from jpo_ray.planning.missing import (
    assumed_of_hub,
    disk_gib,
    free_disk,
    host_memory_gib,
    hub_gib,
    missing_keys,
    missing_machine,
    missing_models,
    missing_of_hub,
)
from jpo_ray.planning.plan import Plan
from jpo_ray.planning.rounds import counts_of_a_round
from jpo_ray.planning.shapes import ModelShapes, base_name, model_folder, model_shapes
from jpo_ray.planning.tokenizing import PlainTokenizer, plain_tokenizer
from jpo_ray.planning.workers import JUDGING, STAGES, has_gpus

OF_THE_HUB = "data of"  # begins what is said of a data set that is to be downloaded
FILE_READERS = ("json", "parquet", "csv", "text")  # of `datasets`: names that say nothing of where the files are


def make_plan(config: RunConfig, run_dir: Path | None = None) -> Plan:
    """Count what is here, compute the rest from it or from `config.plan`, and say what neither gives."""
    rows, not_here = _read(config)
    folder = model_folder(config.model.model_name_or_path)
    tokenizer = None if config.model.model_name_or_path == TINY else plain_tokenizer(folder)
    tables, notes = _tables(config, rows, tokenizer)
    counts = count_all(config, tables, set(rows), tokenizer)
    a_round = counts_of_a_round(config, counts) if config.rounds else None
    found = model_shapes(base_name(config.model.model_name_or_path))
    shapes = found if isinstance(found, ModelShapes) else None
    machine = this_machine(run_dir)
    speeds, assumed = stated_speeds(config, machine)
    (judge, no_sizes), (evaluate, none_either) = (judging_stage(config, name, shapes) for name in JUDGING)
    stages = [*judge, *stage_costs(config, counts, shapes, speeds, a_round), *evaluate]
    unknown = list(dict.fromkeys([*no_sizes, *none_either]))
    evaluation = evaluation_judge(config, config.evaluate) if config.evaluate else None
    judges: list[AnnotatorConfig] = [config.judge, *config.judge.also, *([evaluation] if evaluation else [])]
    models = missing_models(config, judges)
    needed, downloaded, host = disk_gib(config, shapes), hub_gib(models), host_memory_gib(config, shapes)
    hub = bool(models) or any(line.startswith(OF_THE_HUB) for line in not_here)
    of_hub, public = (missing_of_hub(config), assumed_of_hub(config)) if hub else ((), ())
    missing = [
        *not_here, *(model.said for model in models), *of_hub, *missing_keys(judges),
        *missing_machine(config, machine, stages, host), *free_disk(machine, needed, downloaded, run_dir),
    ]  # fmt: skip
    return Plan(
        counts=_shown(counts, a_round),
        model=found if isinstance(found, str) else f"{config.model.model_name_or_path} ({found.origin})",
        parameters=shapes.parameters if shapes else None,
        judging=judge_costs(config, counts, evaluation, a_round),
        stages=stages,
        machine=machine,
        run_dir_gib=needed,
        hub_gib=downloaded,
        host_memory_gib=host,
        fine_tunes=config.sft is not None,
        on_cpu=not any(has_gpus(config, stage) for stage in STAGES),
        assumed=[*assumed, *_assumed(config, a_round or counts), *_judges_left_out(unknown), *public, *notes],
        missing=list(dict.fromkeys(missing)),
    )


def _shown(counts: Counts, a_round: Counts | None) -> Counts:
    """Of rounds, what each of them compares beside the data, which are not."""
    if a_round is None:
        return counts
    data = {name: replace(split, conditional=0, joint=0) for name, split in counts.splits.items()}
    splits = {**data, "validation": counts.splits["validation"], "a round": a_round.splits["train"]}
    return replace(a_round, splits=splits, tokens=counts.tokens)


def _read(config: RunConfig) -> tuple[dict[str, list[SourceRows]], list[str]]:
    """Rows of the splits whose sources are all here, by split; and what is not here."""
    found: dict[str, list[SourceRows]] = {}
    missing: list[str] = []
    for split, sources in split_sources(config.items).items():
        rows: list[SourceRows] = []
        for source in sources:
            try:
                rows.append(read_rows(source, split, config.items.on_bad_rows, config.seed, cached_only=True))
            except InputError as error:
                missing.append(_not_here(split, source, error))
        if len(rows) == len(sources):
            found[split] = rows
    return found, missing


def _not_here(split: str, source: Source, error: InputError) -> str:
    if source.path == SANDBOX or not is_remote(source):
        return str(error)
    name = source_name(source)
    if source.data_files and source.path in FILE_READERS:
        name = name.removeprefix(f"{source.path}/")
    return f"{OF_THE_HUB} items.{split}: {name}"


def _tables(
    config: RunConfig, rows: Mapping[str, Sequence[SourceRows]], tokenizer: PlainTokenizer | None
) -> tuple[ItemTables | None, list[str]]:
    """The items of what was read, and what is left out of the count."""
    if not any(rows.values()):
        return None, []
    tables, notes = build_items(rows, config.seed), []
    if limit := config.items.max_instruction_tokens:
        if tokenizer is None or config.model.template == CHAT:
            notes.append("not counted: instructions that items.max_instruction_tokens leaves out")
        else:
            layout = Layout(config.model.template, config.model.response_prefix, config.model.max_length)
            texts = {records.instruction_id(text): text for text in tables.items["instruction"].to_pylist()}
            lengths = map(len, prompt_ids(tokenizer, layout, list(texts.values())))
            long = {identity for identity, length in zip(texts, lengths, strict=True) if length > limit}
            tables = build_items(rows, config.seed, {"too_long": long})
    if config.items.drop_near_duplicates:
        notes.append("not counted: near-duplicates that items.drop_near_duplicates leaves out")
    return tables, notes


def _assumed(config: RunConfig, counts: Counts) -> list[str]:
    """What the numbers rest on, and which key says otherwise."""
    found = [f"tokens: {counts.tokens.origin}", f"training comparisons: {counts.preferences_origin}"]
    unknown = [name for name, split in counts.splits.items() if split.instructions is None]
    if unknown:
        keys = ", ".join(f"plan.{name}_instructions" for name in unknown)
        found.append(f"not known: how many instructions {', '.join(unknown)} have; say so with {keys}")
    if lacking := _labels_not_stated(config, counts):
        found.append(f"not known: how many comparisons the labels decide; say so with {' and '.join(lacking)}")
    if counts.tokens.instruction is None:
        found.append("not known: tokens; say so with plan.instruction_tokens and plan.response_tokens")
    if inexact := [entry.name for entry in config.train if not entry.counts_steps]:
        found.append(
            f"steps of {', '.join(inexact)} are not exact: batches are taken to be full, which max_batch_tokens, whole "
            "lists (lipo, pro) and the phases of a curriculum leave out of account"
        )
    if config.sample or config.rounds:
        found.append("samples: as long as the data's responses, at most sample.max_new_tokens; prompts come on top")
    found.append("the time that judging takes is not estimated")
    return found


def _judges_left_out(unknown: Sequence[str]) -> list[str]:
    """`unknown` are judges' models whose size nobody knows here."""
    if not unknown:
        return []
    return [f"judges' memory and disk: {', '.join(unknown)} left out, of a size that is not known here"]


def _labels_not_stated(config: RunConfig, counts: Counts) -> list[str]:
    """Keys of `plan` that would say how many of the data's own comparisons there are."""
    by_labels, joint = config.judge.annotator == "labels", config.pairs.joint
    asked = {
        "conditional": by_labels and config.pairs.conditional,
        "joint": joint is not None and (joint.strategy == "labelled" or (by_labels and joint.strategy != "proxy")),
    }
    return [
        f"plan.{protocol}_labels"
        for protocol, wanted in asked.items()
        if wanted and counts.preferences[protocol] is None and getattr(config.plan, f"{protocol}_labels") is None
    ]
