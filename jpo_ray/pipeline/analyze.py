"""`jpo analyze`: what judgments say about annotators and about the two protocols."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jpo_ray import records
from jpo_ray.config_judge import PEOPLE
from jpo_ray.errors import InputError
from jpo_ray.evaluation.run_judgments import Compared, compared_in, judged_rows
from jpo_ray.feedback.analysis import CELLS, SHOWN, Judged, analysis_of
from jpo_ray.files import output_folder
from jpo_ray.pipeline.judge_files import file_comparisons
from jpo_ray.runs import RunDir


def analyze(
    source: Path | str,
    judgments: Sequence[Path],
    out: Path,
    people: Sequence[str],
    cell: str | None,
    console: Console,
) -> None:
    """Print the tables, write `analysis.json` and `index.html` into `out`.

    `source` is a run directory (text: its URI), or a file of comparisons; `judgments` are tables of further judgments
    of them, such as `jpo annotate` and `jpo judge` export. Raises `InputError` without judgments, or for those of other
    comparisons.
    """
    from jpo_ray.evaluation.analysis_page import write_analysis

    if cell is not None and cell not in CELLS:
        raise InputError(f"--list {cell}: no such cell; there are {', '.join(CELLS)}")
    compared = compared_in(RunDir(source)) if isinstance(source, str) or source.is_dir() else _of_file(source)
    tables = {str(source): compared.judgments} | {str(path): read_judgments(path) for path in judgments}
    rows = list(_distinct(tables, compared).values())
    if not rows:
        raise InputError(f"{source}: no judgments to analyse; give --judgments FILE")
    if unknown := sorted(set(people) - {row.annotator for row in rows}):
        names = ", ".join(dict.fromkeys(row.annotator for row in rows))
        raise InputError(f"--people {unknown[0]}: no such annotator; there are {names}")
    found = analysis_of(rows, people)
    with output_folder(out):
        write_analysis(found, out)
    for shown in (_agreement_table(found), _interplay_table(found)):
        if shown.row_count:
            console.print(shown)
    if unranked := sum(row["unranked"] for row in found["interplay"]):
        console.print(
            f"{unranked:,} joint verdicts are on items that conditional ones have not ranked", highlight=False
        )
    if cell is not None:
        _list(found, cell, compared, console)
    console.print(f"Analysis: {out / 'index.html'}", highlight=False, soft_wrap=True)


def _of_file(path: Path) -> Compared:
    comparisons = file_comparisons(path)
    return Compared(comparisons, dict.fromkeys(comparisons, path.stem), {}, records.JUDGMENTS.empty_table())


def read_judgments(path: Path) -> pa.Table:
    """A table of judgments. Raises `InputError` where the file is none."""
    try:
        return records.read_table(path, records.JUDGMENTS)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"--judgments {path}: no table of judgments ({str(error).splitlines()[0][:200]})") from error


def _distinct(tables: Mapping[str, pa.Table], compared: Compared) -> dict[tuple[str, str], Judged]:
    """Every judgment once, by annotator and comparison. Raises `InputError` where two tables contradict each other."""
    found: dict[tuple[str, str], Judged] = {}
    for origin, table in tables.items():
        for row in judged_rows(compared, table):
            if found.setdefault((row.annotator, row.pair), row).verdict != row.verdict:
                raise InputError(
                    f"{origin}: {row.annotator} judged comparison {row.pair} otherwise in another table; give "
                    "annotators names of their own (judge.name)"
                )
            if row.annotator == PEOPLE:
                raise InputError(f"{origin}: an annotator is called `{PEOPLE}`, which is what people say together")
    return found


def _agreement_table(found: dict[str, Any]) -> Table:
    table = Table("annotators", "dataset", "protocol", title="Agreement, percent, and Cohen's kappa", box=SIMPLE_HEAD)
    for name in ("n", "agree", "kappa", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found["agreements"]:
        interval = row["kappa_ci95"]
        table.add_row(
            f"{row['one']} and {row['other']}",
            row["dataset"],
            row["protocol"],
            f"{row['comparisons']:,}",
            _number(row["score"]),
            _number(row["kappa"], ".2f"),
            "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
        )
    return table


def _interplay_table(found: dict[str, Any]) -> Table:
    title = "Joint verdicts on items that conditional ones ranked, percent\n(of both alike: the decisive ones)"
    table = Table("annotator", "dataset", title=title, box=SIMPLE_HEAD)
    for cell in SHOWN:
        table.add_column(cell, justify="right")
    for row in found["interplay"]:
        table.add_row(row["annotator"], row["dataset"], *(_number(row["shares"][cell]) for cell in SHOWN))
    if found["interplay"]:
        table.add_row("average", "", *(_number(found["average"][cell]) for cell in SHOWN))
    return table


def _list(found: dict[str, Any], cell: str, compared: Compared, console: Console) -> None:
    """The texts of the comparisons behind a cell, ties last."""
    for row in found["interplay"]:
        for pair in [*row["comparisons"][cell], *row["ties"].get(cell, [])]:
            each = compared.comparisons[pair]
            texts = {
                "instruction a": each.instruction_a, "response a": each.response_a,
                "instruction b": each.instruction_b, "response b": each.response_b,
            }  # fmt: skip
            tie = " (a tie)" if pair in row["ties"].get(cell, []) else ""
            console.print(f"{row['annotator']}, {row['dataset']}: {cell}{tie}: {pair}", highlight=False, markup=False)
            for name, text in texts.items():
                console.print(f"  {name}: {text}", highlight=False, markup=False, soft_wrap=True)


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)
