"""The stages that make data: items, pairs (with embeddings), judge."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from jpo_ray import records
from jpo_ray.config import AnnotatorConfig, ClosureConfig, Source
from jpo_ray.data.items import build_items
from jpo_ray.data.sources import SourceRows, parse_rows, read_source
from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import Annotator, label_annotator, score_annotator
from jpo_ray.feedback.judge import comparisons_of, judge, judgment_counts, preferences
from jpo_ray.pairs.candidates import Side, item_keys, random_groups
from jpo_ray.pipeline.console import progress_bar
from jpo_ray.pipeline.context import Context, Spec
from jpo_ray.runs import file_hashes, hash_file, stage_fingerprint

SANDBOX = "sandbox"
SANDBOX_ROWS = {"train": 3000, "validation": 300, "test": 500}
JUDGE_CHUNK = 2000  # comparisons between two updates of the progress bar


def items_specs(context: Context) -> list[Spec]:
    config = context.config.items
    sources = {"train": config.train, "validation": config.validation, "test": config.test}
    inputs = {f"{split}:{source.path}": _source_hash(source) for split, group in sources.items() for source in group}

    def make(out: Path) -> dict[str, Any]:
        rows = {
            split: [_read(source, split, config.on_bad_rows, context.config.seed) for source in group]
            for split, group in sources.items()
        }
        tables = build_items(rows, context.config.seed)
        records.write_table(out / "items.parquet", tables.items, records.ITEMS)
        records.write_table(out / "labels.parquet", tables.labels, records.LABELS)
        return dict(tables.counts)

    slice_ = {"items": config.model_dump(), "seed": context.config.seed}
    return [Spec("items", "items", inputs, slice_, make)]


def _source_hash(source: Source) -> str:
    path = Path(source.path).expanduser()
    if path.is_dir():
        return stage_fingerprint("folder", file_hashes(path), {})
    return hash_file(path) if path.is_file() else source.path


def _read(source: Source, split: str, on_bad_rows: Any, seed: int) -> SourceRows:
    if source.path != SANDBOX:
        return read_source(source, on_bad_rows)
    from jpo_ray.sandbox import make_rows

    try:
        rows = make_rows(cast(Any, split), source.limit or SANDBOX_ROWS[split], seed)
    except ValueError as error:
        raise InputError(f"items.{split}: {error}") from error
    numbered = ((f"sandbox {split} row {number}", row) for number, row in enumerate(rows, start=1))
    return parse_rows(numbered, source.model_copy(update={"format": "dove_single", "limit": None}), on_bad_rows)


def pairs_specs(context: Context) -> list[Spec]:
    items = context.standing("items", "items").fingerprint
    embeddings = Spec(
        "embeddings",
        "pairs",
        {"items": items},
        {"embedder": context.config.pairs.embedder},
        lambda out: _embed(context, out),
    )
    pairs = Spec(
        "pairs",
        "pairs",
        {"items": items, "embeddings": embeddings.fingerprint},
        {"pairs": context.config.pairs.model_dump(), "seed": context.config.seed},
        lambda out: _pair(context, out),
    )
    return [embeddings, pairs]


def _embed(context: Context, out: Path) -> dict[str, Any]:
    from jpo_ray.cluster.pairing import embed_texts

    items = records.read_table(context.path("items") / "items.parquet", records.ITEMS)
    texts = dict(zip(items["instruction_id"].to_pylist(), items["instruction"].to_pylist(), strict=True))
    with progress_bar(context.console, "embedding instructions") as bar:
        bar.begin(len(texts))
        vectors, truncated = embed_texts(
            context.ray(), context.config.cluster, context.config.pairs.embedder, list(texts.values()), bar.advance
        )
    values = pa.ListArray.from_arrays(np.arange(len(texts) + 1, dtype=np.int32) * vectors.shape[1], vectors.ravel())
    table = pa.table({"instruction_id": list(texts), "vector": values})
    records.write_table(out / "embeddings.parquet", table, records.EMBEDDINGS)
    counts = {"instructions": len(texts), "dimensions": int(vectors.shape[1])}
    return counts | {"longer than the encoder reads": truncated}


def _pair(context: Context, out: Path) -> dict[str, Any]:
    items = records.read_table(context.path("items") / "items.parquet", records.ITEMS).to_pylist()
    embeddings = records.read_table(context.path("embeddings") / "embeddings.parquet", records.EMBEDDINGS)
    row_of = {name: row for row, name in enumerate(embeddings["instruction_id"].to_pylist())}
    flat = embeddings["vector"].combine_chunks().values.to_numpy(zero_copy_only=False)
    vectors = flat.reshape(len(row_of), -1)
    rows: list[dict[str, Any]] = []
    for split in ("train", "validation"):
        here = [item for item in items if item["split"] == split]
        if context.config.pairs.conditional:
            rows += _conditional(here, split)
        if context.config.pairs.joint and here:
            rows += _labelled(context, here, split, row_of, vectors)
            rows += _joint(context, here, split, row_of, vectors)
    distinct = list({row["pair_id"]: row for row in reversed(rows)}.values())[::-1]  # a labelled pair stays as such
    table = records.write_table(out / "pairs.parquet", distinct, records.PAIRS)
    kinds = list(zip(table["split"].to_pylist(), table["protocol"].to_pylist(), strict=True))
    return {f"{split} {protocol}": kinds.count((split, protocol)) for split, protocol in dict.fromkeys(kinds)}


def _conditional(items: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """All pairs of responses of each instruction."""
    of_instruction: dict[str, list[str]] = {}
    for item in items:
        of_instruction.setdefault(item["instruction_id"], []).append(item["item_id"])
    return [
        _pair_row(a, b, "conditional", 1.0, "conditional", split)
        for members in of_instruction.values()
        for place, a in enumerate(members)
        for b in members[place + 1 :]
    ]


def _labelled(
    context: Context, items: list[dict[str, Any]], split: str, row_of: dict[str, int], vectors: Any
) -> list[dict[str, Any]]:
    """The joint comparisons that the data have labels for: all of them, beside the budget and the band."""
    instruction_of = {item["item_id"]: item["instruction_id"] for item in items}
    rows = []
    for label in records.read_table(context.path("items") / "labels.parquet", records.LABELS).to_pylist():
        a, b = (instruction_of.get(label[side]) for side in ("item_a", "item_b"))
        if a is not None and b is not None and a != b:
            similarity = float(vectors[row_of[a]].astype(np.float32) @ vectors[row_of[b]].astype(np.float32))
            rows.append(_pair_row(label["item_a"], label["item_b"], "joint", similarity, "labelled", split))
    return rows


def _joint(
    context: Context, items: list[dict[str, Any]], split: str, row_of: dict[str, int], vectors: Any
) -> list[dict[str, Any]]:
    """Joint pairs of one split by the configured strategy; as many as D_S has items unless a budget says otherwise."""
    from jpo_ray.cluster.pairing import joint_pairs

    config = context.config.pairs.joint
    assert config is not None
    members = [item for item in items if item["sft"]]
    possible = len(members) * (len(members) - 1) // 2
    budget = (config.budget if split == "train" else config.validation_budget) or min(len(members), possible)
    if not budget:
        return []
    left, right = (members, members) if config.strategy != "proxy" else _chosen_and_rejected(context, items)
    if not left or not right:
        if split == "validation":
            return []
        raise InputError("pairs.joint.strategy: proxy needs labelled comparisons in items.train; there are none")
    groups = -(-len(left) // config.group_size) if config.group_size else None
    rows = _side(left, row_of, groups, context.config.seed)
    columns = rows if right is left else _side(right, row_of, groups, context.config.seed)
    with progress_bar(context.console, f"candidate pairs ({split})") as bar:
        found = joint_pairs(
            context.ray(),
            rows,
            columns,
            vectors,
            strategy=config.strategy,
            band=(config.min_similarity, config.max_similarity),
            budget=budget,
            seed=context.config.seed,
            budget_key="pairs.joint.budget" if split == "train" else "pairs.joint.validation_budget",
            begin=bar.begin,
            advance=bar.advance,
        )
    return [
        _pair_row(left[pair["row"]]["item_id"], right[pair["column"]]["item_id"], "joint", pair["similarity"],
                  config.strategy, split)
        for pair in found.to_pylist()
    ]  # fmt: skip


def _chosen_and_rejected(
    context: Context, items: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Items that are only ever chosen, and only ever rejected, by the ready-made labels."""
    chosen, rejected = set(), set()
    for label in records.read_table(context.path("items") / "labels.parquet", records.LABELS).to_pylist():
        if label["verdict"] in ("a", "b"):
            winner, loser = ("item_a", "item_b") if label["verdict"] == "a" else ("item_b", "item_a")
            chosen.add(label[winner])
            rejected.add(label[loser])
    return (
        [item for item in items if item["item_id"] in chosen - rejected],
        [item for item in items if item["item_id"] in rejected - chosen],
    )


