"""The pairs stage: embeddings of instructions, near-duplicates among them, and which items to compare."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray import records
from jpo_ray.config import JointPairs, PairsConfig, RunConfig
from jpo_ray.errors import InputError
from jpo_ray.pairs.embedding import vector_column
from jpo_ray.pipeline.console import progress_bar
from jpo_ray.pipeline.context import Context, Spec
from jpo_ray.pipeline.pair_shards import make_pairs

DRAWN = 2  # how partners are drawn where any will do: from random groups
COPIES = 8  # near-duplicates of a training instruction within training that are looked at
LEAKS_INTO = {"train": ("validation", "test"), "validation": ("test",), "test": ()}  # split -> more protected ones

Vectors = npt.NDArray[np.float16]


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
    slice_ = {"pairs": config.pairs.model_dump(), "seed": config.seed, **config.model.model_dump(include=layout)}
    if config.pairs.joint and _may_be_drawn(config, config.pairs.joint):
        slice_["drawn"] = DRAWN
    return slice_


def _may_be_drawn(config: RunConfig, joint: JointPairs) -> bool:
    """Whether items' partners may come from random groups of the others: there are many items, and any will do."""
    open_band = (joint.min_similarity, joint.max_similarity) == (-1, 1)
    free = joint.strategy in ("random", "proxy") and open_band and joint.group_size is None
    # A validation split without a budget of its own is not held to the other two limits.
    lenient = bool(config.items.validation) and not joint.validation_budget
    limited = joint.max_per_item is not None or ((joint.min_per_item > 0 or joint.connected) and not lenient)
    return free and not limited


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
        found = embed_texts(context.ray(), context.cluster("pairs"), config.pairs, texts, bar)
    counts = {"instructions": len(texts), "dimensions": int(found.vectors.shape[1]), "from cache": found.cached}
    return list(texts), found.vectors, counts | {"longer than the encoder reads": found.truncated}


def _duplicates(context: Context, items: pa.Table, ids: Sequence[str], vectors: Vectors) -> list[dict[str, Any]]:
    """Rows of `records.NEAR_DUPLICATES`; `instruction_a` is of the less protected split."""
    from jpo_ray.cluster.pairing import near_duplicates
    from jpo_ray.cluster.tiles import share

    shared = share(context.ray_with_a_core(), vectors, context.cluster("pairs"))
    config, seed = context.config.pairs, context.config.seed
    assert config.near_duplicates is not None
    above, timeout_s = (config.joint or JointPairs()).approximate_above, context.cluster("pairs").actor_timeout_s
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
                found = near_duplicates(
                    context.ray(), shared, of_split[split], columns, joint, keep, seed, bar, timeout_s
                )
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
        counts = make_pairs(context, out, tiles)
    except InputError:
        shutil.rmtree(tiles, ignore_errors=True)
        raise
    shutil.rmtree(tiles, ignore_errors=True)
    return counts
