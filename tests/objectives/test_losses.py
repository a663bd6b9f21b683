"""What all losses share, JPO and DPO: values derived by hand, gradients of all losses against finite differences."""

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from jpo_ray.config_objective import OBJECTIVES, ObjectiveConfig
from jpo_ray.objectives import LOSSES, Items, ItemScores, Outcome, concatenated, mixture, sft
from jpo_ray.objectives.losses import dpo, jpo, mean_sides, sides
from objectives.batch import POLICY, edge, hard, random_edges, random_items, two_items, with_scores


def loss_of(name: str) -> Callable[..., Outcome]:
    """The loss with its default parameters."""
    parameters = ObjectiveConfig(objective=name).parameters()  # type: ignore[arg-type]
    return lambda items, edges: LOSSES[name](items, edges, **parameters)


def test_every_objective_has_a_loss_that_takes_its_keys() -> None:
    assert LOSSES.keys() == OBJECTIVES.keys()
    for name, loss in LOSSES.items():
        keywords = [p for p in inspect.signature(loss).parameters.values() if p.kind == p.KEYWORD_ONLY]
        assert {p.name for p in keywords} == OBJECTIVES[name].keys.keys(), name


def test_log_ratios() -> None:
    """Instruction parts: -10 + 11 = 1 and -12 + 12.5 = 0.5; response parts: -5 + 6 = 1 and -8 + 7 = -1."""
    ratios = two_items().ratios
    assert ratios.instruction_N.tolist() == [1.0, 0.5]
    assert ratios.response_N.tolist() == [1.0, -1.0]
    assert ratios.whole_N.tolist() == [2.0, -0.5]


def test_sides_have_their_instruction_on_joint_edges_alone() -> None:
    ratios = two_items().ratios
    chosen, rejected = sides(ratios, edge(joint=True))
    assert (chosen.whole_N.item(), rejected.whole_N.item()) == (2.0, -0.5)
    chosen, rejected = sides(ratios, edge(joint=False))
    assert (chosen.whole_N.item(), rejected.whole_N.item()) == (1.0, -1.0)
    chosen, rejected = sides(ratios, edge(joint=True), responses_only=True)
    assert (chosen.whole_N.item(), rejected.whole_N.item()) == (1.0, -1.0)


def test_means_are_over_the_tokens_that_are_summed() -> None:
    """Joint: 2 / (5 + 5) and -0.5 / (4 + 10); else 1 / 5 and -1 / 10."""
    items = two_items()
    for joint, expected in ((True, [0.2, -0.5 / 14]), (False, [0.2, -0.1])):
        means = [side.whole_N.item() for side in mean_sides(items.ratios, items, edge(joint=joint))]
        assert means == pytest.approx(expected, abs=1e-12)


def test_jpo_on_a_joint_edge_counts_the_instruction() -> None:
    """beta 0.5: s_w = 0.5 (1 + 1) = 1, s_l = 0.5 (0.5 - 1) = -0.25, margin 1.25 = 0.25 (instruction) + 1 (response).

    loss = log(1 + e^-1.25) = log(1.2865048) = 0.2519291.
    """
    outcome = jpo(two_items(), edge(joint=True), beta=0.5)
    assert outcome.loss_E.item() == pytest.approx(0.2519291, abs=1e-6)
    assert (outcome.chosen_E.item(), outcome.rejected_E.item()) == (1.0, -0.25)
    assert (outcome.margin_instruction_E.item(), outcome.margin_response_E.item()) == (0.25, 1.0)
    assert outcome.margin_E.item() == 1.25


@pytest.mark.parametrize("loss", [jpo, dpo])
def test_jpo_on_an_edge_within_an_instruction_is_dpo(loss: Callable[..., Outcome]) -> None:
    """beta 0.5: margin 0.5 (1 - -1) = 1, whatever the instruction parts are; loss = log(1 + e^-1) = 0.3132617."""
    outcome = loss(two_items(), edge(joint=False), beta=0.5)
    assert outcome.loss_E.item() == pytest.approx(0.3132617, abs=1e-6)
    assert (outcome.chosen_E.item(), outcome.rejected_E.item()) == (0.5, -0.5)
    assert (outcome.margin_instruction_E.item(), outcome.margin_response_E.item()) == (0.0, 1.0)


def test_dpo_leaves_the_instruction_out_even_of_a_joint_edge() -> None:
    assert dpo(two_items(), edge(joint=True), beta=0.5).loss_E.item() == pytest.approx(0.3132617, abs=1e-6)


def test_gradient_of_jpo_by_hand() -> None:
    """dL/dlogp = -beta sigmoid(-margin) for the chosen item, plus for the rejected: 0.5 * 0.2227001 = 0.1113501 on
    both parts of a joint edge; 0.5 * sigmoid(-1) = 0.1344707 on the response of a conditional one, and 0.
    """
    for joint, instruction, response in ((True, 0.1113501, 0.1113501), (False, 0.0, 0.1344707)):
        parts = [part.clone().requires_grad_() for part in (POLICY.instruction_N, POLICY.response_N)]
        jpo(with_scores(two_items(), *parts), edge(joint=joint), beta=0.5).loss_E.sum().backward()
        for part, size in zip(parts, (instruction, response), strict=True):
            assert part.grad is not None
            assert part.grad.tolist() == pytest.approx([-size, size], abs=1e-6)


def test_a_loss_that_needs_a_reference_says_so() -> None:
    """With all else that it reads: KTO's mismatched items, RPO's embeddings."""
    items = replace(random_items(), reference=None)
    for name, objective in OBJECTIVES.items():
        if "reference" in objective.reads:
            with pytest.raises(ValueError, match="no reference log-probs"):
                loss_of(name)(items, edge(joint=False))


