"""Embedding and candidate blocks on Ray Data."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jpo_ray.cluster.session import require_resources, worker_resources
from jpo_ray.config import ClusterConfig
from jpo_ray.pairs.candidates import Candidates, Side, block_candidates, block_rows
from jpo_ray.pairs.embedding import count_truncated, embed, embedder_path, load_embedder
from jpo_ray.pairs.selection import candidates_per_row, select, too_few

EMBED_BATCH = 64  # texts of similar length per forward pass

Advance = Callable[[int], None]


def _silent(count: int) -> None:
    """No progress bar."""


class Embedder:
    """Actor that embeds batches of texts; a row is one batch."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.model = load_embedder(name, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        vectors = [embed(self.model, list(texts)) for texts in batch["texts"]]
        return {
            "batch": batch["batch"],
            "vectors": [v.tobytes() for v in vectors],
            "width": [v.shape[1] for v in vectors],
            "truncated": [count_truncated(self.model, list(texts)) for texts in batch["texts"]],
        }


def embed_texts(
    ray: Any, config: ClusterConfig, name: str, texts: Sequence[str], advance: Advance
) -> tuple[npt.NDArray[np.float16], int]:
    """Normalised vectors of `texts` in an actor pool, float16[n, d], and how many texts the encoder cut short.

    Batches are formed here, by length, so that the vectors do not depend on the number of actors.
    """
    embedder_path(name)  # a missing package is an error here, not in an actor
    wanted = worker_resources(ray, config, config.num_actors)
    require_resources(ray, "pairs", [wanted] * config.num_actors)
    order = np.argsort([len(text) for text in texts], kind="stable")
    batches = [order[start : start + EMBED_BATCH] for start in range(0, len(order), EMBED_BATCH)]
    rows = [{"batch": number, "texts": [texts[i] for i in members]} for number, members in enumerate(batches)]
    embedded = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Embedder,
        fn_constructor_args=(name, "cuda" if wanted.get("GPU") else "cpu", int(wanted["CPU"])),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
        num_cpus=wanted["CPU"],
        num_gpus=wanted.get("GPU", 0),
    )
    vectors: npt.NDArray[np.float16] | None = None
    truncated = 0
    for row in embedded.iter_rows():
        members = batches[row["batch"]]
        if vectors is None:
            vectors = np.empty((len(texts), row["width"]), dtype=np.float16)
        vectors[members] = np.frombuffer(row["vectors"], dtype=np.float16).reshape(len(members), -1)
        truncated += int(row["truncated"])
        advance(len(members))
    return (vectors if vectors is not None else np.empty((0, 0), dtype=np.float16)), truncated


def joint_pairs(
    ray: Any,
    rows: Side,
    columns: Side,
    vectors: npt.NDArray[np.float16],
    *,
    strategy: str,
    band: tuple[float, float],
    budget: int,
    seed: int,
    budget_key: str = "pairs.joint.budget",
    begin: Advance = _silent,
    advance: Advance = _silent,
) -> pa.Table:
    """Exactly `budget` pairs: columns row, column (numbers into the sides), similarity.

    Candidate blocks are tasks of Ray Data over vectors shared through the object store. Raises `InputError` where the
    band leaves fewer pairs than the budget, and names the budget by its key in the config. Progress counts rows.
    """
    symmetric = rows is columns
    per_row = min(candidates_per_row(budget, len(rows.keys)), len(columns.keys))
    shared = ray.put((rows, columns, vectors))
    while True:
        begin(len(rows.keys))
        found = _all_candidates(ray, shared, len(rows.keys), len(columns.keys), strategy, band, per_row, seed, advance)
        available = found.in_band // 2 if symmetric else found.in_band
        if available < budget:
            raise too_few(budget, available, band, budget_key, grouped=rows.groups is not None)
        chosen = select(found, budget, symmetric=symmetric)
        if chosen is not None:
            return pa.table({name: getattr(found, name)[chosen] for name in ("row", "column", "similarity")})
        per_row = min(per_row * 2, len(columns.keys))


def _all_candidates(
    ray: Any,
    shared: Any,
    rows: int,
    columns: int,
    strategy: str,
    band: tuple[float, float],
    per_row: int,
    seed: int,
    advance: Advance,
) -> Candidates:
    size = block_rows(columns)
    blocks = [{"start": start, "stop": min(start + size, rows)} for start in range(0, rows, size)]

    def tile(batch: dict[str, Any]) -> dict[str, Any]:
        sides = ray.get(shared)
        block = np.arange(batch["start"][0], batch["stop"][0], dtype=np.int64)
        found = block_candidates(block, *sides, strategy=strategy, band=band, per_row=per_row, seed=seed)
        values = {name: [value] for name, value in found.__dict__.items()}
        return values | {"start": batch["start"], "rows": [len(block)]}

    tiles = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(tile, batch_size=1, num_cpus=1)
    parts = []
    for part in tiles.iter_rows():
        parts.append(part)
        advance(int(part["rows"]))
    parts.sort(key=lambda part: part["start"])

    def joined(name: str, dtype: Any) -> Any:
        return np.concatenate([np.asarray(part[name], dtype=dtype) for part in parts])

    return Candidates(
        row=joined("row", np.int64),
        column=joined("column", np.int64),
        similarity=joined("similarity", np.float32),
        priority=joined("priority", np.float64),
        in_band=sum(int(part["in_band"]) for part in parts),
    )
