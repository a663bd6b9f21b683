"""`jpo analyze`: what judgments say about annotators and about the two protocols."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jpo_ray import records
from jpo_ray.config_judge import PEOPLE
from jpo_ray.errors import InputError
from jpo_ray.feedback.analysis import CELLS, Judged
from jpo_ray.feedback.annotators import Comparison
from jpo_ray.feedback.judge import comparisons_of
from jpo_ray.files import output_folder
from jpo_ray.pipeline.judge_files import file_comparisons
from jpo_ray.runs import RunDir


def analyze(
    source: Path,
    judgments: Sequence[Path],
    out: Path,
    people: Sequence[str],
    cell: str | None,
    console: Console,
) -> None:
    """Print the tables, write `analysis.json` and `index.html` into `out`.

    `source` is a run directory, or a file of comparisons; `judgments` are tables of further judgments of them, such as
    `jpo annotate` and `jpo judge` export. Raises `InputError` without judgments, or for those of other comparisons.
    """
    from jpo_ray.evaluation.analysis_page import analysis_of, write_analysis

    if cell is not None and cell not in CELLS:
        raise InputError(f"--list {cell}: no such cell; there are {', '.join(CELLS)}")
    compared = _of_run(RunDir(source)) if source.is_dir() else _of_file(source)
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


@dataclass(frozen=True)
class Compared:
    """Comparisons by id, what is known of each, and the judgments that stand beside them."""

    comparisons: Mapping[str, Comparison]
    datasets: Mapping[str, str]
    similarities: Mapping[str, float]
    judgments: pa.Table


def _of_run(run: RunDir) -> Compared:
    for artifact in ("items", "pairs", "judge"):
        run.require(artifact, artifact)
    pairs = records.read_table(run.path("pairs") / "pairs.parquet", records.PAIRS)
    items = records.read_table(run.path("items") / "items.parquet", records.ITEMS)
    names = short_names(items["source"].unique().to_pylist())
    source_of = {
        item: names[source] for item, source in zip(*(items[c].to_pylist() for c in ("item_id", "source")), strict=True)
    }
    comparisons = {each.key: each for each in comparisons_of(pairs, items)}
    return Compared(
        comparisons,
        {key: " + ".join(sorted({source_of[e.item_a], source_of[e.item_b]})) for key, e in comparisons.items()},
        dict(zip(pairs["pair_id"].to_pylist(), pairs["similarity"].to_pylist(), strict=True)),
        records.read_table(run.path("judge") / "judgments.parquet", records.JUDGMENTS),
    )


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Each path by its last part, or by as many as tell it from the others."""
    for parts in range(1, 1 + max(len(Path(path).parts) for path in paths)):
        names = {path: "/".join(Path(path).parts[-parts:]) for path in paths}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in paths}


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
        for row in _judged(compared, table):
            if found.setdefault((row.annotator, row.pair), row).verdict != row.verdict:
                raise InputError(
                    f"{origin}: {row.annotator} judged comparison {row.pair} otherwise in another table; give "
                    "annotators names of their own (judge.name)"
                )
            if row.annotator == PEOPLE:
                raise InputError(f"{origin}: an annotator is called `{PEOPLE}`, which is what people say together")
    return found


def _judged(compared: Compared, judgments: pa.Table) -> Iterator[Judged]:
    for row in judgments.select(["pair_id", "annotator", "verdict"]).to_pylist():
        comparison = compared.comparisons.get(row["pair_id"])
        if comparison is None:
            raise InputError(f"judgments of {row['annotator']}: comparison {row['pair_id']} is none of those given")
        yield Judged(
            pair=comparison.key,
            annotator=row["annotator"],
            dataset=compared.datasets[comparison.key],
            protocol=comparison.protocol,
            item_a=comparison.item_a,
            item_b=comparison.item_b,
            verdict=row["verdict"],
            similarity=compared.similarities.get(comparison.key, math.nan),
            characters_a=len(comparison.response_a),
            characters_b=len(comparison.response_b),
        )


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
    from jpo_ray.evaluation.analysis_page import SHOWN

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
