"""Activations that are made again instead of being kept."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from engine.tiny import World, config, gradients_of, policy_scorer
from jpo_ray.engine import recompute
from jpo_ray.engine.memory import activation_bytes
from jpo_ray.engine.recompute import Recomputed, install_recomputation


class Gated(nn.Module):
    def __init__(self, act_fn: Any = nn.functional.silu) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return found


class Summed(Gated):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
        return found


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_gradients_are_the_same_to_the_last_bit_in_less_memory(
    use_peft: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama's MLP is twice as wide as the model: of 14 widths a layer keeps, 4 are made again."""
    train = config(use_peft=use_peft, lora_dropout=0.0)
    found = []
    for kept in (False, True):
        if kept:
            monkeypatch.setattr(recompute, "_is_gated", lambda _: False)
        scorer = policy_scorer(world.model, train)
        found.append((gradients_of(scorer, world.data, train), activation_bytes(scorer, world.tokens)))
    (again, again_bytes), (kept_whole, kept_bytes) = found
    assert again[0] == kept_whole[0]
    assert torch.equal(again[1], kept_whole[1])
    assert again_bytes < 0.85 * kept_bytes


@pytest.mark.parametrize("act_fn", [nn.functional.silu, nn.functional.gelu, torch.tanh])
def test_any_activation_function(act_fn: Any) -> None:
    torch.manual_seed(0)
    mlp, recomputed, x = Gated(act_fn), Recomputed(), torch.randn(5, 8)
    mlp(x).square().sum().backward()
    plain = [parameter.grad.clone() for parameter in mlp.parameters() if parameter.grad is not None]
    mlp.zero_grad()
    install_recomputation(mlp, lambda: recomputed)
    recomputed.kept = {}
    with saved_tensors_hooks(recomputed.pack, recomputed.unpack):
        result = mlp(x)
    widths = sorted(recomputed.kept.values())
    assert widths == [5 * 8 * 4, 5 * 16 * 4, 5 * 16 * 4]  # the input, the gate, the other half
    result.square().sum().backward()
    again = [parameter.grad for parameter in mlp.parameters() if parameter.grad is not None]
    assert len(plain) == len(again) == 6
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_what_is_not_gated_keeps_its_own_forward_pass() -> None:
    torch.manual_seed(0)
    mlp, x = Summed(), torch.randn(5, 8)
    before = mlp(x)
    install_recomputation(mlp, Recomputed)
    assert "forward" not in vars(mlp)
    assert torch.equal(mlp(x), before)


def test_a_tensor_that_was_changed_since_is_kept() -> None:
    recomputed, x = Recomputed(), torch.ones(3, requires_grad=True)
    output = recomputed.note(x * 2, lambda: x * 2)
    assert isinstance(recomputed.pack(output), tuple)
    output.add_(1)
    assert recomputed.pack(output) is output
    other = recomputed.note(torch.zeros(3, 4, requires_grad=True) * 2, lambda: torch.zeros(3, 4))
    assert isinstance(recomputed.pack(other.T), Tensor)  # laid out otherwise


def test_notes_go_with_their_tensors() -> None:
    recomputed, x = Recomputed(), torch.ones(3, requires_grad=True)
    output = recomputed.note(x * 2, lambda: x * 2)
    assert len(recomputed._notes) == 1
    del output
    gc.collect()
    assert recomputed._notes == {}
