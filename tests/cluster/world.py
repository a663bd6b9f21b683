"""The artifacts that training reads, for twelve items and a tiny Llama: made here, without Ray."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from engine.tiny import INSTRUCTIONS, RESPONSES

from jpo_ray import records
from jpo_ray.config import BaseModelConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.data.tokens import tokenize
from jpo_ray.engine.jobs import PreferenceInputs, layout_of
from jpo_ray.engine.model import load_model, load_tokenizer
from jpo_ray.engine.scoring import make_scorer
from jpo_ray.engine.step import score_all

CONDITIONAL = [(2 * i, 2 * i + 1) for i in range(6)]
JOINT = [(0, 3), (2, 5), (4, 1), (7, 8), (10, 1), (9, 6)]
ITEMS = [
    {
        "item_id": records.item_id(instruction, response),
        "instruction_id": records.instruction_id(instruction),
        "instruction": instruction,
        "response": response,
        "source": "here",
        "split": "train",
        "sft": place == 0,
        "gold": False,
    }
    for instruction, pair in zip(INSTRUCTIONS, RESPONSES, strict=True)
    for place, response in enumerate(pair)
]
# 3 steps an epoch, 12 in all, a checkpoint every second one.
LORA = TrainConfig(
    name="lora", beta=0.1, learning_rate=1e-2, num_train_epochs=4, comparisons_per_step=4, warmup_steps=1,
    lora_dropout=0.2, save_steps=2, seed=3,
)  # fmt: skip
FULL = LORA.model_copy(update={"name": "full", "use_peft": False, "learning_rate": 1e-3})


@dataclass(frozen=True)
class Artifacts:
    inputs: PreferenceInputs
    model: BaseModelConfig


def make_artifacts(folder: Path, model: Path, *, load_in_4bit: bool = False) -> Artifacts:
    """Items, preferences and reference log-probs in `folder`."""
    config = BaseModelConfig(model_name_or_path=str(model), max_length=96, load_in_4bit=load_in_4bit)
    ids = [item["item_id"] for item in ITEMS]
    kinds = [("conditional", pair) for pair in CONDITIONAL] + [("joint", pair) for pair in JOINT]
    preferences = [
        {"chosen": ids[a], "rejected": ids[b], "protocol": kind, "weight": 1.0, "probability": 1.0, "split": "train"}
        for kind, (a, b) in kinds
    ]
    tokens = tokenize(
        load_tokenizer(model),
        layout_of(config),
        [item["instruction"] for item in ITEMS],
        [item["response"] for item in ITEMS],
    )
    scorer = make_scorer(load_model(model, dtype="float32", load_in_4bit=load_in_4bit))
    scores = score_all(scorer, tokens, np.arange(len(ITEMS)), max_tokens=4096).tolist()
    reference = [
        {
            "item_id": item,
            "response_of": item,
            "instruction_logprob": score[0],
            "response_logprob": score[1],
            "instruction_tokens": 1,
            "response_tokens": 1,
        }
        for item, score in zip(ids, scores, strict=True)
    ]
    tables: list[tuple[str, Any, Any]] = [
        ("items", ITEMS, records.ITEMS),
        ("preferences", preferences, records.PREFERENCES),
        ("reference", reference, records.REFERENCE),
    ]
    for name, rows, schema in tables:
        records.write_table(folder / f"{name}.parquet", rows, schema)
    return Artifacts(PreferenceInputs(model, folder, folder, folder), config)
