"""The judge stage: pairs in, verdicts and preferences out; all pairs at once, or chosen in rounds."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray import records, shards
from jpo_ray.cache import cache_folder
from jpo_ray.config_judge import AnnotatorConfig, ClosureConfig, SelectionConfig
from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import Annotator
from jpo_ray.feedback.judge import comparisons_of, texts_of
from jpo_ray.feedback.tally import invalid_reasons, invalid_warning, judgment_counts, require_verdicts
from jpo_ray.pairs.choosing import Known, choose_next
from jpo_ray.pairs.sides import item_keys
from jpo_ray.pipeline.annotating import Given, annotator_inputs, judging_estimate, open_annotator
from jpo_ray.pipeline.console import Bar, progress_bar
from jpo_ray.pipeline.context import Context, Spec
from jpo_ray.pipeline.judge_shards import (
    JUDGMENTS,
    OTHERS,
    Sums,
    add_judgments,
    add_preferences,
    ask,
    judge_shards,
    judged,
    write_judged,
)

POLICY = "judge.selection.policy"

Floats = npt.NDArray[np.float64]


def judge_specs(context: Context) -> list[Spec]:
    if context.config.rounds is not None:  # each has its own
        return []
    inputs = {name: context.standing(name, name).fingerprint for name in ("items", "pairs")}
    for config in (context.config.judge, *context.config.judge.also):
        inputs |= annotator_inputs(config)

    def make(out: Path) -> dict[str, Any]:
        return judge_all(context, out)

    slice_ = {"judge": context.config.judge.decisive(), "seed": context.config.seed}  # the strategy is in the pairs
    selection = context.config.judge.selection
    if selection and selection.policy:
        inputs["policy"] = _policy_hash(_policy_folder(selection))
    return [Spec("judge", "judge", inputs, slice_, make)]


def judge_all(context: Context, out: Path) -> dict[str, Any]:
    config = context.config.judge
    items = records.read_table(context.path("items") / "items.parquet", records.ITEMS)
    pairs = context.path("pairs") / "pairs.parquet"
    first = _in_rounds(context, pairs, items, out) if config.selection else _judged(context, config, pairs, items, out)
    mostly_invalid = require_verdicts(first.tally)
    warnings = [_without_joint_labels(context, first) or mostly_invalid]
    by_name = {first.tally.annotator: first.tally} if first.tally.annotator else {}
    kept = []
    for number, other in enumerate(config.also):
        kept.append(out / OTHERS / str(number))
        found = _others_judgments(context, other, pairs, items, out, kept[-1])
        warnings.append(invalid_warning(found.tally))
        by_name |= {found.tally.annotator: found.tally} if found.tally.annotator else {}
    if kept:
        add_judgments(out, kept)
        shutil.rmtree(out / OTHERS)
    counts = judgment_counts(first.tally) | {"preferences": first.decisive}
    if reasons := invalid_reasons(first.tally):
        counts["invalid because"] = reasons
    counts["annotators"] = {name: judgment_counts(of_one) for name, of_one in by_name.items()}
    counts |= {key: sum(some[key] for some in counts["annotators"].values()) for key in ("tokens", "cost")}
    for name, of_other in list(counts["annotators"].items())[1:]:
        said = ", ".join(f"{key} {of_other[key]:,}" for key in ("a", "b", "tie", "invalid"))
        context.console.print(f"  {name}: {said}", highlight=False, soft_wrap=True)
    if config.closure:
        implied, facts = _closure(config.closure, pairs, items, first.tally.annotator, context.config.seed, out)
        add_preferences(out, implied)
        warnings.append(facts.pop("warning", ""))
        counts |= facts
    return counts | {"warning": "; ".join(filter(None, warnings))}


def _without_joint_labels(context: Context, found: Sums) -> str:
    """A warning where labels that came with the data decide no joint pair; else empty."""
    if context.config.judge.annotator != "labels" or not found.joint or found.joint_valid:
        return ""
    return (
        "no joint pair has a verdict, so nothing is learned across instructions; with labels alone set "
        "pairs.joint.strategy=proxy, or pairs.joint=null"
    )


def _judged(
    context: Context, config: AnnotatorConfig, pairs: Path, items: pa.Table, out: Path, seed: int | None = None
) -> Sums:
    """What an annotator says of all pairs."""
    of = f" ({config.called})" if seed is not None else ""
    with (
        run_annotator(context, config, seed) as annotator,
        progress_bar(context.console, f"judging comparisons{of}") as bar,
    ):
        return judge_shards(context.ray, context.cluster("judge"), annotator, pairs, items, out, bar)


def _in_rounds(context: Context, pairs: Path, items: pa.Table, out: Path) -> Sums:
    """What the annotator says of chosen pairs; they are few."""
    selection = context.config.judge.selection
    assert selection is not None
    if selection.policy:  # before anything is judged, which may cost something
        from jpo_ray.engine.adapters import base_of

        base_of(_policy_folder(selection), POLICY, cache_folder())
    table = records.read_table(pairs, records.PAIRS)
    pool, others = _pool_and_others(table)
    known = _known(context, selection, pool, items)  # before the annotator takes the GPUs that this may need
    with (
        run_annotator(context, context.config.judge) as annotator,
        progress_bar(context.console, "judging comparisons") as bar,
    ):
        bar.begin(len(others) + selection.budget)
        judgments = _judge_in_rounds(context, selection, known, pool, others, table, items, annotator, bar)
    found, sums = judged(table, judgments), Sums()
    write_judged(out, None, found)
    sums.add(found)
    return sums


def judging_estimates(context: Context) -> list[str]:
    """What each annotator of the stage would take; of pairs that are chosen in rounds, any of their number stand in."""
    for name in ("items", "pairs"):
        context.standing(name, name)
    items = records.read_table(context.path("items") / "items.parquet", records.ITEMS)
    pairs = records.read_table(context.path("pairs") / "pairs.parquet", records.PAIRS)
    judge = context.config.judge
    if judge.selection is not None:
        pool, others = _pool_and_others(pairs)
        pairs = pa.concat_tables([others, pool.slice(0, judge.selection.budget)])
    comparisons = comparisons_of(pairs, items)
    return [judging_estimate(config, comparisons) for config in (judge, *judge.also)]


def _pool_and_others(pairs: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The pairs that rounds choose from, and those that are judged in any case."""
    in_pool = pc.and_(pc.equal(pairs["protocol"], "joint"), pc.equal(pairs["split"], "train"))
    return pairs.filter(in_pool), pairs.filter(pc.invert(in_pool))


