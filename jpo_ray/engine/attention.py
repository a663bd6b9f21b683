"""Attention over a packed row: linear layers see the row without padding, attention sees each item by itself.

The queries, keys and values of each item are gathered from the row, items of similar length are padded to one
another, and plain causal attention runs on them; what it says of each token is put back in its place. Items that share
an instruction part gather it each, so no mask is needed, and a sliding window acts as it does on an item alone.

Shape suffixes: T tokens of the row, N cells (an item's tokens, padded to its bucket's length), H heads, D head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from jpo_ray.engine.passing import PassState

NAME = "jpo_items"


@dataclass(frozen=True)
class Cells:
    """How the tokens of a row are spread over its items."""

    token_N: Tensor  # int64: the token of each cell; padding repeats one
    cell_T: Tensor  # int64: the cell in which each token's result stands
    buckets: list[tuple[int, int]]  # (items, length) of each bucket, in the order of the cells
    each_once: bool  # no token is in two items


def install_attention(model: Any, state: PassState) -> bool:
    """Make a model with torch's `sdpa` attention take packed rows; False where it has another kind.

    Without `state.cells` the attention is `sdpa` as before.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for module in model.modules():
        module.pass_state = state
    if model.config._attn_implementation not in ("sdpa", NAME):
        return False
    AttentionInterface.register(NAME, _item_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def _item_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, T, D] in, [1, T, H, D] out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    cells: Cells | None = getattr(module, "pass_state", PassState()).cells
    if cells is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **options
        )
        return plain
    sizes = [items * length for items, length in cells.buckets]
    gathered = [torch.split(_gather(x, cells), sizes) for x in (query, key, value)]
    found = []
    for (items, length), *parts in zip(cells.buckets, *gathered, strict=True):
        q, k, v = (part.view(items, length, *part.shape[1:]).transpose(1, 2) for part in parts)
        window = _window(length, sliding_window, query.device)
        out, _ = sdpa_attention_forward(module, q, k, v, window, **options)
        found.append(out.flatten(0, 1))
    put_back: Any = _PutBack.apply
    result: Tensor = put_back(torch.cat(found), cells.cell_T)
    return result.unsqueeze(0), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    if sliding_window is None or length <= sliding_window:
        return None
    place = torch.arange(length, device=device)
    distance = place.unsqueeze(1) - place
    return ((distance >= 0) & (distance < sliding_window))[None, None]


def _gather(x: Tensor, cells: Cells) -> Tensor:
    gather: Any = _Gather.apply
    gathered: Tensor = gather(x[0].transpose(0, 1), cells)
    return gathered


class _Gather(torch.autograd.Function):
    """[T, H, D] -> [N, H, D]. The gradient of padding is zero, so where each token is in one item, its gradient is that
    of its cell, and a second gathering takes the place of a sum.
    """

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cells: Cells) -> Tensor:
        ctx.cells = cells
        return x_THD.index_select(0, cells.token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_NHD: Tensor) -> tuple[Tensor, None]:
        cells = ctx.cells
        if cells.each_once:
            return upstream_NHD.index_select(0, cells.cell_T), None
        zeros = upstream_NHD.new_zeros(len(cells.cell_T), *upstream_NHD.shape[1:])
        return zeros.index_add_(0, cells.token_N, upstream_NHD), None


class _PutBack(torch.autograd.Function):
    """[N, H, D] -> [T, H, D]; what was computed for padding is left out."""

    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, cell_T: Tensor) -> Tensor:
        ctx.cell_T, ctx.cells = cell_T, len(x_NHD)
        return x_NHD.index_select(0, cell_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_THD: Tensor) -> tuple[Tensor, None]:
        zeros = upstream_THD.new_zeros(ctx.cells, *upstream_THD.shape[1:])
        return zeros.index_copy_(0, ctx.cell_T, upstream_THD), None
