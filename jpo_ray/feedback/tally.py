"""What a set of judgments looks like: verdicts, flips between orders, costs, and why some are invalid.

Tallies of shards add up to that of the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray import records
from jpo_ray.errors import InputError

READ = ("annotator", "verdict", "verdict_ab", "verdict_ba", "text_ab", "tokens", "cost", "reason")
SCHEMA = pa.schema([records.JUDGMENTS.field(name) for name in READ])


@dataclass(frozen=True)
class Tally:
    """Counts of judgments. `answers`: by both orders' verdicts, where both are valid; `reasons`: of the invalid ones.

    Asked are those that somebody was asked about: all but an item compared with itself.
    """

    verdicts: Counter[str] = field(default_factory=Counter)
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    cost: float = 0.0
    asked: int = 0
    asked_invalid: int = 0
    asked_reasons: Counter[str] = field(default_factory=Counter)
    annotator: str = ""
    first_invalid: tuple[str, int] | None = None  # its text and tokens

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.verdicts + other.verdicts,
            self.answers + other.answers,
            self.reasons + other.reasons,
            self.tokens + other.tokens,
            self.cost + other.cost,
            self.asked + other.asked,
            self.asked_invalid + other.asked_invalid,
            self.asked_reasons + other.asked_reasons,
            self.annotator or other.annotator,
            self.first_invalid or other.first_invalid,
        )


Judged: TypeAlias = Sequence[dict[str, Any]] | pa.Table | Tally


def tally(judged: Judged) -> Tally:
    """Of rows of `records.JUDGMENTS` (or of any table with its verdicts)."""
    if isinstance(judged, Tally):
        return judged
    table = judged.select(READ) if isinstance(judged, pa.Table) else pa.Table.from_pylist(list(judged), SCHEMA)
    invalid = table.filter(pc.equal(table["verdict"], "invalid"))
    asked = pc.is_valid(invalid["verdict_ab"])
    first = invalid.filter(asked).slice(0, 1).to_pylist()
    return Tally(
        verdicts=_counted(table, "verdict"),
        answers=_answers(table),
        reasons=_counted(invalid, "reason"),
        tokens=pc.sum(table["tokens"]).as_py() or 0,
        cost=pc.sum(table["cost"]).as_py() or 0.0,
        asked=len(table) - table["verdict_ab"].null_count,
        asked_invalid=pc.sum(asked).as_py() or 0,
        asked_reasons=_counted(invalid.filter(asked), "reason"),
        annotator=table["annotator"][0].as_py() if len(table) else "",
        first_invalid=(first[0]["text_ab"] or "", first[0]["tokens"]) if first else None,
    )


def judgment_counts(judged: Judged) -> dict[str, Any]:
    """What a set of judgments (`records.JUDGMENTS`) looks like.

    `flip_rate` is the share of judgments with a valid answer in both orders whose answers disagree, ties included, and
    `flip_rate_ci95` its Wilson interval; `first_shown_share` the share of their decisive answers that prefer the item
    shown first, 0.5 without position bias. None where there is nothing to count.
    """
    found = tally(judged)
    answers = found.answers
    both = answers.total()
    first_shown = sum(count * ((ab == "a") + (ba == "b")) for (ab, ba), count in answers.items())
    second_shown = sum(count * ((ab == "b") + (ba == "a")) for (ab, ba), count in answers.items())
    flips = sum(count for (ab, ba), count in answers.items() if ab != ba)
    return {
        "judgments": found.verdicts.total(),
        **{verdict: found.verdicts[verdict] for verdict in ("a", "b", "tie", "invalid")},
        "decisive": found.verdicts["a"] + found.verdicts["b"],
        "flip_rate": _share(flips, both),
        "flip_rate_ci95": wilson(flips, both),
        "first_shown_share": _share(first_shown, first_shown + second_shown),
        "tokens": found.tokens,
        "cost": found.cost,
    }


def invalid_reasons(judged: Judged, most: int = 3) -> str:
    """Why verdicts are invalid, the most frequent reasons first; empty where none is."""
    return _shown(tally(judged).reasons, most)


def invalid_warning(judged: Judged) -> str:
    """What to say where most verdicts of one judge are invalid; empty where they are not."""
    found = tally(judged)
    if found.asked_invalid <= found.asked / 2 or found.first_invalid is None:
        return ""
    said, tokens = found.first_invalid
    because = _shown(found.asked_reasons, 3)
    if said or tokens:  # a language model, which may have answered with nothing
        because += f"; the first answer: {said[:80]!r}"
    return f"{found.asked_invalid:,} of {found.asked:,} verdicts of {found.annotator} are invalid: {because}"


def require_verdicts(judged: Judged) -> str:
    """`invalid_warning`. Raises `InputError` where no verdict of the judge is valid: nothing would follow from them."""
    found = tally(judged)
    warning = invalid_warning(found)
    if warning and found.asked_invalid == found.asked:
        raise InputError(f"judge: {warning}; mend that, or name another judge")
    return warning


def wilson(part: int, whole: int) -> list[float] | None:
    """Wilson's 95 % interval of a share; None where there is nothing to count."""
    if not whole:
        return None
    from scipy.stats import binomtest

    interval = binomtest(part, whole).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def _answers(table: pa.Table) -> Counter[tuple[str, str]]:
    both = table.filter(pc.and_(pc.is_valid(table["verdict_ab"]), pc.is_valid(table["verdict_ba"])))
    both = both.filter(
        pc.and_(pc.not_equal(both["verdict_ab"], "invalid"), pc.not_equal(both["verdict_ba"], "invalid"))
    )
    counted = both.group_by(["verdict_ab", "verdict_ba"]).aggregate([([], "count_all")]).to_pylist()
    return Counter({(row["verdict_ab"], row["verdict_ba"]): row["count_all"] for row in counted})


def _counted(table: pa.Table, column: str) -> Counter[str]:
    counted = table.group_by(column, use_threads=False).aggregate([([], "count_all")]).to_pylist()
    return Counter({row[column] or "": row["count_all"] for row in counted})


def _shown(reasons: Counter[str], most: int) -> str:
    found = [f"{(reason or 'no reason given')[:100]} ({count:,})" for reason, count in reasons.most_common(most)]
    return "; ".join([*found, "..."] if len(reasons) > most else found)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
