"""Joint pairs: the budget exactly, within the limits, the same whatever the tasks, or an error that says numbers."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pairs.world import clustered_vectors, side, unit_vectors

from cluster.running import NoBar
from jpo_ray.cluster import pairing, tiles
from jpo_ray.cluster.joint_problem import JointProblem
from jpo_ray.cluster.pairing import JointChoice, joint_pairs, near_duplicates
from jpo_ray.cluster.session import LARGE_AHEAD
from jpo_ray.cluster.tiles import SharedVectors, share
from jpo_ray.config import JointPairs
from jpo_ray.errors import InputError
from jpo_ray.pairs import plans
from jpo_ray.pairs.plans import run_task
from jpo_ray.pairs.sides import Side, random_groups

Pairs = list[tuple[int, int]]
ON_RAY = tiles._tasks_on_ray
HERE = SimpleNamespace(put=lambda value: value, get=lambda value: value)


def tasks_here(
    _: Any, sides: Any, vectors: SharedVectors, plan: Any, tasks: list[int], search: Any
) -> Iterator[tuple[int, bytes]]:
    for task in reversed(tasks):
        yield task, tiles.encoded(run_task(plan, task, *sides, vectors.array, search))


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in this process instead of on Ray, the last one first."""
    monkeypatch.setattr(tiles, "_tasks_on_ray", tasks_here)


def choose(
    rows: Side,
    vectors: np.ndarray,
    columns: Side | None = None,
    *,
    ray: Any = HERE,
    parts: Path | None = None,
    at_most: bool = False,
    **options: Any,
) -> JointChoice:
    budget, seed = options.pop("budget", len(rows)), options.pop("seed", 0)
    config = JointPairs(**options)
    problem = JointProblem(rows, columns or rows, share(ray, vectors), config, budget, seed, at_most=at_most)
    return joint_pairs(ray, problem, NoBar(), parts)


def pairs_of(*arguments: Any, **options: Any) -> Pairs:
    table = choose(*arguments, **options).pairs
    assert table.column_names == ["row", "column", "similarity"]
    return list(zip(table["row"].to_pylist(), table["column"].to_pylist(), strict=True))


def degrees(pairs: Pairs, count: int) -> list[int]:
    counts = Counter(item for pair in pairs for item in pair)
    return [counts[item] for item in range(count)]


def cosines(vectors: np.ndarray) -> np.ndarray:
    return np.clip(vectors.astype(np.float32) @ vectors.astype(np.float32).T, -1, 1)


def components(pairs: Pairs, count: int) -> int:
    part = list(range(count))
    for i, j in pairs:
        part = [part[i] if one == part[j] else one for one in part]
    return len(set(part))


@pytest.mark.parametrize("strategy", ["random", "similar", "stratified"])
@pytest.mark.parametrize("budget", [1, 29, 30, 31, 200, 435])
def test_the_budget_is_met_exactly_by_distinct_pairs(strategy: str, budget: int) -> None:
    """435 is every pair of 30 items, far more than the candidates looked at first."""
    pairs = pairs_of(side(30), unit_vectors(30), strategy=strategy, budget=budget)
    assert len(pairs) == budget
    assert len({frozenset(pair) for pair in pairs}) == budget
    assert all(left != right for left, right in pairs)


@pytest.mark.parametrize("strategy", ["random", "similar"])
def test_with_as_many_pairs_as_items_every_item_is_in_one(strategy: str) -> None:
    pairs = pairs_of(side(101), unit_vectors(101), strategy=strategy)
    assert min(degrees(pairs, 101)) >= 1


def test_all_pairs_are_equally_likely() -> None:
    """8 of the 28 pairs of 8 items, over 1,000 seeds: chi-square with 27 degrees of freedom, 99.9 % quantile 55.5."""
    rows, vectors = side(8), unit_vectors(8)
    counts = np.zeros((8, 8))
    for seed in range(1000):
        for left, right in pairs_of(rows, vectors, seed=seed):
            counts[min(left, right), max(left, right)] += 1
    found = counts[np.triu_indices(8, 1)]
    assert found.sum() == 8000
    assert ((found - 8000 / 28) ** 2 / (8000 / 28)).sum() < 55.5


