"""Dropout whose masks are keyed by (seed, step, item, position, layer) instead of drawn from a running generator.

Tokens of an instruction part are keyed by the instruction, which its items share. An item then meets the same mask in
whatever micro-batch, phase or worker it is scored, so splitting a batch changes nothing. The mask is a hash of its
coordinates: no generator has a state, and backward through a recomputed forward agrees.
"""

import torch
from torch import Tensor, nn

from jpo_ray.engine.passing import PassState


class KeyedDropout(nn.Module):
    """Zeroes each element with probability `p`, by a hash of its token's key, its feature and the layer's `salt`."""

    def __init__(self, p: float, salt: int, state: PassState) -> None:
        super().__init__()
        self.p = p
        self.salt = salt
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        """x: float[B, L, D] or float[B * L, D]."""
        if not self.training or self.p == 0:
            return x
        keys = self.state.tokens_BL
        if keys is None or keys.numel() * x.shape[-1] != x.numel():
            raise RuntimeError("dropout without token keys: score items through `score_items`, which sets them")
        return x * self._mask(keys.reshape(*x.shape[:-1]), x.shape[-1]).to(x.dtype)

    def _mask(self, keys: Tensor, features: int) -> Tensor:
        columns = mix32(torch.arange(features, dtype=torch.int32, device=keys.device) + mix_int(self.salt))
        hashed = mix32(keys.unsqueeze(-1) ^ columns) & 0x7FFFFFFF
        keep = hashed >= int(self.p * 2**31)
        return keep * (1 / (1 - self.p))


def install_dropout(model: nn.Module, state: PassState) -> None:
    """Replace every active `nn.Dropout` of the model by a keyed one that reads its tokens' keys from `state`."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    for salt, (name, module) in enumerate(found):
        if module.p > 0:
            parent = model.get_submodule(name.rpartition(".")[0])
            replacement = KeyedDropout(module.p, salt, state).train(module.training)
            parent.add_module(name.rpartition(".")[2], replacement)


def token_keys(seed: int, step: int, pieces_BL: Tensor, positions_BL: Tensor) -> Tensor:
    """Keys int32[B, L] of tokens, given the piece each belongs to (int64: the response's item, or a number of the
    instruction, the same for all its items) and its position in the item. They do not depend on the layout.
    """
    piece = mix32((pieces_BL + mix_int(seed * 1_000_003 + step)).to(torch.int32))
    return mix32(piece + positions_BL.to(torch.int32) * _GOLDEN)


_GOLDEN = -1640531527  # 2^32 / golden ratio as int32: spreads consecutive positions


def mix32(x: Tensor) -> Tensor:
    """A bijective hash of int32 values with good avalanche (Ellis, hash prospector "lowbias32")."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def mix_int(value: int) -> int:
    """`mix32` of a Python integer, as a non-negative number below 2^31 (so that sums with int32 stay defined)."""
    low = torch.tensor(value % 2**31, dtype=torch.int32)
    return int(mix32(low)) & 0x3FFFFFFF
