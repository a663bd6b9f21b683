"""Micro-batches side by side: the same result in however many lanes, and the same to the last bit every time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.tiny import World, config, difference, gradients_of, plain_scorer, policy_scorer
from jpo_ray.engine import lanes
from jpo_ray.engine.lanes import lane_count, side_by_side
from jpo_ray.engine.step import score_all

SAME = 2e-5


@pytest.fixture(autouse=True)
def _lanes_of_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LANE_TOKENS", 1)


@pytest.mark.parametrize("count", [2, 3, 20])
@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    "split", [{}, {"max_micro_batch_tokens": 240}, {"max_micro_batch_tokens": 240, "activation_memory_gib": 0.0}]
)
def test_lanes_change_nothing_with_dropout_on(count: int, use_peft: bool, split: dict[str, Any], world: World) -> None:
    """More lanes than items, one or two phases, LoRA or all parameters."""
    train = config(use_peft=use_peft, **split)
    scorer = policy_scorer(world.model, train)
    loss, alone = gradients_of(replace(scorer, cores=1), world.data, train)
    several = [gradients_of(replace(scorer, cores=count), world.data, train) for _ in range(2)]
    assert several[0][0] == pytest.approx(loss, abs=1e-6)
    assert difference(several[0][1], alone) < SAME
    assert torch.equal(several[0][1], several[1][1])


def test_lanes_with_checkpointed_layers(world: World) -> None:
    train = config()
    scorer = policy_scorer(world.model, train)
    _, kept = gradients_of(replace(scorer, cores=1), world.data, train)
    scorer.model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer.model.enable_input_require_grads()
    _, again = gradients_of(replace(scorer, cores=2), world.data, train)
    assert difference(again, kept) < SAME


def test_scores_are_the_same(world: World) -> None:
    scorer = plain_scorer(world.model)
    one, three = (score_all(replace(scorer, cores=n), world.tokens, np.arange(24), max_tokens=200) for n in (1, 3))
    assert torch.allclose(one, three, atol=1e-4)
    assert not three.requires_grad


def test_a_lane_has_enough_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LANE_TOKENS", 1024)
    assert [lane_count(cores, 2048) for cores in (1, 2, 64)] == [1, 2, 2]
    assert [lane_count(2, tokens) for tokens in (1, 1024, 65_536)] == [1, 1, 2]


def test_lanes_share_the_cores_and_the_caller_gets_its_own_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        assert side_by_side([torch.get_num_threads] * 3) == [2, 2, 2]
        assert side_by_side([torch.get_num_threads]) == [6]
        with pytest.raises(ZeroDivisionError):
            side_by_side([lambda: 1 // 0, torch.get_num_threads])
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)
