"""A run directory as the stages leave it, made of invented numbers: what the report is tested on."""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from jpo_ray import records
from jpo_ray.config import RunConfig
from jpo_ray.config_file import parse_config
from jpo_ray.evaluation.win_rates import win_rates
from jpo_ray.files import write_json
from jpo_ray.records import content_id, instruction_id, item_id, pair_id
from jpo_ray.runs import RunDir

TEMPERATURES = (0.001, 0.5, 1.0)
FRUITS = ["apple", "pear", "plum", "fig", "quince", "cherry", "lemon", "mango", "papaya", "grape"]
VERDICT_ODDS = {"sft": (0.28, 0.1), "dpo": (0.38, 0.1), "jpo": (0.42, 0.1)}  # of `a` and of a tie


def make_config(names: Sequence[str] = ("jpo", "dpo"), **sections: Any) -> RunConfig:
    train = [
        {"name": name, "objective": "dpo" if name == "dpo" else "jpo", "beta": 0.5}
        | ({"protocols": ["conditional"]} if name == "dpo" else {})
        for name in names
    ]
    values = {
        "seed": 7,
        "items": {"train": [{"path": "sandbox"}], "test": [{"path": "sandbox"}]},
        "model": {"model_name_or_path": "sandbox"},
        "pairs": {"joint": {"strategy": "similar", "min_similarity": 0.2, "max_similarity": 0.85}},
        "train": train,
    }
    return parse_config(values | sections, "test")


def texts(instruction: int, model: str, temperature: float) -> str:
    generator = random.Random(f"{instruction}-{model}-{temperature}")
    fruits = generator.sample(FRUITS, 4)
    return generator.choice(
        [
            ", ".join(fruits) + ".",
            f"Sure! Here are four fruits:\n- {fruits[0]}\n- {fruits[1]}\n- {fruits[2]}\n- {fruits[3]}",
            "I am not certain which fruits you mean, but there are many of them and all are good in their own way. "
            * 2,
            f"{fruits[0]}, {fruits[0]}, {fruits[1]} 🍎",
        ]
    )


def instruction_text(index: int) -> str:
    return f"Name four fruits other than {FRUITS[index % 10]} that a shop with {index + 2} shelves could sell."


def item_row(index: int, response: str, split: str, *, sft: bool = False, gold: bool = False) -> dict[str, Any]:
    instruction = instruction_text(index)
    return {
        "item_id": item_id(instruction, response),
        "instruction_id": instruction_id(instruction),
        "instruction": instruction,
        "response": response,
        "source": "sandbox",
        "split": split,
        "sft": sft,
        "gold": gold,
    }


def put(run: RunDir, artifact: str, tables: Mapping[str, tuple[Any, pa.Schema]], **extra: Any) -> None:
    """Build an artifact of tables and JSON files (`extra["json"]`), as a stage does."""

    def make(folder: Path) -> dict[str, Any]:
        for name, (rows, schema) in tables.items():
            records.write_table(folder / name, rows, schema)
        for name, content in extra.get("json", {}).items():
            write_json(folder / name, content)
        return dict(extra.get("counts", {}))

    run.build(artifact, inputs={}, config={}, make=make)


def put_data(run: RunDir, instructions: int, tests: int) -> None:
    """Items, pairs, judgments and preferences."""
    generator = random.Random(0)
    items = []
    for index in range(instructions + tests):
        split = "train" if index < instructions * 0.9 else "validation" if index < instructions else "test"
        items.append(item_row(index, f"{texts(index, 'first', 1)} (1)", split, sft=True, gold=split == "test"))
        if split != "test":
            items.append(item_row(index, f"{texts(index, 'second', 1)} (2)", split))
    put(run, "items", {"items.parquet": (items, records.ITEMS)}, counts={"items": len(items), "skipped": 0})
    pairs = []
    for first in range(instructions):
        split = items[2 * first]["split"]
        second = generator.randrange(instructions)
        for a, b, protocol, similarity in (
            (2 * first, 2 * first + 1, "conditional", 1.0),
            (2 * first, 2 * second, "joint", min(0.85, max(0.2, generator.gauss(0.45, 0.15)))),
        ):
            ids = items[a]["item_id"], items[b]["item_id"]
            pairs.append(
                {"pair_id": pair_id(*ids, protocol) + str(first), "item_a": ids[0], "item_b": ids[1]}
                | {"protocol": protocol, "similarity": similarity, "strategy": "similar", "split": split}
            )
    put(run, "embeddings", {})
    put(run, "pairs", {"pairs.parquet": (pairs, records.PAIRS)}, counts={"pairs": len(pairs), "skipped_similar": 3})
    put_judgments(run, pairs, generator)


def put_judgments(run: RunDir, pairs: Sequence[Mapping[str, Any]], generator: random.Random) -> None:
    judgments, preferences = [], []
    for pair in pairs:
        orders = generator.choices(["aa", "bb", "ab", "tt", "xa"], [40, 40, 8, 9, 3])[0]
        first, second = ({"a": "a", "b": "b", "t": "tie", "x": "invalid"}[order] for order in orders)
        verdict = first if first == second else "invalid" if "x" in orders else "tie"
        judgments.append(judgment({"pair_id": pair["pair_id"]}, verdict, first, second))
        if verdict in "ab":
            chosen, rejected = ("item_a", "item_b") if verdict == "a" else ("item_b", "item_a")
            preferences.append(
                {"chosen": pair[chosen], "rejected": pair[rejected], "weight": 1.0, "probability": 1.0}
                | {"protocol": pair["protocol"], "split": pair["split"]}
            )
    tables = {
        "judgments.parquet": (judgments, records.JUDGMENTS),
        "preferences.parquet": (preferences, records.PREFERENCES),
    }
    put(run, "judge", tables, counts={"decisive": len(preferences)})


