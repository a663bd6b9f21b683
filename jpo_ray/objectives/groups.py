"""Losses that join more than two items: all responses of an instruction (a list), or all items of a batch.

A list's items are ranked by their share of wins in its edges, which is where its labels are: what wins more is better,
and equal shares are not compared. So items are ranked that never met; where the edges of a list are not all that could
be, that is a guess. The loss of a list stands at each of its edges: whoever averages lets each list count once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from jpo_ray.objectives.losses import Edges, Items, Outcome, both_labels, mean_sides, outcome, sides


def lipo(items: Items, edges: Edges, *, beta: float) -> Outcome:
    """LiPO-lambda (the lambda loss of LiPO, arXiv 2402.01878): pairs of a list, weighted by what exchange does to DCG.

    `sum over psi_i > psi_j of |G_i - G_j| |1 / D(tau_i) - 1 / D(tau_j)| log(1 + exp(-(s_i - s_j)))` with
    `s = beta log-ratio`, gains `G = 2^psi - 1` of the labels psi (shares of wins), discounts `D(tau) = log(1 + tau)` of
    the ranks tau by s. The weights have no gradient.
    """
    ratios = items.ratios
    score_N = beta * ratios.response_N
    label_N, pair_NN = _labels(items, edges)
    gain_N, discount_N = 2**label_N - 1, 1 / torch.log1p(_ranks(score_N.detach(), items.group_N))
    weight_NN = (gain_N[:, None] - gain_N).abs() * (discount_N[:, None] - discount_N).abs() * pair_NN
    loss_N = (weight_NN * F.softplus(score_N - score_N[:, None])).sum(dim=1)
    return outcome(_of_lists(loss_N, items, edges), *sides(ratios, edges, responses_only=True), beta)


def pro(items: Items, edges: Edges, *, beta: float) -> Outcome:
    """Preference Ranking Optimization (PRO, arXiv 2306.17492): each response against all worse ones.

    `-sum over k of log(exp(r_k) / (exp(r_k) + sum over psi_i < psi_k of exp(r_i)))` with `r = beta log p(R | I) / |R|`
    (the paper has no beta: 1), checked against its authors' code (GitHub: AlibabaResearch/DAMO-ConvAI, `PRO/`). Its SFT
    term is the objective `sft` beside it; its temperatures, which need the scores of a reward model, are left out.
    """
    reward_N = beta * items.policy.response_N / items.response_tokens_N
    _, pair_NN = _labels(items, edges)
    against_NN = pair_NN | torch.eye(len(reward_N), dtype=torch.bool, device=reward_N.device)
    loss_N = torch.logsumexp(reward_N.masked_fill(~against_NN, -torch.inf), dim=1) - reward_N
    means = mean_sides(items.policy, items, edges, responses_only=True)
    return outcome(_of_lists(loss_N, items, edges), *means, beta)


def rpo(items: Items, edges: Edges, *, beta: float, rpo_temperature: float) -> Outcome:
    """Relative Preference Optimization (RPO, arXiv 2402.10958): chosen against all rejected ones.

    `-mean over j of log sigmoid(w_ij beta (ratio_i - ratio_j))` for the chosen response i, all rejected ones j of a
    batch; w_i is the softmax over j of `-(1 - cosine) / temperature` of the two instructions. Checked against its
    authors' code (GitHub: yinyueqin/relative-preference-optimization). Log-ratios are of responses given their
    instruction: the paper compares them across instructions as they are, and says that a partition function is thereby
    neglected. ValueError without embeddings.
    """
    if items.embedding_ND is None:
        raise ValueError("rpo needs embeddings of the instructions")
    embedding_ND = items.embedding_ND
    ratio_N = items.ratios.response_N

    def against_all(winner_E: Tensor, loser_E: Tensor) -> Tensor:
        cosine_EE = embedding_ND[winner_E] @ embedding_ND[loser_E].T
        weight_EE = torch.softmax((cosine_EE - 1) / rpo_temperature, dim=1)
        margin_EE = ratio_N[winner_E][:, None] - ratio_N[loser_E]
        return -F.logsigmoid(beta * weight_EE * margin_EE).mean(dim=1)

    loss_E = both_labels(edges, edges.chosen_E, edges.rejected_E, against_all)
    return outcome(loss_E, *sides(items.ratios, edges, responses_only=True), beta)


def _labels(items: Items, edges: Edges) -> tuple[Tensor, Tensor]:
    """Shares of wins float[N], and bool[N, N]: the first is in edges of the second's list, with a larger share."""
    zero_N = torch.zeros_like(items.policy.response_N)
    wins_N = zero_N.index_add(0, edges.chosen_E, edges.probability_E.to(zero_N))
    wins_N = wins_N.index_add(0, edges.rejected_E, (1 - edges.probability_E).to(zero_N))
    met_N = torch.bincount(torch.cat([edges.chosen_E, edges.rejected_E]), minlength=len(zero_N))
    label_N = wins_N / met_N.clamp(min=1)
    same_NN = (items.group_N[:, None] == items.group_N) & (met_N > 0) & (met_N > 0)[:, None]
    return label_N, same_NN & (label_N[:, None] > label_N)


def _ranks(score_N: Tensor, group_N: Tensor) -> Tensor:
    """Places 1, 2, ... of items in their lists by falling score; equal ones, as at the start, in batch order."""
    place_N = torch.argsort(torch.argsort(score_N, descending=True, stable=True))
    ahead_NN = (group_N[:, None] == group_N) & (place_N < place_N[:, None])
    return 1 + ahead_NN.sum(dim=1).to(score_N)


def _of_lists(loss_N: Tensor, items: Items, edges: Edges) -> Tensor:
    """Each edge gets the loss of its list: the sum of its items'."""
    groups, list_N = torch.unique(items.group_N, return_inverse=True)
    return torch.zeros(len(groups)).to(loss_N).index_add(0, list_N, loss_N)[list_N[edges.chosen_E]]