def test_the_seed_decides_random_pairs() -> None:
    rows, vectors = side(40), unit_vectors(40)
    first, again, other = (set(pairs_of(rows, vectors, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert len(first & other) < 10  # of 40; by chance about 2


def test_similar_pairs_are_the_nearest_neighbours() -> None:
    vectors = unit_vectors(25)
    cosine = cosines(vectors)
    np.fill_diagonal(cosine, -2)
    nearest = {frozenset((row, int(cosine[row].argmax()))) for row in range(25)}
    pairs = pairs_of(side(25), vectors, strategy="similar", budget=len(nearest))
    assert {frozenset(pair) for pair in pairs} == nearest


def test_stratified_pairs_are_spread_evenly_over_similarities() -> None:
    """Most pairs of 300 items are around 0.35; each of the four ranges gets a quarter all the same."""
    vectors = unit_vectors(300)
    every = np.histogram(cosines(vectors)[np.triu_indices(300, 1)], bins=4, range=(0.0, 0.9))[0]
    assert every.max() > 3 * every.min()
    found = choose(side(300), vectors, strategy="stratified", bins=4, min_similarity=0.0, max_similarity=0.9)
    counts = np.histogram(found.pairs["similarity"].to_numpy(), bins=4, range=(0.0, 0.9))[0]
    assert counts.tolist() == [75, 75, 75, 75]


def test_what_a_range_of_similarities_lacks_the_others_get() -> None:
    vectors = unit_vectors(60)
    cosine = cosines(vectors)[np.triu_indices(60, 1)]
    rare = int((cosine > 0.7).sum())
    assert 0 < rare < 100
    found = choose(side(60), vectors, strategy="stratified", bins=2, min_similarity=0.4, max_similarity=1.0, budget=200)
    assert int((found.pairs["similarity"].to_numpy() > 0.7).sum()) == rare


def test_proxy_pairs_take_one_item_from_each_side() -> None:
    rows, columns = side(6), side(9, name="rejected")
    pairs = pairs_of(rows, unit_vectors(9), columns, strategy="proxy", budget=6 * 9 - 6)
    assert set(pairs) == {(row, column) for row in range(6) for column in range(9) if row != column}


def test_groups_are_kept_to() -> None:
    plain = side(40)
    rows = replace(plain, groups=random_groups(plain.keys, 4, 0))
    assert rows.groups is not None
    pairs = pairs_of(rows, unit_vectors(40), budget=180)
    assert {frozenset(pair) for pair in pairs} == {
        frozenset((i, j)) for i, j in combinations(range(40), 2) if rows.groups[i] == rows.groups[j]
    }
    with pytest.raises(InputError, match=r"leaves 180 pairs, the budget asks for 181; raise group_size or"):
        pairs_of(rows, unit_vectors(40), budget=181)


@pytest.mark.parametrize("strategy", ["random", "similar", "stratified"])
@pytest.mark.parametrize(("limit", "budget"), [(2, 30), (4, 60), (5, 70), (3, 44)])
def test_no_item_is_in_more_pairs_than_it_may(strategy: str, limit: int, budget: int) -> None:
    """Down to limits that leave no choice: 30 items in exactly 2 of 30 pairs, 4 of 60."""
    pairs = pairs_of(side(30), unit_vectors(30), strategy=strategy, budget=budget, max_per_item=limit)
    assert max(degrees(pairs, 30)) <= limit
    assert len(pairs) == budget


def test_connected_pairs_join_all_items() -> None:
    """Two clouds of items far apart: their nearest neighbours alone never join them."""
    vectors = np.concatenate([unit_vectors(30, seed=1), -unit_vectors(30, seed=2)])
    rows = side(60)
    assert components(pairs_of(rows, vectors, strategy="similar"), 60) > 1
    pairs = pairs_of(rows, vectors, strategy="similar", connected=True)
    assert (len(pairs), components(pairs, 60)) == (60, 1)
    limited = pairs_of(rows, vectors, strategy="similar", connected=True, max_per_item=4)
    assert components(limited, 60) == 1
    assert max(degrees(limited, 60)) <= 4
    with pytest.raises(
        InputError, match=r"connected: .*\[0\.55, 1\] leave fall into 2 parts, which no pair joins; widen"
    ):
        pairs_of(rows, vectors, min_similarity=0.55, connected=True)


def test_many_clouds_are_joined_without_longer_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 clouds of 15 near-equal items: the nearest 6 of an item never leave its cloud."""
    monkeypatch.setattr(pairing, "MOST_CANDIDATES", 0)
    vectors = clustered_vectors(600, 40, seed=3, spread=0.05)
    rows = side(600)
    options = {"strategy": "similar", "budget": 700, "connected": True}
    pairs = pairs_of(rows, vectors, **options)
    assert (len(pairs), components(pairs, 600)) == (700, 1)
    between = cosines(vectors)[tuple(np.array(pairs).T)] < 0.8
    assert 30 < between.sum() < 80  # a bridge or two for each cloud
    limited = pairs_of(rows, vectors, max_per_item=4, **options)
    assert components(limited, 600) == 1
    assert max(degrees(limited, 600)) <= 4


def test_two_sides_are_joined() -> None:
    """Rows and columns in two clouds each, whose cosines with the other cloud are below 0.5."""
    vectors = np.concatenate([unit_vectors(20, seed=1), -unit_vectors(20, seed=2)])
    assert cosines(vectors)[:20, 20:].max() < 0.5
    rows = side(20, [*range(10), *range(20, 30)])
    columns = side(20, [*range(10, 20), *range(30, 40)], name="rejected")
    pairs = pairs_of(rows, vectors, columns, strategy="proxy", connected=True, budget=39)
    assert len(pairs) == 39
    assert components([(row, 20 + column) for row, column in pairs], 40) == 1
    with pytest.raises(InputError, match=r"fall into \d parts, which no pair joins"):
        pairs_of(rows, vectors, columns, strategy="proxy", connected=True, budget=60, min_similarity=0.5)


def test_parts_are_joined_where_not_all_pairs_are_looked_at() -> None:
    vectors = clustered_vectors(1500, 40, seed=4, spread=0.3)
    options = {"strategy": "similar", "approximate_above": 1000, "connected": True, "budget": 2000}
    pairs = pairs_of(side(1500), vectors, **options)
    assert (len(pairs), components(pairs, 1500)) == (2000, 1)


@pytest.mark.parametrize(("rows", "columns", "budget"), [(10, 1000, 1010), (100, 300, 400), (300, 100, 400)])
def test_every_item_of_both_sides_gets_its_least(rows: int, columns: int, budget: int) -> None:
    vectors = unit_vectors(rows + columns)
    left, right = side(rows), side(columns, list(range(rows, rows + columns)), name="rejected")
    pairs = pairs_of(left, vectors, right, strategy="proxy", budget=budget, min_per_item=1)
    assert len(pairs) == budget
    assert {row for row, _ in pairs} == set(range(rows))
    assert {column for _, column in pairs} == set(range(columns))


def test_limits_that_take_a_ranges_places_do_not_make_lists_longer_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    select = pairing.select

    def counted(found: Any, *arguments: Any) -> Any:
        chosen.append(len(found.row))
        return select(found, *arguments)

    monkeypatch.setattr(pairing, "select", counted)
    options = {"strategy": "stratified", "min_similarity": 0.0, "max_similarity": 0.9, "connected": True}
    pairs = pairs_of(side(400), unit_vectors(400), budget=400, **options)
    assert (len(pairs), components(pairs, 400)) == (400, 1)
    assert len(chosen) <= 4


def test_vectors_that_are_no_directions_are_refused() -> None:
    vectors = unit_vectors(30)
    for value in (0, np.nan, np.inf, 3):
        broken = vectors.copy()
        broken[7] = value
        with pytest.raises(InputError, match="vector 7 of 30 has the norm"):
            pairs_of(side(30), broken)


def test_what_another_run_left_is_not_taken(tmp_path: Path) -> None:
    rows, vectors = side(60), unit_vectors(60)
    left = []
    for seed in (0, 9):
        left.append(choose(rows, vectors, seed=seed, parts=tmp_path).pairs)
        assert left[-1] == choose(rows, vectors, seed=seed).pairs
    assert left[0] != left[1]


@pytest.mark.parametrize(("least", "budget"), [(1, 60), (2, 115), (3, 170), (5, 300)])
def test_every_item_gets_its_least_where_the_budget_allows(least: int, budget: int) -> None:
    """100 items, at least so many pairs of each; with chance alone some have fewer."""
    rows, vectors = side(100), unit_vectors(100)
    assert min(degrees(pairs_of(rows, vectors, budget=budget), 100)) < least or least == 1
    assert min(degrees(pairs_of(rows, vectors, budget=budget, min_per_item=least), 100)) >= least


def test_a_limit_leaves_the_shares_of_similarities_equal() -> None:
    """Few pairs are as similar as the last range asks for, and they crowd on few items."""
    vectors = unit_vectors(300)
    options = {"strategy": "stratified", "bins": 4, "min_similarity": 0.0, "max_similarity": 0.9, "max_per_item": 2}
    found = choose(side(300), vectors, budget=240, **options).pairs
    counts = np.histogram(found["similarity"].to_numpy(), bins=4, range=(0.0, 0.9))[0]
    assert counts.tolist() == [60, 60, 60, 60]
    assert max(degrees(list(zip(found["row"].to_pylist(), found["column"].to_pylist(), strict=True)), 300)) <= 2


def test_a_budget_that_is_only_wished_for_takes_what_there_is() -> None:
    rows, vectors = side(30), unit_vectors(30)
    there = int(np.triu(cosines(vectors) >= 0.5, 1).sum())
    assert len(choose(rows, vectors, min_similarity=0.5, budget=there + 50, at_most=True).pairs) == there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_per_item": 3, "budget": 46},
            "max_per_item: 30 items in at most 3 pairs each make at most 45 pairs, the budget asks for 46; raise it or",
        ),
        (
            {"min_per_item": 4, "budget": 59},
            "min_per_item: 30 items in at least 4 pairs each take at least 60 pairs, the budget gives 59; lower it or",
        ),
        (
            {"connected": True, "budget": 28},
            "connected: it takes 29 pairs to connect 30 items, the budget gives 28; raise pairs.joint.budget",
        ),
        ({"budget": 436}, "pairs.joint: 30 items make 435 pairs, the budget asks for 436; lower pairs.joint.budget"),
        ({"min_per_item": 3, "budget": 45}, "of 30 items are in fewer than 3 pairs (the fewest: "),
    ],
)
def test_limits_that_cannot_be_met_say_so_with_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        pairs_of(side(30), unit_vectors(30), **options)


def test_enough_budget_gives_every_item_its_least() -> None:
    assert min(degrees(pairs_of(side(30), unit_vectors(30), min_per_item=3, budget=90), 30)) >= 3


def test_a_band_too_narrow_says_how_many_pairs_there_are() -> None:
    rows, vectors = side(30), unit_vectors(30)
    there = int(np.triu(cosines(vectors) >= 0.5, 1).sum())
    assert 0 < there < 200
    assert len(pairs_of(rows, vectors, min_similarity=0.5, budget=there)) == there
    message = rf"the similarity band \[0\.5, 1\] leaves {there} pairs, the budget asks for {there + 1}; widen"
    with pytest.raises(InputError, match=message):
        pairs_of(rows, vectors, min_similarity=0.5, budget=there + 1)
    with pytest.raises(InputError, match="leaves 0 pairs"):
        pairs_of(rows, vectors, min_similarity=0.9999, budget=1)


@pytest.mark.parametrize("strategy", ["random", "similar", "stratified"])
def test_tasks_and_tiles_change_nothing(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vectors = side(90), unit_vectors(90)
    options = {"strategy": strategy, "min_similarity": 0.2, "budget": 120, "max_per_item": 4}
    expected = choose(rows, vectors, **options).pairs
    monkeypatch.setattr(plans, "BLOCK_ROWS", 7)
    monkeypatch.setattr("jpo_ray.pairs.candidates.STRIP", 11)
    assert choose(rows, vectors, **options).pairs.select(["row", "column"]) == expected.select(["row", "column"])


def test_a_killed_run_goes_on_with_the_tasks_it_had_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "BLOCK_ROWS", 10)
    rows, vectors = side(60), unit_vectors(60)
    ran: list[int] = []

    def dying(after: int) -> Callable[..., Iterator[tuple[int, bytes]]]:
        def tasks(*arguments: Any) -> Iterator[tuple[int, bytes]]:
            for task, found in tasks_here(*arguments):
                if len(ran) == after:
                    raise KeyboardInterrupt
                ran.append(task)
                yield task, found

        return tasks

    expected = choose(rows, vectors).pairs
    monkeypatch.setattr(tiles, "_tasks_on_ray", dying(after=4))
    with pytest.raises(KeyboardInterrupt):
        choose(rows, vectors, parts=tmp_path)
    monkeypatch.setattr(tiles, "_tasks_on_ray", dying(after=6))
    assert choose(rows, vectors, parts=tmp_path).pairs == expected
    assert sorted(ran) == [0, 1, 2, 3, 4, 5]


def test_parts_of_another_plan_are_not_taken_for_a_run_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many tasks over the same items."""
    monkeypatch.setattr(pairing, "SAMPLED_COLUMNS", 100)
    monkeypatch.setattr(pairing, "CLUSTER_SIZE", 20)
    rows, vectors, ran = side(600), unit_vectors(600), []
    monkeypatch.setattr(tiles, "_tasks_on_ray", lambda *how: ran.append(len(how[4])) or tasks_here(*how))
    choose(rows, vectors, parts=tmp_path)
    choose(rows, vectors, parts=tmp_path)
    monkeypatch.setattr(pairing, "SAMPLED_COLUMNS", 120)
    expected = choose(rows, vectors)
    assert choose(rows, vectors, parts=tmp_path).pairs == expected.pairs
    assert ran == [1, 0, 1, 1]


def test_approximate_candidates_find_what_is_near_and_say_how_much_of_it() -> None:
    vectors = clustered_vectors(1500, 40, seed=4)
    rows = side(1500)
    options = {"strategy": "similar", "budget": 1500}
    exact, near = choose(rows, vectors, **options), choose(rows, vectors, approximate_above=1000, **options)
    assert exact.notes == {}
    assert near.notes["recall"] >= 0.95
    assert 1 <= near.notes["clusters met"] < near.notes["clusters"]
    same = {frozenset(pair) for pair in pairs_of(rows, vectors, **options)} & {
        frozenset(pair) for pair in pairs_of(rows, vectors, approximate_above=1000, **options)
    }
    assert len(same) > 0.95 * 1500


def test_too_little_recall_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "MOST_NEAR", 1)
    vectors = clustered_vectors(1500, 40, seed=4)
    notes = choose(side(1500), vectors, strategy="similar", approximate_above=1000, min_recall=0.999).notes
    assert 0.1 < notes["recall"] < 0.999
    assert re.search(r"find \d+\.\d+% of the exact ones, .*min_recall asks for 99\.90%", notes["warning"])


def test_random_pairs_of_many_items_come_from_a_sample_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a band, or with limits, as many are met as the band leaves of them."""
    monkeypatch.setattr(pairing, "SAMPLED_COLUMNS", 100)
    rows, vectors = side(1500), unit_vectors(1500)
    found = choose(rows, vectors, approximate_above=1000, max_per_item=20)
    assert found.notes["columns met at random"] == 100
    assert len(found.pairs) == 1500
    mean = float(np.mean(found.pairs["similarity"].to_numpy()))
    assert abs(mean - float(cosines(vectors)[np.triu_indices(1500, 1)].mean())) < 0.03


def test_random_pairs_need_no_look_at_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,500 items in 75 groups of 20, each of which meets 6 others: 180 thousand pairs are looked at, of 2.2 million.

    An item proposes 4 partners, and is the partner of 4 others on average, with a binomial's variance of 4 (the
    standard error of a variance of 1,500 is 0.17).
    """
    monkeypatch.setattr(pairing, "SAMPLED_COLUMNS", 100)
    monkeypatch.setattr(pairing, "CLUSTER_SIZE", 20)
    rows, vectors = side(1500), unit_vectors(1500)
    looked_at = []
    monkeypatch.setattr(tiles, "_tasks_on_ray", lambda *how: looked_at.append(how[3]) or tasks_here(*how))
    found = choose(rows, vectors, budget=6000)
    assert found.notes == {"columns met at random": 120}
    [plan] = looked_at
    assert sum(len(some) * len(met) for task in range(plan.tasks) for some, met in plan.blocks(task)) == 1500 * 120
    pairs = list(zip(found.pairs["row"].to_pylist(), found.pairs["column"].to_pylist(), strict=True))
    assert len({frozenset(pair) for pair in pairs}) == 6000
    as_row, as_column = (np.bincount(ends, minlength=1500) for ends in zip(*pairs, strict=True))
    assert set(as_row.tolist()) <= {3, 4, 5}
    assert 3.4 < float(as_column.var()) < 4.6
    monkeypatch.setattr(plans, "TASK_ROWS", 300)
    again = choose(rows, vectors, budget=6000)
    assert again.pairs.equals(found.pairs)


def _times_met(count: int, others: int | None, budget: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int]]:
    """The choice, and how many groups of 20 rows meet each column, none of them twice."""
    monkeypatch.setattr(pairing, "CLUSTER_SIZE", 20)
    looked_at = []
    monkeypatch.setattr(tiles, "_tasks_on_ray", lambda *how: looked_at.append(how[3]) or tasks_here(*how))
    columns = None if others is None else side(others, name="other")
    found = choose(
        side(count),
        unit_vectors(max(count, others or 0)),
        columns,
        budget=budget,
        strategy="random" if columns is None else "proxy",
    )
    [plan] = looked_at
    met = [np.sort(columns) for task in range(plan.tasks) for _, columns in plan.blocks(task)]
    assert len(met) == count // 20
    assert all(len(np.unique(columns)) == len(columns) for columns in met)
    return found, np.bincount(np.concatenate(met), minlength=others or count).tolist()


def test_two_sides_meet_in_samples_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of 300 columns is met by 1,200 rows as often as any other: a third of the pairs."""
    monkeypatch.setattr(pairing, "SAMPLED_COLUMNS", 80)
    found, met = _times_met(1200, 300, 3000, monkeypatch)
    assert found.notes == {"columns met at random": 100}
    assert met == [20] * 300
    as_column = np.bincount(found.pairs["column"].to_numpy(), minlength=300)
    assert as_column.sum() == 3000
    assert 7 < float(as_column.var()) < 13  # of a binomial 10


@pytest.mark.parametrize(
    ("rows", "columns", "wanted", "times"),
    [
        (20, 70, 17, {4, 5}),  # 340 times 70 groups: 4.86
        (2, 34, 17, {1}),
        (2, 60, 17, {1}),  # 30 each, or some would be met by none
        (50, 15, 5, {16, 17}),
        (35, None, 17, {17}),
        (34, None, 17, {17}),
    ],
)
def test_columns_are_met_as_often_as_each_other(
    rows: int, columns: int | None, wanted: int, times: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of groups of 20."""
    monkeypatch.setattr(pairing, "SAMPLED_COLUMNS", 20 * (wanted - 1))
    _, met = _times_met(20 * rows, columns and 20 * columns, 40, monkeypatch)
    assert set(met) == times


def test_groups_of_items_meet_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the groups that each meets, 5, divide those there are, 20."""
    monkeypatch.setattr(pairing, "SAMPLED_COLUMNS", 80)
    monkeypatch.setattr(pairing, "CLUSTER_SIZE", 20)
    looked_at = []
    monkeypatch.setattr(tiles, "_tasks_on_ray", lambda *how: looked_at.append(how[3]) or tasks_here(*how))
    choose(side(400), unit_vectors(400), budget=400)
    assert len({frozenset(some) for some in looked_at[0].meets.tolist()}) == 20


@pytest.mark.parametrize(
    "limit", [{"max_per_item": 20}, {"min_per_item": 1}, {"connected": True}, {"min_similarity": -0.5}]
)
def test_limits_are_kept_by_a_look_at_all_pairs(limit: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "SAMPLED_COLUMNS", 100)
    assert choose(side(600), unit_vectors(600), **limit).notes == {}


def test_near_duplicates_are_found_in_both_modes() -> None:
    vectors = unit_vectors(1200, width=48)
    copies = vectors.copy()
    copies[700] = vectors[3]
    copies[701] = vectors[5]
    copies[702] = vectors[5]
    expected = {(3, 700), (5, 701), (5, 702), (701, 702)}
    every = np.arange(1200)
    for above in (5000, 500):
        config = JointPairs(strategy="similar", min_similarity=0.99, approximate_above=above)
        first, second, similarity = near_duplicates(HERE, share(HERE, copies), every, every, config, 8, 0, NoBar())
        assert set(zip(first.tolist(), second.tolist(), strict=True)) == expected | {(b, a) for a, b in expected}
        assert similarity.min() > 0.99
        some = near_duplicates(HERE, share(HERE, copies), every[700:], every[:10], config, 1, 0, NoBar())
        assert list(zip(*(values.tolist() for values in some[:2]), strict=True)) == [(700, 3), (701, 5), (702, 5)]


def test_few_tasks_results_wait_to_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be large: beside the one at hand two at most are there."""
    monkeypatch.setattr(plans, "BLOCK_ROWS", 1)
    made: list[int] = []
    waiting: list[int] = []

    def counted(*arguments: Any) -> Iterator[tuple[int, bytes]]:
        for each in tasks_here(*arguments):
            made.append(each[0])
            yield each

    class SlowBar(NoBar):
        def advance(self, count: int) -> None:
            if count:
                time.sleep(0.01)
                waiting.append(len(made) - len(waiting) - 1)

    monkeypatch.setattr(tiles, "_tasks_on_ray", counted)
    rows = side(40)
    problem = JointProblem(rows, rows, share(HERE, unit_vectors(40)), JointPairs(), budget=40, seed=0)
    joint_pairs(HERE, problem, SlowBar(), tmp_path)
    assert len(made) == len(waiting) >= 40
    assert 0 < max(waiting) <= LARGE_AHEAD


def test_proxy_pairs_within_groups_that_lack_a_side() -> None:
    rows, columns = side(100), side(3, list(range(100, 103)), name="rejected")
    rows, columns = (replace(s, groups=random_groups(s.keys, 10, 0)) for s in (rows, columns))
    pairs = pairs_of(rows, unit_vectors(103), columns, strategy="proxy", budget=20)
    assert rows.groups is not None
    assert columns.groups is not None
    assert all(rows.groups[i] == columns.groups[j] for i, j in pairs)


@pytest.mark.ray
def test_tasks_on_ray_give_what_tasks_here_give(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tasks of Ray Data, some without any candidate, as tasks and in actors, against one in this process."""
    rows, vectors = side(40), unit_vectors(40)
    ways = (("random", -1.0, 40, 16), ("similar", 0.66, 20, 16), ("stratified", 0.1, 30, 16), ("random", -1.0, 40, 2))
    for strategy, low, budget, pool in ways:
        options = {"strategy": strategy, "min_similarity": low, "budget": budget, "seed": 4}
        expected = choose(rows, vectors, **options)
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "_tasks_on_ray", ON_RAY)
            patch.setattr(plans, "BLOCK_ROWS", 6)
            patch.setattr(tiles, "POOL_TASKS", pool)
            assert choose(rows, vectors, ray=ray_cluster, **options).pairs == expected.pairs
