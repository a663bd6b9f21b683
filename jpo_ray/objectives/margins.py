"""Losses of the margin between two items' log-ratios: what DPO became in other hands. All take joint edges.

The margin of an edge is `m = beta * (ratio_w - ratio_l)`, of whole sequences on joint edges (`losses.py`).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from jpo_ray.objectives.losses import (
    Edges,
    Items,
    ItemScores,
    Outcome,
    both_labels,
    jpo,
    mean_sides,
    of_margins,
    outcome,
    sides,
)

LEAST_GAP = 1e-3  # the log of no gap at all would be infinite


def cdpo(items: Items, edges: Edges, *, beta: float, label_smoothing: float) -> Outcome:
    """Conservative DPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf, Equation 3): labels are wrong with probability eps.

    `-(1 - eps) log sigmoid(m) - eps log sigmoid(-m)`: what a soft label of 1 - eps would say.
    """
    probability_E = edges.probability_E * (1 - label_smoothing) + (1 - edges.probability_E) * label_smoothing
    return jpo(items, replace(edges, probability_E=probability_E), beta=beta)


def robust(items: Items, edges: Edges, *, beta: float, label_smoothing: float) -> Outcome:
    """Robust DPO (arXiv 2403.00409; checked against TRL): in expectation over flips, DPO's loss of the true labels.

    `(-(1 - eps) log sigmoid(m) + eps log sigmoid(-m)) / (1 - 2 eps)`, with flips of probability eps < 1/2.
    """

    def loss(margin_E: Tensor) -> Tensor:
        clean_E, flipped_E = -F.logsigmoid(margin_E), -F.logsigmoid(-margin_E)
        return ((1 - label_smoothing) * clean_E - label_smoothing * flipped_E) / (1 - 2 * label_smoothing)

    return of_margins(items, edges, beta, loss)


def ipo(items: Items, edges: Edges, *, beta: float) -> Outcome:
    """Identity Preference Optimization (arXiv 2310.12036, Equation 17): `(h - 1 / (2 beta))^2`, beta its tau.

    h is the difference of log-ratios per token rather than of sums: what the paper's authors ran, as TRL reports.
    """
    chosen, rejected = mean_sides(items.ratios, items, edges)

    def loss(winner: ItemScores, loser: ItemScores) -> Tensor:
        return (winner.whole_N - loser.whole_N - 1 / (2 * beta)) ** 2

    return outcome(both_labels(edges, chosen, rejected, loss), *sides(items.ratios, edges), beta)


def slic(items: Items, edges: Edges, *, beta: float) -> Outcome:
    """SLiC's hinge (the calibration loss of SLiC-HF, arXiv 2305.10425) on log-ratios, as in RSO (arXiv 2309.06657).

    `max(0, 1 - m)`. The paper's second part, the regularisation, is the objective `sft` beside it.
    """
    return of_margins(items, edges, beta, lambda margin_E: torch.relu(1 - margin_E))


def dpop(items: Items, edges: Edges, *, beta: float, dpop_lambda: float) -> Outcome:
    """DPO-Positive (DPOP, of Smaug, arXiv 2402.13228): a fall of the chosen item's likelihood counts against it.

    `-log sigmoid(m - beta * lambda * max(0, log p_ref(w) - log p_policy(w)))`.
    """
    chosen, rejected = sides(items.ratios, edges)

    def loss(winner: ItemScores, loser: ItemScores) -> Tensor:
        fall_E = torch.relu(-winner.whole_N)
        return -F.logsigmoid(beta * (winner.whole_N - loser.whole_N - dpop_lambda * fall_E))

    return outcome(both_labels(edges, chosen, rejected, loss), chosen, rejected, beta)


def odpo(items: Items, edges: Edges, *, beta: float, odpo_alpha: float) -> Outcome:
    """DPO with an offset (ODPO, arXiv 2402.10571): the margin is to exceed what the gap asks for.

    `-log sigmoid(m - alpha * log(score_w - score_l))`, checked against its authors' code (GitHub:
    rycolab/odpo). The gap of the scores says how sure a label is, so the label's probability does not count once more;
    where there is next to none, next to nothing is asked for.
    """
    chosen, rejected = sides(items.ratios, edges)
    margin_E = beta * (chosen.whole_N - rejected.whole_N)
    offset_E = odpo_alpha * torch.log(edges.gap_E.clamp(min=LEAST_GAP))
    return outcome(-F.logsigmoid(margin_E - offset_E), chosen, rejected, beta)


def rdpo(items: Items, edges: Edges, *, beta: float, rdpo_alpha: float) -> Outcome:
    """Length-regularised DPO (R-DPO, arXiv 2403.19159): rewards less alpha per token.

    `-log sigmoid(m + alpha * (|R_w| - |R_l|))`, lengths in tokens of the responses: where the longer one was chosen,
    length explains part of the label, and less is left to learn.
    """
    ratios = items.ratios
    with_length = replace(ratios, response_N=ratios.response_N + rdpo_alpha / beta * items.response_tokens_N)

    def loss(winner: ItemScores, loser: ItemScores) -> Tensor:
        return -F.logsigmoid(beta * (winner.whole_N - loser.whole_N))

    return outcome(both_labels(edges, *sides(with_length, edges), loss), *sides(ratios, edges), beta)
