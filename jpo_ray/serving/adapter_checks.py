"""Whether a folder holds a LoRA adapter of the served base: all of it checked before an engine reads any of it.

Engines are no judges of that: one took weights of rank 4 under a config of rank 2 without a word.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jpo_ray.files import read_json
from jpo_ray.serving.models import ADAPTER_CONFIG

WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1_000_000
PEFT_PREFIX = "base_model.model."
REFUSED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication")

# Trained adapters stay far below both (0.2 at most in the sandbox's experiments). Beyond them float32 and bfloat16 may
# overflow within a few layers.
LARGEST_WEIGHT = 100.0
LARGEST_SCALE = 100.0

Shapes = Mapping[str, tuple[int, ...]]  # of a model's tensors, by name


class AdapterError(ValueError):
    """An adapter that is not taken; the message is for whoever offered it."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


def base_shapes(folder: Path) -> Shapes:
    """Shapes of a model's tensors, from the headers of its files."""
    index = folder / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return {key: shape for name in sorted(names) for key, shape in _shapes(folder / name).items()}


def check_adapter(folder: Path, base: Shapes, max_rank: int) -> int:
    """The rank of the LoRA adapter in `folder`. Raises `AdapterError` for anything else, pickled weights above all."""
    config, weights, name = folder / ADAPTER_CONFIG, folder / WEIGHTS, folder.name[:64]
    if not config.is_file():
        raise AdapterError(f"{name}: holds no {ADAPTER_CONFIG}")
    if not weights.is_file():
        raise AdapterError(f"{name}: holds no {WEIGHTS}; pickled weights are not loaded")
    if config.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError(f"{name}: {ADAPTER_CONFIG} is larger than {MAX_CONFIG_BYTES} bytes")
    fields = _check_config(config, name)
    rank: int = fields["r"]
    transposed = bool(fields.get("fan_in_fan_out"))
    if rank > max_rank:
        raise AdapterError(f"{name}: rank {rank}, and max_lora_rank is {max_rank}")
    try:
        shapes = _shapes(weights)
    except Exception as error:  # the format's own error is not an OSError, and headers may be anything
        raise AdapterError(f"{name}: {WEIGHTS} is not in the safetensors format") from error
    updated = _check_shapes(shapes, base, rank, name, transposed=transposed)
    _check_targets(updated, base, fields, name)
    _check_values(weights, name)
    return rank


def _check_config(path: Path, name: str) -> dict[str, Any]:
    no_lora = AdapterError(f"{name}: {ADAPTER_CONFIG} is not that of a LoRA adapter")
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rank, kind = fields["r"], fields["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise no_lora from error
    if kind != "LORA" or not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < 2**16:
        raise no_lora
    for key in REFUSED:
        if fields.get(key):
            raise AdapterError(f"{name}: {key} is not served")
    if fields.get("bias", "none") != "none":
        raise AdapterError(f"{name}: biases are not served")
    alpha = fields.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= LARGEST_SCALE * rank**0.5:
        raise AdapterError(f"{name}: lora_alpha is no number from 0 to {LARGEST_SCALE:g} times the root of the rank")
    return fields


def _check_targets(updated: set[str], base: Shapes, fields: dict[str, Any], name: str) -> None:
    """The config must name the very matrices that the weights update: vLLM goes by the weights, peft by the config."""
    from peft.tuners.tuners_utils import check_target_module_exists

    optional = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    config = SimpleNamespace(**{key: fields.get(key) for key in optional})
    matrices = [key.removesuffix(".weight") for key, shape in base.items() if len(shape) == 2]
    try:
        named = {matrix for matrix in matrices if check_target_module_exists(config, matrix)}
    except Exception as error:  # fields that are no lists, patterns that are none
        raise AdapterError(f"{name}: {ADAPTER_CONFIG} names no target modules") from error
    if named != updated:
        raise AdapterError(f"{name}: the target modules of {ADAPTER_CONFIG} are not those of {WEIGHTS}")


def _check_shapes(shapes: Shapes, base: Shapes, rank: int, name: str, *, transposed: bool) -> set[str]:
    """The matrices that are updated. Every tensor must be half of an update of a matrix that the base has, and none may
    lack its other half.
    """
    halves: dict[str, set[str]] = {}
    for key, shape in shapes.items():
        module, _, half = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        matrix = base.get(f"{module}.weight")
        if half not in ("A.weight", "B.weight") or matrix is None or len(matrix) != 2:
            raise AdapterError(f"{name}: {key[:100]} is no LoRA weight of this base")
        outputs, inputs = reversed(matrix) if transposed else matrix
        if shape != ((rank, inputs) if half == "A.weight" else (outputs, rank)):
            raise AdapterError(f"{name}: {key[:100]} has the shape {list(shape)}, which does not fit base and rank")
        halves.setdefault(module, set()).add(half)
    if not halves or any(len(found) != 2 for found in halves.values()):
        raise AdapterError(f"{name}: {WEIGHTS} is not complete")
    return set(halves)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118


def _check_values(path: Path, name: str) -> None:
    """Raise `AdapterError` for weights that are no numbers, or so large that activations need not be any more: what is
    not finite stays in the engine's cache, and comes out in other models' answers.
    """
    import torch
    from safetensors import safe_open

    served = (torch.float32, torch.bfloat16, torch.float16)
    with safe_open(path, "pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            weight = opened.get_tensor(key)
            if weight.dtype not in served:
                raise AdapterError(f"{name}: {key[:100]} is of {weight.dtype}, which is not served")
            largest = float(weight.abs().max())
            if not largest <= LARGEST_WEIGHT:
                raise AdapterError(f"{name}: {key[:100]} holds {largest:g}; weights beyond {LARGEST_WEIGHT:g} overflow")
