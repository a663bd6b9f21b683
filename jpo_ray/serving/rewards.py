"""Implicit rewards: beta times the log-ratio of a model and the SFT model, per item and per comparison.

An aligned model is a reward model: `beta * (log p_policy - log p_reference)` of an instruction and a response is the
score whose differences the preference loss was fitted to (DPO, arXiv 2305.18290; with the instruction's own part for
pairs of different instructions, JPO, arXiv 2404.00530). Two items are compared by the sigmoid of the difference of
their scores; where their instructions are the same, the instruction parts cancel and are left out.
"""

import math
from collections.abc import Sequence
from typing import Any


def scored(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of a `/v1/score` reply."""
    return [
        {"object": "score", "index": index, "score": result["instruction"] + result["response"], **result}
        for index, result in enumerate(results)
    ]


def compared(results: Sequence[dict[str, Any]], same_instruction: Sequence[bool]) -> list[dict[str, Any]]:
    """Entries of a `/v1/compare` reply. `results` holds a and b of each pair in turn."""
    entries = []
    for index, same in enumerate(same_instruction):
        a, b = results[2 * index], results[2 * index + 1]
        instruction = 0.0 if same else a["instruction"] - b["instruction"]
        margin = instruction + a["response"] - b["response"]
        entries.append(
            {
                "object": "comparison",
                "index": index,
                "probability": sigmoid(margin),  # that a is preferred
                "margin": margin,
                "instruction_margin": instruction,
                "response_margin": a["response"] - b["response"],
                "same_instruction": same,
                "beta": a["beta"],
            }
        )
    return entries


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