def _others_judgments(
    context: Context, config: AnnotatorConfig, pairs: Path, items: pa.Table, judged_in: Path, out: Path
) -> Sums:
    """What another annotator says of the pairs that were judged."""
    out.mkdir(parents=True)
    if context.config.judge.selection:
        table = records.read_table(pairs, records.PAIRS)
        ids = records.read_table(judged_in / JUDGMENTS, records.JUDGMENTS)["pair_id"]
        pairs = out / "pairs.parquet"
        shards.write_shard(pairs, table.filter(pc.is_in(table["pair_id"], value_set=ids)), records.PAIRS)
    return _judged(context, config, pairs, items, out, _own_seed(context.config.seed, config.called))


def _judge_in_rounds(
    context: Context,
    selection: SelectionConfig,
    known: Known,
    pool: pa.Table,
    others: pa.Table,
    pairs: pa.Table,
    items: pa.Table,
    annotator: Annotator,
    bar: Bar,
) -> pa.Table:
    """Judgments of `others`, which count as known, and of `selection.budget` pairs of `pool`."""
    seed, texts = context.config.seed, texts_of(items)
    judgments = ask(annotator, others, texts, bar)
    ids = _item_ids(pool)
    number = {item: place for place, item in enumerate(ids)}
    first, second = (np.array([number[i] for i in pool[side].to_pylist()]) for side in ("item_a", "item_b"))
    judged = np.zeros(len(pool), dtype=bool)
    rounds = min(selection.rounds, selection.budget)
    for turn in range(rounds):
        count = selection.budget * (turn + 1) // rounds - selection.budget * turn // rounds
        if selection.strategy == "uncertainty":
            known = with_strengths(known, ids, pairs, judgments, seed)
        chosen = choose_next(selection.strategy, first, second, judged, known, count, seed + turn)
        judged[chosen] = True
        judgments = pa.concat_tables([judgments, ask(annotator, pool.take(chosen), texts, bar)])
    return judgments


def _item_ids(pool: pa.Table) -> list[str]:
    return sorted({*pool["item_a"].to_pylist(), *pool["item_b"].to_pylist()})


def _known(context: Context, selection: SelectionConfig, pool: pa.Table, items: pa.Table) -> Known:
    """What is known of the pool's items before anything is judged. Raises `InputError` where the pool is too small."""
    if selection.budget > len(pool):
        raise InputError(
            f"judge.selection.budget: asks for {selection.budget} joint training pairs, `pairs` has {len(pool)}; "
            "raise pairs.joint.budget (several times the judgments leave a choice) or lower it"
        )
    ids = _item_ids(pool)
    return Known(item_keys(ids), np.zeros(len(ids)), np.ones(len(ids)), *_policy_facts(context, selection, ids, items))


def _policy_hash(folder: Path) -> str:
    if not (folder / "adapter_config.json").exists():
        raise InputError(f"{POLICY}: {folder}: is no adapter's folder")
    from jpo_ray.engine.model import weights_hash

    return weights_hash(folder, cache_folder())


def _policy_folder(selection: SelectionConfig) -> Path:
    assert selection.policy is not None
    return Path(selection.policy).expanduser().resolve()


