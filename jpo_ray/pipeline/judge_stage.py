"""The judge stage: pairs in, verdicts and preferences out; all pairs at once, or chosen in rounds."""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray import records
from jpo_ray.cache import cache_folder
from jpo_ray.config_judge import AnnotatorConfig, ClosureConfig, SelectionConfig
from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import Annotator
from jpo_ray.feedback.judge import (
    comparisons_of,
    invalid_reasons,
    invalid_warning,
    judgment_counts,
    preferences,
    require_verdicts,
)
from jpo_ray.pairs.choosing import Known, choose_next
from jpo_ray.pairs.sides import item_keys
from jpo_ray.pipeline.annotating import Given, Rows, annotator_inputs, judge_with_bar, judging_estimate, open_annotator
from jpo_ray.pipeline.console import Bar, progress_bar
from jpo_ray.pipeline.context import Context, Spec

POLICY = "judge.selection.policy"

Floats = npt.NDArray[np.float64]


def judge_specs(context: Context) -> list[Spec]:
    if context.config.rounds is not None:  # each has its own
        return []
    inputs = {name: context.standing(name, name).fingerprint for name in ("items", "pairs")}
    for config in (context.config.judge, *context.config.judge.also):
        inputs |= annotator_inputs(config)

    def make(out: Path) -> dict[str, Any]:
        items = records.read_table(context.path("items") / "items.parquet", records.ITEMS)
        pairs = records.read_table(context.path("pairs") / "pairs.parquet", records.PAIRS)
        rows = _judgments(context, pairs, items)
        mostly_invalid = require_verdicts(rows)
        warnings = [_without_joint_labels(context, pairs, rows) or mostly_invalid]
        others = [_others_judgments(context, other, pairs, items, rows) for other in context.config.judge.also]
        warnings += map(invalid_warning, others)
        records.write_table(out / "judgments.parquet", sum(others, rows), records.JUDGMENTS)
        decisive = preferences(pairs, rows)
        counts = judgment_counts(rows) | {"preferences": len(decisive)}
        if reasons := invalid_reasons(rows):
            counts["invalid because"] = reasons
        counts["annotators"] = {some[0]["annotator"]: judgment_counts(some) for some in (rows, *others) if some}
        counts |= {key: sum(some[key] for some in counts["annotators"].values()) for key in ("tokens", "cost")}
        for name, of_other in list(counts["annotators"].items())[1:]:
            said = ", ".join(f"{key} {of_other[key]:,}" for key in ("a", "b", "tie", "invalid"))
            context.console.print(f"  {name}: {said}", highlight=False, soft_wrap=True)
        if context.config.judge.closure:
            implied, facts = _closure(context.config.judge.closure, pairs, items, rows, context.config.seed, out)
            decisive += implied
            warnings.append(facts.pop("warning", ""))
            counts |= facts
        records.write_table(out / "preferences.parquet", decisive, records.PREFERENCES)
        return counts | {"warning": "; ".join(filter(None, warnings))}

    slice_ = {"judge": context.config.judge.decisive(), "seed": context.config.seed}  # the strategy is in the pairs
    selection = context.config.judge.selection
    if selection and selection.policy:
        inputs["policy"] = _policy_hash(_policy_folder(selection))
    return [Spec("judge", "judge", inputs, slice_, make)]


def _without_joint_labels(context: Context, pairs: pa.Table, rows: Rows) -> str:
    """A warning where labels that came with the data decide no joint pair; else empty."""
    joint = set(pairs["pair_id"].filter(pc.equal(pairs["protocol"], "joint")).to_pylist())
    decided = any(row["verdict"] != "invalid" for row in rows if row["pair_id"] in joint)
    if context.config.judge.annotator != "labels" or not joint or decided:
        return ""
    return (
        "no joint pair has a verdict, so nothing is learned across instructions; with labels alone set "
        "pairs.joint.strategy=proxy, or pairs.joint=null"
    )


