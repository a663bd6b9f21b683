"""The engine's own kernels against plain torch and peft: log-probs in chunks, LoRA layers on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.tiny import config, difference, load_model
from jpo_ray.engine import logprobs, lora
from jpo_ray.engine.logprobs import token_logprobs
from jpo_ray.engine.lora import speed_up_lora
from jpo_ray.engine.model import add_lora


def plain(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias)
    return logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 23),
    vocabulary=st.integers(2, 40),
    trained=st.sampled_from(["hidden", "hidden and head", "head"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_token_logprobs_and_their_gradients_are_those_of_log_softmax(
    tokens: int, vocabulary: int, trained: str, with_bias: bool, seed: int
) -> None:
    """In chunks of about five tokens; in float64 beside float32, so that only rounding differs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, 12), (vocabulary, 12), (vocabulary,)]
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator, dtype=torch.float64)
    inputs = {"hidden": [hidden], "hidden and head": [hidden, weight], "head": [weight]}[trained]
    inputs += [bias] if with_bias and trained != "hidden" else []
    for tensor in inputs:
        tensor.requires_grad_()
    expected = plain(hidden, targets, weight, bias if with_bias else None)
    gradients = torch.autograd.grad(expected, inputs, upstream)
    before = logprobs.MAX_CHUNK_LOGITS
    logprobs.MAX_CHUNK_LOGITS = {"cpu": 5 * vocabulary}
    try:
        rounded = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in (hidden, weight, bias)]
        found = token_logprobs(rounded[0], targets, rounded[1], rounded[2] if with_bias else None)
        wanted = [tensor for tensor in rounded if tensor.requires_grad]
        its_gradients = torch.autograd.grad(found, wanted[: len(inputs)], upstream.float())
    finally:
        logprobs.MAX_CHUNK_LOGITS = before
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(its_gradients, gradients, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_the_softmax_is_float32() -> None:
    """The same hidden states and weights in float32: only the products' rounding differs, 0.4 % of a logit."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 64).bfloat16().requires_grad_(), (torch.randn(200, 64) / 8).bfloat16()
    targets = torch.randint(0, 200, (30,))
    found = token_logprobs(hidden, targets, weight)
    expected = plain(hidden.float(), targets, weight.float(), None)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.02
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    (exact,) = torch.autograd.grad(expected.sum(), hidden)
    assert gradient.dtype == torch.bfloat16
    assert difference(gradient.float(), exact.float()) < 0.01


def test_no_gradient_is_prepared_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(20, 8)
    products: list[int] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (products.append(1), mm(*a, **k))[1])
    with torch.no_grad():
        token_logprobs(hidden, torch.arange(9), weight)
    assert not products
    token_logprobs(hidden, torch.arange(9), weight).sum().backward()
    assert products


def lora_model(folder: Path, *, dtype: str = "float32", dropout: float = 0.0, bias: bool = False) -> Any:
    model = load_model(folder, dtype=dtype)
    if bias:
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features != 420:
                module.bias = nn.Parameter(torch.linspace(-1, 1, module.out_features))
    model = add_lora(model, config(lora_dropout=dropout), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def outputs(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    logits = model(input_ids=ids).logits.float()
    (logits * torch.linspace(-1, 1, logits.shape[-1])).mean().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("length", [7, 60], ids=["added", "merged"])
def test_lora_layers_give_what_pefts_give(length: int, bias: bool, llama: Path) -> None:
    model = lora_model(llama, bias=bias)
    ids = torch.randint(3, 420, (2, length), generator=torch.Generator().manual_seed(2))
    assert (ids.numel() >= lora.MERGE_FROM_TOKENS) == (length == 60)
    logits, gradient = outputs(model, ids)
    assert speed_up_lora(model) == 14
    its_logits, its_gradient = outputs(model, ids)
    assert torch.allclose(its_logits, logits, atol=1e-4)
    assert difference(its_gradient, gradient) < 1e-5


def test_lora_layers_with_dropout_give_what_pefts_give(llama: Path) -> None:
    """The same random numbers: both draw one mask per layer, in the same order."""
    model = lora_model(llama, dropout=0.3).train()
    ids = torch.randint(3, 420, (2, 60), generator=torch.Generator().manual_seed(2))
    logits, gradient = outputs(model, ids)
    speed_up_lora(model)
    its_logits, its_gradient = outputs(model, ids)
    assert torch.allclose(its_logits, logits, atol=1e-4)
    assert difference(its_gradient, gradient) < 1e-5
    assert not torch.allclose(outputs(model.eval(), ids)[0], logits, atol=1e-2)


def test_lora_layers_in_bfloat16_are_near_pefts(llama: Path) -> None:
    model = lora_model(llama, dtype="bfloat16")
    ids = torch.randint(3, 420, (2, 60), generator=torch.Generator().manual_seed(2))
    logits, gradient = outputs(model, ids)
    speed_up_lora(model)
    its_logits, its_gradient = outputs(model, ids)
    exact, its_exact = outputs(lora_model(llama), ids)
    assert difference(its_logits, exact) < 1.2 * difference(logits, exact)
    assert difference(its_gradient, its_exact) < 1.5 * difference(gradient, its_exact)


def test_a_disabled_adapter_leaves_the_base_model(llama: Path) -> None:
    model = lora_model(llama)
    speed_up_lora(model)
    ids = torch.randint(3, 420, (2, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=ids).logits
        assert torch.equal(off, load_model(llama, dtype="float32")(input_ids=ids).logits)
        on_again = model(input_ids=ids).logits
    assert torch.equal(on_again, off)
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, off, atol=1e-2)
    model.merge_adapter()
    with torch.no_grad():
        merged = model(input_ids=ids).logits
    model.unmerge_adapter()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, merged, atol=1e-3)
