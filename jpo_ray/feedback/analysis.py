"""What judgments say about annotators and about the two protocols (JPO paper, section 5; version 1, Appendix C).

Everything is counted from rows of one comparison and one annotator each; averages over annotators and datasets are
unweighted, as in the paper.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from jpo_ray.config_judge import PEOPLE
from jpo_ray.feedback.annotators import Verdict, flipped_verdict
from jpo_ray.feedback.closure import OUTCOMES
from jpo_ray.feedback.strengths import graph_facts
from jpo_ray.feedback.tally import wilson

CELLS = ("both chosen", "both rejected", "C > R", "C < R", "C ? R")  # of the interplay; ? is a tie
SHOWN = (*CELLS[:2], "both alike", *CELLS[2:])
SIMILARITY_BINS = 4

K = TypeVar("K")


@dataclass(frozen=True)
class Judged:
    """One annotator's verdict on one comparison."""

    pair: str
    annotator: str
    dataset: str
    protocol: str
    item_a: str
    item_b: str
    verdict: Verdict
    similarity: float = 1.0  # cosine of the instructions; NaN where nobody measured it
    characters_a: int = 0  # of the responses
    characters_b: int = 0


def analysis_of(rows: Sequence[Judged], people: Sequence[str]) -> dict[str, Any]:
    """Everything the page shows, as plain numbers; `interplay` also names the comparisons behind each cell.

    In the interplay people who share comparisons count as one, with what they say together, as in the paper.
    """
    together = gold_rows(rows, people)
    tables = interplay([*(row for row in rows if not together or row.annotator not in people), *together])
    ranked = {
        key: table for key, table in tables.items() if any(share is not None for share in table.shares().values())
    }
    return {
        "judged": len(rows),
        "annotators": list(dict.fromkeys(row.annotator for row in rows)),
        "verdicts": verdict_counts(rows),
        "agreements": agreements(rows, people),
        "interplay": [
            {"annotator": annotator, "dataset": dataset, "shares": table.shares(), "comparisons": table.decisive,
             "ties": table.ties, "unranked": table.unranked}
            for (annotator, dataset), table in ranked.items()
        ],
        "average": average_shares(ranked),
        "length_bias": length_bias(rows),
        "similarity": decisiveness_by_similarity(rows),
        "circles": circles(rows),
    }  # fmt: skip


def agreement_score(one: Verdict, other: Verdict) -> float:
    """1 for the same verdict (both equal included), 0.5 where one of them is a tie, 0 for opposite ones."""
    if one == other:
        return 1.0
    return 0.5 if "tie" in (one, other) else 0.0