def _judgments(context: Context, pairs: pa.Table, items: pa.Table) -> Rows:
    selection = context.config.judge.selection
    if selection and selection.policy:  # before anything is judged, which may cost something
        from jpo_ray.engine.adapters import base_of

        base_of(_policy_folder(selection), POLICY, cache_folder())
    with (
        run_annotator(context, context.config.judge) as annotator,
        progress_bar(context.console, "judging comparisons") as bar,
    ):
        if selection is None:
            bar.begin(len(pairs))
            return _judge(pairs, items, annotator, bar)
        pool, others = _pool_and_others(pairs)
        if selection.budget > len(pool):
            raise InputError(
                f"judge.selection.budget: asks for {selection.budget} joint training pairs, `pairs` has {len(pool)}; "
                "raise pairs.joint.budget (several times the judgments leave a choice) or lower it"
            )
        bar.begin(len(others) + selection.budget)
        rows = _judge(others, items, annotator, bar)
        return rows + _judge_in_rounds(context, selection, pool, pairs, rows, items, annotator, bar)


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
    context: Context, config: AnnotatorConfig, pairs: pa.Table, items: pa.Table, judged: Rows
) -> Rows:
    """What another annotator says of the pairs that were judged."""
    ids = pa.array([row["pair_id"] for row in judged], pa.string())
    some = pairs.filter(pc.is_in(pairs["pair_id"], value_set=ids))
    with (
        run_annotator(context, config, _own_seed(context.config.seed, config.called)) as annotator,
        progress_bar(context.console, f"judging comparisons ({config.called})") as bar,
    ):
        bar.begin(len(judged))
        return _judge(some, items, annotator, bar)


def _judge(pairs: pa.Table, items: pa.Table, annotator: Annotator, bar: Bar) -> Rows:
    return judge_with_bar(comparisons_of(pairs, items), annotator, bar)


def _judge_in_rounds(
    context: Context,
    selection: SelectionConfig,
    pool: pa.Table,
    pairs: pa.Table,
    before: Rows,
    items: pa.Table,
    annotator: Annotator,
    bar: Bar,
) -> Rows:
    """Judge `selection.budget` pairs of `pool`; `before` are the judgments of other pairs, which count as known."""
    seed = context.config.seed
    ids = sorted({*pool["item_a"].to_pylist(), *pool["item_b"].to_pylist()})
    number = {item: place for place, item in enumerate(ids)}
    first, second = (np.array([number[i] for i in pool[side].to_pylist()]) for side in ("item_a", "item_b"))
    known = Known(item_keys(ids), np.zeros(len(ids)), np.ones(len(ids)), *_policy_facts(context, selection, ids, items))
    judged = np.zeros(len(pool), dtype=bool)
    rows: Rows = []
    rounds = min(selection.rounds, selection.budget)
    for turn in range(rounds):
        count = selection.budget * (turn + 1) // rounds - len(rows)
        if selection.strategy == "uncertainty":
            known = with_strengths(known, ids, pairs, before + rows, seed)
        chosen = choose_next(selection.strategy, first, second, judged, known, count, seed + turn)
        judged[chosen] = True
        rows += _judge(pool.take(chosen), items, annotator, bar)
    return rows


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
            context.ray(), context.config.cluster, "judge", tokens, policies=[(folder, np.arange(len(tokens)))],
            base=base_of(folder, POLICY, cache_folder()), dtype=model.dtype, load_in_4bit=model.load_in_4bit,
            fact=fact, bar=bar,
        )  # fmt: skip
    values = found.astype(np.float64)
    return (values.sum(axis=1), None) if fact == "log_ratio" else (None, values)


def with_strengths(known: Known, ids: Sequence[str], pairs: pa.Table, judgments: Rows, seed: int) -> Known:
    """Strengths of the items as far as the judgments tell; of those not judged yet nothing is known."""
    from jpo_ray.feedback.closure import item_graph
    from jpo_ray.feedback.strengths import fit_strengths

    graph = item_graph(pairs, judgments, "train")
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
    config: ClosureConfig, pairs: pa.Table, items: pa.Table, judgments: Rows, seed: int, out: Path
) -> tuple[Rows, dict[str, Any]]:
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


def _own_seed(seed: int, name: str) -> int:
    """Two annotators must not err alike, as with the run's seed they would."""
    return int.from_bytes(hashlib.sha256(f"annotator {seed} {name}".encode()).digest()[:4])


def run_annotator(
    context: Context, config: AnnotatorConfig, seed: int | None = None
) -> AbstractContextManager[Annotator]:
    """The configured annotator of a run; `seed` is that of its errors, default the run's."""
    joint = context.config.pairs.joint
    given = Given(
        records.read_table(context.path("items") / "labels.parquet", records.LABELS),
        records.read_table(context.path("items") / "ratings.parquet", records.RATINGS),
        proxy=joint is not None and joint.strategy == "proxy",
    )
    return open_annotator(config, context.ray, context.config.cluster, context.seed(seed), given)
