"""Candidates of each row, against every ordered pair looked at one by one."""

import numpy as np
import pytest

from jpo_ray.pairs.candidates import Candidates, Side, block_candidates, block_rows, item_keys, random_groups
from jpo_ray.records import item_id

MASK = 2**64 - 1


def side(count: int, instructions: list[int] | None = None, name: str = "item") -> Side:
    keys = item_keys([item_id(name, str(number)) for number in range(count)])
    return Side(keys, np.array(instructions or list(range(count)), dtype=np.int64))


def unit_vectors(count: int, seed: int = 0, width: int = 12) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, width)) + 0.7  # cosines from about -0.2 to 0.8
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def mix(x: int) -> int:
    """SplitMix64's finaliser, in Python integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def by_hand(
    rows: Side,
    columns: Side,
    vectors: np.ndarray,
    strategy: str,
    band: tuple[float, float],
    per_row: int,
    seed: int,
) -> tuple[list[tuple[int, int]], int]:
    """(row, column) of every candidate, best first within a row, and how many pairs the band admits."""
    chosen: list[tuple[int, int]] = []
    in_band = 0
    for row in range(len(rows.keys)):
        found = []
        for column in range(len(columns.keys)):
            left, right = int(rows.instructions[row]), int(columns.instructions[column])
            cosine = float(vectors[left].astype(np.float64) @ vectors[right].astype(np.float64))
            if left == right or not band[0] <= cosine <= band[1]:
                continue
            in_band += 1
            drawn = (mix(int(rows.keys[row]) + mix(int(columns.keys[column]) + seed & MASK) & MASK) >> 11) / 2**53
            found.append((drawn if strategy == "random" else -cosine, column))
        chosen += [(row, column) for _, column in sorted(found)[:per_row]]
    return chosen, in_band


def whole(rows: Side, columns: Side, vectors: np.ndarray, **options: object) -> Candidates:
    settings = {"strategy": "random", "band": (-1.0, 1.0), "per_row": 3, "seed": 0} | options
    return block_candidates(np.arange(len(rows.keys)), rows, columns, vectors, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["random", "similar"])
@pytest.mark.parametrize("band", [(-1.0, 1.0), (0.3, 0.6)])
def test_candidates_are_those_of_brute_force(strategy: str, band: tuple[float, float]) -> None:
    rows = side(40, [number // 2 for number in range(40)])  # two items of each instruction
    vectors = unit_vectors(20)
    found = whole(rows, rows, vectors, strategy=strategy, band=band, per_row=5, seed=3)
    expected, in_band = by_hand(rows, rows, vectors, strategy, band, 5, 3)
    got = list(zip(found.row.tolist(), found.column.tolist(), strict=True))
    if strategy == "similar":  # the two items of an instruction are equally similar: their order is drawn
        instruction = rows.instructions
        got, expected = ([(row, int(instruction[column])) for row, column in pairs] for pairs in (got, expected))
    assert got == expected
    assert found.in_band == in_band


def test_two_sides_of_different_size_are_those_of_brute_force() -> None:
    rows, columns = side(7), side(13, [number % 9 for number in range(13)], name="other")
    vectors = unit_vectors(9)
    found = whole(rows, columns, vectors, band=(0.2, 0.9), per_row=4, seed=11)
    expected, in_band = by_hand(rows, columns, vectors, "random", (0.2, 0.9), 4, 11)
    assert list(zip(found.row.tolist(), found.column.tolist(), strict=True)) == expected
    assert found.in_band == in_band


def test_both_ends_of_the_band_belong_to_it() -> None:
    vectors = np.eye(4, dtype=np.float16)
    vectors[1] = [0.5, 0.5, 0.5, 0.5]  # cosine with the first is exactly 0.5, in float16 and float32
    rows = side(2)
    for band in ((0.5, 1.0), (-1.0, 0.5), (0.25, 0.75)):
        assert whole(rows, rows, vectors[:2], band=band).in_band == 2
    assert whole(rows, rows, vectors[:2], band=(0.501, 1.0)).in_band == 0
    assert whole(rows, rows, vectors[:2], band=(-1.0, 0.499)).in_band == 0


def test_identical_vectors_have_a_cosine_of_at_most_one() -> None:
    vectors = np.repeat(unit_vectors(1, seed=5), 2, axis=0)  # float16 rounding alone would give 1.0005
    found = whole(side(2), side(2, name="other"), vectors, band=(0.9, 1.0))
    assert found.in_band == 2
    assert found.similarity.max() <= 1


def test_items_of_one_instruction_are_no_joint_candidates() -> None:
    rows = side(30, [number % 3 for number in range(30)])
    found = whole(rows, rows, unit_vectors(3), per_row=30)
    assert (rows.instructions[found.row] != rows.instructions[found.column]).all()
    assert found.in_band == len(found.row) == 30 * 20


def test_a_row_without_any_partner_has_no_candidate() -> None:
    rows = side(4, [0, 0, 0, 0])
    found = whole(rows, rows, unit_vectors(1))
    assert (len(found.row), found.in_band) == (0, 0)


def test_random_partners_are_uniform_and_depend_on_the_seed() -> None:
    """Best partner of each of 8 items over 2,000 seeds: chi-square on 8 rows of 7 partners, 48 degrees of freedom."""
    rows = side(8)
    vectors = unit_vectors(8)
    counts = np.zeros((8, 8))
    for seed in range(2000):
        found = whole(rows, rows, vectors, per_row=1, seed=seed)
        counts[found.row, found.column] += 1
    expected = 2000 / 7
    off_diagonal = counts[~np.eye(8, dtype=bool)]
    assert off_diagonal.sum() == 16000
    assert 21 < ((off_diagonal - expected) ** 2 / expected).sum() < 84  # the 0.1 % and 99.9 % quantiles: 21.3, 84.0


def test_blocks_and_the_order_of_items_change_nothing() -> None:
    rows = side(20)
    vectors = unit_vectors(20)
    every = whole(rows, rows, vectors, per_row=4, seed=9)
    options = {"strategy": "random", "band": (-1.0, 1.0), "per_row": 4, "seed": 9}
    parts = [block_candidates(np.arange(i, i + 5), rows, rows, vectors, **options) for i in range(0, 20, 5)]
    assert np.concatenate([part.column for part in parts]).tolist() == every.column.tolist()
    order = np.random.default_rng(0).permutation(20)
    shuffled = Side(rows.keys[order], rows.instructions[order])
    other = whole(shuffled, shuffled, vectors, per_row=4, seed=9)
    pairs = {(int(order[row]), int(order[column])) for row, column in zip(other.row, other.column, strict=True)}
    assert pairs == set(zip(every.row.tolist(), every.column.tolist(), strict=True))


def test_blocks_keep_the_matrix_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jpo_ray.pairs.candidates.BLOCK_ELEMENTS", 1000)
    assert (block_rows(100), block_rows(1001), block_rows(0)) == (10, 1, 1000)


def test_keys_are_the_leading_bits_of_the_ids() -> None:
    assert item_keys(["00000000000000ff1234", "ffffffffffffffff0000"]).tolist() == [255, 2**64 - 1]


def test_groups_are_even_random_and_a_function_of_the_keys() -> None:
    keys = side(100).keys
    groups = random_groups(keys, 7, seed=3)
    sizes = np.bincount(groups)
    assert (len(sizes), sizes.min(), sizes.max()) == (7, 14, 15)
    order = np.random.default_rng(0).permutation(100)
    assert random_groups(keys[order], 7, seed=3).tolist() == groups[order].tolist()
    assert random_groups(keys, 7, seed=4).tolist() != groups.tolist()


def test_candidates_stay_within_their_group() -> None:
    plain = side(40)
    rows = Side(plain.keys, plain.instructions, random_groups(plain.keys, 4, 0))
    found = whole(rows, rows, unit_vectors(40), per_row=40)
    assert rows.groups is not None
    assert (rows.groups[found.row] == rows.groups[found.column]).all()
    assert found.in_band == len(found.row) == 40 * 9