def judgment(identity: Mapping[str, Any], verdict: str, first: str = "a", second: str = "a") -> dict[str, Any]:
    return {
        **identity,
        "annotator": "sandbox",
        "verdict": verdict,
        "verdict_ab": first,
        "verdict_ba": second,
        "text_ab": "",
        "text_ba": "",
        "tokens": 0,
        "cost": 0.0,
        "reason": "",
    }


def put_trainings(run: RunDir, names: Sequence[str], steps: int) -> None:
    put(run, "sft", {}, json={"trainer_state.json": sft_state(steps)}, counts={"items": 500})
    put(run, "reference", {}, counts={"items": 1000})
    for position, name in enumerate(names):
        state = {"trainer_state.json": preference_state(steps, position)}
        put(run, f"train/{name}", {}, json=state, counts={"comparisons": 900, "steps": steps})


def sft_state(steps: int) -> dict[str, Any]:
    generator = random.Random(1)
    log: list[dict[str, Any]] = [
        {"step": step, "loss": 1.2 + 2 * math.exp(-step / steps * 4) + generator.gauss(0, 0.08)}
        for step in range(1, steps + 1)
    ]
    log += [{"step": step, "eval_loss": 1.3 + 2 * math.exp(-step / steps * 4)} for step in (steps // 2, steps)]
    return {"global_step": steps, "epoch": 3.0, "max_steps": steps, "log_history": log}


def preference_state(steps: int, position: int) -> dict[str, Any]:
    generator = random.Random(position)
    log = []
    for step in range(1, steps + 1):
        log.append(preference_entry(step, step / steps, position, generator.gauss(0, 0.05), ""))
        if step % max(1, steps // 5) == 0:
            log.append(preference_entry(step, step / steps, position, 0.02, "eval_"))
    return {"global_step": steps, "epoch": 2.0, "max_steps": steps, "log_history": log}


def preference_entry(step: int, done: float, position: int, noise: float, prefix: str) -> dict[str, Any]:
    lift = (0.6 + 0.1 * (position % 3)) * (1 - math.exp(-3 * done))
    values = {
        "loss": 0.69 - 0.35 * lift + noise,
        "rewards/accuracies": min(1.0, 0.5 + 0.4 * lift + noise),
        "rewards/margins": 1.6 * lift + noise,
        "joint/margin_instruction": 0.3 * lift * (position % 2 == 0) + noise / 3,
        "joint/margin_response": 1.3 * lift + noise,
        "joint/accuracy_conditional": min(1.0, 0.5 + 0.42 * lift + noise),
        "joint/accuracy_joint": min(1.0, 0.5 + 0.37 * lift - noise),
    }
    entry: dict[str, Any] = {"step": step, "epoch": 2 * done} | {prefix + key: value for key, value in values.items()}
    return entry if prefix else entry | {"tokens_per_second": 5400.0, "learning_rate": 1e-4 * (1 - done)}


def sample_row(index: int, model: str, temperature: float, response: str) -> dict[str, Any]:
    return {
        "instruction_id": instruction_id(instruction_text(index)),
        "instruction": instruction_text(index),
        "model": model,
        "temperature": temperature,
        "effective_temperature": max(temperature, 0.01),
        "seed": 1000 * index + round(10 * temperature),  # as sampled: one per instruction and temperature
        "response": response,
        "finish_reason": "length" if "certain" in response else "stop",
        "engine": "vllm",
    }


def put_samples(run: RunDir, models: Sequence[str], start: int, tests: int) -> list[dict[str, Any]]:
    rows = [
        sample_row(index, model, temperature, texts(index, model, temperature))
        for index in range(start, start + tests)
        for model in models
        for temperature in TEMPERATURES
    ]
    put(run, "sample", {"samples.parquet": (rows, records.SAMPLES)}, counts={"samples": len(rows)})
    return rows


def put_evaluation(run: RunDir, samples: Sequence[Mapping[str, Any]]) -> None:
    judged = []
    for row in samples:
        wins, ties = VERDICT_ODDS.get(row["model"], (0.35, 0.1))
        key = content_id("test", row["instruction_id"], row["model"], str(row["temperature"]))
        luck = random.Random(key).random()
        verdict = "invalid" if luck > 0.985 else "a" if luck < wins else "tie" if luck < wins + ties else "b"
        judged.append(
            judgment({name: row[name] for name in ("instruction_id", "model", "temperature", "seed")}, verdict)
        )
    table = pa.Table.from_pylist(judged, records.SAMPLE_JUDGMENTS)
    rates = win_rates(table, bootstrap_samples=300, seed=7)
    put(run, "evaluate", {"judgments.parquet": (table, records.SAMPLE_JUDGMENTS)}, json={"win_rates.json": rates})


def put_everything(run: RunDir, names: Sequence[str] = ("jpo", "dpo"), *, tests: int = 40, steps: int = 60) -> None:
    """All artifacts of a finished run with the trained models `names`."""
    put_data(run, 60, tests)
    put_trainings(run, names, steps)
    put_evaluation(run, put_samples(run, ["sft", *names], 60, tests))
