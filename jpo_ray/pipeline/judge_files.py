"""`jpo judge --pairs FILE --out DIR`: judging a file of comparisons, without a run directory."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jpo_ray import records
from jpo_ray.config import Source
from jpo_ray.config_file import FilesConfig
from jpo_ray.data.formats import BadRow, Item, Row
from jpo_ray.data.sources import read_source
from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import Comparison, Verdict, flipped_verdict
from jpo_ray.feedback.dove import raw_rows
from jpo_ray.feedback.tally import invalid_reasons, invalid_warning, judgment_counts, require_verdicts
from jpo_ray.files import output_folder, write_json
from jpo_ray.pipeline.annotating import Given, judge_with_bar, judging_estimate, open_file_annotator
from jpo_ray.pipeline.console import progress_bar

WRITTEN = ("judgments.parquet", "feedback.jsonl", "preferences.jsonl", "trl_preferences.jsonl", "report.json")


def judge_file(pairs: Path, out: Path, config: FilesConfig, console: Console, *, dry_run: bool = False) -> None:
    """Judge each row's two items; `out` gets judgments, a report, and the verdicts in DOVE's and TRL's formats.

    Raises `InputError` for a row that holds fewer than two items, for a judge without a valid verdict, and as
    annotators do. What an endpoint answered is kept, so that the same command goes on where it was stopped.
    """
    rows = _read(pairs)
    comparisons = _comparisons(rows)
    first = _distinct(comparisons)  # a comparison that stands there twice is judged once
    distinct = list(first.values())
    if dry_run:
        console.print(judging_estimate(config.judge, distinct), highlight=False, soft_wrap=True)
        return
    with (
        open_file_annotator(config.judge, config.cluster.of("judge"), _given(rows)) as annotator,
        progress_bar(console, f"judging {pairs.name}") as bar,
    ):
        bar.begin(len(distinct))
        judgments = {row["pair_id"]: row for row in judge_with_bar(distinct, annotator, bar)}
    require_verdicts(list(judgments.values()))
    verdicts: list[tuple[Comparison, Verdict]] = []
    for each in comparisons:
        verdict, as_judged = judgments[each.key]["verdict"], each.item_a == first[each.key].item_a
        verdicts.append((each, verdict if as_judged else flipped_verdict(verdict)))
    report = {
        protocol: judgment_counts([judgments[each.key] for each in distinct if protocol in ("all", each.protocol)])
        for protocol in ("all", *records.PROTOCOLS)
    }
    with output_folder(out):
        records.write_table(out / "judgments.parquet", list(judgments.values()), records.JUDGMENTS)
        _write_verdicts(out, verdicts)
        write_json(out / "report.json", report)
    console.print(report_table(report))
    for note in _notes(report, list(judgments.values()), len(comparisons)):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{out}: {', '.join(WRITTEN)}", highlight=False, soft_wrap=True)


def file_comparisons(path: Path) -> dict[str, Comparison]:
    """The distinct comparisons of a file, by id. Raises `InputError` for a row that holds one item only."""
    return _distinct(_comparisons(_read(path)))


def _read(path: Path) -> list[Row]:
    try:
        return read_source(Source(path=str(path)), "fail").rows
    except BadRow as bad:
        raise InputError(f"{bad.plain}; mend it, or leave it out") from bad


def _distinct(comparisons: Iterable[Comparison]) -> dict[str, Comparison]:
    """By id; of those that are the same but for the order of their items, the first."""
    first: dict[str, Comparison] = {}
    for each in comparisons:
        first.setdefault(each.key, each)
    return first


def _given(rows: Sequence[Row]) -> Given:
    """The labels and ratings that stand in the file."""
    labels = [
        dict(zip(records.LABELS.names, (*(records.item_id(*item) for item in row.items), row.verdict), strict=True))
        for row in rows
        if row.verdict is not None
    ]
    ratings = {
        records.item_id(*item): rating
        for row in rows
        for item, rating in zip(row.items, row.ratings, strict=False)
        if rating is not None
    }
    return Given(
        pa.Table.from_pylist(labels, records.LABELS),
        pa.Table.from_pydict({"item_id": list(ratings), "rating": list(ratings.values())}, records.RATINGS),
    )


def _comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Of each row every two items, in the order of the file."""
    if single := next((row for row in rows if len(row.items) < 2), None):
        raise InputError(f"{single.where}: holds one item, nothing to compare it with ({single.kind})")
    return [_comparison(a, b) for row in rows for a, b in itertools.combinations(row.items, 2)]