def _side(items: list[dict[str, Any]], row_of: dict[str, int], groups: int | None, seed: int) -> Side:
    keys = item_keys([item["item_id"] for item in items])
    return Side(
        keys=keys,
        instructions=np.array([row_of[item["instruction_id"]] for item in items], dtype=np.int64),
        groups=None if groups is None else random_groups(keys, groups, seed),
    )


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


def judge_specs(context: Context) -> list[Spec]:
    inputs = {name: context.standing(name, name).fingerprint for name in ("items", "pairs")}

    def make(out: Path) -> dict[str, Any]:
        items = records.read_table(context.path("items") / "items.parquet", records.ITEMS)
        pairs = records.read_table(context.path("pairs") / "pairs.parquet", records.PAIRS)
        annotator = make_annotator(context, context.config.judge)
        comparisons = comparisons_of(pairs, items)
        rows: list[dict[str, Any]] = []
        with progress_bar(context.console, "judging comparisons") as bar:
            bar.begin(len(comparisons))
            for start in range(0, len(comparisons), JUDGE_CHUNK):
                chunk = comparisons[start : start + JUDGE_CHUNK]
                rows += judge(chunk, annotator)
                bar.advance(len(chunk))
        records.write_table(out / "judgments.parquet", rows, records.JUDGMENTS)
        decisive = preferences(pairs, rows)
        counts = judgment_counts(rows) | {"preferences": len(decisive)}
        if context.config.judge.closure:
            implied, facts = _closure(context.config.judge.closure, pairs, items, rows, context.config.seed, out)
            decisive += implied
            counts |= facts
        records.write_table(out / "preferences.parquet", decisive, records.PREFERENCES)
        joint = {
            pair
            for pair, kind in zip(pairs["pair_id"].to_pylist(), pairs["protocol"].to_pylist(), strict=True)
            if kind == "joint"
        }
        if joint and all(row["verdict"] == "invalid" for row in rows if row["pair_id"] in joint):
            counts["warning"] = (
                "no joint pair has a verdict, so nothing is learned across instructions; with labels alone set "
                "pairs.joint.strategy=proxy, or pairs.joint=null"
            )
        return counts

    slice_ = {"judge": context.config.judge.model_dump(), "seed": context.config.seed}  # the strategy is in the pairs
    return [Spec("judge", "judge", inputs, slice_, make)]


