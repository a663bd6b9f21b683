"""Checkpoints of sharded models: every worker writes the slices that it holds and reads those that it needs.

The format is that of `torch.distributed.checkpoint` as safetensors: a file for each worker, whose header says where in
the whole tensor a slice begins. So the number of workers that read is free, and none of them holds all. Tensors are
named `weight.NAME`, and Adam's `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`, after the parameter.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from jpo_ray.engine.workers import patient_group, rank_and_world


def save_slices(folder: Path, model: Any, optimizer: Any) -> list[Path]:
    """Write what is trained, and the optimizer's state of it; returns this worker's own files.

    Every rank must call it, and it ends when all have written theirs. What is not sharded is written by one of them.
    Raises `OSError` on every rank for what the system refused to one.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(_tensors_of(model, optimizer), storage_writer=writer, process_group=patient_group())
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), error) from error
    return sorted(folder.glob(f"shard-{rank_and_world()[0] + 1:05d}-*.safetensors"))


def load_slices(folder: Path, model: Any, optimizer: Any) -> None:
    """Load weights and optimizer state in place, however they are sharded now; every rank must call it.

    Raises `RuntimeError` where they are another model's.
    """
    reader = HuggingFaceStorageReader(str(folder))
    stored = {name: (found.size, found.properties.dtype) for name, found in _metadata(reader).items()}
    parameters = dict(model.named_parameters())
    for entry, (shape, dtype) in stored.items():
        kind, _, name = entry.partition(".")
        if kind != "weight" and (parameter := parameters.get(name)) is not None:
            like = parameter.detach() if shape == parameter.shape else torch.empty(shape, device=parameter.device)
            optimizer.state[parameter][kind] = torch.zeros_like(like, dtype=dtype)
    tensors = _tensors_of(model, optimizer)
    missing = [name for name, tensor in tensors.items() if name not in stored or stored[name][0] != tensor.shape]
    unexpected = sorted(stored.keys() - tensors.keys())
    if unexpected or missing:
        raise RuntimeError(f"{folder}: weights do not fit the model ({missing[:2]}, {unexpected[:2]})")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # of a process that is alone
        load(tensors, storage_reader=reader, process_group=patient_group())


def _tensors_of(model: Any, optimizer: Any) -> dict[str, Tensor]:
    """What is trained and the optimizer's state of it, by name, sharded as they are."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"weight.{name}"] = parameter.detach()
            tensors |= {f"{kind}.{name}": value for kind, value in optimizer.state.get(parameter, {}).items()}
    return tensors


def _metadata(reader: Any) -> dict[str, Any]:
    found: dict[str, Any] = reader.read_metadata().state_dict_metadata
    return found
