"""Losses of lists and of whole batches against values derived by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jpo_ray.objectives import Edges, Items, ItemScores
from jpo_ray.objectives.groups import lipo, pro, rpo
from objectives.batch import random_edges, random_items

ZERO, ONE_LIST = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)


def items(response: Tensor, groups: Tensor, tokens: Tensor | None = None) -> Items:
    """Items with these log-probs of their responses, of which the reference has 0."""
    zero = torch.zeros_like(response)
    ones = torch.ones_like(groups)
    policy, reference = ItemScores(zero, response), ItemScores(zero, zero)
    return Items(policy, reference, ones, ones if tokens is None else tokens, groups)


def edges(*pairs: tuple[int, int], probability: float = 1.0) -> Edges:
    chosen, rejected = torch.tensor(pairs).T
    sure = torch.full((len(pairs),), probability, dtype=torch.float64)
    return Edges(chosen, rejected, torch.zeros(len(pairs), dtype=torch.bool), sure, sure * torch.nan)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


CHAIN = edges((0, 1), (0, 2), (1, 2))  # item 0 wins two of two, item 1 one, item 2 none


def test_lipo_by_hand() -> None:
    """Scores 0, 1, -1: ranks 2, 1, 3; 1 / log(1 + rank): 0.9102392, 1.4426950, 0.7213475. Gains 1, 0.4142136, 0.

    (0, 1): 0.5857864 * 0.5324558 * log(1 + e^1) = 0.4096134; (0, 2): 1 * 0.1888917 * log(1 + e^-1) = 0.0591725;
    (1, 2): 0.4142136 * 0.7213475 * log(1 + e^-2) = 0.0379251; sum 0.5067110, which stands at every edge.
    """
    found = lipo(items(values(0.0, 2.0, -2.0), ONE_LIST), CHAIN, beta=0.5)
    assert found.loss_E.tolist() == pytest.approx([0.5067110] * 3, abs=1e-7)
    assert found.margin_E.tolist() == [-1.0, 1.0, 2.0]


def test_lipo_moves_at_the_start() -> None:
    """All log-ratios are 0: had all items the same rank, no exchange would matter and nothing would be learned."""
    response = ZERO.clone().requires_grad_()
    lipo(items(response, ONE_LIST), CHAIN, beta=0.5).loss_E.mean().backward()
    assert response.grad is not None
    assert response.grad[0].item() < 0 < response.grad[2].item()


def test_lipo_of_two_is_a_weighted_dpo() -> None:
    """Gains 1 and 0, discounts of ranks 1 and 2: 1.4426950 - 0.9102392 = 0.5324558 times -log sigmoid(margin)."""
    found = lipo(items(values(3.0, 1.0), ONE_LIST[:2]), edges((0, 1)), beta=0.5)
    assert found.loss_E.item() == pytest.approx(0.5324558 * 0.3132617, abs=1e-6)


def test_pro_by_hand() -> None:
    """Log-probs -2, -3, -4 of 2, 6, 2 tokens: rewards -1, -0.5, -2.

    Item 0 against 1 and 2: log(e^-1 + e^-0.5 + e^-2) + 1 = 1.1041306; item 1 against 2: log(e^-0.5 + e^-2) + 0.5 =
    0.2014133; sum 1.3055439.
    """
    given = replace(items(values(-2.0, -3.0, -4.0), ONE_LIST, torch.tensor([2, 6, 2])), reference=None)
    found = pro(given, CHAIN, beta=1.0)
    assert found.loss_E.tolist() == pytest.approx([1.3055439] * 3, abs=1e-7)
    assert found.margin_E.tolist() == [-0.5, 1.0, 1.5]


def test_pro_of_two_is_simpo_without_a_margin() -> None:
    given = items(values(-2.0, -3.0), ONE_LIST[:2], torch.tensor([2, 6]))
    expected = -F.logsigmoid(values(-1.0 - -0.5)).item()
    assert pro(given, edges((0, 1)), beta=1.0).loss_E.item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [lipo, pro])
def test_equal_shares_of_wins_are_not_compared(loss: object) -> None:
    """In a circle every item wins one of two: nothing is said, at no loss. So it is with labels of probability 1/2."""
    assert callable(loss)
    circle = edges((0, 1), (1, 2), (2, 0))
    given = items(values(-1.0, -2.0, -3.0), ONE_LIST)
    assert loss(given, circle, beta=1.0).loss_E.tolist() == [0.0, 0.0, 0.0]
    assert loss(given, edges((0, 1), probability=0.5), beta=1.0).loss_E.tolist() == [0.0]


def test_items_that_never_met_are_ranked_by_their_shares() -> None:
    """0 beats 1 and 2 beats 3: shares 1, 0, 1, 0, so 0 is put above 3 and 2 above 1 too, and 0 and 2 are not compared.

    Scores 0, 1, -1, 2: LiPO's ranks are 3, 2, 4, 1, its pairs 0.2480642 (0, 1), 1.5342542 (0, 3), 0.6144786 (2, 1),
    2.5039880 (2, 3). PRO: log(e^0 + e^1 + e^2) = 2.4076060 and log(e^-1 + e^1 + e^2) + 1 = 3.3490122.
    """
    met = edges((0, 1), (2, 3))
    given = items(values(0.0, 1.0, -1.0, 2.0), torch.zeros(4, dtype=torch.int64))
    assert lipo(given, met, beta=1.0).loss_E.tolist() == pytest.approx([4.9007852] * 2, abs=1e-6)
    assert pro(given, met, beta=1.0).loss_E.tolist() == pytest.approx([5.7566182] * 2, abs=1e-6)


@pytest.mark.parametrize("loss", [lipo, pro])
def test_a_list_weighs_the_same_in_any_batch(loss: object) -> None:
    """Other lists do not enter, wherever their items stand in the batch, and send no gradient."""
    assert callable(loss)
    given = random_items(9, per_list=3)
    mixed = replace(given, group_N=torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2]))
    both = edges((0, 3), (3, 6), (0, 6), (1, 4), (4, 7), (2, 8))
    first = edges((0, 3), (3, 6), (0, 6))
    response = mixed.policy.response_N.clone().requires_grad_()
    mixed = replace(mixed, policy=ItemScores(mixed.policy.instruction_N, response))
    whole, alone = loss(mixed, both, beta=0.7).loss_E, loss(mixed, first, beta=0.7).loss_E
    assert whole[:3].tolist() == pytest.approx(alone.tolist(), abs=1e-12)
    (gradient,) = torch.autograd.grad(whole[:3].sum(), response)
    assert gradient.nonzero().flatten().tolist() == [0, 3, 6]


def test_rpo_by_hand() -> None:
    """Chosen items of ratios 1 and 0, rejected of -1 and 0.5, embeddings of cosine 0.5; temperature 0.5, beta 1.

    Weights: softmax(0, -1) = 0.7310586, 0.2689414 on the own instruction and the other. First edge: mean of
    -log sigmoid(0.7310586 * 2) = 0.2084320 and -log sigmoid(0.2689414 * 0.5) = 0.6281704: 0.4183012. Second: mean of
    -log sigmoid(0.2689414 * 1) = 0.5676905 and -log sigmoid(0.7310586 * -0.5) = 0.8925211: 0.7301058.
    """
    directions = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)
    given = replace(
        items(values(1.0, -1.0, 0.0, 0.5), torch.tensor([0, 0, 1, 1])), embedding_ND=directions[[0, 0, 1, 1]]
    )
    found = rpo(given, edges((0, 1), (2, 3)), beta=1.0, rpo_temperature=0.5)
    assert found.loss_E.tolist() == pytest.approx([0.4183012, 0.7301058], abs=1e-7)
    assert found.margin_E.tolist() == [2.0, -0.5]


def test_rpo_of_one_comparison_is_dpo() -> None:
    given = replace(items(values(3.0, 1.0), ONE_LIST[:2]), embedding_ND=torch.ones(2, 1, dtype=torch.float64))
    found = rpo(given, edges((0, 1)), beta=0.5, rpo_temperature=0.5)
    assert found.loss_E.item() == pytest.approx(0.3132617, abs=1e-7)


def test_rpo_without_embeddings_says_so() -> None:
    given = replace(random_items(), embedding_ND=None)
    with pytest.raises(ValueError, match="embeddings"):
        rpo(given, random_edges(given), beta=0.1, rpo_temperature=0.5)