def _closure(
    config: ClosureConfig, pairs: pa.Table, items: pa.Table, judgments: list[dict[str, Any]], seed: int, out: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Implied training preferences, and what the fit says of the judgments; every item's strength goes to `out`."""
    from jpo_ray.feedback.closure import implied_rows, item_graph, warning
    from jpo_ray.feedback.strengths import fit_strengths, graph_facts

    graph = item_graph(pairs, judgments, "train")
    if not len(graph.first):
        raise InputError("judge.closure: no judgment of a training pair to fit strengths to; set judge.closure: null")
    facts = graph_facts(len(graph.ids), graph.first, graph.second, graph.outcome)
    fitted = fit_strengths(len(graph.ids), graph.first, graph.second, graph.outcome, seed)
    records.write_table(out / "strengths.parquet", graph.table(fitted, "train"), records.STRENGTHS)
    rows = implied_rows(graph, fitted, items, config.per_item, config.min_probability, seed)
    shown = {
        "implied": len(rows),
        "components": facts.components,
        "intransitive_share": facts.intransitive_share,
        "strengths_agree": fitted.agreement,
        "reliability": fitted.reliability,
        "warning": warning(facts, fitted),
    }
    return rows, {name: value for name, value in shown.items() if value is not None}


def make_annotator(context: Context, config: AnnotatorConfig) -> Annotator:
    """The configured annotator."""
    if config.annotator == "labels":
        labels = records.read_table(context.path("items") / "labels.parquet", records.LABELS)
        joint = context.config.pairs.joint
        return label_annotator(labels, proxy=joint is not None and joint.strategy == "proxy")
    from jpo_ray.sandbox import quality

    return score_annotator(SANDBOX, quality, noise=config.noise, tie_band=config.tie_band, seed=context.config.seed)
