"""Adapters and their bases: which model an adapter was trained on, and whether it fits the one it is put on.

An adapter on another base than its own answers nonsense without any error wherever the shapes happen to agree. So a
run's adapters carry the hash of the weights they were trained on; those from elsewhere have the name that peft writes.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpo_ray.engine.model import load_model, ranks_of_experts, resolve_model, weights_hash
from jpo_ray.errors import InputError
from jpo_ray.files import read_json, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_RECORD = "base_model.json"
_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def load_adapter(folder: Path, base: Path, *, dtype: str, load_in_4bit: bool = False, device: str = "cpu") -> Any:
    """An adapter on `base`, in evaluation mode."""
    from peft import PeftModel

    model = load_model(base, dtype=dtype, load_in_4bit=load_in_4bit, device=device)
    with ranks_of_experts():
        return PeftModel.from_pretrained(model, folder, use_safetensors=True).eval()


def record_base(folder: Path, base: Path, weights: str, *, load_in_4bit: bool) -> None:
    """Write beside an adapter what it was trained on: `base`, whose `weights_hash` is `weights`."""
    write_json(folder / BASE_RECORD, {"model": str(base), "weights": weights, "load_in_4bit": load_in_4bit})


def base_of(folder: Path, key: str, cache: Path | None = None) -> Path:
    """The model that an adapter names as its base. Raises `InputError`, naming `key`, where that is not there."""
    config = _config_of(folder, key)
    name = config.get("base_model_name_or_path")
    if not name:
        raise InputError(f"{key}: {folder / CONFIG} names no base model (base_model_name_or_path)")
    base = resolve_model(str(name), f"{key}: {folder / CONFIG}: base_model_name_or_path")
    check_base(folder, base, key, cache)
    return base


def check_base(folder: Path, base: Path, key: str, cache: Path | None = None) -> None:
    """Raise `InputError`, naming `key`, the adapter's base and `base`, unless the adapter belongs on `base`.

    Weights decide where they can be compared, else names; and then the shapes, which are read without loading either.
    """
    config = _config_of(folder, key)
    own, differs = compare_bases(folder, base, cache)
    if differs:
        mend = "use the base that it was trained on, or train it again on this one"
        if not (folder / BASE_RECORD).exists():
            own_name = f"base_model_name_or_path into {folder / CONFIG}"
            mend = f"where both are the same model, write this one's folder as {own_name}"
        not_this = "as it was then, and its weights are others now" if own == str(base) else f"and not on {base}"
        raise InputError(f"{key}: {folder} was trained on {own}, {not_this}; {mend}")
    misfits = list(_misfits(folder, base, None if config.get("rank_pattern") else config.get("r")))
    if misfits:
        more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        of_base = f", whose base is {own}," if own and own != str(base) else ""
        raise InputError(f"{key}: {folder}{of_base} does not fit {base}: {misfits[0]}{more}")


def compare_bases(folder: Path, base: Path, cache: Path | None = None) -> tuple[str, bool]:
    """The name of the base that an adapter was trained on ("" where it says none), and whether that is not `base`."""
    if (folder / BASE_RECORD).exists():
        record = read_json(folder / BASE_RECORD)
        return str(record["model"]), record["weights"] != weights_hash(base, cache)
    own = str(read_json(folder / CONFIG).get("base_model_name_or_path") or "")
    return own, bool(own) and not _same_model(own, base, cache)


def _config_of(folder: Path, key: str) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise InputError(f"{key}: {folder}: is no adapter's folder ({CONFIG} cannot be read)") from error
    if not (folder / WEIGHTS).exists():
        raise InputError(f"{key}: {folder}: holds no {WEIGHTS}; pickled adapters are not loaded")
    return config


def _same_model(name: str, base: Path, cache: Path | None) -> bool:
    """Whether what an adapter calls its base is `base`. A hub id is looked for in the hub's cache only."""
    folder: Path | None = Path(name).expanduser()
    assert folder is not None
    if not folder.exists():
        folder = _downloaded(name)
    if folder is None:
        return False
    return folder.resolve() == base.resolve() or weights_hash(folder, cache) == weights_hash(base, cache)


def _downloaded(repo_id: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _misfits(folder: Path, base: Path, rank: int | None) -> Iterator[str]:
    """What of an adapter's weights has no place in the model, or one of another shape; `rank`: of all its updates."""
    model = _skeleton(base)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, shape in _shapes(folder / WEIGHTS).items():
        lora = _LORA.fullmatch(name)
        if lora is None:
            plain = name.removeprefix("base_model.model.")
            if plain in parameters and tuple(parameters[plain].shape) != shape:
                yield f"{plain} is {_by(parameters[plain].shape)} there and {_by(shape)} in the adapter"
            continue
        module = modules.get(
            lora["module"].removesuffix(".base_layer")
        )  # two updates of one module: of stacked experts
        ends = "inputs" if lora["side"] == "A" else "outputs"
        own_rank, given = (shape[0], shape[-1]) if lora["side"] == "A" else (shape[-1], shape[0])
        if module is None:
            yield f"it has no {lora['module']}"
        elif (sizes := _inputs_and_outputs(module)) is not None and sizes[ends] != given:
            yield f"{lora['module']} has {sizes[ends]} {ends} there and {given} in the adapter"
        elif rank is not None and own_rank != rank:
            yield f"{lora['module']} has rank {own_rank} in its weights and {rank} in its config"


def _skeleton(folder: Path) -> nn.Module:
    """The model's modules without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return model


def _inputs_and_outputs(module: nn.Module) -> dict[str, int] | None:
    """Of a linear layer; None of any other module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return {"inputs": module.in_features, "outputs": module.out_features}
    return {"inputs": int(module.nx), "outputs": int(module.nf)} if isinstance(module, Conv1D) else None


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
