"""The pipeline: which stages there are, in which order, and running them on a run directory."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.console import Console

from jpo_ray.cache import cache_folder
from jpo_ray.config import TINY, RunConfig
from jpo_ray.engine.tracking import check_trackers
from jpo_ray.errors import InputError
from jpo_ray.files import read_json
from jpo_ray.pipeline import (
    evaluate_stage,
    item_stage,
    judge_stage,
    model_stages,
    pair_stage,
    report_stage,
    sample_stage,
)
from jpo_ray.pipeline.annotating import check_annotator
from jpo_ray.pipeline.base_model import MODEL_KEY, adapter_to_start_from, base_model
from jpo_ray.pipeline.console import progress_bar
from jpo_ray.pipeline.context import Context, Spec, build, run_stage, show, stands
from jpo_ray.pipeline.demand import check_resources
from jpo_ray.pipeline.instructions import check_instructions_fit
from jpo_ray.runs import RunDir, open_run

STAGES: dict[str, Callable[[Context], list[Spec]]] = {
    "items": item_stage.items_specs,
    "pairs": pair_stage.pairs_specs,
    "judge": judge_stage.judge_specs,
    "sft": model_stages.sft_specs,
    "reference": model_stages.reference_specs,
    "train": model_stages.train_specs,
    "sample": sample_stage.sample_specs,
    "evaluate": evaluate_stage.evaluate_specs,
    "report": report_stage.report_specs,
}


def run_stages(
    config: RunConfig,
    run_dir: Path | str,
    stages: Sequence[str],
    console: Console | None = None,
    others: Sequence[Path] = (),
    *,
    summary: bool = True,
) -> None:
    """Run `stages` in order on `run_dir` (a folder, or a URI as text).

    Finished ones whose inputs and config are unchanged are skipped.

    What one of the run directories `others` has made from the same is taken over.
    """
    console = console or Console()
    with open_run(run_dir, others, config.cluster.lease_wait_s) as run, ExitStack() as stack:
        context = Context(run, config, console, STAGES, stack, connected=partial(check_resources, stages=stages))
        _check_early(context, stages)
        for stage in stages:
            if stage == "train" and config.cluster.trainings_at_once > 1 and config.rounds is None:
                train_side_by_side(context)
            else:
                run_stage(context, stage)
            if stage == "items" and "sft" in stages:
                check_instructions_fit(context)
        if "report" in stages and summary:
            _summarise(context)


def train_side_by_side(context: Context) -> None:
    """The train stage with several entries at a time."""
    from jpo_ray.cluster.trials import run_trials

    specs = context.specs_of("train")
    lacking = [spec for spec in specs if not stands(context, spec)]
    # An entry that takes as many steps as another needs nothing of it but its config, so order does not matter.
    names = [spec.artifact.removeprefix("train/") for spec in lacking]
    if names:
        train = partial(train_entry, context.run.absolute(), context.config)
        with progress_bar(context.console, f"training {len(names)} models") as bar:
            bar.begin(len(names))
            notes = context.run.root / ".building" / "trials"
            run_trials(
                context.ray(), context.cluster("train"), train, names, notes,
                lambda: bar.to(sum(stands(context, spec) for spec in lacking)),
            )  # fmt: skip
    for spec in specs:
        show(context, context.standing(spec.artifact, "train"), spec in lacking)


def train_entry(run_dir: Path | str, config: RunConfig, name: str) -> None:
    """Train one entry, in a process beside the one that holds the run directory."""
    with ExitStack() as stack:
        context = Context(RunDir(run_dir), config, Console(quiet=True), STAGES, stack, in_trial=True)
        build(context, next(spec for spec in context.specs_of("train") if spec.artifact == f"train/{name}"))


def dry_run_judge(config: RunConfig, run_dir: Path | str, console: Console | None = None) -> None:
    """Say what the judge stage would take. Raises `InputError` where its pairs do not stand."""
    console = console or Console()
    with ExitStack() as stack:
        for line in judge_stage.judging_estimates(Context(RunDir(run_dir), config, console, STAGES, stack)):
            console.print(line, highlight=False, soft_wrap=True)


def _check_early(context: Context, stages: Sequence[str]) -> None:
    """Raise for a model, engine or key that is not there, which would else be found after hours of other stages."""
    from jpo_ray.cluster.sampling import choose_engine
    from jpo_ray.engine.adapters import base_of
    from jpo_ray.engine.merging import tokenizer_of
    from jpo_ray.engine.model import load_tokenizer

    if "sft" in stages and context.config.model.model_name_or_path != TINY:
        if adapter := adapter_to_start_from(context):
            base = base_of(adapter, MODEL_KEY, cache_folder())
            tokenizer_of(adapter, base)
            context.console.print(
                f"  {adapter} is an adapter: what starts from it, and the reference, is it merged into {base}",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
        else:
            load_tokenizer(base_model(context)[0])
    if {"sft", "train", "evaluate"} & {*stages}:
        on_workers = context.config.cluster.address or os.environ.get("RAY_ADDRESS")
        evaluates = "evaluate" in stages and context.config.evaluate is not None  # win rates are sent from here
        check_trackers(context.config.report_to, here=evaluates or not on_workers)
    sample, evaluate, items = context.config.sample, context.config.evaluate, context.config.items
    if "sample" in stages and sample is not None:
        choose_engine(sample.engine)
        if "items" in stages and not (items.test if sample.split == "test" else items.validation):
            raise InputError(f"sample: no instructions to sample; give items.{sample.split}, or set sample: null")
    if "items" in stages and "evaluate" in stages and evaluate is not None:
        check_annotator(evaluate_stage.evaluation_judge(context.config, evaluate), context.config.cluster)
    if "items" in stages and "judge" in stages:
        for config in (context.config.judge, *context.config.judge.also):
            check_annotator(config, context.config.cluster)


def _summarise(context: Context) -> None:
    from jpo_ray.evaluation.win_rates import win_rate_table

    path = context.path("evaluate") / "win_rates.json"
    if context.config.evaluate is not None and path.exists():
        context.console.print(win_rate_table(read_json(path)))
    else:
        context.console.print("No win rates: `evaluate` is off in the config or has not run.", highlight=False)
    context.console.print(f"Report: {context.path('report') / 'index.html'}", highlight=False, soft_wrap=True)
