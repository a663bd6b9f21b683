"""Log-probs of items: one forward pass each, their instruction part shared among those that have the same.

Shape suffixes: M items of a micro-batch, B rows, L length of a row, D width, T scored tokens.
"""

import types
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.dropout import DropoutKeys, install, token_keys
from jpo_ray.engine.logprobs import token_logprobs
from jpo_ray.engine.lora import speed_up_lora
from jpo_ray.engine.micro_batches import Laid, lay_out, micro_batches, tree_tokens, trees_of
from jpo_ray.engine.model import backbone_and_head
from jpo_ray.engine.probes import (
    UNLIMITED,
    attention_mask,
    hidden_states,
    maskable_length,
    projects_plainly,
    refuse_drawn_dropout,
)


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
    share: bool  # items of one instruction share its forward pass
    packed: bool  # sequences end to end in one row, not padded in a matrix
    longest_row: int  # that may be masked

    def computed_tokens(self, tokens: TokenizedItems, rows: npt.NDArray[np.int64]) -> int:
        """Tokens that go through the model for `rows`, shared instruction parts counted once, padding apart."""
        return sum(tree_tokens(tokens, tree) for tree in trees_of(tokens, rows, share=self.share))

    def micro_batches(
        self, tokens: TokenizedItems, rows: npt.NDArray[np.int64], max_tokens: int, at_least: int = 1
    ) -> list[npt.NDArray[np.int64]]:
        """`rows` in batches for `score_items`, of at most `max_tokens` each."""
        return micro_batches(tokens, rows, max_tokens, at_least, share=self.share, packed=self.packed)


def make_scorer(
    model: Any,
    *,
    dropout_seed: int = 0,
    autocast: torch.dtype | None = None,
    share: bool = True,
    packed: bool | None = None,
) -> Scorer:
    """Wrap a model. Its dropout layers become keyed ones (`dropout.py`), LoRA layers on CPU faster ones (`lora.py`).

    `share` and `packed` (by default on CUDA) are wishes: a model whose attention cannot be masked so that scores stay
    the same goes without. Raises `InputError` for a model that draws dropout masks itself, which no key could repeat.
    """
    backbone, head = backbone_and_head(model)
    vocabulary = int(model.config.get_text_config().vocab_size)
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device).unsqueeze(0) % (vocabulary - 1)
    was_training = model.training
    plain = projects_plainly(model.eval(), backbone, head, ids)
    longest_row = maskable_length(backbone, ids)
    keys = install(model)
    speed_up_lora(model)
    refuse_drawn_dropout(model.train(), backbone, keys, ids)
    model.train(was_training)
    if packed is None:
        packed = device.type == "cuda"
    model.score_laid = types.MethodType(_score_laid, model)
    return Scorer(
        model=model,
        backbone=backbone,
        head=head if plain else None,
        dropout=keys,
        dropout_seed=dropout_seed,
        device=device,
        autocast=autocast,
        share=share and longest_row > 0,
        packed=packed and longest_row == UNLIMITED,
        longest_row=longest_row,
    )


def score_items(
    scorer: Scorer, tokens: TokenizedItems, rows: Sequence[int] | npt.NDArray[Any], step: int = 0
) -> Tensor:
    """Log-probs of the instruction and the response part of items `rows` (distinct): float64[M, 2], in nats.

    With gradients where torch's grad mode is on. `step` keys the dropout masks.
    """
    rows = np.asarray(rows, dtype=np.int64)
    laid = lay_out(tokens, rows, share=scorer.share, packed=scorer.packed)
    if laid.needs_mask and laid.ids_BL.shape[1] > scorer.longest_row:
        laid = lay_out(tokens, rows, share=False, packed=False)
    key_BL, position_BL = _tensor(laid.key_BL, scorer), _tensor(laid.position_BL, scorer)
    scorer.dropout.tokens_BL = token_keys(scorer.dropout_seed, step, key_BL, position_BL)
    logprob_T = scorer.model.score_laid(scorer, laid, position_BL)
    sums_P = torch.zeros(laid.pieces, dtype=torch.float64, device=scorer.device)
    sums_P = sums_P.index_add(0, _tensor(laid.piece_T, scorer), logprob_T.double())
    return torch.stack([sums_P[_tensor(part, scorer)] for part in (laid.instruction_M, laid.response_M)], dim=1)


def _score_laid(model: Any, scorer: Scorer, laid: Laid, position_BL: Tensor) -> Tensor:
    """Log-probs float32[T] of the scored tokens. A method of the model, so that a sharded one gathers its weights."""
    ids_BL, source_T, target_T = (_tensor(part, scorer) for part in (laid.ids_BL, laid.source_T, laid.target_T))
    mask = None
    if laid.needs_mask:
        pieces = (_tensor(part, scorer) for part in (laid.piece_BL, laid.tree_BL, laid.is_instruction_BL))
        mask = attention_mask(scorer.backbone, *pieces)
    with torch.autocast(scorer.device.type, scorer.autocast) if scorer.autocast else nullcontext():
        if scorer.head is None:
            special = {} if mask is None else {"position_ids": position_BL, "attention_mask": mask}
            logits = model(input_ids=ids_BL, use_cache=False, **special).logits.flatten(0, 1)[source_T]
            return -F.cross_entropy(logits.float(), target_T, reduction="none")
        hidden_TD = hidden_states(scorer.backbone, ids_BL, position_BL, mask).flatten(0, 1)[source_T]
    dtype = scorer.autocast or hidden_TD.dtype
    weight_VD, bias_V = scorer.head.weight, scorer.head.bias
    return token_logprobs(
        hidden_TD.to(dtype), target_T, weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    )


def _tensor(array: npt.NDArray[Any], scorer: Scorer) -> Tensor:
    return torch.from_numpy(array).to(scorer.device, non_blocking=True)
