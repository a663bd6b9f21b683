"""Plans cover what they say they cover, and clusters find neighbours."""

from dataclasses import replace

import numpy as np
import pytest

from jpo_ray.pairs import plans
from jpo_ray.pairs.candidates import Candidates, Search, block_candidates
from jpo_ray.pairs.clusters import cluster
from jpo_ray.pairs.plans import Exact, Parts, Plan, grouped, run_task
from jpo_ray.pairs.sides import Side, random_groups
from pairs.world import clustered_vectors, side, unit_vectors

SEARCH = Search("random", (-1.0, 1.0), keep=5, seed=2)


def run(plan: Plan, rows: Side, columns: Side, vectors: np.ndarray, search: Search = SEARCH) -> list[Candidates]:
    return [run_task(plan, task, rows, columns, vectors, search) for task in range(plan.tasks)]


def pairs(parts: list[Candidates]) -> set[tuple[int, int]]:
    return {pair for part in parts for pair in zip(part.row.tolist(), part.column.tolist(), strict=True)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BLOCK_ROWS", "TASK_ROWS"):
        monkeypatch.setattr(plans, name, 16)


def test_tasks_of_the_exact_plan_are_one_block_of_all() -> None:
    rows, vectors = side(40), unit_vectors(40)
    parts = run(Exact(np.arange(40)), rows, rows, vectors)
    assert [len(set(part.row.tolist())) for part in parts] == [16, 16, 8]
    assert pairs(parts) == pairs([block_candidates(rows, rows, vectors, SEARCH)])
    some = np.array([3, 4, 39])
    assert pairs(run(Exact(some), rows, rows, vectors)) == {p for p in pairs(parts) if p[0] in some}


def test_groups_meet_within_themselves_alone() -> None:
    plain, vectors = side(90), unit_vectors(90)
    groups = random_groups(plain.keys, 4, 0)
    found = run(grouped(np.arange(90), groups, groups), plain, plain, vectors, replace(SEARCH, keep=90))
    expected = {(i, j) for i in range(90) for j in range(90) if i != j and groups[i] == groups[j]}
    assert pairs(found) == expected
    assert sum(int(part.in_band[0]) for part in found) == len(expected)


def test_parts_meet_those_that_are_listed_and_columns_at_random() -> None:
    rows, columns, vectors = side(50), side(400, name="other"), unit_vectors(400)
    columns = replace(columns, instructions=np.arange(400))
    row_parts, column_parts = np.arange(50) % 3, np.arange(400) % 4
    meets = np.array([[0, 1], [2, 2], [3, 0]])
    search = replace(SEARCH, keep=400)
    found = pairs(
        run(Parts.of(np.arange(50), row_parts, column_parts, meets, 0, seed=1), rows, columns, vectors, search)
    )
    allowed = {(i, j) for i in range(50) for j in range(400) if j % 4 in meets[i % 3] and i != j}
    assert found == allowed
    none = np.empty((3, 0), dtype=np.int64)
    drawn = pairs(
        run(Parts.of(np.arange(50), row_parts, column_parts, none, 60, seed=1), rows, columns, vectors, search)
    )
    of_part = {part: {j for i, j in drawn if i % 3 == part} for part in range(3)}
    assert all(45 < len(columns_met) <= 60 for columns_met in of_part.values())
    assert len(of_part[0] & of_part[1]) < 25  # another sample for each part


def test_long_lists_come_from_tasks_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 rows in 8 parts, 8 at a time where 5 candidates of each are kept and a task may give 40: in row order."""
    monkeypatch.setattr(plans, "TASK_CANDIDATES", 40)
    monkeypatch.setattr(plans, "LEAST_TASK_ROWS", 4)
    rows, vectors = side(64), unit_vectors(64)
    parts = random_groups(rows.keys, 8, seed=3)
    whole, few, fewer = (
        Parts.of(np.arange(64), parts, parts, np.arange(8)[:, None], 0, seed=0, keep=keep) for keep in (1, 5, 100)
    )
    assert [plan.tasks for plan in (whole, few, fewer)] == [4, 8, 16]
    found = run(few, rows, rows, vectors)
    assert [len(set(part.row.tolist())) for part in found] == [8] * 8
    assert all((np.diff(part.row) >= 0).all() for part in [*found, *run(whole, rows, rows, vectors)])
    for plan in (few, fewer):
        assert pairs(run(plan, rows, rows, vectors)) == pairs(run(whole, rows, rows, vectors))


def test_clusters_hold_what_is_near() -> None:
    vectors = clustered_vectors(2000, 12, seed=3, spread=0.5)
    found = cluster(vectors, 40, seed=0)
    assert 30 <= len(found.centroids) <= 45
    assert np.bincount(found.of_vector, minlength=len(found.centroids)).min() >= 1
    assert len(found.of_vector) == 2000
    assert np.abs(np.linalg.norm(found.centroids, axis=1) - 1).max() < 1e-5
    own = (vectors.astype(np.float32) * found.centroids[found.of_vector]).sum(axis=1)
    assert own.mean() > 0.8
    near = found.nearest(5)
    assert (near[:, 0] == np.arange(len(near))).all()
    again = cluster(vectors, 40, seed=0)
    assert (again.of_vector == found.of_vector).all()


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_few_vectors_make_few_clusters(count: int) -> None:
    found = cluster(unit_vectors(3), count, seed=0)
    assert 1 <= len(found.centroids) <= 3
    assert set(found.of_vector.tolist()) == set(range(len(found.centroids)))


def test_a_crowd_of_equal_vectors_is_dealt_out_to_several_clusters() -> None:
    vectors = np.concatenate([np.repeat(unit_vectors(1, seed=2), 500, axis=0), unit_vectors(100)])
    whole = cluster(vectors, 12, seed=0)
    assert np.bincount(whole.of_vector).max() >= 500
    clusters = whole.cut(64)
    sizes = np.bincount(clusters.of_vector)
    assert len(sizes) == len(clusters.centroids)
    assert sizes.min() >= 1
    assert sizes.max() <= 64
    assert (clusters.centroids[clusters.of_vector] == whole.centroids[whole.of_vector]).all()


def test_neighbours_are_found_in_few_clusters() -> None:
    """Of the 5 nearest of each of 3,000 items, at least 95 % lie in the 6 nearest of some 47 clusters."""
    vectors = clustered_vectors(3000, 30, seed=1)
    rows = side(3000)
    search = replace(SEARCH, strategy="similar")
    clusters = cluster(vectors, 47, seed=0)
    plan = Parts.of(np.arange(3000), clusters.of_vector, clusters.of_vector, clusters.nearest(6), 0, seed=0)
    found = pairs(run(plan, rows, rows, vectors, search))
    exact = pairs([block_candidates(rows, rows, vectors, search)])
    assert len(found & exact) / len(exact) > 0.95