def gold_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of people together: that of the majority of the decisive ones, a tie where there is none.

    Of two people this is the paper's rule: what both say; a tie where they contradict; else the decisive one's.
    Invalid where one of them gave none.
    """
    if "invalid" in verdicts:
        return "invalid"
    lead = verdicts.count("a") - verdicts.count("b")
    return "tie" if lead == 0 else ("a" if lead > 0 else "b")


def gold_rows(rows: Iterable[Judged], people: Sequence[str]) -> list[Judged]:
    """What people say together, as verdicts of the annotator `PEOPLE`, of what two or more of them judged."""
    theirs = _grouped((row for row in rows if row.annotator in people), lambda row: row.pair)
    return [
        replace(members[0], annotator=PEOPLE, verdict=gold_of([row.verdict for row in members]))
        for members in theirs.values()
        if len({row.annotator for row in members}) > 1
    ]


@dataclass(frozen=True)
class Agreement:
    comparisons: int
    score: float | None  # mean agreement score, percent
    kappa: float | None  # Cohen's
    kappa_ci95: tuple[float, float] | None  # asymptotic


def agreement(both: Iterable[tuple[Verdict, Verdict]]) -> Agreement:
    """Of two verdicts on each of some comparisons; where one is invalid, both are left out."""
    valid = [verdicts for verdicts in both if "invalid" not in verdicts]
    if not valid:
        return Agreement(0, None, None, None)
    score = 100 * float(np.mean([agreement_score(one, other) for one, other in valid]))
    kinds = sorted({verdict for both in valid for verdict in both})
    if len(kinds) < 2:  # both only ever say one and the same thing: chance explains all of it
        return Agreement(len(valid), score, None, None)
    from statsmodels.stats.inter_rater import cohens_kappa

    with np.errstate(invalid="ignore", divide="ignore"):  # in a test of significance, which is not used
        found = cohens_kappa(np.array([[valid.count((one, other)) for other in kinds] for one in kinds]))
    if not found.var_kappa > 0:  # all agree, or the like: the approximation says nothing of so clear a case
        return Agreement(len(valid), score, float(found.kappa), None)
    interval = (max(-1.0, float(found.kappa_low)), min(1.0, float(found.kappa_upp)))
    return Agreement(len(valid), score, float(found.kappa), interval)


def agreements(rows: Iterable[Judged], people: Sequence[str]) -> list[dict[str, Any]]:
    """Of every two annotators; of people with each other, all together; of their gold with every other annotator.

    By dataset and protocol.
    """
    rows = list(rows)
    found = []
    for (dataset, protocol), members in _grouped(rows, lambda row: (row.dataset, row.protocol)).items():
        verdicts: dict[str, dict[str, Verdict]] = defaultdict(dict)
        for row in [*members, *gold_rows(members, people)]:
            verdicts[row.annotator][row.pair] = row.verdict
        of_two = {
            (one, other): [
                (verdicts[one][pair], verdicts[other][pair]) for pair in verdicts[one] if pair in verdicts[other]
            ]
            for one, other in combinations(verdicts, 2)
            if not (other == PEOPLE and one in people)
        }
        of_people = [both for names, pairs in of_two.items() if set(names) <= set(people) for both in pairs]
        if len(people) > 2:
            of_two[PEOPLE, "each other"] = of_people
        for (one, other), pairs in of_two.items():
            between = agreement(pairs)
            if between.comparisons:
                kind = {"dataset": dataset, "protocol": protocol, "one": one, "other": other}
                found.append(kind | between.__dict__)
    return found


@dataclass
class Interplay:
    """How joint verdicts relate to conditional ones; the comparisons behind each of `CELLS`, decisive or not."""

    unranked: int = 0  # joint comparisons of an item that has no rank
    decisive: dict[str, list[str]] = field(default_factory=lambda: {cell: [] for cell in CELLS})
    ties: dict[str, list[str]] = field(default_factory=lambda: {cell: [] for cell in CELLS[:2]})

    def shares(self) -> dict[str, float | None]:
        """Percent: decisive among both chosen, both rejected and both alike; C > R, C < R and tie of the others."""
        alike = {cell: (len(self.decisive[cell]), len(self.ties[cell])) for cell in CELLS[:2]}
        alike["both alike"] = tuple(map(sum, zip(*alike.values(), strict=True)))  # type: ignore[assignment]
        mixed = {cell: len(self.decisive[cell]) for cell in CELLS[2:]}
        total = sum(mixed.values())
        return {cell: _percent(one, one + other) for cell, (one, other) in alike.items()} | {
            cell: _percent(count, total) for cell, count in mixed.items()
        }


def interplay(rows: Iterable[Judged]) -> dict[tuple[str, str], Interplay]:
    """By (annotator, dataset): joint comparisons of items that the same annotator's conditional verdicts have ranked.

    An item is chosen (C) or rejected (R) where it won or lost all its decisive conditional comparisons; conditional
    ties are left out, and joint comparisons of items without a rank with them. The two items of a joint comparison may
    be of two datasets.
    """
    found = {}
    for annotator, judged in _grouped(rows, lambda row: row.annotator).items():
        ranks: dict[str, set[str]] = defaultdict(set)
        for row in judged:
            if row.protocol == "conditional" and row.verdict in ("a", "b"):
                winner, loser = (row.item_a, row.item_b) if row.verdict == "a" else (row.item_b, row.item_a)
                ranks[winner].add("C")
                ranks[loser].add("R")
        rank = {item: next(iter(given)) for item, given in ranks.items() if len(given) == 1}
        for dataset, members in _grouped(judged, lambda row: row.dataset).items():
            table = found[annotator, dataset] = Interplay()
            for row in members:
                if row.protocol == "joint" and row.verdict != "invalid":
                    if row.item_a in rank and row.item_b in rank:
                        _count(table, row, rank[row.item_a], rank[row.item_b])
                    else:
                        table.unranked += 1
    return found


def _count(table: Interplay, row: Judged, rank_a: str, rank_b: str) -> None:
    if rank_a == rank_b:
        cell = "both chosen" if rank_a == "C" else "both rejected"
        (table.ties if row.verdict == "tie" else table.decisive)[cell].append(row.pair)
        return
    verdict = row.verdict if rank_a == "C" else flipped_verdict(row.verdict)
    table.decisive[{"a": "C > R", "b": "C < R", "tie": "C ? R"}[verdict]].append(row.pair)


def average_shares(tables: Mapping[tuple[str, str], Interplay]) -> dict[str, float | None]:
    """The unweighted mean of each share over annotators and datasets that have it."""
    shares = [table.shares() for table in tables.values()]
    found: dict[str, float | None] = {}
    for cell in shares[0] if shares else []:
        values = [share[cell] for share in shares if share[cell] is not None]
        found[cell] = float(np.mean([value for value in values if value is not None])) if values else None
    return found


def length_bias(rows: Iterable[Judged]) -> dict[str, dict[str, Any]]:
    """By annotator: how often the longer response wins, of decisive verdicts on responses of different length."""
    found = {}
    for annotator, members in _grouped(rows, lambda row: row.annotator).items():
        decisive = [r for r in members if r.verdict in ("a", "b") and r.characters_a != r.characters_b]
        longer = sum((row.verdict == "a") == (row.characters_a > row.characters_b) for row in decisive)
        interval = wilson(longer, len(decisive))
        found[annotator] = {
            "decisive": len(decisive),
            "longer wins": _percent(longer, len(decisive)),
            "ci95": None if interval is None else [100 * end for end in interval],
        }
    return found


def decisiveness_by_similarity(rows: Iterable[Judged]) -> dict[str, list[dict[str, Any]]]:
    """By annotator: the share of decisive verdicts on joint comparisons, in quarters by instruction similarity."""
    found = {}
    for annotator, members in _grouped(rows, lambda row: row.annotator).items():
        joint = [row for row in members if row.protocol == "joint" and row.verdict != "invalid"]
        joint = [row for row in joint if not math.isnan(row.similarity)]  # as in files of comparisons
        joint.sort(key=lambda row: (row.similarity, row.pair))
        quarters = np.array_split(np.arange(len(joint)), min(SIMILARITY_BINS, len(joint))) if joint else []
        found[annotator] = [
            {
                "from": joint[some[0]].similarity,
                "to": joint[some[-1]].similarity,
                "comparisons": len(some),
                "decisive": _percent(sum(joint[place].verdict != "tie" for place in some), len(some)),
            }
            for some in quarters
        ]
    return found


def circles(rows: Iterable[Judged]) -> dict[str, dict[str, int]]:
    """By annotator: triples of items that were all compared, and how many of them beat each other in a circle."""
    found = {}
    valid = (row for row in rows if row.verdict in OUTCOMES)
    for annotator, members in _grouped(valid, lambda row: row.annotator).items():
        number = {item: n for n, item in enumerate(dict.fromkeys(i for r in members for i in (r.item_a, r.item_b)))}
        first, second = (np.array([number[getattr(row, side)] for row in members]) for side in ("item_a", "item_b"))
        facts = graph_facts(len(number), first, second, np.array([OUTCOMES[row.verdict] for row in members]))
        found[annotator] = {"triples": facts.triples, "circles": facts.intransitive}
    return found


def verdict_counts(rows: Iterable[Judged]) -> list[dict[str, Any]]:
    """By annotator, dataset and protocol."""
    return [
        dict(zip(("annotator", "dataset", "protocol"), kind, strict=True))
        | {verdict: counts[verdict] for verdict in ("a", "b", "tie", "invalid")}
        for kind, members in _grouped(rows, lambda row: (row.annotator, row.dataset, row.protocol)).items()
        for counts in [Counter(row.verdict for row in members)]
    ]


def _grouped(rows: Iterable[Judged], key: Callable[[Judged], K]) -> dict[K, list[Judged]]:
    groups: dict[K, list[Judged]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
