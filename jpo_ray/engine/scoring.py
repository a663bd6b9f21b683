"""Log-probs of items: one forward pass per item, in length-bucketed micro-batches.

Shape suffixes: B items of a micro-batch, L padded length, D width, T scored tokens, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.dropout import DropoutKeys, install, row_keys
from jpo_ray.engine.model import backbone_and_head
from jpo_ray.errors import InputError

# Logits of one chunk stay below this many elements, whatever the vocabulary: 64 MiB in float32.
MAX_CHUNK_LOGITS = 2**24


@dataclass(frozen=True)
class Scorer:
    """A model ready to score items."""

    model: Any
    backbone: Any
    head: Any | None  # None where the logits are more than `head(hidden)`: then the model's own logits are used
    dropout: DropoutKeys
    dropout_seed: int
    device: torch.device
    autocast: torch.dtype | None  # compute dtype of matrix products, where it differs from the weights'


def make_scorer(model: Any, *, dropout_seed: int = 0, autocast: torch.dtype | None = None) -> Scorer:
    """Wrap a model. Its dropout layers are replaced by keyed ones (see `dropout.py`).

    Raises `InputError` for a model that draws dropout masks in another way, which no key could repeat.
    """
    backbone, head = backbone_and_head(model)
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device).unsqueeze(0) % head.weight.shape[0]
    was_training = model.training
    plain = _projects_plainly(model.eval(), backbone, head, ids)
    keys = install(model)
    _refuse_drawn_dropout(model.train(), backbone, keys, ids)
    model.train(was_training)
    return Scorer(model, backbone, head if plain else None, keys, dropout_seed, device, autocast)


@torch.no_grad()
def _refuse_drawn_dropout(model: Any, backbone: Any, keys: DropoutKeys, ids: Tensor) -> None:
    keys.rows_BL = torch.zeros_like(ids, dtype=torch.int32)
    first, again = (backbone(input_ids=ids, use_cache=False).last_hidden_state for _ in range(2))
    if not torch.allclose(first, again, rtol=1e-2, atol=1e-3):
        raise InputError(
            f"model.model_name_or_path: {type(model).__name__} draws dropout in its forward pass, which cannot be "
            "repeated item by item; set its dropout rates to 0 in config.json"
        )


@torch.no_grad()
def _projects_plainly(model: Any, backbone: Any, head: Any, ids: Tensor) -> bool:
    """Whether the model's logits are `head(hidden)`: some models scale or cap them, or scale the hidden states.

    What the head gave is compared with the logits exactly: a cap hardly changes the small logits of these few tokens.
    """
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    logits = model(input_ids=ids, use_cache=False).logits
    hook.remove()
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    if len(seen) != 2 or not torch.equal(seen[1].float(), logits.float()):
        return False
    return torch.allclose(seen[0].float(), hidden.float(), rtol=1e-3, atol=1e-3)


def micro_batches(
    tokens: TokenizedItems, rows: npt.NDArray[np.int64], max_tokens: int, at_least: int = 1
) -> list[npt.NDArray[np.int64]]:
    """Split `rows` into batches of similar length whose padded size stays within `max_tokens`.

    A single item longer than that has a batch of its own. The split depends on the rows alone, not on their order.
    """
    rows = np.sort(rows)
    rows = rows[np.argsort(-tokens.lengths[rows], kind="stable")]  # longest first: memory peaks at once, or not at all
    most_items = max(1, len(rows) // at_least)
    batches, start = [], 0
    while start < len(rows):
        longest = int(tokens.lengths[rows[start]])
        size = min(max(1, max_tokens // longest), most_items)
        batches.append(rows[start : start + size])
        start += size
    return batches


def score_items(
    scorer: Scorer, tokens: TokenizedItems, rows: Sequence[int] | npt.NDArray[Any], step: int = 0
) -> Tensor:
    """Log-probs of the instruction and the response part of items `rows`: float64[B, 2], in nats.

    With gradients where torch's grad mode is on. Sequences are padded on the right, where causal attention never
    looks, so no attention mask is needed. `step` keys the dropout masks.
    """
    rows = np.asarray(rows, dtype=np.int64)
    ids_BL, prompt_B, length_B = _pad(tokens, rows, scorer.device)
    rows_B = torch.from_numpy(rows).to(scorer.device)
    scorer.dropout.rows_BL = row_keys(scorer.dropout_seed, step, rows_B, ids_BL.shape[1])
    position_L = torch.arange(1, ids_BL.shape[1], device=scorer.device)  # of the predicted token
    scored_BL = position_L < length_B.unsqueeze(1)
    targets_T = ids_BL[:, 1:][scored_BL]
    with _autocast(scorer):
        logprob_T = _token_logprobs(scorer, ids_BL, scored_BL, targets_T)
    in_response_BL = position_L >= prompt_B.unsqueeze(1)
    slot_T = (torch.arange(len(rows), device=scorer.device).unsqueeze(1) * 2 + in_response_BL)[scored_BL]
    sums = torch.zeros(len(rows) * 2, dtype=torch.float64, device=scorer.device)
    return sums.index_add(0, slot_T, logprob_T.double()).view(-1, 2)


def _pad(tokens: TokenizedItems, rows: npt.NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    lengths = tokens.lengths[rows]
    padded = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : lengths[place]] = tokens.item(int(row))
    prompts = tokens.prompt_lengths[rows].astype(np.int64)
    ids_BL, prompt_B, length_B = (torch.from_numpy(array).to(device) for array in (padded, prompts, lengths))
    return ids_BL, prompt_B, length_B


def _token_logprobs(scorer: Scorer, ids_BL: Tensor, scored_BL: Tensor, targets_T: Tensor) -> Tensor:
    if scorer.head is None:
        logits = scorer.model(input_ids=ids_BL, use_cache=False).logits[:, :-1][scored_BL]
        return -F.cross_entropy(logits.float(), targets_T, reduction="none")
    hidden_TD = scorer.backbone(input_ids=ids_BL, use_cache=False).last_hidden_state[:, :-1][scored_BL]
    chunk = max(1, MAX_CHUNK_LOGITS // scorer.head.weight.shape[0])
    if len(targets_T) <= chunk:
        return _chunk_logprobs(hidden_TD, targets_T, scorer.head)
    # The logits of a chunk are recomputed in backward, so those of a whole batch never exist at once.
    return torch.cat(
        [
            checkpoint(_chunk_logprobs, hidden, targets, scorer.head, use_reentrant=False)
            for hidden, targets in zip(torch.split(hidden_TD, chunk), torch.split(targets_T, chunk), strict=True)
        ]
    )


def _chunk_logprobs(hidden_TD: Tensor, targets_T: Tensor, head: Any) -> Tensor:
    return -F.cross_entropy(head(hidden_TD).float(), targets_T, reduction="none")


def _autocast(scorer: Scorer) -> AbstractContextManager[Any]:
    return torch.autocast(scorer.device.type, scorer.autocast) if scorer.autocast else nullcontext()
