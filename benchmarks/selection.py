"""How many judged comparisons each way of choosing them needs for 95 % of what judging the whole pool gives.

    python benchmarks/selection.py --run-dir runs/quality [--seeds 0 1 2] [--json FILE] [section.key=value ...]

On the sandbox, each seed a run of its own up to the reference. A pool of random joint comparisons of `--items` items of
D_S is judged by the run's own noisy oracle as it is asked; a policy is trained from the SFT model on what is judged so
far at each of `--sizes`, always for about as many updates, and measured on the run's validation split. Ties cost a
judgment and teach nothing. Every strategy begins with the same random quarter of the first size.

    random        the baseline
    uncertainty   rounds of a quarter of a size, strengths fitted again before each
    margin        rewards of the policy trained at the last size (before the first: random)
    ches          embeddings of the SFT model
    closure       random, and training also on what the fit implies of pairs nobody judged

The gain is measured in held-out accuracy and in win rate; a curve's first crossing counts, linear between its points.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from quality_curves.reading import METRICS
from quality_curves.setting import DEMO, machine, prepare
from quality_curves.training import train_curve
from quality_curves.world import Row, World, mode_settings, oracle, read_items, world_of
from rich.console import Console
from rich.table import Table
from scipy.stats import sem, t

from jpo_ray import records
from jpo_ray.artifacts import package_versions
from jpo_ray.config import RunConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.data.tokens import TokenizedItems, tokenize
from jpo_ray.engine.jobs import layout_of
from jpo_ray.engine.model import load_model, load_policy, load_tokenizer
from jpo_ray.engine.scoring import make_scorer, response_embeddings
from jpo_ray.engine.step import score_all
from jpo_ray.feedback.closure import implied_table, item_graph, judged_edges
from jpo_ray.feedback.judge import comparisons_of, judge, preferences
from jpo_ray.feedback.strengths import fit_strengths
from jpo_ray.files import write_json
from jpo_ray.pairs.choosing import Known, choose_next
from jpo_ray.pairs.sides import item_keys
from jpo_ray.pipeline.judge_stage import with_strengths

STRATEGIES = ("random", "uncertainty", "margin", "ches", "closure")
SHARE = 0.95  # of the gain
CLOSURE = {"per_item": 8, "min_probability": 0.75}  # the config's defaults
PASS_TOKENS = 2048


def main() -> None:
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    configs = prepare(arguments, console)
    about: Row = {"command": shlex.join(sys.argv), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    about |= {"machine": machine(torch.get_num_threads()), "versions": package_versions()}
    rows: list[Row] = []
    for seed, config in configs.items():
        pool = make_pool(config, arguments.run_dir / f"seed-{seed}", arguments)
        for strategy in ("start", "full", *arguments.strategies):
            for point in curve(pool, strategy, arguments):
                rows.append({"seed": seed, "strategy": strategy} | point)
                console.print("  " + ", ".join(f"{name} {_shown(value)}" for name, value in rows[-1].items()))
                if arguments.json:
                    write_json(arguments.json, about | {"rows": rows})
    summary = summarise(rows, arguments.strategies)
    _print_tables(console, rows, summary, arguments)
    if arguments.json:
        write_json(arguments.json, about | {"summary": summary, "rows": rows})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEMO, help="with a `train` entry `jpo`; default: the demo's")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--pool", type=int, default=6144, help="comparisons that could be judged")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--comparisons-per-step", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, help="default: the entry's")
    parser.add_argument("--win-rate-instructions", type=int, default=300)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    arguments.epochs = arguments.graph_learning_rate = arguments.graph_epochs = None
    arguments.sizes = sorted(arguments.sizes)
    if arguments.sizes[-1] >= arguments.pool:
        parser.error("--sizes: below --pool")
    return arguments


@dataclass(frozen=True)
class Pool:
    """Comparisons that may be judged, in a random order, and what the oracle says of each."""

    config: RunConfig
    run: Path
    items: pa.Table  # those of the pool
    ids: list[str]
    first: np.ndarray  # int64[P], numbers into `ids`
    second: np.ndarray
    pairs: pa.Table  # records.PAIRS
    judgments: list[Row]


def make_pool(config: RunConfig, run: Path, arguments: argparse.Namespace) -> Pool:
    table = read_items(run)
    mask = np.array([row["sft"] and row["split"] == "train" for row in table.to_pylist()])
    items = table.filter(pa.array(mask)).slice(0, arguments.items)
    ids = items["item_id"].to_pylist()
    rng = np.random.default_rng([config.seed, 0x706F])
    drawn = rng.permutation(len(ids) * (len(ids) - 1) // 2)[: arguments.pool]
    second, first = (ends[drawn] for ends in np.tril_indices(len(ids), -1))
    rows = [
        {"pair_id": records.pair_id(ids[a], ids[b], "joint"), "item_a": ids[a], "item_b": ids[b], "protocol": "joint",
         "split": "train"}
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]  # fmt: skip
    pairs = pa.Table.from_pylist(rows, records.PAIRS)
    judgments = judge(comparisons_of(pairs, items), oracle(config, config.judge))
    return Pool(config, run, items, ids, first, second, pairs, judgments)


def curve(pool: Pool, strategy: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """A point for each size: what was judged, and how good a policy trained on it is."""
    count = len(pool.judgments)
    judged = np.zeros(count, dtype=bool)
    policy = None
    if strategy in ("start", "full"):
        world, settings = _world(pool, np.arange(count), arguments, closure=False)
        points = list(train_curve(world, settings, points=1))
        yield {"judged": 0 if strategy == "start" else count} | _measured(points[0 if strategy == "start" else 1])
        return
    facts = _static_facts(pool, strategy)
    for size in arguments.sizes:
        while (missing := size - int(judged.sum())) > 0:
            step = min(missing, size // 4)
            known, chosen_by = facts, strategy
            if not judged.any() or strategy == "closure" or (strategy == "margin" and policy is None):
                chosen_by = "random"
            elif strategy == "margin":
                known = replace(facts, reward=_rewards(pool, policy))
            elif strategy == "uncertainty":
                rows = [pool.judgments[number] for number in np.flatnonzero(judged).tolist()]
                known = with_strengths(
                    facts, pool.ids, pool.pairs, pa.Table.from_pylist(rows, records.JUDGMENTS), pool.config.seed
                )
            seed = pool.config.seed * 1000 + int(judged.sum())
            judged[choose_next(chosen_by, pool.first, pool.second, judged, known, step, seed)] = True
        world, settings = _world(pool, np.flatnonzero(judged), arguments, closure=strategy == "closure")
        policy = load_policy(world.sft, world.config.model, settings, seed=settings.seed or 0)
        (point,) = train_curve(world, settings, 1, policy)
        yield {"judged": int(judged.sum())} | _measured(point)


def _measured(point: Row) -> Row:
    return {name: point[name] for name in ("comparisons", "seconds", *METRICS)}


def _world(
    pool: Pool, numbers: np.ndarray, arguments: argparse.Namespace, *, closure: bool
) -> tuple[World, TrainConfig]:
    """The judged comparisons as training data, and as many epochs as make the wanted updates."""
    rows = pa.Table.from_pylist([pool.judgments[number] for number in numbers.tolist()], records.JUDGMENTS)
    training = preferences(pool.pairs, rows).to_pylist()
    if closure:
        graph = item_graph(judged_edges(pool.pairs, rows, "train"))
        fitted = fit_strengths(len(graph.ids), graph.first, graph.second, graph.outcome, pool.config.seed)
        training += implied_table(graph, fitted, pool.items, **CLOSURE, seed=pool.config.seed).to_pylist()
    updates = arguments.updates * arguments.comparisons_per_step
    settings = mode_settings(pool.config, "graph", arguments).model_copy(
        update={"num_train_epochs": updates / len(training)}
    )
    return world_of(pool.config, pool.run, settings, training, arguments.win_rate_instructions), settings


def _static_facts(pool: Pool, strategy: str) -> Known:
    count = len(pool.ids)
    embedding = None
    if strategy == "ches":
        scorer, tokens = make_scorer(load_model(pool.run / "sft", dtype="float32")), _tokens(pool)
        parts = scorer.micro_batches(tokens, np.arange(count), PASS_TOKENS)
        embedding = np.empty((count, scorer.model.config.hidden_size))
        for part in parts:
            embedding[part] = response_embeddings(scorer, tokens, part).numpy()
    return Known(item_keys(pool.ids), np.zeros(count), np.ones(count), embedding=embedding)


def _rewards(pool: Pool, policy: Any) -> np.ndarray:
    tokens, rows = _tokens(pool), np.arange(len(pool.ids))
    scorer = make_scorer(policy.eval())
    scores = score_all(scorer, tokens, rows, max_tokens=PASS_TOKENS)
    with policy.disable_adapter():
        scores = scores - score_all(scorer, tokens, rows, max_tokens=PASS_TOKENS)
    rewards: np.ndarray = scores.sum(dim=1).numpy()
    return rewards


def _tokens(pool: Pool) -> TokenizedItems:
    texts = (pool.items[name].to_pylist() for name in ("instruction", "response"))
    return tokenize(load_tokenizer(pool.run / "sft"), layout_of(pool.config.model), *texts)


def summarise(rows: list[Row], strategies: list[str]) -> list[Row]:
    """Judged comparisons until 95 % of the gain: of each seed, and in multiples of random's over seeds (t-interval)."""
    seeds = sorted({row["seed"] for row in rows})
    found = []
    for metric, title in METRICS.items():
        needed = {s: [_needed(rows, seed, s, metric) for seed in seeds] for s in strategies}
        for strategy in strategies:
            logs = [
                math.log(own / base)
                for own, base in zip(needed[strategy], needed.get("random", []), strict=False)
                if own and base
            ]
            row: Row = {"quality": title, "strategy": strategy, "needed": needed[strategy], "ratio": None, "ci95": None}
            if logs and len(logs) == len(seeds):
                row["ratio"] = math.exp(float(np.mean(logs)))
                half = float(t.ppf(0.975, len(logs) - 1) * sem(logs)) if len(logs) > 1 else math.nan
                row["ci95"] = [math.exp(np.mean(logs) - half), math.exp(np.mean(logs) + half)]
            found.append(row)
    return found


