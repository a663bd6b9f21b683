"""What people answered, as tables and files that the other stages read."""

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jpo_ray import records
from jpo_ray.annotation.store import Answered, Store
from jpo_ray.feedback.analysis import gold_of
from jpo_ray.feedback.annotators import Comparison, Verdict
from jpo_ray.feedback.dove import raw_rows

WRITTEN = ("judgments.parquet", "answers.jsonl", "labels.jsonl")


def judgment_rows(store: Store) -> list[dict[str, Any]]:
    """Rows of `records.JUDGMENTS`, one per answer. A person sees one order, so the other order's columns are null."""
    return [_judgment(each) for each in store.answers()]


def export(store: Store, out: Path) -> int:
    """Write `WRITTEN` into the folder `out`; returns the number of answers.

    `answers.jsonl` is in DOVE's raw format, with who answered, which item they saw first ("a" or "b") and why.
    `labels.jsonl` has each comparison once, with what its people say together: data to train on.
    """
    answers = store.answers()
    with _staged(out / "judgments.parquet") as path:
        records.write_table(path, [_judgment(each) for each in answers], records.JUDGMENTS)
    with _staged(out / "answers.jsonl") as path:
        path.write_text(_lines(_with_people(answers)), encoding="utf-8")
    with _staged(out / "labels.jsonl") as path:
        path.write_text(_lines(raw_rows(_together(answers))), encoding="utf-8")
    return len(answers)


def _judgment(answered: Answered) -> dict[str, Any]:
    """Both orders' verdicts are in terms of the comparison's own a and b, as in `feedback/judge.py`."""
    a_first = answered.a_first
    return {
        "pair_id": answered.comparison.key,
        "annotator": answered.annotator,
        "verdict": answered.verdict,
        "verdict_ab": answered.verdict if a_first else None,
        "verdict_ba": None if a_first else answered.verdict,
        "probability": None,
        "gap": None,
        "text_ab": answered.explanation if a_first else None,
        "text_ba": None if a_first else answered.explanation,
        "tokens": 0,
        "cost": 0.0,
        "reason": "",
    }


def _with_people(answers: Sequence[Answered]) -> list[dict[str, Any]]:
    rows = raw_rows((each.comparison, each.verdict) for each in answers)
    return [
        row
        | {
            "annotator": each.annotator,
            "shown_first": "a" if each.a_first else "b",
            "explanation": each.explanation,
        }
        for row, each in zip(rows, answers, strict=True)
    ]


def _together(answers: Sequence[Answered]) -> list[tuple[Comparison, Verdict]]:
    said: dict[str, tuple[Comparison, list[Verdict]]] = {}
    for each in answers:
        said.setdefault(each.comparison.key, (each.comparison, []))[1].append(each.verdict)
    return [(comparison, gold_of(verdicts)) for comparison, verdicts in said.values()]


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A path beside `path` that takes its place once the block has ended, and is gone if it fails."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield staged
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
