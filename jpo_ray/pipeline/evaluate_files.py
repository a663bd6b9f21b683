"""`jpo evaluate --samples FILE --gold FILE --out DIR`: win rates of a file of samples, without a run directory."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from jpo_ray import records
from jpo_ray.config_file import FilesConfig
from jpo_ray.data.sources import read_rows
from jpo_ray.errors import InputError
from jpo_ray.evaluation.length_control import controlled_win_rates
from jpo_ray.evaluation.win_rates import judge_samples, win_rate_table
from jpo_ray.feedback.tally import invalid_reasons, judgment_counts, require_verdicts
from jpo_ray.files import output_folder, write_json
from jpo_ray.pipeline.annotating import open_file_annotator
from jpo_ray.pipeline.console import progress_bar

BOOTSTRAP_SAMPLES = 2000
MODEL = "samples"  # where no row names its generator
# The formats that the paper's authors train with: their samples carry them around the instruction.
TEMPLATES = (
    re.compile(
        r"### Instructions: You are given a social media post, summarize it accordingly\. ?\nPost: (.*)\n\n"
        r"### Response:\s*",
        re.DOTALL,
    ),
    re.compile(r"### Instructions: (.*)\n\n### Response:\s*", re.DOTALL),
)


@dataclass(frozen=True)
class _Gold:
    """A file of gold responses."""

    path: Path
    responses: dict[str, str]  # by the id of the instruction
    in_order: list[str]  # the instruction of each row


def evaluate_file(
    samples: Path, gold: Path, out: Path, config: FilesConfig, console: Console, *, by_order: bool = False
) -> None:
    """Judge each sample against the gold response of its instruction; `out` gets win rates and judgments.

    Samples are `{instruction, outputs}` or AlpacaEval's `{instruction, output, generator}`, gold is `{instruction,
    gold_response}`; they are matched by instruction, or by order. Raises `InputError` for what does not match, for
    samples that stand there twice, and for a judge without a valid verdict.
    """
    golds = _golds(gold)
    rows = _samples(samples, golds, by_order=by_order)
    with (
        open_file_annotator(config.judge, config.cluster.of("evaluate")) as annotator,
        progress_bar(console, f"judging {samples.name}") as bar,
    ):
        bar.begin(len(rows))
        judged = judge_samples(
            pa.Table.from_pylist(rows),
            golds.responses,
            annotator,
            lambda share, note: bar.to(int(share * len(rows)), note=note),
        )
    warning = require_verdicts(judged)
    table = pa.Table.from_pylist(judged, records.SAMPLE_JUDGMENTS)
    found = controlled_win_rates(table, pa.Table.from_pylist(rows), golds.responses, BOOTSTRAP_SAMPLES, seed=0)
    with output_folder(out):
        records.write_table(out / "judgments.parquet", judged, records.SAMPLE_JUDGMENTS)
        write_json(out / "win_rate.json", _summary(found, rows, judged, len(golds.responses)))
    console.print(win_rate_table(found))
    for note in [*_coverage(rows, golds), *(["warning: " + warning] if warning else [])]:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{out}: win_rate.json, judgments.parquet", highlight=False, soft_wrap=True)


def _summary(
    found: Mapping[str, Any], rows: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]], golds: int
) -> dict[str, Any]:
    """Of the samples; of each generator under its name where there are several. `golds`: how many instructions."""
    of_model = {}
    for model, entry in found["models"].items():
        own = [row for row in judged if row["model"] == model]
        counts = judgment_counts(own)
        of_model[model] = {
            "win_rate": entry["win_rate"]["mean"],
            **{name: entry[name] for name in ("wins", "ties", "losses", "invalid", "n", "empty", "ci95")},
            "invalid_because": invalid_reasons(own),
            "without_sample": golds - len({row["instruction_id"] for row in rows if row["model"] == model}),
            "length_controlled": entry["length_controlled"],
            "flip_rate": counts["flip_rate"],
            "flip_rate_ci95": counts["flip_rate_ci95"],
            "tokens": counts["tokens"],
            "cost": counts["cost"],
        }
    return next(iter(of_model.values())) if len(of_model) == 1 else of_model


def _coverage(rows: Sequence[dict[str, Any]], golds: _Gold) -> list[str]:
    """Where a generator has no sample of an instruction, or several: n is then not the number of gold responses."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row["instruction_id"] for row in rows if row["model"] == model]
        asked, all_ = len(set(own)), len(golds.responses)
        if asked < all_:
            found.append(f"{model}: no sample of {all_ - asked:,} of the {all_:,} instructions in {golds.path}")
        if len(own) > asked:
            found.append(f"{model}: {len(own):,} samples of {asked:,} instructions, all of which count")
    return found


def _golds(path: Path) -> _Gold:
    golds = _Gold(path, {}, [])
    empty = []
    for where, row in read_rows(path):
        instruction, response = bare(_text(row, "instruction", where)), _text(row, "gold_response", where)
        golds.in_order.append(instruction)
        if not response.strip():
            empty.append(where)
        if golds.responses.setdefault(records.instruction_id(instruction), response) != response:
            raise InputError(f"{where}: another gold response for an instruction that stands there already")
    if empty:
        raise InputError(f"{empty[0]}: `gold_response` is empty ({len(empty)} of {len(golds.in_order)} are)")
    return golds


def _samples(path: Path, golds: _Gold, *, by_order: bool) -> list[dict[str, Any]]:
    """Columns of `records.SAMPLES`, of each row of the file. Raises `InputError`."""
    read = list(read_rows(path))
    if by_order and len(read) != len(golds.in_order):
        raise InputError(
            f"--by-order: {path} has {len(read)} rows and {golds.path} has {len(golds.in_order)}; rows that belong "
            "together must stand in the same order"
        )
    rows = [
        _sample(row, golds.in_order[number] if by_order else bare(_text(row, "instruction", where)), where)
        for number, (where, row) in enumerate(read)
    ]
    places = [where for where, _ in read]
    _require_matched(rows, places, golds)
    _number(rows, places)
    return rows


def _sample(row: Mapping[str, Any], instruction: str, where: str) -> dict[str, Any]:
    seed = row.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise InputError(f"{where}: `seed` is no whole number")
    return {
        "instruction_id": records.instruction_id(instruction),
        "instruction": instruction,
        "model": str(row.get("generator") or MODEL),
        "temperature": 0.0,
        "seed": seed,
        "response": _text(row, "outputs" if "outputs" in row else "output", where),
    }


def _require_matched(rows: Sequence[dict[str, Any]], places: Sequence[str], golds: _Gold) -> None:
    unmatched = [number for number, row in enumerate(rows) if row["instruction_id"] not in golds.responses]
    if unmatched:
        first = unmatched[0]
        raise InputError(
            f"{places[first]}: {golds.path} has no gold response for the instruction "
            f"{rows[first]['instruction'][:60]!r} ({len(unmatched)} of {len(rows)} samples match none); if the rows of "
            "both files belong together in their order, use --by-order"
        )


_SAME = ("model", "instruction_id", "seed", "response")


def _number(rows: Sequence[dict[str, Any]], places: Sequence[str]) -> None:
    """Give the samples of an instruction distinct seeds. Raises `InputError` for rows that say the same again."""
    first: dict[tuple[Any, ...], str] = {}
    repeated = []
    for row, where in zip(rows, places, strict=True):
        before = first.setdefault(tuple(row[name] for name in _SAME), where)
        if before != where:
            repeated.append((where, before))
    if repeated:
        where, before = repeated[0]
        raise InputError(
            f"{where}: the same sample as {before} ({len(repeated)} of {len(rows)} samples repeat another); leave them "
            "out, or give each its own `seed` where they were sampled apart"
        )
    count: Counter[tuple[str, str]] = Counter()
    for row in rows:
        key = (row["model"], row["instruction_id"])
        row["seed"] = count[key]
        count[key] += 1


def bare(instruction: str) -> str:
    """Without the blanks and the training template around it."""
    text = instruction.strip()
    return next((found[1].strip() for form in TEMPLATES if (found := form.fullmatch(text))), text)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    """A text, or the only one of a list."""
    value = row.get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise InputError(f"{where}: `{name}` is {'missing' if name not in row else 'no text'}")
    return value
