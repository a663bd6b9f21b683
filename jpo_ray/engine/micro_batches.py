"""Which items go through the model together, and how their tokens are laid out for one forward pass.

The unit is a **tree**: one instruction part and one or more responses to it, side by side. A response attends to the
instruction part and to itself, and its positions go on from the instruction's end, so each item is scored as if it
were alone, and the instruction part is computed once. Without sharing, every tree is one item.

Trees are rows of a matrix, padded on the right (`padded`), or laid end to end in one row (`packed`). Only shared and
packed trees need an attention mask: padding on the right is never attended to.

Shape suffixes: M items, B rows, L length of a row, T scored tokens, P pieces (instruction parts and responses).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jpo_ray.data.tokens import TokenizedItems

Ints = npt.NDArray[np.int64]
MAX_SHARED_TOKENS = 4096  # of a tree of several responses: attention is quadratic in it


def trees_of(tokens: TokenizedItems, rows: Ints, *, share: bool, longest: int = MAX_SHARED_TOKENS) -> list[Ints]:
    """Group `rows` by instruction part where `share`, up to `longest` tokens per tree; one item each otherwise."""
    if not share:
        return list(rows[:, None])
    of_prompt: dict[int, list[list[int]]] = {}
    size: dict[int, int] = {}  # of the prompt's last tree
    for row in rows.tolist():
        prompt = int(tokens.prompt_groups[row])
        trees = of_prompt.setdefault(prompt, [])
        if trees and size[prompt] + int(tokens.response_tokens[row]) <= longest:
            trees[-1].append(row)
            size[prompt] += int(tokens.response_tokens[row])
        else:
            trees.append([row])
            size[prompt] = int(tokens.lengths[row])
    return [np.array(tree, dtype=np.int64) for trees in of_prompt.values() for tree in trees]


def tree_tokens(tokens: TokenizedItems, tree: Ints) -> int:
    return int(tokens.prompt_lengths[tree[0]] + tokens.response_tokens[tree].sum())


def micro_batches(
    tokens: TokenizedItems, rows: Ints, max_tokens: int, at_least: int = 1, *, share: bool = False, packed: bool = False
) -> list[Ints]:
    """Split `rows` into batches of trees of similar length that take at most `max_tokens`, padding included.

    A single tree longer than that has a batch of its own. The split depends on the rows alone, not on their order.
    """
    trees = trees_of(tokens, np.sort(rows), share=share)
    sizes = np.array([tree_tokens(tokens, tree) for tree in trees], dtype=np.int64)
    most = max(1, len(trees) // at_least)
    batches: list[list[Ints]] = []
    room = 0
    for place in np.argsort(-sizes, kind="stable"):  # longest first: memory peaks at once, or not at all
        if not batches or len(batches[-1]) == most or room < sizes[place]:
            batches.append([])
            longest = int(sizes[place])
            room = max_tokens if packed else max(1, max_tokens // longest) * longest
        batches[-1].append(trees[place])
        room -= int(sizes[place]) if packed else longest
    return [np.concatenate(batch) for batch in batches]


@dataclass(frozen=True)
class Laid:
    """The tokens of M items for one forward pass.

    `piece_BL` numbers the piece each token belongs to (-1 for padding) and `tree_BL` its tree; `key_BL` names the piece
    for the whole data set. `source_T` are flat indices of the tokens that predict the scored ones `target_T`, which add
    to the piece `piece_T`. Item m's parts are the pieces `instruction_M[m]` and `response_M[m]`.
    """

    ids_BL: Ints
    position_BL: Ints
    piece_BL: Ints
    tree_BL: Ints
    key_BL: Ints
    is_instruction_BL: npt.NDArray[np.bool_]
    source_T: Ints
    target_T: Ints
    piece_T: Ints
    instruction_M: Ints
    response_M: Ints
    pieces: int
    needs_mask: bool


def lay_out(tokens: TokenizedItems, rows: Ints, *, share: bool, packed: bool) -> Laid:
    """Lay out `rows`, in the order in which their scores are wanted."""
    trees = trees_of(tokens, rows, share=share)
    sizes = [tree_tokens(tokens, tree) for tree in trees]
    shape = (1, sum(sizes)) if packed else (len(trees), max(sizes))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) if packed else np.arange(len(trees)) * shape[1]
    ids, position, key = (np.zeros(shape[0] * shape[1], dtype=np.int64) for _ in range(3))
    piece = np.full(shape[0] * shape[1], -1, dtype=np.int64)
    tree_of = np.repeat(np.arange(shape[0], dtype=np.int64), shape[1])  # padding belongs to its row's tree
    is_instruction = np.zeros(shape[0] * shape[1], dtype=np.bool_)
    place_of = {int(row): place for place, row in enumerate(rows)}
    instruction_M, response_M = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    sources: list[Ints] = []
    targets: list[Ints] = []
    piece_of_target: list[Ints] = []
    pieces = 0

    def add(part: Ints, at: int, first_position: int, predicted_by: int | None, name: int) -> None:
        """One piece at flat index `at`; its first token is predicted by the token `predicted_by` (None: by none)."""
        nonlocal pieces
        span = slice(at, at + len(part))
        ids[span], piece[span], key[span] = part, pieces, name
        position[span] = np.arange(first_position, first_position + len(part))
        inside = np.arange(at, at + len(part) - 1, dtype=np.int64)
        sources.append(inside if predicted_by is None else np.concatenate([[predicted_by], inside]))
        targets.append(part[len(part) - len(sources[-1]) :])
        piece_of_target.append(np.full(len(sources[-1]), pieces, dtype=np.int64))
        pieces += 1

    for number, (tree, start) in enumerate(zip(trees, starts.tolist(), strict=True)):
        prompt_length = int(tokens.prompt_lengths[tree[0]])
        tree_of[start : start + sizes[number]] = number
        is_instruction[start : start + prompt_length] = True
        instruction = pieces
        prompt = tokens.item(int(tree[0]))[:prompt_length].astype(np.int64)
        add(prompt, start, 0, None, -1 - int(tokens.prompt_groups[tree[0]]))
        at = start + prompt_length
        for row in tree.tolist():
            instruction_M[place_of[row]], response_M[place_of[row]] = instruction, pieces
            response = tokens.item(row)[prompt_length:].astype(np.int64)
            add(response, at, prompt_length, start + prompt_length - 1, row)
            at += len(response)
    return Laid(
        ids_BL=ids.reshape(shape),
        position_BL=position.reshape(shape),
        piece_BL=piece.reshape(shape),
        tree_BL=tree_of.reshape(shape),
        key_BL=key.reshape(shape),
        is_instruction_BL=is_instruction.reshape(shape),
        source_T=np.concatenate(sources),
        target_T=np.concatenate(targets),
        piece_T=np.concatenate(piece_of_target),
        instruction_M=instruction_M,
        response_M=response_M,
        pieces=pieces,
        needs_mask=packed or any(len(tree) > 1 for tree in trees),
    )
