"""Checkpoints: weights, optimizer and trainer state, as safetensors and JSON, whole or not at all.

A checkpoint is written aside, its files' hashes last, and renamed to `checkpoint-N`. Resuming takes the newest one
whose hashes hold. Batches, dropout masks and learning rates are functions of (seed, step), so the step is all there is
to know about their position.
"""

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from jpo_ray.engine.step import trainable
from jpo_ray.runs import file_hashes, read_json, write_json


def save_checkpoint(folder: Path, model: Any, tokenizer: Any, optimizer: Any, state: dict[str, Any]) -> Path:
    """Write `folder/checkpoint-<global_step>`."""
    target = folder / f"checkpoint-{state['global_step']}"
    staged = folder / f".{target.name}-{secrets.token_hex(4)}"
    staged.mkdir(parents=True)
    save_weights(staged, model, tokenizer)
    tensors, scalars = _flatten_state(optimizer, trainable(model))
    save_file(tensors, staged / "optimizer.safetensors", metadata={"scalars": json.dumps(scalars)})
    write_json(staged / "trainer_state.json", state)
    write_json(staged / "files.json", file_hashes(staged))
    if target.exists():  # left by an attempt whose hashes no longer hold
        shutil.rmtree(target)
    staged.rename(target)
    return target


def save_weights(folder: Path, model: Any, tokenizer: Any) -> None:
    """The model (or its adapter) and tokenizer as plain transformers and peft read them."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged."""
    found = sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True)
    return next((path for path in found if is_valid(path)), None)


def is_valid(checkpoint: Path) -> bool:
    try:
        expected = read_json(checkpoint / "files.json")
    except (OSError, ValueError):
        return False
    found = file_hashes(checkpoint)
    return all(found.get(name) == digest for name, digest in expected.items())


def load_checkpoint(checkpoint: Path, model: Any, optimizer: Any) -> dict[str, Any]:
    """Load weights and optimizer state in place; returns the trainer state."""
    adapter = checkpoint / "adapter_model.safetensors"
    if adapter.exists():
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(adapter))
    else:
        weights: dict[str, torch.Tensor] = {}
        for path in sorted(checkpoint.glob("model*.safetensors")):
            weights.update(load_file(path))
        missing, unexpected = model.load_state_dict(weights, strict=False)
        tied = set(getattr(model, "_tied_weights_keys", None) or [])
        if unexpected or set(missing) - tied:
            raise RuntimeError(f"{checkpoint}: weights do not fit the model ({missing[:2]}, {unexpected[:2]})")
    _restore_state(checkpoint / "optimizer.safetensors", optimizer, trainable(model))
    return read_json(checkpoint / "trainer_state.json")


def keep_only(folder: Path, keep: set[Path]) -> None:
    """Delete checkpoints besides `keep`, and what interrupted writes left."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")]:
        if path not in keep:
            shutil.rmtree(path)


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else -1


def _flatten_state(
    optimizer: Any, parameters: list[nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, float | int]]:
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, float | int] = {}
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().clone().contiguous()
            else:
                scalars[f"{index}.{name}"] = value
    return tensors, scalars


def _restore_state(path: Path, optimizer: Any, parameters: list[nn.Parameter]) -> None:
    with safe_open(path, "pt") as file:
        scalars = json.loads((file.metadata() or {}).get("scalars", "{}"))
    for key, value in [*load_file(path).items(), *scalars.items()]:
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        optimizer.state[parameter][name] = value.to(parameter.device) if isinstance(value, torch.Tensor) else value
