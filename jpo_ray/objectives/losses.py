"""Losses of preference optimisation over items and edges.

Every loss sees, per item, the log-probs of its instruction part and of its response part under policy and reference
(float32 or wider, in nats, summed over tokens), and the edges between items. It never sees a token or a model, so one
forward pass per item serves any number of edges. Losses return one value per edge; the caller weights and averages.

Shape suffixes: `_N` items of the batch, `_E` edges, `_K` mismatched items (KTO).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ItemScores:
    """Per-item log-probs: float[N] each."""

    instruction_N: Tensor
    response_N: Tensor


@dataclass(frozen=True)
class Edges:
    """Comparisons: indices into the batch's items, and how sure their labels are."""

    chosen_E: Tensor  # int64
    rejected_E: Tensor  # int64
    joint_E: Tensor  # bool: the two instructions differ
    probability_E: Tensor  # float: that `chosen` is better; 1 unless the label is soft


@dataclass(frozen=True)
class Outcome:
    """What a loss says of each edge; `chosen`, `rejected` and the margins are implicit rewards, times beta.

    A soft label's loss is the mean of the losses of both labels, weighted by their probabilities.
    """

    loss_E: Tensor
    chosen_E: Tensor
    rejected_E: Tensor
    margin_instruction_E: Tensor
    margin_response_E: Tensor

    @property
    def margin_E(self) -> Tensor:
        return self.margin_instruction_E + self.margin_response_E


def log_ratios(policy: ItemScores, reference: ItemScores) -> ItemScores:
    """log p_policy - log p_reference of both parts, float[N] each."""
    return ItemScores(policy.instruction_N - reference.instruction_N, policy.response_N - reference.response_N)


def jpo(policy: ItemScores, reference: ItemScores, edges: Edges, *, beta: float) -> Outcome:
    """Joint Preference Optimization (arXiv 2404.00530, Equation 1, with the minus sign its print lacks).

    `-log sigmoid(s_w - s_l)` with `s = beta * (log p_policy(I, R) - log p_ref(I, R))`, the instruction's tokens
    included. For edges within one instruction the instruction terms cancel (Lemma D.1) and this is DPO; they are left
    out by construction, so that dropout cannot bring back what mathematics cancels.
    """
    return _pairwise(log_ratios(policy, reference), edges, edges.joint_E, beta)


def dpo(policy: ItemScores, reference: ItemScores, edges: Edges, *, beta: float) -> Outcome:
    """Direct Preference Optimization (arXiv 2305.18290, Equation 7) on responses given their instruction."""
    return _pairwise(log_ratios(policy, reference), edges, torch.zeros_like(edges.joint_E), beta)


def _pairwise(ratios: ItemScores, edges: Edges, with_instruction_E: Tensor, beta: float) -> Outcome:
    w, l = edges.chosen_E, edges.rejected_E  # noqa: E741
    zero = ratios.instruction_N.new_zeros(())
    instruction_w = torch.where(with_instruction_E, ratios.instruction_N[w], zero)
    instruction_l = torch.where(with_instruction_E, ratios.instruction_N[l], zero)
    margin_instruction = beta * (instruction_w - instruction_l)
    margin_response = beta * (ratios.response_N[w] - ratios.response_N[l])
    margin, probability = margin_instruction + margin_response, edges.probability_E
    return Outcome(
        loss_E=-probability * F.logsigmoid(margin) - (1 - probability) * F.logsigmoid(-margin),
        chosen_E=beta * (instruction_w + ratios.response_N[w]),
        rejected_E=beta * (instruction_l + ratios.response_N[l]),
        margin_instruction_E=margin_instruction,
        margin_response_E=margin_response,
    )


def kto(
    policy: ItemScores,
    reference: ItemScores,
    edges: Edges,
    mismatched_policy_K: Tensor,
    mismatched_reference_K: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Outcome:
    """Kahneman-Tversky Optimization (arXiv 2402.01306, Equation 8): chosen items desirable, rejected undesirable.

    The reference point z_0 is the mean log-ratio of mismatched items (an instruction with another one's response;
    `mismatched_*_K` are their response log-probs), clamped at zero and without gradient. An edge stands for its two
    labelled examples, so its loss is the mean of theirs.
    """
    ratio_N = log_ratios(policy, reference).response_N
    kl = (mismatched_policy_K - mismatched_reference_K).mean().clamp(min=0).detach()
    chosen_E, rejected_E = beta * ratio_N[edges.chosen_E], beta * ratio_N[edges.rejected_E]

    def labelled(better_E: Tensor, worse_E: Tensor) -> Tensor:
        desirable_E = desirable_weight * (1 - torch.sigmoid(better_E - beta * kl))
        undesirable_E = undesirable_weight * (1 - torch.sigmoid(beta * kl - worse_E))
        return (desirable_E + undesirable_E) / 2

    probability = edges.probability_E
    return Outcome(
        loss_E=probability * labelled(chosen_E, rejected_E) + (1 - probability) * labelled(rejected_E, chosen_E),
        chosen_E=chosen_E,
        rejected_E=rejected_E,
        margin_instruction_E=torch.zeros_like(chosen_E),
        margin_response_E=chosen_E - rejected_E,
    )


def sft(policy: ItemScores, response_tokens: int) -> Tensor:
    """Negative log-likelihood of the responses in nats per token, given the batch's number of response tokens."""
    return -policy.response_N.sum() / response_tokens
