"""`jpo alpaca-eval`: a run's samples for AlpacaEval to judge, and win rates from what it said of them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from jpo_ray import records
from jpo_ray.evaluation.alpaca_eval import generator_name, read_annotations, write_outputs
from jpo_ray.evaluation.length_control import controlled_win_rates
from jpo_ray.evaluation.soft_win_rates import soft_win_rate_table, soft_win_rates
from jpo_ray.evaluation.win_rates import win_rate_table
from jpo_ray.feedback.tally import require_verdicts
from jpo_ray.files import output_folder, write_json
from jpo_ray.runs import RunDir

BOOTSTRAP_SAMPLES = 2000


def export_outputs(run_dir: Path | str, out: Path, console: Console) -> None:
    """Write AlpacaEval's files of a run's samples and gold responses. Raises `InputError` without samples."""
    samples, golds = _sampled(run_dir)
    with output_folder(out):
        paths = write_outputs(samples, golds, out)
    console.print("AlpacaEval judges them with, for each of these folders:", highlight=False)
    for path in paths:
        console.print(f"  {path.parent}", highlight=False, soft_wrap=True)
    console.print(
        f"  alpaca_eval --model_outputs {paths[0]} --reference_outputs {out / 'reference_outputs.json'} "
        f"--output_path {paths[0].parent}",
        highlight=False,
        soft_wrap=True,
    )


def import_annotations(run_dir: Path | str, annotations: Sequence[Path], out: Path, console: Console) -> None:
    """Win rates from files of AlpacaEval's annotations of such samples: of whole verdicts, plain and length-controlled,
    and AlpacaEval's own, of preferences.
    """
    samples, golds = _sampled(run_dir)
    rows = read_annotations(annotations, samples, golds)
    warning = require_verdicts(rows)
    table = pa.Table.from_pylist(rows, records.SAMPLE_JUDGMENTS)
    judged = _samples_of(table, samples)
    found = controlled_win_rates(table, judged, golds, BOOTSTRAP_SAMPLES, seed=0)
    for model, soft in soft_win_rates(table, BOOTSTRAP_SAMPLES, seed=0).items():
        found["models"][model]["soft"] = soft
    with output_folder(out):
        records.write_table(out / "judgments.parquet", table, records.SAMPLE_JUDGMENTS)
        write_json(out / "win_rates.json", found)
    console.print(win_rate_table(found), soft_win_rate_table(found))
    for note in [*_left_out(samples, judged), *(["warning: " + warning] if warning else [])]:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{out}: win_rates.json, judgments.parquet", highlight=False, soft_wrap=True)


def _sampled(run_dir: Path | str) -> tuple[pa.Table, dict[str, str]]:
    run = RunDir(run_dir)
    for artifact in ("items", "sample"):
        run.require(artifact, artifact)
    items = records.read_table(run.path("items") / "items.parquet", records.ITEMS).to_pylist()
    samples = records.read_table(run.path("sample") / "samples.parquet", records.SAMPLES)
    return samples, {item["instruction_id"]: item["response"] for item in items if item["gold"]}


def _left_out(samples: pa.Table, judged: pa.Table) -> list[str]:
    """A line that names the generators whose samples no file of annotations is of."""
    all_, named = (
        Counter(map(generator_name, table["model"].to_pylist(), table["temperature"].to_pylist()))
        for table in (samples, judged)
    )
    left = {name: count for name, count in all_.items() if name not in named}
    count = f"{sum(left.values()):,} of {len(samples):,} samples"
    return [f"left out, since no annotation is of their generators: {count} ({', '.join(left)})"] if left else []


def _samples_of(judgments: pa.Table, samples: pa.Table) -> pa.Table:
    """The samples that were judged, in the order of the judgments."""
    keys = ("instruction_id", "model", "temperature", "seed")
    place = {key: row for row, key in enumerate(zip(*(samples[name].to_pylist() for name in keys), strict=True))}
    wanted = zip(*(judgments[name].to_pylist() for name in keys), strict=True)
    return samples.take([place[key] for key in wanted])
