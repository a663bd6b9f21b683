"""Losses against values derived by hand, their gradients against finite differences."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from jpo_ray.objectives import Edges, ItemScores, Outcome, dpo, jpo, kto, log_ratios, sft

POLICY = ItemScores(torch.tensor([-10.0, -12.0]), torch.tensor([-5.0, -8.0]))
REFERENCE = ItemScores(torch.tensor([-11.0, -12.5]), torch.tensor([-6.0, -7.0]))
MISMATCHED_POLICY, MISMATCHED_REFERENCE = torch.tensor([-4.0, -9.0]), torch.tensor([-6.0, -8.5])
KTO = partial(kto, mismatched_policy_K=MISMATCHED_POLICY, mismatched_reference_K=MISMATCHED_REFERENCE)


def edges(*, joint: bool) -> Edges:
    return Edges(torch.tensor([0]), torch.tensor([1]), torch.tensor([joint]), torch.ones(1))


def test_log_ratios() -> None:
    """Instruction parts: -10 + 11 = 1 and -12 + 12.5 = 0.5; response parts: -5 + 6 = 1 and -8 + 7 = -1."""
    ratios = log_ratios(POLICY, REFERENCE)
    assert ratios.instruction_N.tolist() == [1.0, 0.5]
    assert ratios.response_N.tolist() == [1.0, -1.0]


def test_jpo_on_a_joint_edge_counts_the_instruction() -> None:
    """beta 0.5: s_w = 0.5 (1 + 1) = 1, s_l = 0.5 (0.5 - 1) = -0.25, margin 1.25 = 0.25 (instruction) + 1 (response).

    loss = log(1 + e^-1.25) = log(1.2865048) = 0.2519293.
    """
    outcome = jpo(POLICY, REFERENCE, edges(joint=True), beta=0.5)
    assert outcome.loss_E.item() == pytest.approx(0.2519293, abs=1e-6)
    assert (outcome.chosen_E.item(), outcome.rejected_E.item()) == (1.0, -0.25)
    assert (outcome.margin_instruction_E.item(), outcome.margin_response_E.item()) == (0.25, 1.0)
    assert outcome.margin_E.item() == 1.25


@pytest.mark.parametrize("loss", [jpo, dpo])
def test_jpo_on_an_edge_within_an_instruction_is_dpo(loss: Callable[..., Outcome]) -> None:
    """beta 0.5: margin 0.5 (1 - -1) = 1, whatever the instruction parts are; loss = log(1 + e^-1) = 0.3132617."""
    outcome = loss(POLICY, REFERENCE, edges(joint=False), beta=0.5)
    assert outcome.loss_E.item() == pytest.approx(0.3132617, abs=1e-6)
    assert (outcome.chosen_E.item(), outcome.rejected_E.item()) == (0.5, -0.5)
    assert (outcome.margin_instruction_E.item(), outcome.margin_response_E.item()) == (0.0, 1.0)


def test_dpo_leaves_the_instruction_out_even_of_a_joint_edge() -> None:
    assert dpo(POLICY, REFERENCE, edges(joint=True), beta=0.5).loss_E.item() == pytest.approx(0.3132617, abs=1e-6)


def test_gradient_of_jpo_by_hand() -> None:
    """dL/dlogp = -beta sigmoid(-margin) for the chosen item, plus for the rejected: 0.5 * 0.2227001 = 0.1113501 on
    both parts of a joint edge; 0.5 * sigmoid(-1) = 0.1344707 on the response of a conditional one, and 0.
    """
    for joint, instruction, response in ((True, 0.1113501, 0.1113501), (False, 0.0, 0.1344707)):
        policy = ItemScores(*(part.clone().requires_grad_() for part in POLICY.__dict__.values()))
        jpo(policy, REFERENCE, edges(joint=joint), beta=0.5).loss_E.sum().backward()
        assert policy.instruction_N.grad is not None
        assert policy.response_N.grad is not None
        assert policy.instruction_N.grad.tolist() == pytest.approx([-instruction, instruction], abs=1e-6)
        assert policy.response_N.grad.tolist() == pytest.approx([-response, response], abs=1e-6)


def test_kto_by_hand() -> None:
    """z_0 = mean(2, -0.5) = 0.75. With beta 0.5 the rewards are 0.5 and -0.5, beta z_0 = 0.375.

    Desirable: 1 - sigmoid(0.5 - 0.375) = 1 - 0.5312094 = 0.4687906. Undesirable: 1 - sigmoid(0.375 + 0.5) =
    1 - 0.7057850 = 0.2942150. Mean: 0.3815028. With weights 2 and 0.5: (0.9375812 + 0.1471075) / 2 = 0.5423444.
    """
    equal = kto(POLICY, REFERENCE, edges(joint=False), MISMATCHED_POLICY, MISMATCHED_REFERENCE, beta=0.5)
    assert equal.loss_E.item() == pytest.approx(0.3815028, abs=1e-6)
    assert (equal.chosen_E.item(), equal.rejected_E.item(), equal.margin_E.item()) == (0.5, -0.5, 1.0)
    weighted = kto(
        POLICY, REFERENCE, edges(joint=False), MISMATCHED_POLICY, MISMATCHED_REFERENCE, beta=0.5,
        desirable_weight=2.0, undesirable_weight=0.5,
    )  # fmt: skip
    assert weighted.loss_E.item() == pytest.approx(0.5423444, abs=1e-6)


@pytest.mark.parametrize("joint", [True, False])
def test_a_soft_label_is_the_mean_of_both_labels(joint: bool) -> None:
    """A probability of 0.8: 0.8 of the loss as labelled, 0.2 of the loss with chosen and rejected exchanged."""
    there, back = edges(joint=joint), Edges(torch.tensor([1]), torch.tensor([0]), torch.tensor([joint]), torch.ones(1))
    soft = Edges(there.chosen_E, there.rejected_E, there.joint_E, torch.tensor([0.8]))
    for loss in (partial(jpo, beta=0.5), partial(dpo, beta=0.5), partial(KTO, beta=0.5)):
        as_labelled, exchanged, found = (loss(POLICY, REFERENCE, graph) for graph in (there, back, soft))
        mean = 0.8 * as_labelled.loss_E + 0.2 * exchanged.loss_E
        assert found.loss_E.item() == pytest.approx(mean.item(), abs=1e-6)
        assert found.margin_E.item() == as_labelled.margin_E.item()


def test_kto_clamps_its_reference_point_at_zero() -> None:
    """Mean log-ratio -0.75 becomes z_0 = 0: both examples give 1 - sigmoid(0.5) = 0.3775407."""
    outcome = kto(POLICY, REFERENCE, edges(joint=False), MISMATCHED_REFERENCE, MISMATCHED_POLICY, beta=0.5)
    assert outcome.loss_E.item() == pytest.approx(0.3775407, abs=1e-6)


def test_kto_sends_no_gradient_through_its_reference_point() -> None:
    policy = ItemScores(POLICY.instruction_N, POLICY.response_N.clone().requires_grad_())
    mismatched = MISMATCHED_POLICY.clone().requires_grad_()
    outcome = kto(policy, REFERENCE, edges(joint=False), mismatched, MISMATCHED_REFERENCE, beta=0.5)
    outcome.loss_E.sum().backward()
    assert mismatched.grad is None


def test_sft_is_nats_per_response_token() -> None:
    """(5 + 8) / 10 tokens = 1.3."""
    assert sft(POLICY, 10).item() == pytest.approx(1.3)


@pytest.mark.parametrize("loss", [jpo, dpo, KTO], ids=["jpo", "dpo", "kto"])
def test_gradients_by_finite_differences(loss: Callable[..., Outcome]) -> None:
    """Five items, six edges that share them, joint ones and others; float64, tolerances of torch's gradcheck."""
    generator = torch.Generator().manual_seed(0)
    policy_I, policy_R, reference_I, reference_R = torch.randn(4, 5, generator=generator, dtype=torch.float64) * 3
    graph = Edges(
        torch.tensor([0, 1, 2, 3, 4, 0]),
        torch.tensor([1, 2, 3, 4, 0, 2]),
        torch.tensor([True, False, True, False, True, True]),
        torch.ones(6),
    )

    def losses(instruction: Tensor, response: Tensor) -> Tensor:
        return loss(ItemScores(instruction, response), ItemScores(reference_I, reference_R), graph, beta=0.3).loss_E

    assert torch.autograd.gradcheck(losses, (policy_I.requires_grad_(), policy_R.requires_grad_()))


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_losses_stay_finite_far_from_the_reference(size: float) -> None:
    """-log sigmoid(-m) is m for large m. Here m = 0.5 * 2 * size: the loss is size + log(1 + e^-size)."""
    policy = ItemScores(torch.zeros(2).double(), torch.tensor([-size, size]).double())
    zero = ItemScores(torch.zeros(2).double(), torch.zeros(2).double())
    loss = dpo(policy, zero, edges(joint=False), beta=0.5).loss_E.item()
    assert loss == pytest.approx(size + torch.log1p(torch.exp(torch.tensor(-size).double())).item())


def test_an_edge_weighs_the_same_in_any_batch() -> None:
    """Losses are per edge: other items and edges of the batch do not enter (in KTO only through z_0)."""
    wide = [
        torch.cat([part, torch.tensor([-3.0])]) for part in (*POLICY.__dict__.values(), *REFERENCE.__dict__.values())
    ]
    policy, reference = ItemScores(wide[0], wide[1]), ItemScores(wide[2], wide[3])
    both = Edges(torch.tensor([0, 2]), torch.tensor([1, 0]), torch.tensor([True, True]), torch.ones(2))
    assert jpo(policy, reference, both, beta=0.5).loss_E[0].item() == pytest.approx(0.2519293, abs=1e-6)
