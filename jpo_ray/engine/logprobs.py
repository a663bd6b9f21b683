"""Log-probs of target tokens from hidden states, without the logits of a whole batch.

The projection to the vocabulary runs in chunks of tokens. A token's gradient has a closed form,
`d log p(y) / d h = W[y] - sum_v p(v) W[v]`, which is computed while the chunk's logits are at hand: nothing of the
vocabulary's size outlives its chunk, and backward is one multiplication by the weight each log-prob has in the loss.

Shape suffixes: T tokens, D width, V vocabulary.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of one chunk stay below this many elements: 16 MiB in float32, which a CPU's last-level cache holds.
MAX_CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26}


def token_logprobs(hidden_TD: Tensor, targets_T: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """`log_softmax(hidden @ weight.T + bias)[targets]`: float32[T], softmax and sums in float32, in nats.

    Gradients flow to `hidden_TD`, `weight_VD` and `bias_V` where they require them. On CUDA, in 16 bits and without a
    bias, the fused kernel of cut-cross-entropy is used where that package is installed.
    """
    fits = hidden_TD.is_cuda and bias_V is None and hidden_TD.dtype in (torch.bfloat16, torch.float16)
    if fits and _has_fused_kernel():
        from cut_cross_entropy import linear_cross_entropy

        fused: Tensor = -linear_cross_entropy(hidden_TD, weight_VD, targets_T, reduction="none").float()
        return fused
    apply: Any = _TokenLogprobs.apply
    logprob_T: Tensor = apply(hidden_TD, targets_T, weight_VD, bias_V, torch.is_grad_enabled())
    return logprob_T


def _has_fused_kernel() -> bool:
    return importlib.util.find_spec("cut_cross_entropy") is not None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, targets_T: Tensor, weight_VD: Tensor, bias_V: Tensor | None, with_gradient: bool
    ) -> Tensor:
        trains_head = with_gradient and any(ctx.needs_input_grad[2:4])
        keeps_gradient = with_gradient and ctx.needs_input_grad[0] and not trains_head
        logprob_T = hidden_TD.new_empty(len(targets_T), dtype=torch.float32)
        gradient_TD = torch.empty_like(hidden_TD) if keeps_gradient else None
        for part in _chunks(hidden_TD, weight_VD):
            logits, log_total = _logits(hidden_TD[part], weight_VD, bias_V)
            logprob_T[part] = logits.gather(1, targets_T[part].unsqueeze(1)).squeeze(1) - log_total
            if gradient_TD is not None:
                probability = logits.sub_(log_total.unsqueeze(1)).exp_().to(weight_VD.dtype)
                torch.mm(probability, weight_VD, out=gradient_TD[part])
        if gradient_TD is not None:
            gradient_TD.neg_().add_(weight_VD[targets_T])
            ctx.save_for_backward(gradient_TD)
        elif trains_head:
            ctx.save_for_backward(hidden_TD, targets_T, weight_VD, bias_V)
        ctx.trains_head = trains_head
        return logprob_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_T: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.trains_head:
            (gradient_TD,) = ctx.saved_tensors
            return (gradient_TD * upstream_T.unsqueeze(1)).to(gradient_TD.dtype), None, None, None, None
        hidden_TD, targets_T, weight_VD, bias_V = ctx.saved_tensors
        hidden_gradient = torch.empty_like(hidden_TD)
        weight_gradient = torch.zeros_like(weight_VD, dtype=torch.float32)
        bias_gradient = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for part in _chunks(hidden_TD, weight_VD):  # the chunk's logits once more: their weights were not known before
            logits, log_total = _logits(hidden_TD[part], weight_VD, bias_V)
            upstream = upstream_T[part].unsqueeze(1)
            slope = logits.sub_(log_total.unsqueeze(1)).exp_().mul_(-upstream)
            slope.scatter_add_(1, targets_T[part].unsqueeze(1), upstream)
            if bias_gradient is not None:
                bias_gradient += slope.sum(0)
            slope = slope.to(weight_VD.dtype)
            torch.mm(slope, weight_VD, out=hidden_gradient[part])
            weight_gradient += slope.T @ hidden_TD[part].to(slope.dtype)
        return (
            hidden_gradient,
            None,
            weight_gradient.to(weight_VD.dtype),
            None if bias_gradient is None or bias_V is None else bias_gradient.to(bias_V.dtype),
            None,
        )


def _chunks(hidden_TD: Tensor, weight_VD: Tensor) -> list[slice]:
    size = max(1, MAX_CHUNK_LOGITS[hidden_TD.device.type] // len(weight_VD))
    return [slice(start, min(start + size, len(hidden_TD))) for start in range(0, len(hidden_TD), size)]


def _logits(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits float32[T, V] and their log-sum-exp float32[T]. A product of bfloat16 is summed in float32 throughout; on
    CUDA it is also kept in float32, on CPU it is rounded to bfloat16 once.
    """
    if hidden_TD.is_cuda and hidden_TD.dtype != torch.float32:
        logits = torch.mm(hidden_TD, weight_VD.T, out_dtype=torch.float32)
    else:
        logits = (hidden_TD @ weight_VD.T).float()
    if bias_V is not None:
        logits += bias_V
    return logits, logits.logsumexp(dim=1)
