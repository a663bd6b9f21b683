"""Log-probs of items: one forward pass each, their instruction part shared among those that have the same.

Shape suffixes: M items of a micro-batch, B rows, L length of a row, D width, S scored tokens.
"""

import types
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.attention import Cells, install_attention
from jpo_ray.engine.dropout import install_dropout, token_keys
from jpo_ray.engine.logprobs import token_logprobs
from jpo_ray.engine.lora import speed_up_lora
from jpo_ray.engine.micro_batches import Laid, lay_out, micro_batches, tree_tokens, trees_of
from jpo_ray.engine.model import backbone_and_head
from jpo_ray.engine.passing import PassState
from jpo_ray.engine.probes import projects_plainly, refuse_drawn_dropout
from jpo_ray.engine.recompute import install_recomputation

LAYER_KINDS = {"full_attention", "sliding_attention"}  # that mix tokens by attention alone


@dataclass(frozen=True)
class Scorer:
    """A model ready to score items."""

    model: Any
    backbone: Any
    head: Any | None  # None where the logits are more than `head(hidden)`: then the model's own logits are used
    state: PassState
    dropout_seed: int
    device: torch.device
    autocast: torch.dtype | None  # compute dtype of matrix products, where it differs from the weights'
    cores: int  # for micro-batches that run side by side; 1 where they run one after another
    packed: bool  # rows without padding, instruction parts shared; else one padded row per item

    def computed_tokens(self, tokens: TokenizedItems, rows: npt.NDArray[np.int64]) -> int:
        """Tokens that go through the model for `rows`, shared instruction parts counted once, padding apart."""
        return sum(tree_tokens(tokens, tree) for tree in trees_of(tokens, rows, share=self.packed))

    def micro_batches(
        self, tokens: TokenizedItems, rows: npt.NDArray[np.int64], max_tokens: int, at_least: int = 1
    ) -> list[npt.NDArray[np.int64]]:
        """`rows` in batches for `score_items`, of at most `max_tokens` each."""
        return micro_batches(tokens, rows, max_tokens, at_least, packed=self.packed)


def make_scorer(
    model: Any, *, dropout_seed: int = 0, autocast: torch.dtype | None = None, packed: bool = True
) -> Scorer:
    """Wrap a model. Its dropout layers become keyed ones (`dropout.py`), LoRA layers on CPU faster ones (`lora.py`).

    `packed` is a wish: a model that does not score packed items as it scores them alone goes without. Raises
    `InputError` for a model that draws dropout masks itself, which no key could repeat.
    """
    backbone, head = backbone_and_head(model)
    vocabulary = int(model.config.get_text_config().vocab_size)
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device).unsqueeze(0) % (vocabulary - 1)
    was_training = model.training
    plain = projects_plainly(model.eval(), backbone, head, ids)
    state: PassState = getattr(backbone, "pass_state", PassState())  # the scorers of one model share it
    install_recomputation(model, lambda: state.recomputed)
    install_dropout(model, state)
    speed_up_lora(model)
    refuse_drawn_dropout(model.train(), backbone, state, ids)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes_cells = install_attention(causal, state)
    model.score_laid = types.MethodType(_score_laid, model)
    padded = Scorer(
        model=model.eval(),
        backbone=backbone,
        head=head if plain else None,
        state=state,
        dropout_seed=dropout_seed,
        device=device,
        autocast=autocast,
        cores=torch.get_num_threads() if device.type == "cpu" and not _swaps_weights(model) else 1,
        packed=False,
    )
    found = replace(padded, packed=True) if packed and takes_cells and _packs(padded, ids[0]) else padded
    model.train(was_training)
    return found


def _swaps_weights(model: Any) -> bool:
    """Whether a pass puts other weights into modules that all passes share, as peft's LoRA on stacked experts does."""
    from peft.tuners.lora import ParamWrapper

    return any(isinstance(module, ParamWrapper) for module in model.modules())


@torch.no_grad()
def _packs(scorer: Scorer, ids: Tensor) -> bool:
    """Whether three items in a packed row, two of them of one instruction, score as they do in padded rows.

    Not so for models that ignore positions, or mix tokens otherwise than by attention.
    """
    config = scorer.model.config.get_text_config()
    if not set(getattr(config, "layer_types", None) or []) <= LAYER_KINDS:
        return False
    first = ids.cpu().numpy().astype(np.int32)
    items = [first, np.concatenate([first[:5], first[5:][::-1], first[:2]]), first[::-1]]
    tokens = TokenizedItems(
        ids=np.concatenate(items),
        offsets=np.cumsum([0, *(len(item) for item in items)]),
        prompt_lengths=np.array([5, 5, 3], dtype=np.int32),
        truncated=0,
    )
    try:
        together, alone = (score_items(replace(scorer, packed=packed), tokens, range(3)) for packed in (True, False))
    except (TypeError, ValueError, RuntimeError):  # takes no positions
        return False
    exact = scorer.autocast is None and scorer.model.dtype == torch.float32
    return torch.allclose(together, alone, rtol=0, atol=1e-3 if exact else 0.3)


