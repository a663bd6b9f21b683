"""Which items to compare: conditional pairs, labelled ones, and joint pairs by strategy, written shard by shard.

Pairs are numbers until a shard is written. A run of up to `shards.ROWS` pairs in a split has one tile and is one file.
Above `shards.FEW` pairs, whatever holds a whole tile's is a Ray task.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray import records, shards
from jpo_ray.config import JointPairs
from jpo_ray.pairs import spread
from jpo_ray.pairs.clusters import cluster
from jpo_ray.pairs.embedding import vectors_of
from jpo_ray.pairs.members import (
    Items,
    JointWish,
    conditional_pairs,
    instruction_numbers,
    joint_wish,
    labelled_pairs,
    short_items,
)
from jpo_ray.pairs.sides import Ints, Side, item_keys, random_groups
from jpo_ray.pairs.strategies import STRATEGIES
from jpo_ray.pairs.tiling import Spool, Tiling, make_tiling
from jpo_ray.pipeline.console import progress_bar
from jpo_ray.pipeline.context import Context
from jpo_ray.pipeline.pair_tables import CHOSEN, CONDITIONAL, LABELLED, PairNames, file_bytes, tile_bytes

if TYPE_CHECKING:
    from jpo_ray.cluster.joint_problem import JointProblem
    from jpo_ray.cluster.tiles import SharedVectors

ITEM_COLUMNS = ["item_id", "instruction_id", "split", "sft"]
FIELDS = {"first": "<i4", "second": "<i4", "similarity": "<f4", "kind": "u1"}  # of a pair, by item numbers

Labels = list[dict[str, Any]]


@dataclass(frozen=True)
class SplitItems:
    """The items of a split, numbered as in the items table."""

    split: str
    items: Items
    vector_row: Ints  # int64[N]: of each item's instruction

    @cached_property
    def instructions(self) -> Ints:
        return instruction_numbers(self.items)

    @cached_property
    def ids(self) -> pa.Array:
        return pa.array([item["item_id"] for item in self.items], pa.string())

    @cached_property
    def number_of(self) -> dict[str, int]:
        return {item["item_id"]: number for number, item in enumerate(self.items)}


@dataclass(frozen=True)
class Chosen:
    """A split's pairs, by tiles: those at hand, and the candidates of joint ones with the end of the choice."""

    tiling: Tiling
    pairs: Spool
    strategy: str
    count: int  # of pairs, about
    candidates: Spool | None = None
    end: spread.End | None = None
    rows: Ints | None = None  # item numbers of the candidates' rows and columns
    columns: Ints | None = None


def make_pairs(context: Context, out: Path, work: Path) -> dict[str, Any]:
    """Write `pairs.parquet` in `out`; returns counts and notes. `work` is a folder for what is in the making."""
    config = context.config
    items = records.read_table(context.path("items") / "items.parquet", records.ITEMS)
    items = short_items(items, config.pairs.max_item_characters, config.model).select(ITEM_COLUMNS)
    labels = records.read_table(context.path("items") / "labels.parquet", records.LABELS).to_pylist()
    embeddings = records.read_table(context.path("embeddings") / "embeddings.parquet", records.EMBEDDINGS)
    vector_rows = embeddings["instruction_id"]
    shared = None
    if config.pairs.joint:
        from jpo_ray.cluster.tiles import share

        shared = share(context.ray_with_a_core(), vectors_of(embeddings["vector"]), context.cluster("pairs"))
    del embeddings
    chosen: dict[str, tuple[PairNames, Chosen]] = {}
    notes: dict[str, Any] = {}
    for split in ("train", "validation"):
        some = items.filter(pc.equal(items["split"], split))
        places = pc.index_in(some["instruction_id"], value_set=vector_rows).to_numpy().astype(np.int64)
        here = SplitItems(split, some.to_pylist(), places)
        if here.items:
            names, found, said = _choose(context, here, labels, shared, work / split)
            chosen[split] = names, found
            notes |= {name if name == "warning" else f"{split} {name}": value for name, value in said.items()}
    kinds = _write(context, out / "pairs.parquet", list(chosen.values()))
    return {f"{split} {protocol}": count for (split, protocol), count in kinds.items()} | notes


def _choose(
    context: Context, here: SplitItems, labels: Labels, shared: "SharedVectors | None", work: Path
) -> tuple[PairNames, Chosen, dict[str, Any]]:
    config, joint, seed = context.config.pairs, context.config.pairs.joint, context.config.seed
    first, second = conditional_pairs(here.instructions) if config.conditional else (np.empty(0, np.int64),) * 2
    wish = joint_wish(joint, here.items, labels, here.split) if joint else None
    problem = _problem(context, here, wish, shared) if wish and shared else None
    labelled = labelled_pairs(here.items, labels) if shared else (np.empty(0, np.int64),) * 2
    count = len(first) + len(labelled[0]) + (problem.budget if problem else 0)
    tiling = _tiling(here, problem, count, seed)
    pairs = Spool(work / "pairs", FIELDS)
    pairs.add(tiling.of_beside(first), _columns(first, second, np.ones(len(first)), CONDITIONAL))
    if shared:
        similarity = _cosines(shared.array, here.vector_row[labelled[0]], here.vector_row[labelled[1]])
        # Where a chosen pair of the same items would be: a tile has each pair once.
        pairs.add(tiling.of_joint(*labelled), _columns(*labelled, similarity, LABELLED))
    strategy = joint.strategy if joint else ""
    found, notes = Chosen(tiling, pairs, strategy, count), dict[str, Any]()
    if problem and wish:
        found, notes = _choose_joint(context, here, wish, problem, found, work)
    symmetric = problem is None or problem.symmetric
    names = PairNames(here.ids, here.split, strategy, found.rows, found.columns, found.end, symmetric)
    return names, found, notes


