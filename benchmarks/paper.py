"""The paper's evaluation in miniature, on the sandbox: every experiment, then docs/results.md with their tables.

    python benchmarks/paper.py --run-dir runs/paper [--out docs] [--finished] [section.key=value ...]

`make paper` runs it. Experiments share what they can: data, judgments, SFT model and reference are made once. It goes
on where it was stopped; the time it then states is that of all attempts together.
`--finished` runs nothing: it writes the page and its figures from the experiments that are finished below the folder,
whether this script or `jpo scale --run-dir FOLDER/NAME` carried them out.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from miniature.claims import RESAMPLES, Found
from miniature.document import write_document
from miniature.figures import section_figure
from rich.console import Console

from jpo_ray.config_experiment import load_experiment
from jpo_ray.evaluation.experiment_results import groups_of
from jpo_ray.files import output_folder, read_json, write_json
from jpo_ray.pipeline.scale import measured_in, scale

# In this order: the first makes what the others share.
CLAIMS = ("objectives", "data_scaling", "protocols")  # what the paper has numbers of
EXPERIMENTS = (*CLAIMS, "sweep", "selection", "strategies", "bands")
TIMES = "seconds.json"
CONFIGS = Path(__file__).parent.parent / "configs" / "experiments"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/paper"))
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of results.md")
    parser.add_argument("--finished", action="store_true", help="run nothing, write what is finished")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    console = Console()
    if arguments.finished:
        write_finished(arguments.run_dir, arguments.out, arguments.overrides)
        return
    found: dict[str, Found] = {}
    made: list[Path] = []
    for name in EXPERIMENTS:
        console.rule(name)
        experiment = load_experiment(CONFIGS / f"{name}.yaml", arguments.overrides)
        folder = arguments.run_dir / name
        with output_folder(folder), _timed(folder):
            measured = scale(experiment, folder, name, console, others=made)
        found[name] = Found(measured, groups_of(measured, RESAMPLES, 0), _seconds(folder))
        made += [folder / run.name for run in experiment.runs]
        if found.keys() >= {*CLAIMS}:  # from here on after each, so that a run that is stopped leaves a page
            write_document(found, arguments.run_dir / "objectives" / "run", arguments.out)
    minutes = sum(each.seconds or 0 for each in found.values()) / 60
    console.print(f"{arguments.out / 'results.md'}: {minutes:.0f} minutes of work", highlight=False)


def write_finished(run_dir: Path, out: Path, overrides: list[str]) -> None:
    """Figures of the experiments that have results below `run_dir`; the page, where those that the paper has numbers of
    are among them.
    """
    found = {}
    for name in EXPERIMENTS:
        folder = run_dir / name
        if not (folder / "results.json").exists():
            continue
        experiment = load_experiment(CONFIGS / f"{name}.yaml", overrides)
        measured = measured_in(experiment, folder)
        found[name] = Found(measured, groups_of(measured, RESAMPLES, 0), _seconds(folder))
    if missing := [name for name in CLAIMS if name not in found]:
        with output_folder(out):
            made = [section_figure(name, of.groups, out) for name, of in found.items()]
        print("\n".join(path for path in made if path))
        print(f"no results.md: {run_dir} lacks the results of {', '.join(missing)}")
        return
    write_document(found, run_dir / "objectives" / "run", out)


def _seconds(folder: Path) -> float | None:
    """What all attempts at an experiment took together; None where it was not this script that carried it out."""
    path = folder / TIMES
    return float(read_json(path)["seconds"]) if path.exists() else None


@contextmanager
def _timed(folder: Path) -> Iterator[None]:
    """Add up how long the attempts at an experiment take: one that makes nothing, as a finished one is only shown, does
    not count, and one that was killed counts up to the last file that it wrote.
    """
    path, made = folder / TIMES, _artifacts(folder)
    before = {"seconds": 0.0} | (read_json(path) if path.exists() else {})
    if "begun" in before:
        last = max((file.stat().st_mtime for file in folder.rglob("*") if file != path), default=0.0)
        before["seconds"] += max(0.0, last - before["begun"])
    write_json(path, {"seconds": before["seconds"], "begun": time.time()})
    started = time.monotonic()
    try:
        yield
    finally:
        taken = time.monotonic() - started if _artifacts(folder) != made else 0.0
        write_json(path, {"seconds": before["seconds"] + taken})


def _artifacts(folder: Path) -> dict[Path, int]:
    """When each artifact was made."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/**/manifest.json")}


if __name__ == "__main__":
    main()