def score_items(
    scorer: Scorer,
    tokens: TokenizedItems,
    rows: Sequence[int] | npt.NDArray[Any],
    step: int = 0,
    *,
    instruction: bool = True,
) -> Tensor:
    """Log-probs of the instruction and the response part of items `rows` (distinct): float64[M, 2], in nats.

    Where not `instruction`, its tokens are not scored and its part is zero. `step` keys the dropout masks. With
    gradients where torch's grad mode is on: then `scorer.state` stays set for layers that run again in backward, and
    whoever uses the model otherwise clears it first.
    """
    laid = lay_out(tokens, np.asarray(rows, dtype=np.int64), packed=scorer.packed, instruction=instruction)
    position_BL = _begin_pass(scorer, laid, step)
    recomputed = scorer.state.recomputed
    with saved_tensors_hooks(recomputed.pack, recomputed.unpack):
        logprob_S = scorer.model.score_laid(scorer, laid, position_BL)
    sums_P = torch.zeros(laid.pieces, dtype=torch.float64, device=scorer.device)
    sums_P = sums_P.index_add(0, _tensor(laid.piece_S, scorer), logprob_S.double())
    if not torch.is_grad_enabled():  # else layers may run again in backward
        scorer.state.clear()
    return torch.stack([sums_P[_tensor(part, scorer)] for part in (laid.instruction_M, laid.response_M)], dim=1)


@torch.no_grad()
def response_embeddings(scorer: Scorer, tokens: TokenizedItems, rows: Sequence[int] | npt.NDArray[Any]) -> Tensor:
    """Last hidden states that predict the response tokens of items `rows` (distinct), their mean: float32[M, D]."""
    laid = lay_out(tokens, np.asarray(rows, dtype=np.int64), packed=scorer.packed, instruction=False)
    position_BL = _begin_pass(scorer, laid, step=0)
    hidden_SD = _hidden_states(scorer, laid, position_BL).float()
    scorer.state.clear()
    piece_S = _tensor(laid.piece_S, scorer)
    sums_PD = torch.zeros(laid.pieces, hidden_SD.shape[1], device=scorer.device).index_add(0, piece_S, hidden_SD)
    tokens_P = torch.bincount(piece_S, minlength=laid.pieces).clamp(min=1)
    return (sums_PD / tokens_P[:, None])[_tensor(laid.response_M, scorer)]


def _begin_pass(scorer: Scorer, laid: Laid, step: int) -> Tensor:
    """Tell the layers what the tokens of the coming pass are; returns their positions."""
    key_BL, position_BL = _tensor(laid.key_BL, scorer), _tensor(laid.position_BL, scorer)
    scorer.state.tokens_BL = token_keys(scorer.dropout_seed, step, key_BL, position_BL)
    scorer.state.cells = None
    if scorer.packed:
        token_N, cell_T = _tensor(laid.token_N, scorer), _tensor(laid.cell_T, scorer)
        scorer.state.cells = Cells(token_N, cell_T, laid.buckets, laid.each_once)
    return position_BL


def _score_laid(model: Any, scorer: Scorer, laid: Laid, position_BL: Tensor) -> Tensor:
    """Log-probs float32[S] of the scored tokens. A method of the model, so that a sharded one gathers its weights."""
    target_S = _tensor(laid.target_S, scorer)
    with torch.autocast(scorer.device.type, scorer.autocast) if scorer.autocast else nullcontext():
        if scorer.head is None:
            logits = model(**_inputs(scorer, laid, position_BL)).logits.flatten(0, 1)[_tensor(laid.source_S, scorer)]
            return -F.cross_entropy(logits.float(), target_S, reduction="none")
    hidden_SD = _hidden_states(scorer, laid, position_BL)
    dtype = scorer.autocast or hidden_SD.dtype
    weight_VD, bias_V = scorer.head.weight, scorer.head.bias
    return token_logprobs(
        hidden_SD.to(dtype), target_S, weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    )


def _hidden_states(scorer: Scorer, laid: Laid, position_BL: Tensor) -> Tensor:
    """Last hidden states [S, D] from which the scored tokens are predicted."""
    with torch.autocast(scorer.device.type, scorer.autocast) if scorer.autocast else nullcontext():
        hidden_BLD = scorer.backbone(**_inputs(scorer, laid, position_BL)).last_hidden_state
    hidden_SD: Tensor = hidden_BLD.flatten(0, 1)[_tensor(laid.source_S, scorer)]
    return hidden_SD


def _inputs(scorer: Scorer, laid: Laid, position_BL: Tensor) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": _tensor(laid.ids_BL, scorer), "use_cache": False}
    if scorer.packed:  # a mask of the right rank, which attention by items ignores, lest one is made from the positions
        inputs |= {"position_ids": position_BL, "attention_mask": torch.zeros(1, 1, 1, 1, device=scorer.device)}
    return inputs


def _tensor(array: npt.NDArray[Any], scorer: Scorer) -> Tensor:
    return torch.from_numpy(array).to(scorer.device, non_blocking=True)
