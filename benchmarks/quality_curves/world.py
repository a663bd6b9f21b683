"""What both batching modes of a seed share: comparisons within groups, reference log-probs, instructions to sample."""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jpo_ray import records
from jpo_ray.config import RunConfig
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.engine.dataset import PreferenceData
from jpo_ray.engine.jobs import PreferenceInputs, load_preferences
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.feedback.annotators import Annotator, one_by_one, score_annotator
from jpo_ray.feedback.judge import comparisons_of, judge, preferences
from jpo_ray.sandbox import quality

GROUP = 32  # items that are compared with each other

Ints = npt.NDArray[np.int64]
Row = dict[str, Any]


@dataclass(frozen=True)
class World:
    config: RunConfig
    sft: Path
    tokenizer: Any
    data: PreferenceData
    golds: list[Row]  # the gold items whose instructions are sampled


def make_world(
    config: RunConfig,
    run: Path,
    settings: TrainConfig,
    arguments: argparse.Namespace,
    degree: int,
    count: int | None = None,
) -> World:
    """Train on comparisons of our own making, hold out the run's validation preferences."""
    rows = joint_preferences(config, read_items(run), degree, count)
    if arguments.conditional:
        rows += [row for row in _run_preferences(run) if (row["split"], row["protocol"]) == ("train", "conditional")]
    return world_of(config, run, settings, rows, arguments.win_rate_instructions)


def world_of(config: RunConfig, run: Path, settings: TrainConfig, training: list[Row], instructions: int) -> World:
    """A world with these training preferences and the run's validation ones."""
    rows = training + [row for row in _run_preferences(run) if row["split"] == "validation"]
    tokenizer = load_tokenizer(run / "sft")
    with tempfile.TemporaryDirectory() as name:  # read as training reads a judge artifact
        records.write_table(Path(name) / "preferences.parquet", rows, records.PREFERENCES)
        inputs = PreferenceInputs(run / "sft", run / "items", Path(name), run / "reference")
        data = load_preferences(tokenizer, inputs, config.model, settings)
    golds = [row for row in read_items(run).to_pylist() if row["gold"] and row["split"] == "validation"]
    return World(config, run / "sft", tokenizer, data, golds[:instructions])


def read_items(run: Path) -> pa.Table:
    return records.read_table(run / "items" / "items.parquet", records.ITEMS)


def _run_preferences(run: Path) -> list[Row]:
    rows: list[Row] = records.read_table(run / "judge" / "preferences.parquet", records.PREFERENCES).to_pylist()
    return rows


def joint_preferences(config: RunConfig, items: pa.Table, degree: int, count: int | None = None) -> list[Row]:
    """Comparisons of D_S items (the first `count`) in groups, judged as the judge stage does: rows of
    `records.PREFERENCES`, no ties.
    """
    members = [row["item_id"] for row in items.to_pylist() if row["sft"] and row["split"] == "train"][:count]
    first, second = circulant_groups(len(members), GROUP, degree, np.random.default_rng([config.seed, 0x7471]))
    named = [sorted((members[i], members[j])) for i, j in zip(first.tolist(), second.tolist(), strict=True)]
    rows = [
        {"pair_id": records.pair_id(a, b, "joint"), "item_a": a, "item_b": b, "protocol": "joint", "split": "train"}
        for a, b in named
    ]
    pairs = pa.Table.from_pylist(rows, records.PAIRS)
    judgments = judge(comparisons_of(pairs, items), oracle(config, config.judge))
    return preferences(pairs, pa.Table.from_pylist(judgments, records.JUDGMENTS)).to_pylist()  # type: ignore[no-any-return]


def circulant_groups(count: int, group: int, degree: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Comparisons (first[i], second[i]) of the items 0..count-1 in random groups: int64[E] each.

    Each item is compared with the `degree / 2` before and after it in its group's circle. The last `count % group`
    items of the random order are left out, since so few may not have `degree` others.
    """
    groups_GK = rng.permutation(count)[: count - count % group].reshape(-1, group)
    neighbours = [np.roll(groups_GK, -offset, axis=1).ravel() for offset in range(1, degree // 2 + 1)]
    return np.tile(groups_GK.ravel(), len(neighbours)), np.concatenate(neighbours)


def oracle(config: RunConfig, settings: AnnotatorConfig) -> Annotator:
    """The sandbox's annotator of these settings, with the run's noise."""
    return score_annotator(
        "sandbox", one_by_one(quality), noise=settings.noise, tie_band=settings.tie_band, seed=config.seed
    )


def mode_settings(config: RunConfig, mode: str, arguments: argparse.Namespace) -> TrainConfig:
    """The config's entry with the mode's batching, and the learning rate and epochs that the command line gives it."""
    entry = config.train_entry("jpo")
    rate, epochs = arguments.learning_rate, arguments.epochs
    if mode == "graph":
        rate, epochs = arguments.graph_learning_rate or rate, arguments.graph_epochs or epochs
    own = {
        "batching": mode,
        "comparisons_per_step": arguments.comparisons_per_step,
        "learning_rate": rate or entry.learning_rate,
        "num_train_epochs": epochs or entry.num_train_epochs,
        "seed": config.seed if entry.seed is None else entry.seed,
    }
    return TrainConfig.model_validate(entry.model_dump() | own)
