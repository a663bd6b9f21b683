"""The gradient of one batch: items are scored once each, edges see only their scores.

Workers shard the items, not the edges. Every rank gathers all detached scores, computes the same gradient of the loss
with respect to them, and runs backward through its own items with those weights; parameter gradients are then summed.
So neither the number of workers nor of micro-batches changes the result beyond rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.micro_batches import tree_tokens, trees_of
from jpo_ray.engine.scoring import Scorer, score_items
from jpo_ray.engine.sharding import is_sharded, release

Rows = npt.NDArray[np.int64]
UNLIMITED = 2**31  # tokens


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_workers(tensor: Tensor) -> Tensor:
    """In place; every rank must call it."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def shards(tokens: TokenizedItems, rows: Rows, *, packed: bool) -> list[Rows]:
    """The `rows` that each rank scores: longest tree first, each to the rank with the fewest tokens so far."""
    world = rank_and_world()[1]
    if world == 1:
        return [rows]
    trees = trees_of(tokens, np.sort(rows), share=packed)
    sizes = np.array([tree_tokens(tokens, tree) for tree in trees], dtype=np.int64)
    load = np.zeros(world, dtype=np.int64)
    members: list[list[Rows]] = [[rows[:0]] for _ in range(world)]
    for place in np.argsort(-sizes, kind="stable"):
        target = int(load.argmin())
        load[target] += sizes[place]
        members[target].append(trees[place])
    return [np.concatenate(group) for group in members]


@dataclass(frozen=True)
class Pass:
    """One forward pass of this rank. `tokens` is the most that any rank computes in its pass of the same number."""

    rows: Rows
    tokens: int
    idle: bool  # this rank has nothing left, but a sharded model runs on all ranks or none


def passes(scorer: Scorer, tokens: TokenizedItems, rows: Rows, max_tokens: int, at_least: int = 1) -> list[Pass]:
    """This rank's micro-batches of `rows`. Where the model is sharded, every rank has the same number of passes."""
    rank = rank_and_world()[0]
    of_rank = shards(tokens, rows, packed=scorer.packed)
    if not is_sharded(scorer.model):
        mine = scorer.micro_batches(tokens, of_rank[rank], max_tokens, at_least)
        return [Pass(batch, int(tokens.lengths[batch].sum()), idle=False) for batch in mine]
    plans = [scorer.micro_batches(tokens, shard, max_tokens, at_least) for shard in of_rank]
    found = []
    for number in range(max(len(plan) for plan in plans)):
        largest = max(int(tokens.lengths[plan[number]].sum()) for plan in plans if number < len(plan))
        idle = number >= len(plans[rank])
        found.append(Pass(rows[:1] if idle else plans[rank][number], largest, idle))
    return found


@torch.no_grad()
def score_all(
    scorer: Scorer, tokens: TokenizedItems, rows: Rows, *, max_tokens: int, step: int = 0, instruction: bool = True
) -> Tensor:
    """Scores of all `rows` without gradients, shared among the workers: float64[N, 2] on every rank."""
    table = torch.zeros(len(rows), 2, dtype=torch.float64, device=scorer.device)
    for one in passes(scorer, tokens, rows, max_tokens) if len(rows) else []:
        scored = score_items(scorer, tokens, one.rows, step, instruction=instruction)
        if not one.idle:
            table[_places(rows, one.rows)] = scored
    release(scorer.model)
    return sum_over_workers(table)


def accumulate_gradients(
    scorer: Scorer,
    tokens: TokenizedItems,
    rows: Rows,
    loss: Callable[[Tensor], Tensor],
    *,
    max_tokens: int,
    keep_tokens: int = UNLIMITED,
    at_least: int = 1,
    step: int = 0,
    instruction: bool = True,
) -> Tensor:
    """Add the gradient of `loss(scores)` to the parameters' `.grad`, the same on every rank; returns the scores.

    `rows` int64[N] are distinct; `loss` maps their scores float64[N, 2] (instruction part, response part) to a scalar.
    Where not `instruction`, the first is zero.
    The first micro-batches keep their graphs, `keep_tokens` tokens in all (one phase). The rest is scored without
    gradients, and once more when the weights dL/ds are known (two phases): the same result, bounded memory, a forward
    pass more.
    """
    mine = passes(scorer, tokens, rows, max_tokens, at_least)
    table = torch.zeros(len(rows), 2, dtype=torch.float64, device=scorer.device)
    kept: list[tuple[Tensor, Any]] = []
    room = keep_tokens
    for one in mine:
        room -= one.tokens
        with torch.set_grad_enabled(room >= 0):
            scored = score_items(scorer, tokens, one.rows, step, instruction=instruction)
        if room >= 0:
            kept.append((scored, scorer.state.snapshot()))
        if not one.idle:
            table[_places(rows, one.rows)] = scored.detach()
    scores = sum_over_workers(table).requires_grad_()
    (weights,) = torch.autograd.grad(loss(scores), scores)
    if is_sharded(scorer.model):  # whose gradients are averaged over the workers
        weights = weights * rank_and_world()[1]
    for one in mine:
        if kept:
            scored, snapshot = kept.pop(0)
            scorer.state.restore(snapshot)  # checkpointed layers run again
        else:
            scored = score_items(scorer, tokens, one.rows, step, instruction=instruction)
        upstream = torch.zeros_like(scored) if one.idle else weights[_places(rows, one.rows)]
        torch.autograd.backward(scored, upstream)
    scorer.state.clear()
    if not is_sharded(scorer.model):
        _sum_gradients(scorer.model)
    return scores.detach()


def _places(rows: Rows, batch: Rows) -> Tensor:
    """Where in `rows` those of a batch stand."""
    order = np.argsort(rows)
    return torch.from_numpy(order[np.searchsorted(rows, batch, sorter=order)])


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
