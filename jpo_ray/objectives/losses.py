"""What every objective sees and returns, and the losses that the others grow from: JPO, DPO, and a sum of several.

Every loss sees, per item, the log-probs of its instruction part and of its response part under policy and reference
(in nats, summed over tokens) with the numbers of their tokens, and the edges between items. It never sees a token or a
model, so one forward pass per item serves any number of edges. Losses return one value per edge; the caller weights
and averages.

A log-ratio is log p_policy - log p_reference. Losses of log-ratios compare whole sequences on joint edges, as JPO does,
and responses given their instruction on the others; losses without a reference always compare the latter.

Shape suffixes: `_N` items of the batch, `_E` edges, `_K` mismatched items (KTO), `_P` objectives of a sum, `_D`
dimensions of an embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Side = TypeVar("Side")  # what a loss knows of one end of each edge


@dataclass(frozen=True)
class ItemScores:
    """Log-probs, or log-ratios, of items or of one side of each edge: float[N] or float[E] each."""

    instruction_N: Tensor
    response_N: Tensor

    @property
    def whole_N(self) -> Tensor:
        return self.instruction_N + self.response_N


@dataclass(frozen=True)
class Items:
    """What losses know of a batch's items."""

    policy: ItemScores
    reference: ItemScores | None  # None where the objective needs none
    instruction_tokens_N: Tensor  # int64: tokens that the log-probs sum over
    response_tokens_N: Tensor  # int64
    group_N: Tensor  # int64: equal for items of one instruction
    embedding_ND: Tensor | None = None  # of the instructions, of norm 1 (RPO)
    mismatched_K: Tensor | None = None  # log-ratios of an instruction with another one's response (KTO)

    @property
    def ratios(self) -> ItemScores:
        """Log-ratios of both parts. Raises ValueError where there is no reference."""
        if self.reference is None:
            raise ValueError("this objective compares with a reference, and no reference log-probs are given")
        return ItemScores(
            self.policy.instruction_N - self.reference.instruction_N,
            self.policy.response_N - self.reference.response_N,
        )


@dataclass(frozen=True)
class Edges:
    """Comparisons: indices into the batch's items, and what is known of their labels."""

    chosen_E: Tensor  # int64
    rejected_E: Tensor  # int64
    joint_E: Tensor  # bool: the two instructions differ
    probability_E: Tensor  # float: that `chosen` is better; 1 unless the label is soft
    gap_E: Tensor  # float: by how much `chosen` is better, in the judge's scores; NaN where it gave none


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
    part_PE: Tensor  # the losses of the objectives that `loss_E` is the weighted sum of

    @property
    def margin_E(self) -> Tensor:
        return self.margin_instruction_E + self.margin_response_E


def jpo(items: Items, edges: Edges, *, beta: float) -> Outcome:
    """Joint Preference Optimization (arXiv 2404.00530, Equation 1, with the minus sign its print lacks).

    `-log sigmoid(s_w - s_l)` with `s = beta * (log p_policy(I, R) - log p_ref(I, R))`, the instruction's tokens
    included. For edges within one instruction the instruction terms cancel (Lemma D.1) and this is DPO; they are left
    out by construction, so that dropout cannot bring back what mathematics cancels.
    """
    return of_margins(items, edges, beta, lambda margin_E: -F.logsigmoid(margin_E))


def dpo(items: Items, edges: Edges, *, beta: float) -> Outcome:
    """Direct Preference Optimization (arXiv 2305.18290, Equation 7) on responses given their instruction."""
    return jpo(items, replace(edges, joint_E=torch.zeros_like(edges.joint_E)), beta=beta)


def mixture(outcomes: Sequence[Outcome], weights: Sequence[float]) -> Outcome:
    """The weighted sum of several losses of the same edges; rewards and margins are the first one's."""
    part_PE = torch.stack([each.loss_E for each in outcomes])
    return replace(outcomes[0], loss_E=part_PE.new_tensor(weights) @ part_PE, part_PE=part_PE)


def concatenated(outcomes: Sequence[Outcome]) -> Outcome:
    """What a loss says of all edges, from what it says of some at a time."""
    columns = zip(*(each.__dict__.values() for each in outcomes), strict=True)
    return Outcome(*(torch.cat(column, dim=-1) for column in columns))


def of_margins(items: Items, edges: Edges, beta: float, loss: Callable[[Tensor], Tensor]) -> Outcome:
    """Any loss of the margin: `loss(beta * (ratio_w - ratio_l))`, float[E] to float[E], both labels' where soft."""
    chosen, rejected = sides(items.ratios, edges)

    def of_sides(winner: ItemScores, loser: ItemScores) -> Tensor:
        return loss(beta * (winner.whole_N - loser.whole_N))

    return outcome(both_labels(edges, chosen, rejected, of_sides), chosen, rejected, beta)


def sides(scores: ItemScores, edges: Edges, *, responses_only: bool = False) -> tuple[ItemScores, ItemScores]:
    """The scores of each edge's chosen and of its rejected item; the instruction's part is zero on edges within one."""
    zero = scores.instruction_N.new_zeros(())
    counts_E = torch.zeros_like(edges.joint_E) if responses_only else edges.joint_E
    chosen, rejected = (
        ItemScores(torch.where(counts_E, scores.instruction_N[end_E], zero), scores.response_N[end_E])
        for end_E in (edges.chosen_E, edges.rejected_E)
    )
    return chosen, rejected


def mean_sides(
    scores: ItemScores, items: Items, edges: Edges, *, responses_only: bool = False
) -> tuple[ItemScores, ItemScores]:
    """`sides` per token: divided by the tokens that are summed over, on joint edges those of the whole sequence."""
    tokens = ItemScores(items.instruction_tokens_N, items.response_tokens_N)
    summed = sides(scores, edges, responses_only=responses_only)
    counts = sides(tokens, edges, responses_only=responses_only)
    chosen, rejected = (
        ItemScores(side.instruction_N / count.whole_N, side.response_N / count.whole_N)
        for side, count in zip(summed, counts, strict=True)
    )
    return chosen, rejected


def both_labels(edges: Edges, chosen: Side, rejected: Side, loss: Callable[[Side, Side], Tensor]) -> Tensor:
    """`loss(winner, loser)` as labelled and the other way round, weighted by the label's probability."""
    probability_E = edges.probability_E
    return probability_E * loss(chosen, rejected) + (1 - probability_E) * loss(rejected, chosen)


def outcome(loss_E: Tensor, chosen: ItemScores, rejected: ItemScores, beta: float) -> Outcome:
    return Outcome(
        loss_E=loss_E,
        chosen_E=beta * chosen.whole_N,
        rejected_E=beta * rejected.whole_N,
        margin_instruction_E=beta * (chosen.instruction_N - rejected.instruction_N),
        margin_response_E=beta * (chosen.response_N - rejected.response_N),
        part_PE=loss_E[None],
    )


def sft(policy: ItemScores, response_tokens: int) -> Tensor:
    """Negative log-likelihood of the responses in nats per token, given the batch's number of response tokens."""
    return -policy.response_N.sum() / response_tokens
