"""The gradient of one batch: items are scored once each, edges see only their scores.

Workers shard the items, not the edges, and on CPUs each worker's lanes do (`lanes.py`). Every rank gathers all detached
scores, computes the same gradient of the loss with respect to them, and runs backward through its own items with those
weights; parameter gradients are then summed. So neither the number of workers, lanes nor micro-batches changes the
result beyond rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.lanes import lane_count, side_by_side
from jpo_ray.engine.micro_batches import tree_tokens, trees_of
from jpo_ray.engine.scoring import Scorer, score_items
from jpo_ray.engine.sharding import is_sharded, release
from jpo_ray.engine.workers import rank_and_world, sum_over_workers

Rows = npt.NDArray[np.int64]
UNLIMITED = 2**31  # tokens


def shards(tokens: TokenizedItems, rows: Rows, count: int, *, packed: bool) -> list[Rows]:
    """Share `rows` among `count` lanes: longest tree first, each to the lane with the fewest tokens so far."""
    if count == 1:
        return [rows]
    trees = trees_of(tokens, np.sort(rows), share=packed)
    sizes = np.array([tree_tokens(tokens, tree) for tree in trees], dtype=np.int64)
    load = np.zeros(count, dtype=np.int64)
    members: list[list[Rows]] = [[rows[:0]] for _ in range(count)]
    for place in np.argsort(-sizes, kind="stable"):
        target = int(load.argmin())
        load[target] += sizes[place]
        members[target].append(trees[place])
    return [np.concatenate(group) for group in members]


@dataclass(frozen=True)
class Pass:
    """One forward pass of a lane."""

    rows: Rows
    places: Tensor  # int64: of `rows` among all rows of the batch; none where the lane is idle
    tokens: int  # the most that any lane computes in its pass of the same number


def plan(scorer: Scorer, tokens: TokenizedItems, rows: Rows, max_tokens: int, at_least: int = 1) -> list[list[Pass]]:
    """Each lane's micro-batches of `rows`, equally many for all lanes; those of a rank stand together.

    The passes of a rank's lanes that run side by side have at most `max_tokens` tokens between them.

    A lane that has nothing left is idle; where the model is sharded it runs an item all the same, since such a model
    runs on all ranks or none.
    """
    lanes = lane_count(scorer.cores, max_tokens)
    shared = shards(tokens, rows, rank_and_world()[1] * lanes, packed=scorer.packed)
    of_lanes = [scorer.micro_batches(tokens, shard, max_tokens // lanes, at_least) for shard in shared]
    order = np.argsort(rows)
    idle = rows[:1] if is_sharded(scorer.model) else rows[:0]
    planned: list[list[Pass]] = [[] for _ in of_lanes]
    for number in range(max(len(batches) for batches in of_lanes)):
        here = [batches[number] if number < len(batches) else rows[:0] for batches in of_lanes]
        largest = max(int(tokens.lengths[batch].sum()) for batch in here)
        for passes, batch in zip(planned, here, strict=True):
            places = torch.from_numpy(order[np.searchsorted(rows, batch, sorter=order)])
            passes.append(Pass(batch if len(batch) else idle, places, largest))
    return planned


def score_all(
    scorer: Scorer, tokens: TokenizedItems, rows: Rows, *, max_tokens: int, step: int = 0, instruction: bool = True
) -> Tensor:
    """Scores of all `rows` without gradients, shared among the workers: float64[N, 2] on every rank."""
    table = torch.zeros(len(rows), 2, dtype=torch.float64, device=scorer.device)

    @torch.no_grad()
    def run(passes: list[Pass]) -> None:
        for one in passes:
            _score(scorer, tokens, one, table, step, instruction=instruction)

    if len(rows):
        planned = plan(scorer, tokens, rows, max_tokens)
        side_by_side([partial(run, passes) for passes in _own(planned)])
    release(scorer.model)
    return sum_over_workers(table)


def accumulate_gradients(
    scorer: Scorer,
    tokens: TokenizedItems,
    rows: Rows,
    loss: Callable[[Tensor], Tensor],
    *,
    max_tokens: int,
    links: Rows | None = None,
    keep_tokens: int = UNLIMITED,
    at_least: int = 1,
    step: int = 0,
    instruction: bool = True,
) -> Tensor:
    """Add the gradient of `loss(scores)` to the parameters' `.grad`, the same on every rank; returns the scores.

    `rows` int64[N] are distinct; `loss` maps their scores float64[N, 2] (instruction part, response part) to a scalar,
    a sum of terms of which each joins linked items alone: `links` int64[L, 2] are places in `rows` (None: all are
    linked). Where not `instruction`, the first part of the scores is zero.

    A micro-batch runs backward once all that its items are linked to is scored. Until then its graph is kept, up to
    `keep_tokens` tokens in all (one phase). The rest is scored without gradients, and once more when the weights dL/ds
    are known (two phases): the same result, bounded memory, a forward pass more.
    """
    planned = plan(scorer, tokens, rows, max_tokens, at_least)
    due = _due(planned, links, len(rows))
    table = torch.zeros(len(rows), 2, dtype=torch.float64, device=scorer.device)
    own = _own(planned)
    score = partial(_score, scorer, tokens, table=table, step=step, instruction=instruction)
    lanes = [_Lane(scorer, score, passes, alone=len(own) == 1) for passes in own]
    scores, room = table, keep_tokens
    kept: dict[int, int] = {}  # tokens of the passes that wait with their graphs
    for number, one in enumerate(lanes[0].passes):
        waits = due[number] > number
        size = one.tokens * len(lanes)
        keeps = not waits or size <= room
        side_by_side([partial(lane.forward, number, keeps) for lane in lanes])
        if waits and keeps:
            kept[number] = size
            room -= size
        if number not in due:
            continue
        scores = sum_over_workers(table.clone()).requires_grad_()
        (weights,) = torch.autograd.grad(loss(scores), scores)
        if is_sharded(scorer.model):  # whose gradients are averaged over the workers
            weights = weights * rank_and_world()[1]
        ready = [earlier for earlier in range(number + 1) if due[earlier] == number]
        side_by_side([partial(lane.backward, ready, weights) for lane in lanes])
        room += sum(kept.pop(earlier, 0) for earlier in ready)
    for lane in lanes:
        lane.finish()
    if not is_sharded(scorer.model):
        _sum_gradients(scorer.model)
    return scores.detach()


class _Lane:
    """The micro-batches of one lane, and what it keeps between their forward and backward passes."""

    def __init__(self, scorer: Scorer, score: Callable[[Pass], Tensor], passes: list[Pass], *, alone: bool) -> None:
        self.passes = passes
        self._score = score
        self._state = scorer.state
        self._parameters = trainable(scorer.model)
        # Where lanes added to the parameters' own gradients, the order of the sums would be that of chance.
        self._gradients: list[Tensor | None] | None = None if alone else [None] * len(self._parameters)
        self._graphs: dict[int, tuple[Tensor, Any]] = {}

    def forward(self, number: int, keeps: bool) -> None:
        """Enter the scores of a pass into the table; `keeps` its graph for `backward`."""
        with torch.set_grad_enabled(keeps):
            scored = self._score(self.passes[number])
        if keeps:
            self._graphs[number] = (scored, self._state.snapshot())
        self._state.clear()

    def backward(self, ready: list[int], weights: Tensor) -> None:
        """Run passes backward, each item's score weighted by its row of `weights`."""
        for number in ready:
            one = self.passes[number]
            if number in self._graphs:
                scored, snapshot = self._graphs.pop(number)
                self._state.restore(snapshot)  # checkpointed layers run again
            else:
                scored = self._score(one)
            if len(one.rows):
                self._add_gradients(scored, weights[one.places] if len(one.places) else torch.zeros_like(scored))
            self._state.clear()
            del scored  # or it would live on beside the next pass's

    def _add_gradients(self, scored: Tensor, upstream: Tensor) -> None:
        if self._gradients is None:
            torch.autograd.backward(scored, upstream)
            return
        found = torch.autograd.grad(scored, self._parameters, upstream, allow_unused=True)
        for place, gradient in enumerate(found):
            mine = self._gradients[place]
            if gradient is not None:
                self._gradients[place] = gradient.contiguous() if mine is None else mine.add_(gradient)

    def finish(self) -> None:
        """Add this lane's gradients to the parameters'."""
        for parameter, gradient in zip(self._parameters, self._gradients or [], strict=False):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _own(planned: list[list[Pass]]) -> list[list[Pass]]:
    """The lanes of this rank."""
    rank, world = rank_and_world()
    lanes = len(planned) // world
    return planned[rank * lanes : (rank + 1) * lanes]


def _score(scorer: Scorer, tokens: TokenizedItems, one: Pass, table: Tensor, step: int, *, instruction: bool) -> Tensor:
    """Run one pass and enter its scores into the table of all."""
    if not len(one.rows):
        return table[:0]
    scored = score_items(scorer, tokens, one.rows, step, instruction=instruction)
    if len(one.places):
        table[one.places] = scored.detach()
    return scored


def _due(planned: list[list[Pass]], links: Rows | None, count: int) -> list[int]:
    """The number of the pass after which the weights of each pass are known, on every rank."""
    last = len(planned[0]) - 1
    if links is None:
        return [last] * (last + 1)
    pass_of = np.zeros(count, dtype=np.int64)
    for passes in planned:
        for number, one in enumerate(passes):
            pass_of[one.places] = number
    known = pass_of.copy()
    for here, there in (links.T, links.T[::-1]):
        np.maximum.at(known, here, pass_of[there])
    return [
        max(int(known[one.places].max(initial=number)) for one in of_ranks)
        for number, of_ranks in enumerate(zip(*planned, strict=True))
    ]


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