def test_sft_is_nats_per_response_token() -> None:
    """(5 + 8) / 10 tokens = 1.3."""
    assert sft(POLICY, 10).item() == pytest.approx(1.3)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_by_finite_differences(name: str) -> None:
    """Eight items in two lists, twelve edges that share them, soft labels; float64, tolerances of torch's gradcheck.

    The hinge of slic and the fall that dpop punishes have kinks, and so have lipo's ranks; none is met here.
    """
    items = random_items()
    edges = random_edges(items, joint=OBJECTIVES[name].conditional_only is None)
    loss = loss_of(name)

    def losses(instruction: Tensor, response: Tensor) -> Tensor:
        return loss(with_scores(items, instruction, response), edges).loss_E

    parts = (items.policy.instruction_N, items.policy.response_N)
    assert torch.autograd.gradcheck(losses, tuple(part.clone().requires_grad_() for part in parts))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"odpo", "lipo", "pro", "rpo"}))
def test_a_soft_label_is_the_mean_of_both_labels(name: str) -> None:
    """A probability of 0.8: 0.8 of the loss as labelled, 0.2 of the loss with chosen and rejected exchanged."""
    items, loss = replace(two_items(), mismatched_K=torch.tensor([2.0, -0.5])), loss_of(name)
    for joint in (True, False):
        there, back = loss(items, edge(joint=joint)), loss(items, edge(joint=joint, back=True))
        soft = loss(items, edge(joint=joint, probability=0.8))
        assert soft.loss_E.item() == pytest.approx(0.8 * there.loss_E.item() + 0.2 * back.loss_E.item(), abs=1e-9)
        assert soft.margin_E.item() == there.margin_E.item()


@pytest.mark.parametrize("name", sorted(name for name, found in OBJECTIVES.items() if "instruction" not in found.reads))
def test_what_is_not_read_does_not_matter(name: str) -> None:
    """These losses are told that no instruction log-prob is computed: another one changes nothing."""
    items = random_items()
    edges = random_edges(items, joint=OBJECTIVES[name].conditional_only is None)
    other = with_scores(items, items.policy.instruction_N - 7, items.policy.response_N)
    assert torch.equal(loss_of(name)(items, edges).loss_E, loss_of(name)(other, edges).loss_E)


@pytest.mark.parametrize("name", sorted(name for name, found in OBJECTIVES.items() if found.joins == "items"))
def test_what_joins_nothing_is_a_sum_over_items(name: str) -> None:
    """The gradient of an item's score is the same whatever the other items' scores are: mixed derivatives vanish."""
    items = random_items()
    edges = hard(random_edges(items))

    def total(response: Tensor) -> Tensor:
        policy = ItemScores(items.policy.instruction_N, response)
        return loss_of(name)(replace(items, policy=policy), edges).loss_E.sum()

    hessian = torch.autograd.functional.hessian(total, items.policy.response_N)
    assert torch.count_nonzero(hessian - torch.diag(torch.diag(hessian))) == 0


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_losses_stay_finite_far_from_the_reference(size: float) -> None:
    """-log sigmoid(-m) is m for large m. Here m = 0.5 * 2 * size: the loss is size + log(1 + e^-size)."""
    zero = torch.zeros(2).double()
    items = replace(
        two_items(),
        policy=ItemScores(zero, torch.tensor([-size, size]).double()),
        reference=ItemScores(zero, zero),
    )
    loss = dpo(items, edge(joint=False), beta=0.5).loss_E.item()
    assert loss == pytest.approx(size + torch.log1p(torch.exp(torch.tensor(-size).double())).item())


@pytest.mark.parametrize(
    "name", sorted(name for name, found in OBJECTIVES.items() if found.joins in ("items", "edges"))
)
def test_an_edge_weighs_the_same_in_any_batch(name: str) -> None:
    """Losses are per edge: other items and edges of the batch do not enter (in KTO only through z_0)."""
    items = random_items()
    edges = random_edges(items)
    alone = replace(edges, **{key: column[3:4] for key, column in edges.__dict__.items()})
    whole, one = loss_of(name)(items, edges), loss_of(name)(items, alone)
    assert whole.loss_E[3].item() == one.loss_E.item()
    assert whole.margin_E[3].item() == one.margin_E.item()


def test_a_mixture_is_the_weighted_sum() -> None:
    items, edges = random_items(), random_edges(random_items())
    outcomes = [loss_of(name)(items, edges) for name in ("jpo", "simpo", "sft")]
    found = mixture(outcomes, [2.0, 0.5, 0.1])
    expected = 2 * outcomes[0].loss_E + 0.5 * outcomes[1].loss_E + 0.1 * outcomes[2].loss_E
    assert torch.allclose(found.loss_E, expected, rtol=1e-12)
    assert torch.equal(found.part_PE, torch.stack([each.loss_E for each in outcomes]))
    assert torch.equal(found.margin_E, outcomes[0].margin_E)


def test_outcomes_of_parts_are_put_together() -> None:
    items: Items = random_items()
    edges = random_edges(items)
    first, second = (
        replace(edges, **{key: column[part] for key, column in edges.__dict__.items()})
        for part in (slice(0, 5), slice(5, 12))
    )
    whole, parts = jpo(items, edges, beta=0.5), [jpo(items, part, beta=0.5) for part in (first, second)]
    joined = concatenated(parts)
    assert all(torch.equal(value, joined.__dict__[name]) for name, value in whole.__dict__.items())
