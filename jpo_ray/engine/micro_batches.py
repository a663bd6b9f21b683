"""Which items go through the model together, and how their tokens are laid out for one forward pass.

The unit is a **tree**: one instruction part and one or more responses to it. Where a model takes packed rows, trees
stand end to end in one row without padding, and the instruction part is computed once for all its responses; each
response's positions go on from the instruction's end, and attention (`attention.py`) sees each item alone. For other
models every tree is one item, a row of a matrix padded on the right, where causal attention never looks.

Shape suffixes: M items, B rows, L length of a row, T tokens of a packed row, S scored tokens, P pieces (instruction
parts and responses), N cells of attention.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jpo_ray.data.tokens import TokenizedItems

Ints = npt.NDArray[np.int64]
NO_LIMIT = 2**62
PASS_COST = 40  # what a micro-batch costs beside its tokens, in tokens of the same time
PLANNED_AT_ONCE = 128  # trees among which the best cuts are searched
BUCKET_FILL = 0.75  # attention pads items to one another down to this share of the longest


def trees_of(
    tokens: TokenizedItems, rows: Ints, *, share: bool, max_tokens: int = NO_LIMIT, max_items: int = NO_LIMIT
) -> list[Ints]:
    """Group `rows` by instruction part where `share`, within limits per tree; one item each otherwise."""
    if not share:
        return list(rows[:, None])
    of_prompt: dict[int, list[list[int]]] = {}
    room: dict[int, int] = {}  # of each prompt's last tree, in tokens
    for row, prompt in zip(rows.tolist(), tokens.prompt_groups[rows].tolist(), strict=True):
        trees = of_prompt.setdefault(prompt, [])
        response = int(tokens.response_tokens[row])
        if not trees or len(trees[-1]) == max_items or room[prompt] < response:
            trees.append([])
            room[prompt] = max_tokens - int(tokens.prompt_lengths[row])
        trees[-1].append(row)
        room[prompt] -= response
    return [np.array(tree, dtype=np.int64) for trees in of_prompt.values() for tree in trees]


def tree_tokens(tokens: TokenizedItems, tree: Ints) -> int:
    return int(tokens.prompt_lengths[tree[0]] + tokens.response_tokens[tree].sum())


def micro_batches(
    tokens: TokenizedItems, rows: Ints, max_tokens: int, at_least: int = 1, *, packed: bool = False
) -> list[Ints]:
    """Split `rows` into batches that take at most `max_tokens`, padding included where they are not `packed`.

    A single item longer than that has a batch of its own; responses to one instruction that together are longer repeat
    it. The split depends on the rows alone, not on their order.
    """
    most = max(1, len(rows) // at_least)
    trees = trees_of(tokens, np.sort(rows), share=packed, max_tokens=max_tokens, max_items=most)
    sizes = np.array([tree_tokens(tokens, tree) for tree in trees], dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")  # longest first: memory peaks at once, or not at all
    counts = [len(tree) for tree in trees]
    parts = _filled(order, sizes, counts, max_tokens, most) if packed else _cuts(order, sizes, max_tokens, most)
    return [np.concatenate([trees[place] for place in part]) for part in parts]


def _filled(order: Ints, sizes: Ints, counts: list[int], max_tokens: int, most: int) -> list[list[int]]:
    """Cut places in descending size into full batches; neighbours are alike, which attention pads to one another."""
    parts: list[list[int]] = []
    room, items = 0, 0
    for place in order.tolist():
        if not parts or items + counts[place] > most or room < sizes[place]:
            parts.append([])
            room, items = max_tokens, 0
        parts[-1].append(place)
        room -= int(sizes[place])
        items += counts[place]
    return parts


def _cuts(order: Ints, sizes: Ints, max_tokens: int, most: int) -> list[list[int]]:
    """Cut places in descending size into batches with the least padding, a batch costing `PASS_COST` tokens more."""
    parts: list[list[int]] = []
    for chunk in (order[at : at + PLANNED_AT_ONCE] for at in range(0, len(order), PLANNED_AT_ONCE)):
        longest = sizes[chunk].tolist()
        best, cut = [0] + [2**62] * len(chunk), [0] * (len(chunk) + 1)  # cost of the first so many, and the last cut
        for end in range(1, len(chunk) + 1):
            for start in range(max(0, end - most), end):
                padded = longest[start] * (end - start)
                cost = best[start] + padded + PASS_COST
                if (padded <= max_tokens or end - start == 1) and cost < best[end]:
                    best[end], cut[end] = cost, start
        found: list[list[int]] = []
        end = len(chunk)
        while end:
            found.append(chunk[cut[end] : end].tolist())
            end = cut[end]
        parts += reversed(found)
    return parts


@dataclass(frozen=True)
class Laid:
    """The tokens of M items for one forward pass.

    `key_BL` names the piece each token belongs to, the same in the whole data set. `source_S` are flat indices of the
    tokens that predict the scored ones `target_S`, which add to the piece `piece_S`. Item m's parts are the pieces
    `instruction_M[m]` and `response_M[m]`. Of a packed row, attention's cells: `token_N` is the token of each, `cell_T`
    the cell of each token, `buckets` are (items, length), and `each_once` says that no token is in two items.
    """

    ids_BL: Ints
    position_BL: Ints
    key_BL: Ints
    source_S: Ints
    target_S: Ints
    piece_S: Ints
    instruction_M: Ints
    response_M: Ints
    pieces: int
    token_N: Ints
    cell_T: Ints
    buckets: list[tuple[int, int]]
    each_once: bool


def lay_out(tokens: TokenizedItems, rows: Ints, *, packed: bool, instruction: bool = True) -> Laid:
    """Lay out `rows`, in the order in which their scores are wanted; of responses only, where not `instruction`."""
    trees = trees_of(tokens, rows, share=packed)
    sizes = [tree_tokens(tokens, tree) for tree in trees]
    shape = (1, sum(sizes)) if packed else (len(trees), max(sizes))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) if packed else np.arange(len(trees)) * shape[1]
    ids, position, key = (np.zeros(shape[0] * shape[1], dtype=np.int64) for _ in range(3))
    place_of = {int(row): place for place, row in enumerate(rows)}
    instruction_M, response_M = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    sources: list[Ints] = []
    targets: list[Ints] = []
    pieces_of: list[Ints] = []
    items: list[tuple[Ints, int]] = []  # the tokens of each item in the row, and how many of them another one put back

    def add(part: Ints, at: int, first_position: int, predicted_by: Ints, name: int) -> int:
        """One piece at flat index `at`, whose last tokens are predicted by the tokens `predicted_by`."""
        span = slice(at, at + len(part))
        ids[span], key[span] = part, name
        position[span] = np.arange(first_position, first_position + len(part))
        sources.append(predicted_by)
        targets.append(part[len(part) - len(predicted_by) :])
        pieces_of.append(np.full(len(predicted_by), len(pieces_of), dtype=np.int64))
        return len(pieces_of) - 1

    for tree, start in zip(trees, starts.tolist(), strict=True):
        prompt_length = int(tokens.prompt_lengths[tree[0]])
        prompt = tokens.item(int(tree[0]))[:prompt_length].astype(np.int64)
        shared = np.arange(start, start + prompt_length, dtype=np.int64)
        predicting = shared[:-1] if instruction else shared[:0]  # nothing predicts the first token
        first = add(prompt, start, 0, predicting, -1 - int(tokens.prompt_groups[tree[0]]))
        at = start + prompt_length
        for row in tree.tolist():
            response = tokens.item(row)[prompt_length:].astype(np.int64)
            own = np.arange(at, at + len(response), dtype=np.int64)
            instruction_M[place_of[row]] = first
            response_M[place_of[row]] = add(response, at, prompt_length, np.r_[shared[-1], own[:-1]], row)
            items.append((np.concatenate([shared, own]), 0 if row == tree[0] else prompt_length))
            at += len(response)
    token_N, cell_T, buckets = _cells(items, shape[1]) if packed else (ids[:0], ids[:0], [])
    return Laid(
        ids_BL=ids.reshape(shape),
        position_BL=position.reshape(shape),
        key_BL=key.reshape(shape),
        source_S=np.concatenate(sources),
        target_S=np.concatenate(targets),
        piece_S=np.concatenate(pieces_of),
        instruction_M=instruction_M,
        response_M=response_M,
        pieces=len(pieces_of),
        token_N=token_N,
        cell_T=cell_T,
        buckets=buckets,
        each_once=len(trees) == len(rows),
    )


def _cells(items: list[tuple[Ints, int]], tokens: int) -> tuple[Ints, Ints, list[tuple[int, int]]]:
    """Spread items over buckets of similar length: the token of each cell, the cell of each token, and the buckets."""
    items = sorted(items, key=lambda item: -len(item[0]))
    buckets: list[tuple[int, int]] = []
    token_N: list[Ints] = []
    cell_T = np.zeros(tokens, dtype=np.int64)
    at = 0
    for members, skipped in items:
        if not buckets or len(members) < BUCKET_FILL * buckets[-1][1]:
            buckets.append((0, len(members)))
        count, length = buckets[-1]
        buckets[-1] = (count + 1, length)
        token_N.append(np.concatenate([members, np.full(length - len(members), members[-1])]))
        cell_T[members[skipped:]] = np.arange(at + skipped, at + len(members))
        at += length
    return np.concatenate(token_N), cell_T, buckets
