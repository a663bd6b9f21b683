"""Sides and vectors for the tests of pairing."""

import numpy as np

from jpo_ray.pairs.sides import Side, item_keys
from jpo_ray.records import item_id


def side(count: int, instructions: list[int] | None = None, name: str = "item") -> Side:
    """`count` items, each of its own instruction unless given."""
    keys = item_keys([item_id(name, str(number)) for number in range(count)])
    return Side(keys, np.array(range(count) if instructions is None else instructions, dtype=np.int64))


def unit_vectors(count: int, seed: int = 0, width: int = 12) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, width)) + 0.7  # cosines from about -0.2 to 0.8
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def clustered_vectors(count: int, clusters: int, seed: int = 0, width: int = 32, spread: float = 0.7) -> np.ndarray:
    """Around `clusters` random centres, of sizes that differ."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, width))
    of = rng.choice(clusters, count, p=np.arange(1, clusters + 1) / (clusters * (clusters + 1) / 2))
    vectors = centres[of] + spread * rng.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
