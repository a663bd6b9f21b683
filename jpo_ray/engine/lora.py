"""LoRA layers on CPUs as few, well-shaped matrix products.

peft computes `W x + s B A x` as three products and a sum, and autograd derives skinny products whose layout is several
times slower than it need be (the gradient of B takes as long as half the frozen layer's). Here:

- Without dropout, in float32, `W + s B A` is formed first, so that the layer is one product forward and one backward.
- With dropout, or in bfloat16 (where the sum would round the update away), the skinny products are added in place.
- Gradients of A and B are products with the rank as the leading dimension.

Only the layer's input is kept for backward. Equal to peft's result up to rounding.

Shape suffixes: T tokens, I inputs, O outputs, R rank.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MERGE_FROM_TOKENS = 64  # below, forming the sum costs more than it saves


def speed_up_lora(model: nn.Module) -> int:
    """Replace the forward pass of the model's plain LoRA layers that are on CPU; returns how many there are.

    Quantised, biased-by-variant (DoRA and others) and embedding layers keep peft's own.
    """
    from peft.tuners.lora import Linear

    layers = [
        module for module in model.modules() if isinstance(module, Linear) and type(module.base_layer) is nn.Linear
    ]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapter = _plain_adapter(layer, x) if not args and not kwargs else None
    if adapter is None:
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    base = layer.base_layer
    a_RI, b_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    x_TI = x.reshape(-1, x.shape[-1])
    dropped_TI = layer.lora_dropout[adapter](x).reshape(x_TI.shape)
    apply: Any = _LoraLinear.apply
    y_TO: Tensor = apply(x_TI, dropped_TI, base.weight, base.bias, a_RI, b_OR, layer.scaling[adapter])
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def _plain_adapter(layer: Any, x: Tensor) -> str | None:
    """The one active adapter, where the layer's forward pass is the plain one."""
    if layer.disable_adapters or layer.merged or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.base_layer.weight
    if len(active) != 1 or active[0] in layer.lora_variant or base.dtype != x.dtype or base.requires_grad:
        return None
    return str(active[0]) if layer.lora_A[active[0]].bias is None and layer.lora_B[active[0]].bias is None else None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        dropped_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        same = dropped_TI is x_TI or dropped_TI.data_ptr() == x_TI.data_ptr()
        merges = same and x_TI.dtype == torch.float32 and len(x_TI) >= MERGE_FROM_TOKENS
        if merges:
            y_TO = _affine(x_TI, torch.addmm(weight_OI, b_OR, a_RI, alpha=scaling), bias_O)
        else:
            y_TO = _affine(x_TI, weight_OI, bias_O)
            inner_TR = dropped_TI @ a_RI.T.to(x_TI.dtype)
            y_TO.addmm_(inner_TR, b_OR.T.to(x_TI.dtype), alpha=scaling)
        ctx.save_for_backward(dropped_TI, weight_OI, a_RI, b_OR)
        ctx.scaling, ctx.merges, ctx.same = scaling, merges, same
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TO: Tensor) -> tuple[Tensor | None, ...]:
        dropped_TI, weight_OI, a_RI, b_OR = ctx.saved_tensors
        dtype, scaling = dropped_TI.dtype, ctx.scaling
        upstream_TO = upstream_TO.contiguous()
        a, b = a_RI.to(dtype), b_OR.T.contiguous().to(dtype)  # b [R, O]: the fast layout of both products with it
        inner_gradient_TR = (upstream_TO @ b.T).mul_(scaling)
        inner_TR = (dropped_TI @ a.T).mul_(scaling)
        a_gradient = (inner_gradient_TR.T @ dropped_TI).to(a_RI.dtype)
        b_gradient = (inner_TR.T @ upstream_TO).T.to(b_OR.dtype)
        x_gradient, dropped_gradient = None, None
        if ctx.needs_input_grad[0]:
            if ctx.merges:
                x_gradient = upstream_TO @ torch.addmm(weight_OI, b_OR, a_RI, alpha=scaling)
            else:
                x_gradient = upstream_TO @ weight_OI
                if ctx.same:
                    x_gradient.addmm_(inner_gradient_TR, a)
                else:
                    dropped_gradient = inner_gradient_TR @ a
        bias_gradient = upstream_TO.sum(0) if ctx.needs_input_grad[3] else None
        return x_gradient, dropped_gradient, None, bias_gradient, a_gradient, b_gradient, None


def _affine(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, x_TI, weight_OI.T)
