"""Clusters of instructions by spherical k-means (faiss), in two levels, so that an item costs the same however many."""

from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from jpo_ray.pairs.sides import Floats, Ints, float32, rank_in_run

ITERATIONS = 8
POINTS_PER_CENTROID = 64  # that k-means looks at
ASSIGNED_AT_ONCE = 8192
COMPARED_AT_ONCE = 256


@dataclass(frozen=True)
class Clusters:
    of_vector: Ints  # int64[N]: the cluster of each vector
    centroids: Floats  # float32[C, d], normalised

    def nearest(self, count: int) -> Ints:
        """The nearest clusters of each, itself first: int64[C, count]."""
        nearest = np.empty((len(self.centroids), min(count, len(self.centroids))), dtype=np.int64)
        for start in range(0, len(nearest), COMPARED_AT_ONCE):
            far = -(self.centroids[start : start + COMPARED_AT_ONCE] @ self.centroids.T)
            far[np.arange(len(far)), start + np.arange(len(far))] = -np.inf
            nearest[start : start + len(far)] = np.argsort(far, axis=1, kind="stable")[:, :count]
        return nearest

    def cut(self, most: int) -> "Clusters":
        """Clusters of at most so many vectors: larger ones, as equal vectors make them, are dealt out to several."""
        counts = np.bincount(self.of_vector, minlength=len(self.centroids))
        pieces = -(-counts // most)
        by_cluster = np.argsort(self.of_vector, kind="stable")
        old = self.of_vector[by_cluster]
        new = np.empty_like(old)
        new[by_cluster] = (np.cumsum(pieces) - pieces)[old] + rank_in_run(old) % pieces[old]
        return Clusters(new, np.repeat(self.centroids, pieces, axis=0))


def cluster(vectors: npt.NDArray[np.float16], count: int, seed: int) -> Clusters:
    """About `count` clusters of normalised vectors (float16[N, d]); fewer where there are fewer vectors."""
    tops = min(len(vectors), ceil(sqrt(count)))
    top = _k_means(vectors, tops, seed)
    of_top = _assign(vectors, top)
    of_vector = np.empty(len(vectors), dtype=np.int64)
    centroids: list[Floats] = []
    found = 0
    for number in range(tops):
        members = np.flatnonzero(of_top == number)
        if not len(members):
            continue
        wanted = max(1, min(len(members), round(count * len(members) / len(vectors))))
        part = vectors[members]
        own = _k_means(part, wanted, seed)
        of_vector[members] = found + _assign(part, own)
        centroids.append(own)
        found += len(own)
    return _without_empty(of_vector, np.concatenate(centroids))


def _k_means(vectors: npt.NDArray[np.float16], count: int, seed: int) -> Floats:
    """Centroids float32[count, d] of a sample of the vectors."""
    import faiss

    rng = np.random.default_rng([seed, 0x6B6D, len(vectors)])
    most = count * POINTS_PER_CENTROID
    sample = vectors if len(vectors) <= most else vectors[np.sort(rng.choice(len(vectors), most, replace=False))]
    if count == 1:
        return _normalised(float32(sample).mean(axis=0, keepdims=True))
    found: Any = faiss.Kmeans(
        vectors.shape[1], count, niter=ITERATIONS, seed=seed % 2**31, spherical=True, min_points_per_centroid=1
    )
    found.train(float32(sample))
    return _normalised(found.centroids)


def _assign(vectors: npt.NDArray[np.float16], centroids: Floats) -> Ints:
    nearest = np.empty(len(vectors), dtype=np.int64)
    for start in range(0, len(vectors), ASSIGNED_AT_ONCE):
        part = slice(start, start + ASSIGNED_AT_ONCE)
        nearest[part] = np.argmax(float32(vectors[part]) @ centroids.T, axis=1)
    return nearest


def _normalised(centroids: Floats) -> Floats:
    norms = np.linalg.norm(centroids, axis=1, keepdims=True)
    normalised: Floats = (centroids / np.maximum(norms, 1e-12)).astype(np.float32)
    return normalised


def _without_empty(of_vector: Ints, centroids: Floats) -> Clusters:
    used, renumbered = np.unique(of_vector, return_inverse=True)
    return Clusters(renumbered, centroids[used])
