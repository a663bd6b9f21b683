"""`jpo scale`: the runs of an experiment, one after the other, and what they found together."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jpo_ray import records
from jpo_ray.artifacts import package_versions
from jpo_ray.config_experiment import Experiment, Run, is_repetition, shown_settings
from jpo_ray.errors import InputError
from jpo_ray.evaluation.experiment_results import COLUMNS, Group, Measured, groups_of, write_results
from jpo_ray.evaluation.win_rates import interval_text
from jpo_ray.files import output_folder
from jpo_ray.pipeline import STAGES, run_stages
from jpo_ray.runs import RunDir


def scale(
    experiment: Experiment, folder: Path, name: str, console: Console, others: Sequence[Path] = ()
) -> list[Measured]:
    """Carry out every run in a folder of its own below `folder`, then write tables, curve and page into it.

    A run takes over what another (or one of the run directories `others`) made from the same input, and goes on where
    it was stopped; finished ones take seconds. Returns what was measured of every model. Raises `InputError` for a
    config without evaluation.
    """
    for run in experiment.runs:
        if run.config.evaluate is None:
            raise InputError("an experiment compares win rates, and `evaluate` is off in its config")
    with output_folder(folder):
        pass
    folders = [folder / run.name for run in experiment.runs]
    for number, (run, path) in enumerate(zip(experiment.runs, folders, strict=True), start=1):
        console.print(f"[bold]run {number} of {len(folders)}: {run.name}[/bold]", highlight=False)
        run_stages(run.config, path, list(STAGES), console, others=[*folders[: number - 1], *others])
    measured = measured_in(experiment, folder)
    first = experiment.runs[0].config
    assert first.evaluate is not None
    groups = groups_of(measured, first.evaluate.bootstrap_samples, first.seed)
    numbers = [key for key in experiment.config.grid if not is_repetition(key)]
    varies = experiment.names[numbers[0]] if numbers else None
    about = {"runs": len(folders), "trained models": sum(len(run.trained) for run in experiment.runs)}
    write_results(name, groups, varies, experiment.config.within, folder, about | package_versions())
    console.print(groups_table(groups))
    console.print(f"Experiment: {folder / 'index.html'}", highlight=False, soft_wrap=True)
    return measured


def measured_in(experiment: Experiment, folder: Path) -> list[Measured]:
    """What was measured of every model of the experiment's runs below `folder`, which must be finished."""
    return [each for run in experiment.runs for each in _measured(run, experiment.names, folder / run.name)]


def _measured(run: Run, names: Mapping[str, str], path: Path) -> Iterator[Measured]:
    """The SFT model (once, whatever the trainings' seeds) and every training of a run."""
    folder = RunDir(path)
    judgments = records.read_table(folder.path("evaluate") / "judgments.parquet", records.SAMPLE_JUDGMENTS)
    repetition = ", ".join(str(value) for key, value in run.settings.items() if is_repetition(key))
    of_model = judgments.select(COLUMNS).to_pylist()
    for model in dict.fromkeys(row["model"] for row in of_model):
        trained = next((each for each in run.trained if each.name == model), None)
        own = trained.settings if trained else {}
        seeds = [str(value) for key, value in own.items() if is_repetition(key)]
        table = pa.Table.from_pylist([row for row in of_model if row["model"] == model])
        manifest = folder.manifest(f"train/{model}") if trained else None
        yield Measured(
            entry=trained.entry if trained else model,
            settings=shown_settings(run.settings | own, names),
            comparisons=manifest.counts.get("comparisons") if manifest else None,
            repetition=", ".join(filter(None, [repetition, *seeds])),
            judgments=table,
        )


def groups_table(groups: Sequence[Group]) -> Table:
    columns = list(dict.fromkeys(key for group in groups for key in group.settings))
    table = Table(title="Win rate against gold, percent", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", min_width=6)
    for heading in (*columns, "mean", "95 % interval", "each repetition", "n", "invalid"):
        table.add_column(heading, justify="right")
    for group in groups:
        table.add_row(
            group.entry,
            *(str(group.settings.get(column, "")) for column in columns),
            "-" if group.win_rate is None else f"{group.win_rate:.1f}",
            interval_text(group.ci95),
            ", ".join("-" if rate is None else f"{rate:.1f}" for rate in group.repetitions),
            f"{group.n:,}",
            f"{group.invalid:,}",
        )
    return table
