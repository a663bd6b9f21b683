"""Embedding of instructions in a Ray Data actor pool; vectors are kept for other runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from jpo_ray.cache import cache_folder
from jpo_ray.cluster.session import map_on_actors
from jpo_ray.config import PairsConfig
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.errors import InputError
from jpo_ray.pairs.embedding import (
    cache_vectors,
    cached_vectors,
    count_truncated,
    embed,
    embedder_key,
    embedder_path,
    load_embedder,
)

EMBED_BATCH = 64  # texts of similar length per forward pass
KEPT_AT_ONCE = 16_384  # vectors: what a kill loses at most


@dataclass(frozen=True)
class Embedded:
    vectors: npt.NDArray[np.float16]  # float16[n, d], normalised
    cached: int  # texts whose vectors another run had left
    truncated: int  # texts embedded now that are longer than the encoder reads


class Embedder:
    """Actor that embeds a batch of texts, a row.

    What is wrong comes back as a row too: an exception would reach the driver as one of Ray's.
    """

    def __init__(self, name: str, revision: str | None, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._load = partial(load_embedder, name, device, revision)
        self._model: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (texts,) = batch["texts"]
        vectors, truncated, error = b"", 0, ""
        try:
            self._model = self._model or self._load()
            vectors, truncated = embed(self._model, list(texts)).tobytes(), count_truncated(self._model, list(texts))
        except InputError as wrong:
            error = str(wrong)
        return {"batch": batch["batch"], "vectors": [vectors], "truncated": [truncated], "error": [error]}


def embed_texts(ray: Any, cluster: ClusterConfig, config: PairsConfig, texts: Mapping[str, str], bar: Any) -> Embedded:
    """Vectors of texts (content hash -> text), in their order; only those that no run has embedded yet are embedded.

    Batches are formed here, by length, so that the vectors do not depend on the number of actors.
    """
    embedder_path(config.embedder)  # a missing package is an error here, not in an actor
    cache, key = cache_folder(), embedder_key(config.embedder, config.embedder_revision)
    place = {name: row for row, name in enumerate(texts)}
    missing = set(texts)
    vectors = np.empty((0, 0), dtype=np.float16)

    def take(names: list[str], part: npt.NDArray[np.float16]) -> None:
        nonlocal vectors
        if not len(vectors):
            vectors = np.empty((len(texts), part.shape[1]), dtype=np.float16)
        new = [number for number, name in enumerate(names) if name in missing]  # two runs may have kept one text
        vectors[[place[names[number]] for number in new]] = part[new]
        missing.difference_update(names)
        bar.to(len(texts) - len(missing))

    def keep(names: list[str]) -> None:
        if names:
            cache_vectors(cache, key, names, vectors[[place[name] for name in names]])

    bar.begin(len(texts))
    for names, part in cached_vectors(cache, key, list(texts)):
        take(names, part)
    cached, truncated = len(texts) - len(missing), 0
    fresh: list[str] = []
    try:
        for names, part, cut in _embed_on_ray(ray, cluster, config, {name: texts[name] for name in missing}):
            take(names, part)
            truncated += cut
            fresh += names
            if len(fresh) >= KEPT_AT_ONCE:
                keep(fresh)
                fresh = []
    finally:  # an error or Ctrl-C loses nothing that was embedded
        keep(fresh)
    return Embedded(vectors, cached, truncated)


def _embed_on_ray(ray: Any, cluster: ClusterConfig, config: PairsConfig, texts: Mapping[str, str]) -> Any:
    """Yields (ids, vectors, number of texts cut short) of each batch, as batches are done."""
    if not texts:
        return
    ids = sorted(texts, key=lambda name: (len(texts[name]), name))
    batches = [ids[start : start + EMBED_BATCH] for start in range(0, len(ids), EMBED_BATCH)]
    rows = [{"batch": number, "texts": [texts[name] for name in names]} for number, names in enumerate(batches)]
    encoder = config.embedder, config.embedder_revision
    for row in map_on_actors(ray, cluster, "pairs", rows, Embedder, *encoder):
        if row["error"]:
            raise InputError(row["error"])
        names = batches[row["batch"]]
        vectors = np.frombuffer(row["vectors"], dtype=np.float16).reshape(len(names), -1)
        yield names, vectors, int(row["truncated"])
