"""Checkpoints: weights, optimizer and trainer state, as safetensors and JSON, whole or not at all.

A checkpoint is written aside, its files' hashes last, and renamed to `checkpoint-N`. Resuming takes the newest one
whose hashes hold. Batches, dropout masks and learning rates are functions of (seed, step), so the step is all there is
to know about their position.

Of a model that every worker holds, rank 0 writes the weights as plain transformers or peft read them. Of a sharded one
every worker writes its own slices below `sharded/`, in the safetensors format of `torch.distributed.checkpoint`, and
reads those that it needs: any number of workers goes on, without one that holds all.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from jpo_ray.engine.sharding import assign, is_sharded, whole_state
from jpo_ray.engine.slices import load_slices, save_slices
from jpo_ray.engine.step import trainable
from jpo_ray.engine.workers import barrier, from_all, from_rank_0, rank_and_world
from jpo_ray.errors import InputError
from jpo_ray.files import file_hashes, flush, flush_one, hash_file, read_json, write_json
from jpo_ray.store import StoreError
from jpo_ray.stored import HASHES, locked, place_of, pull, push

STATE = "trainer_state.json"
SHARDED = "sharded"  # below a checkpoint: slices of all workers


def save_checkpoint(folder: Path, model: Any, tokenizer: Any, optimizer: Any, state: dict[str, Any]) -> Path:
    """Write `folder/checkpoint-<global_step>`; every rank must call it. Returns its path."""
    target = folder / f"checkpoint-{state['global_step']}"
    sharded = is_sharded(model)
    if rank_and_world()[0] != 0 and not sharded:
        return target
    staged = folder / f".{target.name}-{from_rank_0(secrets.token_hex(4)) if sharded else secrets.token_hex(4)}"
    with _writing(target):
        try:
            staged.mkdir(parents=True, exist_ok=True)
            if sharded:
                hashes = _write_slices(staged, target, model, optimizer)
            else:
                _write_weights(staged, model, tokenizer, None)
                tensors, scalars = _flatten_state(optimizer, trainable(model))
                save_file(tensors, staged / "optimizer.safetensors", metadata={"scalars": json.dumps(scalars)})
                hashes = file_hashes(staged)
            if rank_and_world()[0] == 0:
                write_json(staged / STATE, state)
                write_json(staged / HASHES, hashes | {STATE: hash_file(staged / STATE)})
                flush(staged)
                if target.exists():  # left by an attempt whose hashes no longer hold
                    shutil.rmtree(target)
                staged.rename(target)
                flush_one(folder)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    if sharded:
        barrier()
        shutil.rmtree(staged, ignore_errors=True)  # of a worker whose disk is not rank 0's
    return target


def _write_slices(staged: Path, target: Path, model: Any, optimizer: Any) -> dict[str, str]:
    """Hashes of all workers' files. Where the run directory is on an object store, each leaves its own there."""
    mine = {str(path.relative_to(staged)): hash_file(path) for path in save_slices(staged / SHARDED, model, optimizer)}
    if (place := place_of(target)) is not None:
        place.store.upload(staged, place.name, mine)
    return {name: digest for hashes in from_all(mine) for name, digest in hashes.items()}


def save_weights(folder: Path, model: Any, tokenizer: Any, dtype: torch.dtype | None = None) -> None:
    """The model (or its adapter) and tokenizer as plain transformers and peft read them, on rank 0.

    In `dtype`, where given. Every rank must call it.
    """
    weights = whole_state(model, dtype) if is_sharded(model) else None
    if weights is None and dtype is not None:
        model = model.to(dtype)
    if rank_and_world()[0] == 0:
        with _writing(folder):
            _write_weights(folder, model, tokenizer, weights)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A full disk or a folder that is gone is not for another attempt to mend: raises `InputError`."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers raise exceptions of their own, or of no kind at all, for what the system refused.
        if isinstance(error, StoreError) or (not isinstance(error, OSError) and "os error" not in str(error)):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"{path}: cannot be written ({reason}); mend that, and the same command goes on from the last checkpoint"
        ) from error


