"""Which comparisons, and so which items, trainings read: by their configs and the preferences, without a model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jpo_ray import records, shards
from jpo_ray.config_training import TrainConfig
from jpo_ray.engine.dataset import EdgeList, EdgeShards, edge_list, joined
from jpo_ray.engine.schedules import some_edges


def read_edges(files: Sequence[Path], ids: pa.Array, config: TrainConfig) -> tuple[EdgeShards, EdgeList]:
    """Training and validation edges of the entry's protocols; `ids` are the items' ids, by row."""
    return _train_edges(files, ids, config), _validation_edges(files, ids, config)


def _train_edges(files: Sequence[Path], ids: pa.Array, config: TrainConfig) -> EdgeShards:
    """The shards with training edges of the entry's protocols."""
    sizes = {file: _edges_in(file, "train", config) for file in files}
    holding = [file for file, size in sizes.items() if size]

    def load(number: int) -> EdgeList:
        return edge_list(shards.read_shard(holding[number], records.PREFERENCES), ids, "train", config.protocols)

    return EdgeShards([sizes[file] for file in holding], load)


def _validation_edges(files: Sequence[Path], ids: pa.Array, config: TrainConfig) -> EdgeList:
    """Those of all shards together: they are scored in one pass."""
    tables = [
        shards.read_shard(file, records.PREFERENCES) for file in files if _edges_in(file, "validation", config)
    ] or [records.PREFERENCES.empty_table()]
    return joined([edge_list(table, ids, "validation", config.protocols) for table in tables])


def _edges_in(file: Path, split: str, config: TrainConfig) -> int:
    kinds = shards.kinds_of(file)
    return sum(kinds[split, protocol] for protocol in config.protocols)


def readers(entries: Sequence[TrainConfig]) -> dict[str, TrainConfig]:
    """An entry for each set of training comparisons that `entries` read, by what decides it. Sets that are parts of
    others are left out, so that an entry more may change nothing.
    """
    every = [entry for entry in entries if not _draws(entry)]
    whole = {protocol: entry for entry in every for protocol in entry.protocols}
    found: dict[str, TrainConfig] = {
        protocol: entry.model_copy(update={"protocols": [protocol], "max_train_comparisons": None})
        for protocol, entry in whole.items()
    }
    for entry in entries:
        if _draws(entry) and not whole.keys() >= set(entry.protocols):
            of = " and ".join(sorted(entry.protocols))
            found[f"{entry.max_train_comparisons} of {of} by seed {entry.seed or 0}"] = entry
    return dict(sorted(found.items()))


def _draws(entry: TrainConfig) -> bool:
    """Whether it trains on a subset; which lists that takes is known where there are tokens."""
    return entry.max_train_comparisons is not None and entry.joins != "lists"


def items_read(files: Sequence[Path], ids: pa.Array, entries: Sequence[TrainConfig]) -> npt.NDArray[np.bool_]:
    """Whether each item is in a comparison that one of the entries trains on, or in any that is held out: bool[N]."""
    found = np.zeros(len(ids), dtype=np.bool_)
    for entry in readers(entries).values():
        edges = some_edges(_train_edges(files, ids, entry), entry, entry.seed or 0)
        for number in range(len(edges.sizes)):
            found[edges[number].chosen] = found[edges[number].rejected] = True
    for file in files:
        if any(split == "validation" for split, _ in shards.kinds_of(file)):
            edges_of = edge_list(shards.read_shard(file, records.PREFERENCES), ids, "validation", records.PROTOCOLS)
            found[edges_of.chosen] = found[edges_of.rejected] = True
    return found
