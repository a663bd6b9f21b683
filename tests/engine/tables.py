"""The artifacts that training reads, as the stages write them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.tiny import INSTRUCTIONS, LAYOUT, RESPONSES, plain_scorer
from jpo_ray import records
from jpo_ray.data.tokens import tokenize
from jpo_ray.engine.dataset import mismatched_partners
from jpo_ray.engine.jobs import PreferenceInputs
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.engine.step import score_all

FLAGS = {"source": "s", "gold": False}


@dataclass(frozen=True)
class Tables:
    """Artifacts as the stages write them: twelve items, eight preferences, references with mismatched items."""

    inputs: PreferenceInputs
    items: list[dict[str, Any]]
    reference: list[dict[str, Any]]


def item_rows() -> list[dict[str, Any]]:
    """Of the sixth instruction, items of the validation split; the first response of each is D_S's."""
    return [
        {
            "item_id": records.item_id(instruction, response),
            "instruction_id": records.instruction_id(instruction),
            "instruction": instruction,
            "response": response,
            "split": "validation" if number == 5 else "train",
            "sft": place == 0,
        }
        | FLAGS
        for number, (instruction, pair) in enumerate(zip(INSTRUCTIONS, RESPONSES, strict=True))
        for place, response in enumerate(pair)
    ]


def preference_rows(ids: list[str]) -> list[dict[str, Any]]:
    edges = [(0, 1, "conditional"), (2, 3, "conditional"), (4, 5, "conditional"), (6, 7, "conditional")]
    edges += [(0, 3, "joint"), (4, 7, "joint"), (2, 9, "joint"), (10, 11, "conditional")]
    return [
        {"chosen": ids[w], "rejected": ids[l], "protocol": kind, "weight": 1.0, "probability": 1.0}
        | {"split": "validation" if w >= 10 else "train", "gap": 0.5 + number if number < 2 else 2.0}
        for number, (w, l, kind) in enumerate(edges)  # noqa: E741
    ]


def reference_rows(model: Path, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every item, then each with its partner's response."""
    partners = mismatched_partners([row["instruction_id"] for row in items], seed=0)
    sources = [*range(12), *partners]
    instructions = [row["instruction"] for row in items] * 2
    responses = [items[source]["response"] for source in sources]
    tokens = tokenize(load_tokenizer(model), LAYOUT, instructions, responses)
    scores = score_all(plain_scorer(model), tokens, np.arange(24), max_tokens=500).tolist()
    return [
        {
            "item_id": items[number % 12]["item_id"],
            "response_of": items[sources[number]]["item_id"],
            "instruction_logprob": scores[number][0],
            "response_logprob": scores[number][1],
            "instruction_tokens": int(tokens.instruction_tokens[number]),
            "response_tokens": int(tokens.response_tokens[number]),
        }
        for number in range(24)
    ]


def vector_of(instruction: int) -> list[float]:
    """Of norm 1, exact in float16."""
    return [float(place == instruction % 4) for place in range(4)]


def make_tables(llama: Path, folder: Path) -> Tables:
    items = item_rows()
    reference = reference_rows(llama, items)
    records.write_table(folder / "items.parquet", items, records.ITEMS)
    preferences = preference_rows([row["item_id"] for row in items])
    records.write_table(folder / "preferences.parquet", preferences, records.PREFERENCES)
    records.write_table(folder / "reference.parquet", reference, records.REFERENCE)
    vectors = [{"instruction_id": row["instruction_id"], "vector": vector_of(n)} for n, row in enumerate(items[::2])]
    records.write_table(folder / "embeddings.parquet", vectors, records.EMBEDDINGS)
    return Tables(PreferenceInputs(llama, folder, folder, folder, folder), items, reference)