def _comparison(a: Item, b: Item) -> Comparison:
    first, second = records.item_id(*a), records.item_id(*b)
    protocol = "conditional" if a[0] == b[0] else "joint"
    return Comparison(records.pair_id(first, second, protocol), first, second, *a, *b)


def _write_verdicts(out: Path, verdicts: list[tuple[Comparison, Verdict]]) -> None:
    """All rows in the order of the file; the decisive ones as preferences."""
    _write_jsonl(out / "feedback.jsonl", raw_rows(verdicts))
    decisive = []
    for each, verdict in verdicts:
        a, b = (each.instruction_a, each.response_a), (each.instruction_b, each.response_b)
        if verdict in ("a", "b"):
            decisive.append((a, b) if verdict == "a" else (b, a))
    _write_jsonl(out / "preferences.jsonl", (_dove(chosen, rejected) for chosen, rejected in decisive))
    _write_jsonl(out / "trl_preferences.jsonl", (_trl(chosen, rejected) for chosen, rejected in decisive))


def _dove(chosen: Item, rejected: Item) -> dict[str, str]:
    return {"i_chosen": chosen[0], "r_chosen": chosen[1], "i_reject": rejected[0], "r_reject": rejected[1]}


def _trl(chosen: Item, rejected: Item) -> dict[str, Any]:
    """TRL's conversational preference format: one prompt stands apart, two stand in the conversations."""
    sides = {
        name: [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
        for name, (instruction, response) in (("chosen", chosen), ("rejected", rejected))
    }
    if chosen[0] != rejected[0]:
        return dict(sides)
    return {"prompt": sides["chosen"][:1], "chosen": sides["chosen"][1:], "rejected": sides["rejected"][1:]}


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    staged = path.with_name(f".{path.name}.part")
    staged.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    staged.replace(path)


def report_table(report: Mapping[str, Mapping[str, Any]]) -> Table:
    """Verdicts by protocol, for a terminal of 80 columns; protocols that do not occur are left out."""
    priced = any(counts["cost"] for counts in report.values())
    table = Table(title="Judgments", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("judged", "a", "b", "tie", "invalid", "flips", "tokens", *(["cost"] if priced else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for protocol, counts in report.items():
        flips = "-" if counts["flip_rate"] is None else f"{counts['flip_rate']:.1%}"
        if counts["judgments"]:
            numbers = (f"{counts[name]:,}" for name in ("judgments", "a", "b", "tie", "invalid"))
            cost = [f"${counts['cost']:.2f}"] if priced else []
            table.add_row(protocol, *numbers, flips, f"{counts['tokens']:,}", *cost)
    return table


def _notes(report: Mapping[str, Mapping[str, Any]], judgments: Sequence[dict[str, Any]], comparisons: int) -> list[str]:
    """What the table has no room for. `comparisons`: how many the file holds."""
    notes = []
    if repeated := comparisons - len(judgments):
        notes.append(f"{repeated:,} of {comparisons:,} comparisons repeat another one, and are judged with it")
    if interval := report["all"]["flip_rate_ci95"]:
        notes.append(f"flips: 95 % interval {interval[0]:.1%} to {interval[1]:.1%}")
    if warning := invalid_warning(judgments):
        notes.append(f"warning: {warning}")
    elif reasons := invalid_reasons(judgments):
        notes.append(f"invalid: {reasons}")
    return notes
