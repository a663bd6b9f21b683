"""What a spawned worker of `test_workers.py` runs: each case's gradient, written to a file per rank."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from engine.tiny import World, config, gradients_of, make_world, policy_scorer
from jpo_ray.engine.scoring import Scorer
from jpo_ray.engine.step import accumulate_gradients, score_all, trainable

PREFERENCE_CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-two-phase": {"max_micro_batch_tokens": 120, "activation_memory_gib": 0.0},
    "lora-kto": {"objective": "kto"},
    "full": {"use_peft": False},
    "full-two-phase": {"use_peft": False, "max_micro_batch_tokens": 1, "activation_memory_gib": 0.0},
}
CASES = [*PREFERENCE_CASES, "one-item", "scores"]


def outcome_of(case: str, world: World) -> dict[str, torch.Tensor]:
    """Loss and gradient of a case, by however many workers there are."""
    if case == "scores":
        scorer = policy_scorer(world.model, config())
        return {"scores": score_all(scorer, world.tokens, np.arange(24), max_tokens=200, step=3)}
    if case == "one-item":  # fewer items than workers: one has nothing to do
        scorer = policy_scorer(world.model, config())
        scores = accumulate_gradients(scorer, world.tokens, np.array([3]), lambda s: s.sum() / 50, max_tokens=4096)
        return {"scores": scores, "gradient": gradient_of(scorer)}
    train = config(**PREFERENCE_CASES[case])
    loss, gradient = gradients_of(policy_scorer(world.model, train), world.data, train)
    return {"loss": torch.tensor(loss, dtype=torch.float64), "gradient": gradient}


def gradient_of(scorer: Scorer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainable(scorer.model) if p.grad is not None])


def work(rank: int, workers: int, model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=workers)
    world = make_world(model)
    for case in CASES:
        save_file(outcome_of(case, world), out / f"{case}-{rank}.safetensors")
    dist.destroy_process_group()