def _policy_facts(
    context: Context, selection: SelectionConfig, ids: Sequence[str], items: pa.Table
) -> tuple[Floats | None, Floats | None]:
    """Rewards float64[N] or embeddings float64[N, D] of the items, where the strategy needs them."""
    if selection.policy is None:
        return None, None
    from jpo_ray.cluster.policy import Fact, policy_facts
    from jpo_ray.data.tokens import tokenize
    from jpo_ray.engine.adapters import base_of
    from jpo_ray.engine.jobs import layout_of
    from jpo_ray.engine.model import load_tokenizer

    folder, model = _policy_folder(selection), context.config.model
    place = {item: row for row, item in enumerate(items["item_id"].to_pylist())}
    texts = items.take([place[item] for item in ids])
    tokens = tokenize(
        load_tokenizer(folder), layout_of(model), texts["instruction"].to_pylist(), texts["response"].to_pylist()
    )
    fact: Fact = "log_ratio" if selection.strategy == "margin" else "embedding"
    with progress_bar(context.console, "scoring items under the policy") as bar:
        [found] = policy_facts(
            context.ray(), context.cluster("judge"), "judge", tokens, policies=[(folder, np.arange(len(tokens)))],
            base=base_of(folder, POLICY, cache_folder()), dtype=model.dtype, load_in_4bit=model.load_in_4bit,
            fact=fact, bar=bar,
        )  # fmt: skip
    values = found.astype(np.float64)
    return (values.sum(axis=1), None) if fact == "log_ratio" else (None, values)


def with_strengths(known: Known, ids: Sequence[str], pairs: pa.Table, judgments: pa.Table, seed: int) -> Known:
    """Strengths of the items as far as the judgments tell; of those not judged yet nothing is known."""
    from jpo_ray.feedback.closure import item_graph, judged_edges
    from jpo_ray.feedback.strengths import fit_strengths

    graph = item_graph(judged_edges(pairs, judgments, "train"))
    if not len(graph.first):
        return known
    fitted = fit_strengths(len(graph.ids), graph.first, graph.second, graph.outcome, seed)
    place = {item: number for number, item in enumerate(graph.ids)}
    met = np.array([place.get(item, -1) for item in ids])
    return replace(
        known,
        strength=np.where(met >= 0, fitted.strength[met], 0.0),
        standard_error=np.where(met >= 0, fitted.standard_error[met], fitted.prior_std),
    )


def _closure(
    config: ClosureConfig, pairs: Path, items: pa.Table, annotator: str, seed: int, out: Path
) -> tuple[pa.Table, dict[str, Any]]:
    """Implied training preferences, and what the fit says of the judgments; every item's strength goes to `out`."""
    from jpo_ray.feedback.closure import implied_table, item_graph, judged_edges, warning
    from jpo_ray.feedback.strengths import fit_strengths, graph_facts

    graph = item_graph(pa.concat_tables(judged_edges(*part, "train") for part in _judged_parts(pairs, annotator, out)))
    if not len(graph.first):
        raise InputError("judge.closure: no judgment of a training pair to fit strengths to; set judge.closure: null")
    facts = graph_facts(len(graph.ids), graph.first, graph.second, graph.outcome)
    fitted = fit_strengths(len(graph.ids), graph.first, graph.second, graph.outcome, seed)
    records.write_table(out / "strengths.parquet", graph.table(fitted, "train"), records.STRENGTHS)
    rows = implied_table(graph, fitted, items, config.per_item, config.min_probability, seed)
    shown = {
        "implied": len(rows),
        "components": facts.components,
        "intransitive_share": facts.intransitive_share,
        "strengths_agree": fitted.agreement,
        "reliability": fitted.reliability,
        "warning": warning(facts, fitted),
    }
    return rows, {name: value for name, value in shown.items() if value is not None}


def _judged_parts(pairs: Path, annotator: str, out: Path) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The pairs of each shard, and the annotator's judgments of them."""
    for name in shards.shard_names(out / JUDGMENTS):
        judgments = records.read_table(shards.shard_path(out / JUDGMENTS, name), records.JUDGMENTS)
        of_pairs = pairs if name is None else pairs / name
        yield (
            records.read_table(of_pairs, records.PAIRS),
            judgments.filter(pc.equal(judgments["annotator"], annotator)),
        )


def _own_seed(seed: int, name: str) -> int:
    """Two annotators must not err alike, as with the run's seed they would."""
    return int.from_bytes(hashlib.sha256(f"annotator {seed} {name}".encode()).digest()[:4])


def run_annotator(
    context: Context, config: AnnotatorConfig, seed: int | None = None, stage: str = "judge"
) -> AbstractContextManager[Annotator]:
    """The configured annotator of a run's `stage`; `seed` is that of its errors, default the run's."""
    joint = context.config.pairs.joint
    given = Given(
        records.read_table(context.path("items") / "labels.parquet", records.LABELS),
        records.read_table(context.path("items") / "ratings.parquet", records.RATINGS),
        proxy=joint is not None and joint.strategy == "proxy",
    )
    return open_annotator(config, context.ray, context.cluster(stage), context.seed(seed), given, stage)
