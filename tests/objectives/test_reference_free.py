"""Losses without a reference against values derived by hand.

The items of `batch.py`: responses of log-prob -5 in 5 tokens and -8 in 10, so -1 and -0.8 per token.
"""

from dataclasses import replace

import pytest
import torch

from jpo_ray.objectives import ItemScores
from jpo_ray.objectives.reference_free import chosen_nll, orpo, simpo
from objectives.batch import edge, two_items

ITEMS = replace(two_items(), reference=None)


@pytest.mark.parametrize("joint", [True, False])
def test_simpo_by_hand(joint: bool) -> None:
    """beta 2: rewards -2 and -1.6, gamma 0.5: -log sigmoid(-0.4 - 0.5) = log(1 + e^0.9) = 1.2411539."""
    found = simpo(ITEMS, edge(joint=joint), beta=2.0, simpo_gamma=0.5)
    assert found.loss_E.item() == pytest.approx(1.2411539, abs=1e-6)
    assert (found.chosen_E.item(), found.rejected_E.item()) == (-2.0, -1.6)
    assert found.margin_E.item() == pytest.approx(-0.4)


def test_orpo_by_hand() -> None:
    """P = e^-1 = 0.3678794 and e^-0.8 = 0.4493290. Log odds: log(0.3678794 / 0.6321206) = -0.5413249 and
    log(0.4493290 / 0.5506710) = -0.2033823, their difference -0.3379425, -log sigmoid of it 0.8763267.

    With beta 0.1: 1 (the chosen response's nats per token) + 0.0876327 = 1.0876327.
    """
    found = orpo(ITEMS, edge(joint=False), beta=0.1)
    assert found.loss_E.item() == pytest.approx(1.0876327, abs=1e-7)


def test_orpo_of_a_certain_response_is_finite() -> None:
    """Of all rows that are not scored yet the log-prob stands at 0: probability 1, whose odds would be infinite."""
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    found = orpo(replace(ITEMS, policy=ItemScores(zero, zero)), edge(joint=False), beta=0.1).loss_E
    (gradient,) = torch.autograd.grad(found.sum(), zero)
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient).all()


def test_the_sft_term_by_hand() -> None:
    """1 nat per token of item 0, 0.8 of item 1."""
    assert chosen_nll(ITEMS, edge(joint=True)).loss_E.item() == pytest.approx(1.0)
    assert chosen_nll(ITEMS, edge(joint=False, back=True)).loss_E.item() == pytest.approx(0.8)
