"""Losses of the policy's own log-probs per token: no reference is needed.

They judge responses given their instruction, also on joint edges: without a reference to divide it out, how common an
instruction is would count as how good it is. Rewards are beta times the log-prob per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from jpo_ray.objectives.losses import Edges, Items, ItemScores, Outcome, both_labels, mean_sides, outcome

NEARLY_ONE = -1e-7  # log of the largest probability whose odds are told from infinite ones


def simpo(items: Items, edges: Edges, *, beta: float, simpo_gamma: float) -> Outcome:
    """Simple Preference Optimization (arXiv 2405.14734, Equation 6), gamma the margin that is asked for.

    `-log sigmoid(beta / |R_w| log p(R_w | I_w) - beta / |R_l| log p(R_l | I_l) - gamma)`.
    """
    chosen, rejected = mean_sides(items.policy, items, edges, responses_only=True)

    def loss(winner: ItemScores, loser: ItemScores) -> Tensor:
        return -F.logsigmoid(beta * (winner.whole_N - loser.whole_N) - simpo_gamma)

    return outcome(both_labels(edges, chosen, rejected, loss), chosen, rejected, beta)


def orpo(items: Items, edges: Edges, *, beta: float) -> Outcome:
    """Odds Ratio Preference Optimization (arXiv 2403.07691, Equations 6 and 7), beta its lambda.

    `-log p(R_w | I_w) / |R_w| - beta log sigmoid(log odds_w - log odds_l)`, with odds = P / (1 - P) of the response's
    probability per token (its geometric mean).
    """
    chosen, rejected = mean_sides(items.policy, items, edges, responses_only=True)

    def loss(winner: ItemScores, loser: ItemScores) -> Tensor:
        return -winner.whole_N - beta * F.logsigmoid(_log_odds(winner.whole_N) - _log_odds(loser.whole_N))

    return outcome(both_labels(edges, chosen, rejected, loss), chosen, rejected, beta)


def _log_odds(log_probability: Tensor) -> Tensor:
    bounded = log_probability.clamp(max=NEARLY_ONE)
    return bounded - torch.log(-torch.expm1(bounded))


def chosen_nll(items: Items, edges: Edges) -> Outcome:
    """Negative log-likelihood of the chosen responses in nats per token: `-log p(R_w | I_w) / |R_w|`.

    The SFT term beside a preference loss, as in Iterative RPO (arXiv 2404.19733, Equation 1).
    """
    chosen, rejected = mean_sides(items.policy, items, edges, responses_only=True)
    return outcome(both_labels(edges, chosen, rejected, lambda winner, _: -winner.whole_N), chosen, rejected, 1.0)
