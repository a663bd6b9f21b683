"""The pairs stage: embeddings of instructions, near-duplicates among them, and which items to compare."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray import records
from jpo_ray.config import JointPairs, PairsConfig, RunConfig
from jpo_ray.errors import InputError
from jpo_ray.pairs.clusters import cluster
from jpo_ray.pairs.embedding import vector_column, vectors_of
from jpo_ray.pairs.members import conditional_pairs, joint_wish, labelled_pairs, short_items
from jpo_ray.pairs.sides import Side, item_keys, random_groups
from jpo_ray.pairs.strategies import STRATEGIES
from jpo_ray.pipeline.console import progress_bar
from jpo_ray.pipeline.context import Context, Spec

if TYPE_CHECKING:
    from jpo_ray.cluster.tiles import SharedVectors

COPIES = 8  # near-duplicates of a training instruction within training that are looked at
ITEM_COLUMNS = ["item_id", "instruction_id", "split", "sft"]
LEAKS_INTO = {"train": ("validation", "test"), "validation": ("test",), "test": ()}  # split -> more protected ones

Vectors = npt.NDArray[np.float16]
Labels = list[dict[str, Any]]


def pairs_specs(context: Context) -> list[Spec]:
    if context.config.rounds is not None:  # each has its own
        return []
    items = context.standing("items", "items").fingerprint
    embeddings = Spec(
        "embeddings",
        "pairs",
        {"items": items},
        embedding_slice(context.config.pairs),
        lambda out: _embed(context, out),
    )
    pairs = Spec(
        "pairs",
        "pairs",
        {"items": items, "embeddings": embeddings.fingerprint},
        pair_slice(context.config),
        lambda out: _pair_resumably(context, out),
        keep_partial=True,  # tiles that were done before a kill
    )
    return [embeddings, pairs]


def embedding_slice(config: PairsConfig) -> dict[str, Any]:
    """What vectors, and the near-duplicates found by them, depend on besides the instructions."""
    return {
        "embedder": config.embedder,
        "revision": config.embedder_revision,
        "near_duplicates": config.near_duplicates,
        "approximate_above": (config.joint or JointPairs()).approximate_above,
    }


def pair_slice(config: RunConfig) -> dict[str, Any]:
    """What pairs depend on besides items and embeddings."""
    layout = {"template", "response_prefix"} if config.pairs.max_item_characters else set()
    return {"pairs": config.pairs.model_dump(), "seed": config.seed, **config.model.model_dump(include=layout)}


def leaking_instructions(context: Context, items: pa.Table) -> set[str]:
    """Ids of train and validation instructions that are near-duplicates of one in a more protected split."""
    ids, vectors, _ = _vectors(context, items)
    return {row["instruction_a"] for row in _duplicates(context, items, ids, vectors) if row["leaks"]}


def _embed(context: Context, out: Path) -> dict[str, Any]:
    items = records.read_table(context.path("items") / "items.parquet", records.ITEMS)
    ids, vectors, counts = _vectors(context, items)
    records.write_table(
        out / "embeddings.parquet",
        pa.table([ids, vector_column(vectors)], schema=records.EMBEDDINGS),
        records.EMBEDDINGS,
    )
    if context.config.pairs.near_duplicates is None:
        return counts
    duplicates = _duplicates(context, items, ids, vectors)
    records.write_table(out / "near_duplicates.parquet", duplicates, records.NEAR_DUPLICATES)
    leaks = len({row["instruction_a"] for row in duplicates if row["leaks"]})
    counts |= {"near-duplicate pairs": len(duplicates), "instructions that leak": leaks}
    if leaks:
        counts["warning"] = (
            f"{leaks} train or validation instructions are near-duplicates (cosine "
            f"{context.config.pairs.near_duplicates:g} or more) of one in a more protected split; "
            "near_duplicates.parquet lists them, items.drop_near_duplicates=true leaves them out"
        )
    return counts


def _vectors(context: Context, items: pa.Table) -> tuple[list[str], Vectors, dict[str, Any]]:
    """Ids and vectors of all distinct instructions of items to compare, and what to tell about them."""
    from jpo_ray.cluster.embedding import embed_texts

    items = items.filter(pc.not_equal(items["split"], "sft"))  # which is compared with nothing
    texts = dict(zip(items["instruction_id"].to_pylist(), items["instruction"].to_pylist(), strict=True))
    config = context.config
    with progress_bar(context.console, "embedding instructions") as bar:
        found = embed_texts(context.ray(), config.cluster, config.pairs, texts, bar)
    counts = {"instructions": len(texts), "dimensions": int(found.vectors.shape[1]), "from cache": found.cached}
    return list(texts), found.vectors, counts | {"longer than the encoder reads": found.truncated}


def _duplicates(context: Context, items: pa.Table, ids: Sequence[str], vectors: Vectors) -> list[dict[str, Any]]:
    """Rows of `records.NEAR_DUPLICATES`; `instruction_a` is of the less protected split."""
    from jpo_ray.cluster.pairing import near_duplicates
    from jpo_ray.cluster.tiles import share

    shared = share(context.ray(), vectors)
    config, seed = context.config.pairs, context.config.seed
    assert config.near_duplicates is not None
    above = (config.joint or JointPairs()).approximate_above
    joint = JointPairs(strategy="similar", min_similarity=config.near_duplicates, approximate_above=above)
    split_of = dict(zip(items["instruction_id"].to_pylist(), items["split"].to_pylist(), strict=True))
    of_split = {
        split: np.array([place for place, name in enumerate(ids) if split_of[name] == split], dtype=np.int64)
        for split in records.SPLITS
    }
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with progress_bar(context.console, "near-duplicate instructions") as bar:
        for split, into in LEAKS_INTO.items():
            protected = np.concatenate([of_split[split][:0], *(of_split[other] for other in into)])
            # One that leaks is enough; within training a crowd of copies is linked and not listed pair by pair.
            within = of_split[split] if split == "train" else of_split[split][:0]
            for columns, keep in ((protected, 1), (within, COPIES)):
                found = near_duplicates(context.ray(), shared, of_split[split], columns, joint, keep, seed, bar)
                for one, other, cosine in zip(*(values.tolist() for values in found), strict=True):
                    a, b = ids[one], ids[other]
                    leaks = columns is protected
                    a, b = (a, b) if leaks else (min(a, b), max(a, b))
                    row = {"instruction_a": a, "instruction_b": b, "similarity": cosine, "leaks": leaks}
                    rows.setdefault((a, b), row)
    return list(rows.values())


def _pair_resumably(context: Context, out: Path) -> dict[str, Any]:
    """Tiles that were done outlive a kill, but not a config that cannot be met."""
    tiles = out / "tiles"
    try:
        counts = _pair(context, out, tiles)
    except InputError:
        shutil.rmtree(tiles, ignore_errors=True)
        raise
    shutil.rmtree(tiles, ignore_errors=True)
    return counts


def _pair(context: Context, out: Path, tiles: Path) -> dict[str, Any]:
    items = records.read_table(context.path("items") / "items.parquet", records.ITEMS)
    items = short_items(items, context.config.pairs.max_item_characters, context.config.model).select(ITEM_COLUMNS)
    labels = records.read_table(context.path("items") / "labels.parquet", records.LABELS).to_pylist()
    embeddings = records.read_table(context.path("embeddings") / "embeddings.parquet", records.EMBEDDINGS)
    row_of = {name: row for row, name in enumerate(embeddings["instruction_id"].to_pylist())}
    shared = None
    if context.config.pairs.joint:
        from jpo_ray.cluster.tiles import share

        shared = share(context.ray(), vectors_of(embeddings["vector"]))
    del embeddings
    rows: list[dict[str, Any]] = []
    notes: dict[str, Any] = {}
    for split in ("train", "validation"):
        here = items.filter(pc.equal(items["split"], split)).to_pylist()
        if context.config.pairs.conditional:
            rows += [_pair_row(a, b, "conditional", 1.0, "conditional", split) for a, b in conditional_pairs(here)]
        if shared and here:
            rows += _labelled(here, labels, split, row_of, shared.array)
            joint, found = _joint(context, here, labels, split, row_of, shared, tiles / split)
            rows += joint
            notes |= {name if name == "warning" else f"{split} {name}": value for name, value in found.items()}
    distinct = list({row["pair_id"]: row for row in reversed(rows)}.values())[::-1]  # a labelled pair stays as such
    table = records.write_table(out / "pairs.parquet", distinct, records.PAIRS)
    kinds = list(zip(table["split"].to_pylist(), table["protocol"].to_pylist(), strict=True))
    return {f"{split} {protocol}": kinds.count((split, protocol)) for split, protocol in dict.fromkeys(kinds)} | notes


def _labelled(
    items: list[dict[str, Any]], labels: Labels, split: str, row_of: dict[str, int], vectors: Vectors
) -> list[dict[str, Any]]:
    """The joint comparisons that the data have labels for."""
    instruction_of = {item["item_id"]: item["instruction_id"] for item in items}
    rows = []
    for ends in labelled_pairs(items, labels):
        a, b = (vectors[row_of[instruction_of[end]]].astype(np.float32) for end in ends)
        rows.append(_pair_row(*ends, "joint", float(a @ b), "labelled", split))
    return rows


def _joint(
    context: Context,
    items: list[dict[str, Any]],
    labels: Labels,
    split: str,
    row_of: dict[str, int],
    vectors: "SharedVectors",
    tiles: Path,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Joint pairs of one split by the configured strategy; as many as D_S has items unless a budget says otherwise."""
    from jpo_ray.cluster.pairing import JointProblem, joint_pairs

    config, seed = context.config.pairs.joint, context.config.seed
    assert config is not None
    wish = joint_wish(config, items, labels, split)
    if wish is None:
        return [], {}
    left, right, config = wish.left, wish.right, wish.config
    groups = -(-len(left) // config.group_size) if config.group_size else None
    key = "budget" if split == "train" else "validation_budget"
    rows = _side(left, row_of, groups, vectors.array, config, seed)
    columns = rows if right is left else _side(right, row_of, groups, vectors.array, config, seed)
    problem = JointProblem(rows, columns, vectors, config, wish.budget, seed, f"pairs.joint.{key}", wish.at_most)
    with progress_bar(context.console, f"candidate pairs ({split})") as bar:
        choice = joint_pairs(context.ray(), problem, bar, tiles)
    pairs = [
        _pair_row(left[pair["row"]]["item_id"], right[pair["column"]]["item_id"], "joint", pair["similarity"],
                  config.strategy, split)
        for pair in choice.pairs.to_pylist()
    ]  # fmt: skip
    return pairs, choice.notes


def _side(
    items: list[dict[str, Any]],
    row_of: dict[str, int],
    groups: int | None,
    vectors: Vectors,
    config: JointPairs,
    seed: int,
) -> Side:
    keys = item_keys([item["item_id"] for item in items])
    instructions = np.array([row_of[item["instruction_id"]] for item in items], dtype=np.int64)
    facts = {}
    if STRATEGIES[config.strategy].clusters:
        of_item = cluster(vectors[instructions], config.clusters, seed).of_vector
        facts["cluster_size"] = np.bincount(of_item)[of_item].astype(np.float32)
    of_group = None if groups is None else random_groups(keys, groups, seed)
    return Side(keys, instructions, groups=of_group, facts=facts)


def _pair_row(a: str, b: str, protocol: str, similarity: float, strategy: str, split: str) -> dict[str, Any]:
    """Sorted by id, so that neither the chosen item nor the row's own one always stands first."""
    first, second = sorted((a, b))
    return {
        "pair_id": records.pair_id(a, b, protocol),
        "item_a": first,
        "item_b": second,
        "protocol": protocol,
        "similarity": similarity,
        "strategy": strategy,
        "split": split,
    }