def _choose_joint(
    context: Context, here: SplitItems, wish: JointWish, problem: "JointProblem", found: Chosen, work: Path
) -> tuple[Chosen, dict[str, Any]]:
    from jpo_ray.cluster.pairing import joint_pairs
    from jpo_ray.cluster.spreading import spread_pairs, spreads

    rows, columns = (
        np.array([here.number_of[item["item_id"]] for item in side], dtype=np.int64) for side in (wish.left, wish.right)
    )
    tiling, ray = found.tiling, context.ray()
    with progress_bar(context.console, f"candidate pairs ({here.split})") as bar:
        if found.count > shards.FEW and spreads(problem):
            candidates, end, notes = spread_pairs(
                ray, context.cluster("pairs"), problem, bar, work / "parts", work / "candidates",
                lambda row, column: tiling.of_joint(rows[row], columns[column]), tiling.count,
            )  # fmt: skip
            return replace(found, candidates=candidates, end=end, rows=rows, columns=columns), notes
        choice = joint_pairs(ray, problem, bar, work / "parts")
    row, column = (choice.pairs[name].to_numpy() for name in ("row", "column"))
    similarity = choice.pairs["similarity"].to_numpy()
    first, second = rows[row], columns[column]
    found.pairs.add(tiling.of_joint(first, second), _columns(first, second, similarity, CHOSEN))
    return found, choice.notes


def _problem(context: Context, here: SplitItems, wish: JointWish, shared: "SharedVectors") -> "JointProblem":
    """Joint pairs of one split by the configured strategy; as many as D_S has items unless a budget says otherwise."""
    from jpo_ray.cluster.joint_problem import JointProblem

    left, right, config, seed = wish.left, wish.right, wish.config, context.config.seed
    groups = -(-len(left) // config.group_size) if config.group_size else None
    key = "budget" if here.split == "train" else "validation_budget"
    rows = _side(left, here, groups, shared.array, config, seed)
    columns = rows if right is left else _side(right, here, groups, shared.array, config, seed)
    timeout_s = context.config.cluster.actor_timeout_s
    return JointProblem(rows, columns, shared, config, wish.budget, seed, f"pairs.joint.{key}", wish.at_most, timeout_s)


def _side(items: Items, here: SplitItems, groups: int | None, vectors: Any, config: JointPairs, seed: int) -> Side:
    keys = item_keys([item["item_id"] for item in items])
    instructions = here.vector_row[[here.number_of[item["item_id"]] for item in items]]
    facts = {}
    if STRATEGIES[config.strategy].clusters:
        of_item = cluster(vectors[instructions], config.clusters, seed).of_vector
        facts["cluster_size"] = np.bincount(of_item)[of_item].astype(np.float32)
    of_group = None if groups is None else random_groups(keys, groups, seed)
    return Side(keys, instructions, groups=of_group, facts=facts)


def _tiling(here: SplitItems, problem: "JointProblem | None", pairs: int, seed: int) -> Tiling:
    wanted = max(1, -(-pairs // shards.ROWS))
    _, firsts = np.unique(here.instructions, return_index=True)
    keys = item_keys([here.items[place]["instruction_id"] for place in firsts.tolist()])
    groups = None
    if problem is not None and problem.rows.groups is not None and problem.columns.groups is not None:
        groups = np.zeros(len(here.items), dtype=np.int64)
        all_keys = pa.array(item_keys(here.ids.to_pylist()))
        for side in (problem.rows, problem.columns):
            assert side.groups is not None
            groups[pc.index_in(pa.array(side.keys), value_set=all_keys).to_numpy()] = side.groups
    return make_tiling(here.instructions, keys, wanted, seed, groups)


def _columns(first: Ints, second: Ints, similarity: Any, kind: int) -> dict[str, Any]:
    return {
        "first": first, "second": second, "similarity": similarity, "kind": np.full(len(first), kind, dtype=np.uint8)
    }  # fmt: skip


def _cosines(vectors: Any, first: Ints, second: Ints) -> Any:
    found = [
        float(vectors[a].astype(np.float32) @ vectors[b].astype(np.float32)) for a, b in zip(first, second, strict=True)
    ]
    return np.array(found, dtype=np.float32)


def _write(context: Context, path: Path, splits: Sequence[tuple[PairNames, Chosen]]) -> Any:
    """All shards of the splits; one file where each split has one tile."""
    from jpo_ray.cluster.shards import map_shards

    cluster, number = context.cluster("pairs"), 0
    if all(chosen.tiling.count == 1 for _, chosen in splits):
        all_names, parts = [names for names, _ in splits], [part for _, chosen in splits for part in _parts(chosen)]
        if sum(chosen.count for _, chosen in splits) <= shards.FEW:
            path.write_bytes(file_bytes(all_names, parts))
        else:
            [content] = map_shards(context.ray(), cluster, "pairs", file_bytes, [(parts,)], all_names)
            path.write_bytes(content)
        return shards.kinds_of(path)
    for names, chosen in splits:
        with progress_bar(context.console, f"writing pairs ({names.split})") as bar:
            bar.begin(chosen.tiling.count)
            for content in map_shards(context.ray(), cluster, "pairs", tile_bytes, _parts(chosen), names):
                if content is not None:
                    shards.shard_path(path, shards.numbered_name(number)).write_bytes(content)
                    number += 1
                bar.advance(1)
    return shards.kinds_of_all(shards.files_of(path))


def _parts(chosen: Chosen) -> Iterator[tuple[Any, Any]]:
    """Each tile's pairs at hand, and candidates."""
    for tile in range(chosen.tiling.count):
        yield chosen.pairs.read(tile), chosen.candidates.read(tile) if chosen.candidates else None