def _write_weights(folder: Path, model: Any, tokenizer: Any, weights: dict[str, torch.Tensor] | None) -> None:
    model.save_pretrained(folder, safe_serialization=True, state_dict=weights)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged."""
    found = sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True)
    return next((path for path in found if is_valid(path)), None)


def checkpoint_before(folder: Path, step: int) -> Path | None:
    """The newest one of an earlier step."""
    earlier = [path for path in folder.glob("checkpoint-*") if _step_of(path) < step]
    return max(earlier, key=_step_of, default=None)


def agreed_checkpoint(folder: Path) -> Path | None:
    """The newest valid one that all workers have, whose disks may not be the same. Every rank must call it.

    Rank 0 alone compares hashes, since reading all is work; what others fetched was compared as it came.
    """
    here = {path.name for path in folder.glob("checkpoint-*") if (path / HASHES).exists()}
    everywhere = sorted(set.intersection(*from_all(here)), key=lambda name: _step_of(folder / name), reverse=True)
    valid = None
    if rank_and_world()[0] == 0:
        valid = next((folder / name for name in everywhere if is_valid(folder / name)), None)
    agreed: Path | None = from_rank_0(valid)
    return agreed


def is_valid(checkpoint: Path) -> bool:
    try:
        expected = read_json(checkpoint / HASHES)
    except (OSError, ValueError):
        return False
    found = file_hashes(checkpoint)
    more = [name for name in found if name.startswith(f"{SHARDED}/") and name not in expected]  # would be read too
    return not more and all(found.get(name) == digest for name, digest in expected.items())


def load_checkpoint(checkpoint: Path, model: Any, optimizer: Any) -> dict[str, Any]:
    """Load weights and optimizer state in place; returns the trainer state. Every rank must call it."""
    if (checkpoint / SHARDED).exists():
        load_slices(checkpoint / SHARDED, model, optimizer)
    else:
        _load_whole(checkpoint, model, optimizer)
    return read_json(checkpoint / STATE)


def _load_whole(checkpoint: Path, model: Any, optimizer: Any) -> None:
    adapter = checkpoint / "adapter_model.safetensors"
    paths = [adapter] if adapter.exists() else sorted(checkpoint.glob("model*.safetensors"))
    weights = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    # Names in an adapter's file lack the adapter's own.
    own = {name.replace(".default.", "."): parameter for name, parameter in model.named_parameters()}
    unexpected = sorted(weights.keys() - own.keys())
    missing = [name for name, parameter in own.items() if parameter.requires_grad and name not in weights]
    if unexpected or missing:
        raise RuntimeError(f"{checkpoint}: weights do not fit the model ({missing[:2]}, {unexpected[:2]})")
    for name, tensor in weights.items():
        assign(own[name], tensor)
    _restore_state(checkpoint / "optimizer.safetensors", optimizer, trainable(model))


def keep_only(folder: Path, keep: set[Path]) -> None:
    """Delete checkpoints besides `keep`, and what interrupted writes left."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")]:
        if path not in keep:
            shutil.rmtree(path)


def store_checkpoints(folder: Path) -> None:
    """Where the run directory is on an object store, have the checkpoints there that are here, and no others."""
    if (place := place_of(folder)) is None:
        return
    names = place.store.names(place.name)
    there = {name.split("/")[0] for name in names if name.startswith("checkpoint-")}
    here = {path.name for path in folder.glob("checkpoint-*")}
    for checkpoint in sorted(here):
        if f"{checkpoint}/{HASHES}" not in names:
            hashes = read_json(folder / checkpoint / HASHES)
            push(folder / checkpoint, hashes, [name for name in hashes if not name.startswith(f"{SHARDED}/")])
    for checkpoint in there - here:
        place.store.delete(f"{place.name}/{checkpoint}")


def fetch_checkpoints(folder: Path) -> None:
    """Where the run directory is on an object store, have the valid checkpoints here that are there, and no others.

    So workers on whatever machines go on from the same one.
    """
    if (place := place_of(folder)) is None:
        return
    with locked(place.root, f"{place.name}-checkpoints"):
        names = place.store.names(place.name)
        there = {name.split("/")[0] for name in names if name.endswith(f"/{HASHES}")}
        keep_only(folder, {folder / name for name in there if is_valid(folder / name)})
        for checkpoint in sorted(there):
            if not (_fetched(folder / checkpoint) or _fetched(folder / checkpoint)):  # not this disk's fault alone
                place.store.delete(f"{place.name}/{checkpoint}")


def _fetched(checkpoint: Path) -> bool:
    """Whether a checkpoint came here whole from the store; nothing of it stays if not."""
    try:
        hashes = pull(checkpoint)
    except InputError:  # damaged, or deleted meanwhile
        shutil.rmtree(checkpoint, ignore_errors=True)
        return False
    for path in (checkpoint / SHARDED).glob("*"):
        if f"{SHARDED}/{path.name}" not in hashes:  # of an attempt with more workers
            path.unlink()
    write_json(checkpoint / HASHES, hashes)
    return True


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else -1


def _flatten_state(
    optimizer: Any, parameters: list[nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, float | int]]:
    """The optimizer's state: tensors on CPU, and what is none."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, float | int] = {}
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):  # a copy: parameters may share a tensor, which a file may not
                tensors[f"{index}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                scalars[f"{index}.{name}"] = value
    return tensors, scalars


def _restore_state(path: Path, optimizer: Any, parameters: list[nn.Parameter]) -> None:
    with safe_open(path, "pt") as file:
        scalars = json.loads((file.metadata() or {}).get("scalars", "{}"))
    for key, value in [*load_file(path).items(), *scalars.items()]:
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:  # as the parameter is sharded
            moment = torch.zeros_like(parameter, dtype=value.dtype)
            assign(moment, value)
            value = moment
        elif isinstance(value, torch.Tensor):
            value = value.to(parameter.device)
        optimizer.state[parameter][name] = value
