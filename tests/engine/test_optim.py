"""Optimizers and learning-rate schedules."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from engine.tiny import config
from jpo_ray.engine.optim import learning_rate, make_optimizer

OPTIMIZERS = ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # warm-up over 4 steps: 0, 1/4, 2/4, 3/4; then 8 steps down to the end at 12, of which 8 is the middle
        ("cosine", {0: 0, 1: 0.25, 3: 0.75, 4: 1, 6: 0.8535534, 8: 0.5, 12: 0}),  # (1 + cos(pi/4)) / 2 = 0.8535534
        ("linear", {0: 0, 2: 0.5, 4: 1, 6: 0.75, 8: 0.5, 11: 0.125, 12: 0, 13: 0}),
        ("constant", {0: 0, 1: 0.25, 4: 1, 8: 1, 12: 1}),
    ],
)
def test_schedules_by_hand(schedule: str, expected: dict[int, float]) -> None:
    options = config(lr_scheduler_type=schedule, warmup_steps=4, learning_rate=2e-3)
    found = {step: learning_rate(options, step, 12) / 2e-3 for step in expected}
    assert found == pytest.approx(expected, abs=1e-7)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(config(warmup_steps=0, learning_rate=1e-4), 0, 10) == 1e-4


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    """5 of 100 warm-up steps: the last update has 4 % of the peak."""
    assert learning_rate(config(warmup_steps=100, learning_rate=1.0), 4, 5) == pytest.approx(0.04)


def first_step(optimizer: Any, name: str) -> None:
    """bitsandbytes says at the first step that there is no paging without CUDA."""
    expected: AbstractContextManager[Any] = nullcontext()
    if name.startswith("paged") and not torch.cuda.is_available():
        expected = pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU")
    with expected:
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_walks_down_a_quadratic(name: str) -> None:
    """Adam's steps are at most about the rate long: 40 of 0.05 bring all weights within 2 of their goal near it."""
    weight = torch.nn.Parameter(torch.rand(80, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    optimizer = make_optimizer([weight], config(optim=name, learning_rate=0.05))
    start = float((weight.detach() ** 2).sum())
    for number in range(40):
        optimizer.zero_grad()
        (weight**2).sum().backward()
        optimizer.step() if number else first_step(optimizer, name)
    assert float((weight.detach() ** 2).sum()) < 0.05 * start


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_decoupled(name: str) -> None:
    """Without a gradient AdamW only decays: one step of rate 0.1 and decay 0.5 leaves 0.95 of each weight."""
    weight = torch.nn.Parameter(torch.ones(80, 80))
    optimizer = make_optimizer([weight], config(optim=name, learning_rate=0.1, weight_decay=0.5))
    weight.grad = torch.zeros_like(weight)
    first_step(optimizer, name)
    assert weight.detach().flatten()[:3].tolist() == pytest.approx([0.95] * 3, abs=1e-6)
