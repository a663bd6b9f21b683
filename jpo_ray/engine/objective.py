"""A configured objective on a batch: the rows it scores, its loss as a function of their scores, what is logged."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from jpo_ray.config_training import TrainConfig
from jpo_ray.engine.dataset import EdgeList, PreferenceData
from jpo_ray.engine.step import Rows
from jpo_ray.objectives import LOSSES, Edges, Items, ItemScores, Outcome, concatenated, mixture

LossOfScores = Callable[[Tensor], Outcome]
NO_LINKS = np.zeros((0, 2), dtype=np.int64)


def batch_rows(data: PreferenceData, edges: EdgeList, config: TrainConfig) -> Rows:
    """Rows to score for these edges, each once: their items, and where the objective needs them the mismatched ones."""
    rows = np.unique(np.concatenate([edges.chosen, edges.rejected]))
    return np.concatenate([rows, rows + data.items]) if "mismatched" in config.reads else rows


def links(data: PreferenceData, edges: EdgeList, rows: Rows, config: TrainConfig) -> Rows | None:
    """Places in `rows` of the items that a term of the loss joins, int64[L, 2]; None: all of them."""
    if config.joins == "batch":
        return None
    if config.joins == "items":
        return NO_LINKS
    if config.joins == "lists":
        group = data.tokens.prompt_groups[rows]
        return np.argwhere(group[:, None] == group)
    return np.stack([np.searchsorted(rows, edges.chosen), np.searchsorted(rows, edges.rejected)], axis=1)


def loss_of_scores(data: PreferenceData, edges: EdgeList, rows: Rows, config: TrainConfig) -> LossOfScores:
    """The objective as a function of the scores float64[len(rows), 2] of `rows`."""
    count = int((rows < data.items).sum())
    own = rows[:count]
    reference = None if data.reference is None else torch.from_numpy(data.reference[rows])
    embeddings = None if data.embeddings is None else torch.from_numpy(data.embeddings[own]).double()
    instruction_tokens, response_tokens, groups = (
        torch.from_numpy(column[own])
        for column in (data.tokens.instruction_tokens, data.tokens.response_tokens, data.tokens.prompt_groups)
    )
    graph = Edges(
        torch.from_numpy(np.searchsorted(own, edges.chosen)),
        torch.from_numpy(np.searchsorted(own, edges.rejected)),
        *(torch.from_numpy(column) for column in (edges.joint, edges.probability, edges.gap)),
    )

    def evaluate(scores: Tensor) -> Outcome:
        device = scores.device
        base = None if reference is None else reference.to(device)
        items = Items(
            _scores(scores[:count]),
            None if base is None else _scores(base[:count]),
            instruction_tokens.to(device),
            response_tokens.to(device),
            groups.to(device),
            embedding_ND=None if embeddings is None else embeddings.to(device),
            mismatched_K=None if base is None else (scores - base)[count:, 1],
        )
        here = Edges(*(part.to(device) for part in graph.__dict__.values()))
        found = [LOSSES[term.objective](items, here, **term.parameters()) for term in config.terms]
        return mixture(found, [term.weight for term in config.terms])

    return evaluate


def outcome_of(
    data: PreferenceData, edges: EdgeList, parts: Sequence[Rows], rows: Rows, scores: Tensor, config: TrainConfig
) -> Outcome:
    """The outcome of all edges, which the loss sees in batches: `parts` are the numbers of each one's edges."""
    found = []
    for part in parts:
        some = edges.take(part)
        mine = batch_rows(data, some, config)
        places = torch.from_numpy(np.searchsorted(rows, mine)).to(scores.device)
        found.append(loss_of_scores(data, some, mine, config)(scores[places]))
    return concatenated(found)


def _scores(table: Tensor) -> ItemScores:
    return ItemScores(table[:, 0], table[:, 1])


def weighted_mean(loss_E: Tensor, edges: EdgeList) -> Tensor:
    weight_E = torch.from_numpy(edges.weight).to(loss_E.device)
    return (loss_E * weight_E).sum() / weight_E.sum()


def preference_metrics(
    outcome: Outcome, scores: Tensor, edges: EdgeList, rows: Rows, config: TrainConfig
) -> dict[str, float]:
    """TRL's names, and under `joint/` what only comparisons across instructions have."""
    margin = outcome.margin_E
    right = (margin > 0).double()
    joint = torch.from_numpy(edges.joint).to(margin.device)
    whole = scores.sum(dim=1)
    chosen, rejected = (torch.from_numpy(np.searchsorted(rows, side)) for side in (edges.chosen, edges.rejected))
    metrics = {
        "loss": float(weighted_mean(outcome.loss_E, edges)),
        "rewards/chosen": float(outcome.chosen_E.mean()),
        "rewards/rejected": float(outcome.rejected_E.mean()),
        "rewards/accuracies": float(right.mean()),
        "rewards/margins": float(margin.mean()),
        "logps/chosen": float(whole[chosen].mean()),
        "logps/rejected": float(whole[rejected].mean()),
        "joint/margin_instruction": float(outcome.margin_instruction_E.mean()),
        "joint/margin_response": float(outcome.margin_response_E.mean()),
    }
    for name, kind in (("joint/accuracy_joint", joint), ("joint/accuracy_conditional", ~joint)):
        if bool(kind.any()):
            metrics[name] = float(right[kind].mean())
    if config.also:
        for term, part_E in zip(config.terms, outcome.part_PE, strict=True):
            metrics[f"loss/{term.objective}"] = float(weighted_mean(part_E, edges))
    return metrics
