"""Losses of margins against values derived by hand: those that TRL lacks, and what is our own in the others.

The items of `batch.py`: log-ratios 1 and 0.5 of the instructions, 1 and -1 of the responses; with beta 0.5 the margin
is 1 within an instruction, and 1.25 on a joint edge. -log sigmoid(1) = 0.3132617, -log sigmoid(1.25) = 0.2519291.
"""

from dataclasses import replace

import pytest
import torch

from jpo_ray.objectives import ItemScores
from jpo_ray.objectives.losses import jpo
from jpo_ray.objectives.margins import cdpo, dpop, ipo, odpo, rdpo, robust, slic
from objectives.batch import edge, random_edges, random_items, two_items


def test_cdpo_by_hand() -> None:
    """eps 0.1, joint: 0.9 * 0.2519291 + 0.1 * (0.2519291 + 1.25) = 0.2519291 + 0.125 = 0.3769291."""
    found = cdpo(two_items(), edge(joint=True), beta=0.5, label_smoothing=0.1)
    assert found.loss_E.item() == pytest.approx(0.3769291, abs=1e-7)


def test_cdpo_is_a_soft_label() -> None:
    soft = jpo(two_items(), edge(joint=True, probability=0.9), beta=0.5)
    assert torch.allclose(cdpo(two_items(), edge(joint=True), beta=0.5, label_smoothing=0.1).loss_E, soft.loss_E)


def test_robust_by_hand() -> None:
    """eps 0.1, joint: (0.9 * 0.2519291 - 0.1 * 1.5019291) / 0.8 = 0.0765434 / 0.8 = 0.0956793."""
    found = robust(two_items(), edge(joint=True), beta=0.5, label_smoothing=0.1)
    assert found.loss_E.item() == pytest.approx(0.0956793, abs=1e-6)


def test_robust_is_unbiased_under_flips() -> None:
    """The mean over labels that are flipped with probability 0.2 is the loss of the true ones."""
    items, edges = random_items(), random_edges(random_items())
    sure = replace(edges, probability_E=torch.ones(12).double())
    flipped = replace(sure, chosen_E=edges.rejected_E, rejected_E=edges.chosen_E)
    noisy = [robust(items, some, beta=0.5, label_smoothing=0.2).loss_E for some in (sure, flipped)]
    assert torch.allclose(0.8 * noisy[0] + 0.2 * noisy[1], jpo(items, sure, beta=0.5).loss_E)


def test_ipo_by_hand() -> None:
    """Per token within an instruction: 1/5 - (-1/10) = 0.3; beta 0.5 asks for 1: 0.49. Joint: 2/10 - (-0.5/14) =
    0.2357143: 0.5841327. Rewards are of sums, as DPO's.
    """
    found = ipo(two_items(), edge(joint=False), beta=0.5)
    assert found.loss_E.item() == pytest.approx(0.49, abs=1e-9)
    assert (found.chosen_E.item(), found.rejected_E.item()) == (0.5, -0.5)
    assert ipo(two_items(), edge(joint=True), beta=0.5).loss_E.item() == pytest.approx(0.5841327, abs=1e-7)


def test_slic_by_hand() -> None:
    """max(0, 1 - 1) = 0 and max(0, 1 - 1.25) = 0; with beta 0.2 the margins are 0.4 and 0.5: 0.6 and 0.5."""
    assert slic(two_items(), edge(joint=False), beta=0.5).loss_E.item() == 0
    assert slic(two_items(), edge(joint=True), beta=0.5).loss_E.item() == 0
    assert slic(two_items(), edge(joint=False), beta=0.2).loss_E.item() == pytest.approx(0.6)
    assert slic(two_items(), edge(joint=True), beta=0.2).loss_E.item() == pytest.approx(0.5)


def test_dpop_by_hand() -> None:
    """Item 0 chosen: its likelihood rose, so it is JPO. Item 1 chosen, joint: ratios -0.5 and 2, margin -1.25, the fall
    of 0.5 costs 0.5 * 3 * 0.5 = 0.75: -log sigmoid(-2) = 2.1269280.
    """
    assert torch.equal(
        dpop(two_items(), edge(joint=True), beta=0.5, dpop_lambda=3.0).loss_E,
        jpo(two_items(), edge(joint=True), beta=0.5).loss_E,
    )
    found = dpop(two_items(), edge(joint=True, back=True), beta=0.5, dpop_lambda=3.0)
    assert found.loss_E.item() == pytest.approx(2.1269280, abs=1e-6)
    assert found.margin_E.item() == -1.25


def test_odpo_by_hand() -> None:
    """Gap e^2, alpha 0.5: the margin 1.25 is to exceed 1: -log sigmoid(0.25) = 0.5759394. A gap of 1 asks for nothing.

    The label's probability does not matter: it is in the gap. No gap at all asks for less than nothing, finitely.
    """
    items = two_items()
    for probability in (1.0, 0.7):
        edges = edge(joint=True, gap=7.38905609893065, probability=probability)
        assert odpo(items, edges, beta=0.5, odpo_alpha=0.5).loss_E.item() == pytest.approx(0.5759394, abs=1e-6)
    even = odpo(items, edge(joint=True, gap=1.0), beta=0.5, odpo_alpha=0.5)
    assert even.loss_E.item() == pytest.approx(0.2519291, abs=1e-6)
    none = odpo(items, edge(joint=True, gap=-1.0), beta=0.5, odpo_alpha=0.5)
    assert none.loss_E.item() == pytest.approx(0.009020, abs=1e-5)  # log(1 + e^-(1.25 + 0.5 * 6.9077553))


def test_rdpo_by_hand() -> None:
    """Responses of 5 and 10 tokens, alpha 0.1. The shorter chosen: 1 + 0.1 (5 - 10) = 0.5, -log sigmoid(0.5) =
    0.4740770. The longer chosen: -1 + 0.5 = -0.5: 0.9740770. On a joint edge 1.25 - 0.5 = 0.75: 0.3868710.
    """
    items = two_items()
    for edges, expected in (
        (edge(joint=False), 0.4740770),
        (edge(joint=False, back=True), 0.9740770),
        (edge(joint=True), 0.3868710),
    ):
        found = rdpo(items, edges, beta=0.5, rdpo_alpha=0.1)
        assert found.loss_E.item() == pytest.approx(expected, abs=1e-6)
    assert rdpo(items, edge(joint=False), beta=0.5, rdpo_alpha=0.1).margin_E.item() == 1.0


def test_dpop_pushes_up_what_fell() -> None:
    """A fallen chosen item is pushed up 1 + lambda times as much as the rejected is pushed down; under DPO as much."""
    items = two_items()
    response = items.policy.response_N.clone().requires_grad_()
    moved = replace(items, policy=ItemScores(items.policy.instruction_N, response))
    dpop(moved, edge(joint=False, back=True), beta=0.5, dpop_lambda=3.0).loss_E.sum().backward()
    assert response.grad is not None
    assert response.grad[1].item() == pytest.approx(-4 * response.grad[0].item())
