"""FSDP2: every worker holds a slice of each weight, and layers are gathered as they are used.

A sharded model's parameters are `DTensor`s. Checkpoints hold the slices (`slices.py`), results whole tensors. Gathering
is a collective: every rank calls these functions together.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from jpo_ray.engine.scoring import Scorer


def shard(scorer: Scorer, device: torch.device) -> Scorer:
    """Shard the scorer's model over all workers, decoder layer by decoder layer, and move it to `device`."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in _layers(scorer.backbone):
        fully_shard(layer, mesh=mesh)
    fully_shard(scorer.model, mesh=mesh)
    register_fsdp_forward_method(scorer.model, "score_laid")
    return replace(scorer, device=device, cores=1)  # gathering layers is one thread's work


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def release(model: nn.Module) -> None:
    """Give up weights that a forward pass without a backward pass has left gathered.

    Until then the root's parameters are other objects than the ones an optimizer holds, and would not be trained.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)


def whole_state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict in whole tensors (of `dtype`, where given): on CPU, and on rank 0 alone."""
    keep = dist.get_rank() == 0
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # tied weights are stored once
            continue
        seen.add(id(tensor))
        gathered = whole(tensor.detach())
        if keep:
            found[name] = gathered.to("cpu", dtype if gathered.is_floating_point() else None)
    return found


def _layers(backbone: Any) -> list[nn.Module]:
    """The decoder layers: members of the longest list of modules."""
    lists = [list(module) for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])
