"""The commands of `jpo` that are no stages of a run. Each takes its parsed flags, and may raise `InputError`."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from jpo_ray.errors import InputError
from jpo_ray.runs import run_root
from jpo_ray.store import is_uri

JOBS_COPY = "working_dir_files"  # a folder of Ray's, below which jobs run


def require_lasting(run_dir: Path | str) -> None:
    """Raise `InputError` for a run directory that a job would make in its copy of the working directory."""
    if not (is_uri(run_dir) or Path(run_dir).is_absolute()) and JOBS_COPY in Path.cwd().parts:
        raise InputError(
            f"--run-dir {run_dir}: would end with the job, in Ray's copy of the working directory; name the whole path "
            "of a folder that all nodes see, or a URI"
        )


def _analyze(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jpo_ray.pipeline.analyze import analyze

    source = arguments.run_dir or arguments.pairs
    if arguments.out is None and (arguments.run_dir is None or is_uri(source)):
        raise InputError("analyze: --pairs and a run on an object store need --out, a folder for the page")
    out = arguments.out or arguments.run_dir / "analysis"
    analyze(source, arguments.judgments, out, arguments.people, arguments.list, Console())


def _annotate(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jpo_ray.annotation.serve import annotate, export_folder
    from jpo_ray.pipeline.annotate import comparisons_to_annotate

    if arguments.export:
        export_folder(arguments.out, Console())
        return
    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"--limit {arguments.limit}: at least one comparison is needed")
    annotate(
        comparisons_to_annotate(arguments.pairs, arguments.run_dir, arguments.limit),
        arguments.out,
        arguments.annotators,
        per_comparison=arguments.per_comparison,
        host=arguments.host,
        port=arguments.port,
        guidelines=arguments.guidelines,
        release_after_hours=arguments.release_after,
        console=Console(),
    )


def _export(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jpo_ray.pipeline.export import export_model, push_to_hub, require_token

    if arguments.push_to_hub:
        require_token(arguments.push_to_hub)
    console, out = Console(), arguments.out
    export_model(
        arguments.run_dir, arguments.model, out, console, adapter=arguments.adapter, base=arguments.base
    )  # fmt: skip
    if arguments.push_to_hub:
        push_to_hub(out, arguments.push_to_hub, console, public=arguments.public)


def _serve(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jpo_ray.config_serve import load_serve_config
    from jpo_ray.serving.run import serve_run

    serve_run(load_serve_config(arguments.config, arguments.overrides, arguments.run_dir), Console())


def _scale(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jpo_ray.config_experiment import load_experiment
    from jpo_ray.pipeline.scale import scale

    if is_uri(arguments.run_dir):
        raise InputError(f"--run-dir {arguments.run_dir}: `jpo scale` needs a folder; object stores take single runs")
    require_lasting(arguments.run_dir)
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    scale(experiment, arguments.run_dir, arguments.experiment.stem, Console())


def _alpaca_eval(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jpo_ray.pipeline.alpaca import export_outputs, import_annotations

    if (arguments.action == "import") != bool(arguments.annotations):
        needs = "needs the files of annotations" if arguments.action == "import" else "takes no files"
        raise InputError(f"alpaca-eval {arguments.action}: {needs}")
    if arguments.action == "export":
        export_outputs(arguments.run_dir, arguments.out, Console())
    else:
        import_annotations(arguments.run_dir, arguments.annotations, arguments.out, Console())


def _plan(arguments: argparse.Namespace) -> None:
    from jpo_ray.config_experiment import load_runs
    from jpo_ray.pipeline.plan import make_plan
    from jpo_ray.planning.show import plan_lines

    run_dir = run_root(arguments.run_dir) if arguments.run_dir else None
    runs = load_runs(arguments.config, arguments.overrides)
    plans = {name: make_plan(config, run_dir) for name, config in runs.items()}
    one = next(iter(plans.values())) if len(plans) == 1 else None
    if arguments.json:
        import json

        text = json.dumps(one.as_dict() if one else {name: plan.as_dict() for name, plan in plans.items()}, indent=2)
    elif one:
        text = "\n".join(plan_lines(one, str(arguments.config)))
    else:
        parts = ("\n".join(plan_lines(plan, f"{arguments.config}, run {name}")) for name, plan in plans.items())
        text = "\n\n\n".join([*parts, f"{len(plans)} runs: what they have in common is made once, and counted in each"])
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads has read enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _submit(arguments: argparse.Namespace) -> int:
    from jpo_ray.cluster.submission import submit

    def say(text: str) -> None:
        print(text, end="", flush=True)

    return submit(
        arguments.address,
        arguments.entrypoint,
        arguments.runtime_env,
        arguments.working_dir,
        say,
        wait=not arguments.no_wait,
    )


OWN_COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "plan": _plan,
    "analyze": _analyze,
    "annotate": _annotate,
    "export": _export,
    "serve": _serve,
    "scale": _scale,
    "submit": _submit,
    "alpaca-eval": _alpaca_eval,
}
