"""Keys of items, and the groups that are drawn by them."""

import numpy as np

from jpo_ray.pairs.sides import float32, item_keys, random_groups
from pairs.world import side


def test_keys_are_the_leading_bits_of_the_ids() -> None:
    assert item_keys(["00000000000000ff1234", "ffffffffffffffff0000"]).tolist() == [255, 2**64 - 1]


def test_groups_are_even_random_and_a_function_of_the_keys() -> None:
    keys = side(100).keys
    groups = random_groups(keys, 7, seed=3)
    assert sorted(np.bincount(groups).tolist()) == [14] * 5 + [15] * 2
    order = np.random.default_rng(0).permutation(100)
    assert random_groups(keys[order], 7, seed=3).tolist() == groups[order].tolist()
    assert (random_groups(keys, 7, seed=4) != groups).sum() > 50


def test_float16_is_converted_by_its_bits() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert (float32(finite).view(np.uint32) == finite.astype(np.float32).view(np.uint32)).all()
