"""The gradient of one batch: items are scored once each, edges see only their scores.

Workers shard the items, not the edges. Every rank gathers all detached scores, computes the same gradient of the loss
with respect to them, and runs backward through its own items with those weights; parameter gradients are then summed.
So neither the number of workers nor of micro-batches changes the result beyond rounding.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.scoring import Scorer, micro_batches, score_items

Rows = npt.NDArray[np.int64]


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_workers(tensor: Tensor) -> Tensor:
    """In place; every rank must call it."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def my_shard(tokens: TokenizedItems, rows: Rows) -> Rows:
    """Positions within `rows` that this rank scores: longest first, each to the rank with the fewest tokens so far."""
    rank, world = rank_and_world()
    if world == 1:
        return np.arange(len(rows))
    load = np.zeros(world, dtype=np.int64)
    mine = []
    for place in np.argsort(-tokens.lengths[rows], kind="stable"):
        target = int(load.argmin())
        load[target] += tokens.lengths[rows[place]]
        if target == rank:
            mine.append(place)
    return np.array(sorted(mine), dtype=np.int64)


@torch.no_grad()
def score_all(scorer: Scorer, tokens: TokenizedItems, rows: Rows, *, max_tokens: int, step: int = 0) -> Tensor:
    """Scores of all `rows` without gradients, shared among the workers: float64[N, 2] on every rank."""
    table = torch.zeros(len(rows), 2, dtype=torch.float64, device=scorer.device)
    for places in _micro_places(tokens, rows, my_shard(tokens, rows), max_tokens, 1):
        table[places] = score_items(scorer, tokens, rows[places], step)
    return sum_over_workers(table)


def accumulate_gradients(
    scorer: Scorer,
    tokens: TokenizedItems,
    rows: Rows,
    loss: Callable[[Tensor], Tensor],
    *,
    max_tokens: int,
    at_least: int = 1,
    step: int = 0,
) -> Tensor:
    """Add the gradient of `loss(scores)` to the parameters' `.grad`, the same on every rank; returns the scores.

    `rows` int64[N] are distinct; `loss` maps their scores float64[N, 2] (instruction part, response part) to a scalar.
    A shard that fits one micro-batch keeps its graph (one phase). A larger one is scored without gradients first, and
    then again micro-batch by micro-batch with the weights dL/ds (two phases): the same result in bounded memory.
    """
    micro = _micro_places(tokens, rows, my_shard(tokens, rows), max_tokens, at_least)
    one_phase = len(micro) == 1
    table = torch.zeros(len(rows), 2, dtype=torch.float64, device=scorer.device)
    kept: Tensor | None = None
    for places in micro:
        with torch.set_grad_enabled(one_phase):
            kept = score_items(scorer, tokens, rows[places], step)
        table[places] = kept.detach()
    scores = sum_over_workers(table).requires_grad_()
    (weights,) = torch.autograd.grad(loss(scores), scores)
    for places in micro:
        again = kept if one_phase and kept is not None else score_items(scorer, tokens, rows[places], step)
        torch.autograd.backward(again, weights[places])
    _sum_gradients(scorer.model)
    return scores.detach()


def _micro_places(tokens: TokenizedItems, rows: Rows, places: Rows, max_tokens: int, at_least: int) -> list[Rows]:
    """Micro-batches of `rows[places]`, as positions within `rows`."""
    place_of = {int(rows[place]): int(place) for place in places}
    batches = micro_batches(tokens, rows[places], max_tokens, at_least)
    return [np.array([place_of[int(row)] for row in batch], dtype=np.int64) for batch in batches]


def _sum_gradients(model: nn.Module) -> None:
    """Sum `.grad` over the workers, in one message."""
    if rank_and_world()[1] == 1:
        return
    parameters = trainable(model)
    for parameter in parameters:
        if parameter.grad is None:  # this rank had no item
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    dist.all_reduce(flat)
    start = 0
    for parameter in parameters:
        size = parameter.numel()
        parameter.grad = flat[start : start + size].view_as(parameter).to(parameter.dtype)
        start += size


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
