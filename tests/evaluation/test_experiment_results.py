"""Groups of an experiment by hand, the point of saturation, and the page."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from jpo_ray.evaluation.experiment_results import (
    Measured,
    curves_of,
    difference,
    groups_of,
    markdown_table,
    saturation,
    saturation_text,
    write_results,
)

VERDICT = {"w": "a", "l": "b", "t": "tie", "x": "invalid"}


def measured(entry: str, repetition: str, of_temperature: dict[float, str], **settings: object) -> Measured:
    """`of_temperature`: verdicts on instructions 0, 1, .. at each temperature, a letter each."""
    rows = [
        {"instruction_id": str(n), "model": f"{entry}-{repetition}", "temperature": t, "verdict": VERDICT[letter]}
        for t, letters in of_temperature.items()
        for n, letter in enumerate(letters)
    ]
    return Measured(entry, settings, repetition, pa.Table.from_pylist(rows))


def test_a_group_is_the_mean_over_repetitions_and_temperatures() -> None:
    """Seed 0: 100 and 50 percent, seed 1: 25 (one invalid, so of two) and 50."""
    found = groups_of(
        [
            measured("jpo", "0", {0.0: "www", 1.0: "wlt"}, size=100),
            measured("jpo", "1", {0.0: "ltx", 1.0: "lwt"}, size=100),
            measured("jpo", "0", {0.0: "lll", 1.0: "lll"}, size=10),
            measured("sft", "", {0.0: "lll", 1.0: "www"}),
        ],
        200,
        0,
    )
    large, small, sft = found
    assert (large.entry, large.settings, large.win_rate) == ("jpo", {"size": 100}, (100 + 50 + 25 + 50) / 4)
    assert large.by_temperature == {"0.0": (100 + 25) / 2, "1.0": 50.0}
    assert large.repetitions == [75.0, 37.5]
    assert large.spread == pytest.approx(26.5165, abs=1e-3)
    assert (large.n, large.invalid) == (11, 1)
    low, high = large.ci95
    assert low is not None
    assert high is not None
    assert low < large.win_rate < high
    assert (small.win_rate, small.ci95, small.spread) == (0.0, [0.0, 0.0], None)
    assert (sft.entry, sft.win_rate) == ("sft", 50.0)
    assert groups_of([measured("jpo", "0", {0.0: "w"}, size=100)], 10, 0)[0].win_rate == 100


def test_what_has_no_valid_judgment_has_no_rate() -> None:
    (group,) = groups_of([measured("jpo", "0", {0.0: "xx"})], 10, 0)
    assert (group.win_rate, group.repetitions, group.n, group.invalid) == (None, [None], 0, 2)
    assert "| - |" in markdown_table([group])


def test_a_difference_pairs_the_instructions() -> None:
    """Means of 75 and 50 percent; both groups are right on the same instructions, so 25 points stand in each resample
    but for the share of instruction 3, on which alone they differ.
    """
    first = [measured("jpo", seed, {0.0: "wwwl" * 25}) for seed in ("0", "1")]
    second = [measured("sft", "", {0.0: "wwll" * 25})]
    points, (low, high) = difference(first, second, 500, 0)
    assert points == 25.0
    assert low is not None
    assert high is not None
    assert (low, high) == pytest.approx((25 - 8.5, 25 + 8.5), abs=1.5)  # 1.96 sqrt(0.25 * 0.75 / 100) in points
    same = [measured("jpo", "2", {0.0: "wwwl" * 25, 1.0: "wwwl" * 25})]
    assert difference(same, first, 500, 0) == (0.0, [0.0, 0.0])
    with pytest.raises(ValueError, match="not judged on the same instructions"):
        difference(first, [measured("sft", "", {0.0: "ww"})], 10, 0)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([42.4, 60.0, 71.0, 71.5, 71.7], 3),
        ([50.0, 50.1, 50.2], 1),
        ([40.0, 50.0, 60.0], None),  # may go on
        ([60.0, 50.0, 59.5, 60.0], 3),  # back and forth is not saturated
        ([50.0, 50.0], None),
    ],
)
def test_saturation_is_where_the_curve_stops_to_move(rates: list[float], expected: float | None) -> None:
    points = [(float(n), rate) for n, rate in enumerate(rates, start=1)]
    assert saturation(points, within=1.0) == expected
    said = (
        "" if len(rates) < 3 else "still moving" if expected is None else f"1 point of its last value from {expected:g}"
    )
    assert said in saturation_text(points, within=1.0)


def test_sizes_beyond_the_supply_are_one_point() -> None:
    """What there was to train on counts: 2,000 and 4,000 of 1,500 comparisons are the same training twice."""
    sizes = {100: "lll", 1000: "lww", 2000: "www", 4000: "www"}
    models = [
        replace(measured("jpo", "0", {0.0: letters}, max_train_comparisons=size), comparisons=min(size, 1500))
        for size, letters in sizes.items()
    ]
    points = [(x, rate) for x, rate, *_ in curves_of(groups_of(models, 50, 0), "max_train_comparisons")["jpo"]]
    assert [x for x, _ in points] == [100, 1000, 1500, 1500]
    assert saturation(points, 1.0) is None


def test_settings_may_be_lists() -> None:
    """Kinds of comparisons are one; lists are no keys of a dictionary."""
    kinds = (["joint"], ["conditional", "joint"])
    found = groups_of([measured("jpo", "0", {0.0: "wl"}, protocols=some) for some in kinds], 10, 0)
    assert [group.settings["protocols"] for group in found] == list(kinds)
    assert "| jpo | ['conditional', 'joint'] |" in markdown_table(found)


def test_a_difference_counts_how_repetitions_differ() -> None:
    """All instructions give the same, seeds do not: 100, 0 and 50 percent against 50. The mean of three seeds has a
    standard error of sd / sqrt(3) = 28.9 points; a bootstrap of three, unscaled, would have 23.6.
    """
    first = [measured("jpo", str(seed), {0.0: letter * 10}) for seed, letter in enumerate("wlt")]
    second = [measured("sft", "", {0.0: "t" * 10})]
    points, (low, high) = difference(first, second, 4000, 0)
    assert points == 0.0
    assert low is not None
    assert high is not None
    assert (low, high) == pytest.approx((-61, 61), abs=1)  # two of three the same: +-50 x sqrt(3 / 2)
    assert difference(second, second, 100, 0) == (0.0, [0.0, 0.0])


def test_the_page_shows_a_curve_where_numbers_vary(tmp_path: Path) -> None:
    sizes = {100: "lll", 1000: "lww", 10000: "www"}
    models = [measured("jpo", "0", {0.0: letters}, size=size) for size, letters in sizes.items()]
    groups = groups_of([measured("sft", "", {0.0: "lll"}), *models], 50, 0)
    found = write_results("data <scaling>", groups, "size", 1.0, tmp_path, {"runs": 1})
    assert found["saturation"] == {"jpo": None}
    assert json.loads((tmp_path / "results.json").read_text())["groups"][1]["win_rate"] == 0.0
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == 1
    assert "data &lt;scaling&gt;" in page
    assert "jpo: still moving at its last value" in page
    assert (tmp_path / "results.md").read_text().count("\n") == 8
    words = [measured("jpo", "0", {0.0: "wl"}, strategy=name) for name in ("random", "similar")]
    write_results("strategies", groups_of(words, 50, 0), "strategy", 1.0, tmp_path, {})
    assert "<svg" not in (tmp_path / "index.html").read_text()
    assert "curve.svg" not in (tmp_path / "results.md").read_text()