def _needed(rows: list[Row], seed: int, strategy: str, metric: str) -> float | None:
    """Judgments at which the curve first reaches the target, linear between points; None where it never does."""
    of = {name: sorted((r["judged"], r[metric]) for r in rows if (r["seed"], r["strategy"]) == (seed, name))
          for name in ("start", "full", strategy)}  # fmt: skip
    start, full = of["start"][0][1], of["full"][0][1]
    target = start + SHARE * (full - start)
    if start >= target:
        return 0.0
    before = (0, start)
    for point in of[strategy]:
        if point[1] >= target:
            return before[0] + (target - before[1]) / (point[1] - before[1]) * (point[0] - before[0])
        before = point
    return None


def _print_tables(console: Console, rows: list[Row], summary: list[Row], arguments: argparse.Namespace) -> None:
    for metric, title in METRICS.items():
        table = Table("strategy", *(f"{size:,}" for size in arguments.sizes), title=f"{title} by judged comparisons")
        for name in ("start", "full"):
            ends = [row[metric] for row in rows if row["strategy"] == name]
            table.add_row(f"{name} ({'SFT' if name == 'start' else f'{arguments.pool:,}'})", f"{np.mean(ends):.1f}")
        for strategy in arguments.strategies:
            cells = []
            for size in arguments.sizes:
                values = [r[metric] for r in rows if (r["strategy"], r["judged"]) == (strategy, size)]
                cells.append(f"{np.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})")
            table.add_row(strategy, *cells)
        console.print(table)
    table = Table("quality", "strategy", "judged until 95 % of the gain, each seed", "ratio to random", "95 %")
    for row in summary:
        needed = ", ".join("not reached" if value is None else f"{value:,.0f}" for value in row["needed"])
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        interval = "-" if row["ci95"] is None else f"{row['ci95'][0]:.2f} to {row['ci95'][1]:.2f}"
        table.add_row(row["quality"], row["strategy"], needed, ratio, interval)
    console.print(table)


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
