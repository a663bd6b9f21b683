"""Losses that give each item a target of its own, instead of the margin between two."""

import torch
from torch import Tensor

from jpo_ray.objectives.losses import Edges, Items, ItemScores, Outcome, both_labels, outcome, sides


def kto(
    items: Items, edges: Edges, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Outcome:
    """Kahneman-Tversky Optimization (arXiv 2402.01306, Equation 7): chosen items desirable, rejected undesirable.

    The reference point z_0 is the mean log-ratio of mismatched items (an instruction with another one's response),
    clamped at zero and without gradient. An edge stands for its two labelled examples, so its loss is the mean of
    theirs. Responses are judged given their instruction, also on joint edges. ValueError without mismatched items.
    """
    if items.mismatched_K is None:
        raise ValueError("kto needs the log-ratios of mismatched items")
    kl = items.mismatched_K.mean().clamp(min=0).detach()
    chosen, rejected = sides(items.ratios, edges, responses_only=True)

    def loss(winner: ItemScores, loser: ItemScores) -> Tensor:
        desirable_E = desirable_weight * (1 - torch.sigmoid(beta * (winner.whole_N - kl)))
        undesirable_E = undesirable_weight * (1 - torch.sigmoid(beta * (kl - loser.whole_N)))
        return (desirable_E + undesirable_E) / 2

    return outcome(both_labels(edges, chosen, rejected, loss), chosen, rejected, beta)


def sppo(items: Items, edges: Edges, *, beta: float) -> Outcome:
    """Self-Play Preference Optimization (arXiv 2405.00675, Equation 4.7), of one round on given comparisons.

    `(ratio_w - 1 / (2 beta))^2 + (ratio_l + 1 / (2 beta))^2`: the log-ratio of an item goes to `eta * (P - 1/2)`, with
    eta = 1 / beta and P the probability that it wins, here 1 and 0 for the two items of an edge. An item in several
    edges goes to the mean of their targets, and so do both of a soft label.
    """
    chosen, rejected = sides(items.ratios, edges)

    def loss(winner: ItemScores, loser: ItemScores) -> Tensor:
        return (winner.whole_N - 1 / (2 * beta)) ** 2 + (loser.whole_N + 1 / (2 * beta)) ** 2

    return outcome(both_labels(edges, chosen, rejected, loss), chosen, rejected, beta)


def apo_zero(items: Items, edges: Edges, *, beta: float) -> Outcome:
    """Anchored Preference Optimization (arXiv 2408.06266, Equation 7), for chosen items better than the model's own.

    `1 - sigmoid(beta ratio_w) + sigmoid(beta ratio_l)`: the chosen grows likelier, the rejected less likely.
    """
    chosen, rejected = sides(items.ratios, edges)

    def loss(winner: ItemScores, loser: ItemScores) -> Tensor:
        return 1 - torch.sigmoid(beta * winner.whole_N) + torch.sigmoid(beta * loser.whole_N)

    return outcome(both_labels(edges, chosen, rejected, loss), chosen, rejected, beta)


def apo_down(items: Items, edges: Edges, *, beta: float) -> Outcome:
    """Anchored Preference Optimization (arXiv 2408.06266, Equation 8), for chosen items worse than the model's own.

    `sigmoid(beta ratio_w) + 1 - sigmoid(beta (ratio_w - ratio_l))`: both grow less likely, the rejected more so.
    """
    chosen, rejected = sides(items.ratios, edges)

    def loss(winner: ItemScores, loser: ItemScores) -> Tensor:
        return torch.sigmoid(beta * winner.whole_N) + 1 - torch.sigmoid(beta * (winner.whole_N - loser.whole_N))

    return outcome(both_labels(edges, chosen, rejected, loss), chosen, rejected, beta)
