"""Losses with targets against values derived by hand. The items of `batch.py`, see `test_margins.py`."""

from dataclasses import replace

import pytest
import torch

from jpo_ray.objectives import ItemScores
from jpo_ray.objectives.targets import apo_down, apo_zero, kto, sppo
from objectives.batch import REFERENCE, edge, two_items

MISMATCHED = torch.tensor([2.0, -0.5])  # log-ratios


def test_kto_by_hand() -> None:
    """z_0 = mean(2, -0.5) = 0.75. With beta 0.5 the rewards are 0.5 and -0.5, beta z_0 = 0.375.

    Desirable: 1 - sigmoid(0.5 - 0.375) = 1 - 0.5312094 = 0.4687906. Undesirable: 1 - sigmoid(0.375 + 0.5) =
    1 - 0.7057850 = 0.2942150. Mean: 0.3815028. With weights 2 and 0.5: (0.9375812 + 0.1471075) / 2 = 0.5423444.
    """
    items = replace(two_items(), mismatched_K=MISMATCHED)
    for joint in (True, False):
        equal = kto(items, edge(joint=joint), beta=0.5)
        assert equal.loss_E.item() == pytest.approx(0.3815028, abs=1e-6)
        assert (equal.chosen_E.item(), equal.rejected_E.item(), equal.margin_E.item()) == (0.5, -0.5, 1.0)
    weighted = kto(items, edge(joint=False), beta=0.5, desirable_weight=2.0, undesirable_weight=0.5)
    assert weighted.loss_E.item() == pytest.approx(0.5423444, abs=1e-6)


def test_kto_clamps_its_reference_point_at_zero() -> None:
    """Mean log-ratio -0.75 becomes z_0 = 0: both examples give 1 - sigmoid(0.5) = 0.3775407."""
    items = replace(two_items(), mismatched_K=-MISMATCHED)
    assert kto(items, edge(joint=False), beta=0.5).loss_E.item() == pytest.approx(0.3775407, abs=1e-6)


def test_kto_sends_no_gradient_through_its_reference_point() -> None:
    mismatched, response = MISMATCHED.clone().requires_grad_(), two_items().policy.response_N.clone().requires_grad_()
    items = replace(two_items(), policy=ItemScores(REFERENCE.instruction_N, response), mismatched_K=mismatched)
    kto(items, edge(joint=False), beta=0.5).loss_E.sum().backward()
    assert mismatched.grad is None
    assert response.grad is not None


def test_kto_without_mismatched_items_says_so() -> None:
    with pytest.raises(ValueError, match="mismatched"):
        kto(two_items(), edge(joint=False), beta=0.5)


def test_sppo_by_hand() -> None:
    """beta 0.5: targets 1 and -1. Within an instruction both are met: 0. Joint: (2 - 1)^2 + (-0.5 + 1)^2 = 1.25.

    A label of probability 0.75: 0.75 * 0 + 0.25 * (2^2 + 2^2) = 2, least where the ratios are 0.5 and -0.5.
    """
    assert sppo(two_items(), edge(joint=False), beta=0.5).loss_E.item() == 0
    assert sppo(two_items(), edge(joint=True), beta=0.5).loss_E.item() == pytest.approx(1.25)
    assert sppo(two_items(), edge(joint=False, probability=0.75), beta=0.5).loss_E.item() == pytest.approx(2.0)
    ratio = torch.tensor([0.5, -0.5], dtype=torch.float64)
    response = (two_items().policy.response_N * 0 + REFERENCE.response_N + ratio).requires_grad_()
    items = replace(two_items(), policy=ItemScores(REFERENCE.instruction_N, response))
    sppo(items, edge(joint=False, probability=0.75), beta=0.5).loss_E.sum().backward()
    assert response.grad is not None
    assert response.grad.abs().max().item() < 1e-12


def test_apo_by_hand() -> None:
    """beta 0.5, joint: rewards 1 and -0.25. Zero: 1 - sigmoid(1) + sigmoid(-0.25) = 0.2689414 + 0.4378235 = 0.7067649.

    Down: sigmoid(1) + 1 - sigmoid(1.25) = 0.7310586 + 0.2227001 = 0.9537587.
    """
    zero, down = (loss(two_items(), edge(joint=True), beta=0.5).loss_E.item() for loss in (apo_zero, apo_down))
    assert zero == pytest.approx(0.7067649, abs=1e-6)
    assert down == pytest.approx(0.9537587, abs=1e-6)
