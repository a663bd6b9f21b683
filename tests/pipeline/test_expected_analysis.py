"""The oracle as several noisy annotators: what the analysis finds is what their noise makes one expect.

The verdict of an annotator whose error is normal follows from the difference of two qualities, so agreement and
interplay have expected values and variances that can be written down.
"""

import math
from collections import Counter
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest

from jpo_ray import records
from jpo_ray.evaluation.run_judgments import compared_in, judged_rows
from jpo_ray.feedback.analysis import CELLS, analysis_of
from jpo_ray.runs import RunDir
from jpo_ray.sandbox import quality
from pipeline.inline import install, run, small_config

NOISE = {"sandbox": 0.1, "ann": 0.2, "bob": 0.3}
BAND = 0.05
Chances = dict[str, float]  # verdict -> probability


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("expected") / "run"
    first, *others = ({"annotator": "sandbox", "name": n, "noise": s, "tie_band": BAND} for n, s in NOISE.items())
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        config = small_config(
            items={"train": [{"path": "sandbox", "limit": 400}]}, judge=first | {"also": others},
            pairs={"joint": {"budget": 1200}}, sample=None, evaluate=None,
        )  # fmt: skip
        run(config, folder, ["items", "pairs", "judge"])
    return RunDir(folder)


def chances(difference: float, noise: float) -> Chances:
    """Of the verdict from both orders, whose errors are independent: agreement stands, anything else is a tie."""
    error = NormalDist(difference, noise)
    a, b = (1 - error.cdf(BAND)) ** 2, error.cdf(-BAND) ** 2
    return {"a": a, "b": b, "tie": 1 - a - b}


@pytest.fixture(scope="module")
def expected(judged: RunDir) -> dict[str, dict[str, Chances]]:
    """By annotator and comparison."""
    compared = compared_in(judged).comparisons
    differences = {
        key: quality(each.instruction_a, each.response_a) - quality(each.instruction_b, each.response_b)
        for key, each in compared.items()
    }
    return {name: {key: chances(d, noise) for key, d in differences.items()} for name, noise in NOISE.items()}


@pytest.fixture(scope="module")
def found(judged: RunDir) -> dict[str, Any]:
    compared = compared_in(judged)
    return analysis_of(list(judged_rows(compared, compared.judgments)), [])


def within(value: float, chance: list[float], scale: list[float] | None = None) -> bool:
    """Whether a sum of independent yes-or-no events is as expected, within four standard deviations."""
    spread = math.sqrt(sum(p * (1 - p) for p in chance)) if scale is None else math.sqrt(sum(scale))
    return abs(value - sum(chance)) < 4 * spread


def test_verdicts_are_as_often_as_expected(found: dict[str, Any], expected: dict[str, dict[str, Chances]]) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for row in found["verdicts"]:
        counts.update({(row["annotator"], verdict): row[verdict] for verdict in ("a", "b", "tie")})
    for name, of in expected.items():
        for verdict in ("a", "b", "tie"):
            assert within(counts[name, verdict], [each[verdict] for each in of.values()])


def test_agreement_is_as_expected(
    judged: RunDir, found: dict[str, Any], expected: dict[str, dict[str, Chances]]
) -> None:
    protocol_of = {key: each.protocol for key, each in compared_in(judged).comparisons.items()}
    assert len(found["agreements"]) == 6  # three pairs of annotators, two protocols
    for row in found["agreements"]:
        one, other = expected[row["one"]], expected[row["other"]]
        here = [key for key, protocol in protocol_of.items() if protocol == row["protocol"]]
        means, variances = [], []
        for key in here:
            p, q = one[key], other[key]
            full = sum(p[verdict] * q[verdict] for verdict in p)
            half = p["tie"] * (1 - q["tie"]) + q["tie"] * (1 - p["tie"])
            means.append(full + half / 2)
            variances.append(full + half / 4 - means[-1] ** 2)
        assert row["comparisons"] == len(here) > 300
        assert within(row["score"] / 100 * len(here), means, variances)


def test_interplay_is_as_expected(
    judged: RunDir, found: dict[str, Any], expected: dict[str, dict[str, Chances]]
) -> None:
    """Each item is in one conditional comparison, so ranks of two items of a joint one are independent."""
    pairs = records.read_table(judged.path("pairs") / "pairs.parquet", records.PAIRS).to_pylist()
    for row in found["interplay"]:
        of = expected[row["annotator"]]
        rank: dict[str, dict[str, float]] = {}
        for pair in (pair for pair in pairs if pair["protocol"] == "conditional"):
            won = of[pair["pair_id"]]
            rank[pair["item_a"]] = {"C": won["a"], "R": won["b"]}
            rank[pair["item_b"]] = {"C": won["b"], "R": won["a"]}
        cells: dict[str, list[float]] = {cell: [] for cell in CELLS}
        for pair in (pair for pair in pairs if pair["protocol"] == "joint"):
            a, b, says = rank[pair["item_a"]], rank[pair["item_b"]], of[pair["pair_id"]]
            decisive = says["a"] + says["b"]
            cells["both chosen"].append(a["C"] * b["C"] * decisive)
            cells["both rejected"].append(a["R"] * b["R"] * decisive)
            cells["C > R"].append(a["C"] * b["R"] * says["a"] + a["R"] * b["C"] * says["b"])
            cells["C < R"].append(a["C"] * b["R"] * says["b"] + a["R"] * b["C"] * says["a"])
            cells["C ? R"].append((a["C"] * b["R"] + a["R"] * b["C"]) * says["tie"])
        for cell, chance in cells.items():
            # Comparisons of one item depend on each other through its rank: twice the spread of independent ones.
            spread = [4 * p * (1 - p) for p in chance]
            assert within(len(row["comparisons"][cell]), chance, spread), (row["annotator"], cell)
    assert {row["annotator"] for row in found["interplay"]} == set(NOISE)


def test_the_page_is_written_for_it(judged: RunDir, tmp_path: Path) -> None:
    from jpo_ray.cli import main

    assert main(["analyze", "--run-dir", str(judged.root), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "index.html").exists()
