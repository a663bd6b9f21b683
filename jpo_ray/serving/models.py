"""Which models a run directory offers: the SFT model, adapters on it, and whole models."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jpo_ray.artifacts import Manifest
from jpo_ray.cache import cache_folder
from jpo_ray.config import BaseModelConfig
from jpo_ray.config_serve import ServeConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.data.tokens import Layout
from jpo_ray.engine.bases import base_of_adapter, own_base
from jpo_ray.errors import InputError
from jpo_ray.files import read_json
from jpo_ray.runs import RunDir
from jpo_ray.store import location

BASE = "sft"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter, or a whole model, as it lies somewhere."""

    name: str
    folder: Path
    beta: float | None  # of its training; None where it came without a manifest


@dataclass(frozen=True)
class Offer:
    """What can be served, and what is odd about it."""

    base: Path
    layout: Layout
    dtype: str
    adapters: list[Adapter]
    full: list[Adapter]  # whole models
    warnings: list[str]


def find_models(config: ServeConfig) -> Offer:
    """The models that `config` names. Raises `InputError` where one of them is not there."""
    if config.run_dir is None:
        raise InputError("serve: name the run whose models are to be served (--run-dir DIR)")
    run = RunDir(location(config.run_dir))
    trained = _trained(run)
    wanted = _wanted(config, run, trained)
    manifests = {name: manifest for name, manifest in trained.items() if name in wanted}
    model = _model_section(run, trained)
    base = _base_folder(run, manifests | trained)
    found = [_entry(run, name, manifest) for name, manifest in manifests.items()]
    for key, names in (("adapters", config.adapters), ("whole_models", config.whole_models)):
        if taken := {entry.name for entry in found} & set(names):
            raise InputError(f"{key}.{min(taken)}: the run has a model of that name; choose another")
    elsewhere = {name: Path(folder).expanduser() for name, folder in config.adapters.items()}
    more = [Adapter(name, folder, beta_beside(folder)) for name, folder in elsewhere.items()]
    return Offer(
        base=base.resolve(),
        layout=Layout(model.template, model.response_prefix, model.max_length),
        dtype=model.dtype,
        adapters=[entry for entry in found if is_adapter(entry.folder)] + more,
        full=[entry for entry in found if not is_adapter(entry.folder)] + _whole_models(config, base),
        warnings=_of_run(run, manifests, base, model.dtype)
        + [warning for entry in more for warning in adapter_warnings(entry.name, entry.folder, base, model.dtype)],
    )


def _whole_models(config: ServeConfig, base: Path) -> list[Adapter]:
    """Raises `InputError` for one whose tokens are not those of the SFT model: prompts are tokenized once for all."""
    from jpo_ray.engine.model import resolve_model

    found = []
    for name, given in config.whole_models.items():
        key = f"whole_models.{name}"
        folder = resolve_model(given, key)
        if (folder / "tokenizer_config.json").exists():
            if _tokens_of(folder) != _tokens_of(base):
                raise InputError(f"{key}: {folder} has another tokenizer than {base}, and all models share one")
        elif (own := _vocab_size(folder)) != (shared := _vocab_size(base)):
            raise InputError(
                f"{key}: {folder} has no tokenizer and a vocabulary of {own} tokens; that of {base}, which all models "
                f"share, has {shared}"
            )
        found.append(Adapter(name, folder, beta_beside(folder)))
    return found


def _tokens_of(folder: Path) -> tuple[dict[str, int], int | None, int | None]:
    """The vocabulary of a model's tokenizer, BOS and EOS."""
    from jpo_ray.engine.model import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return tokenizer.get_vocab(), tokenizer.bos_token_id, tokenizer.eos_token_id


def _vocab_size(folder: Path) -> int | None:
    """Tokens that a model's config speaks of."""
    from transformers import AutoConfig

    size: int | None = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "vocab_size", None)
    return size


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).exists()


def beta_beside(folder: Path) -> float | None:
    """The beta that an adapter was trained with, from the manifest beside it."""
    try:
        beta = read_json(folder / "manifest.json")["config"]["train"]["beta"]
        known = isinstance(beta, int | float) and not isinstance(beta, bool) and 0 < float(beta) < math.inf
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    return float(beta) if known else None


def adapter_warnings(name: str, folder: Path, base: Path, dtype: str) -> list[str]:
    """What is odd about an adapter: another base than its own, or one that was quantised. Reads weights to compare."""
    from jpo_ray.engine.adapters import BASE_RECORD, compare_bases

    found = []
    try:
        own, differs = compare_bases(folder, base, cache_folder())
        if differs:
            found.append(f"{name} was trained on another base ({own[:200]}) than the one that it is served on ({base})")
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        found.append(f"{name}: what base it was trained on cannot be told from its folder")
    if _in_4bit(folder / BASE_RECORD) or _in_4bit(folder / "manifest.json", "config", "model"):
        found.append(_quantised(name, dtype))
    return found


def _in_4bit(file: Path, *keys: str) -> bool:
    try:
        record = read_json(file)
        for key in keys:
            record = record[key]
        return bool(record.get("load_in_4bit"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _quantised(name: str, dtype: str) -> str:
    return f"{name} was trained on a 4-bit base and is served on one in {dtype}: its answers differ a little"


def _of_run(run: RunDir, manifests: dict[str, Manifest], base: Path, dtype: str) -> list[str]:
    """The same of the run's own models, whose manifests say it."""
    sft = run.manifest("sft")
    found = []
    for name, manifest in manifests.items():
        folder = run.path(f"train/{name}")
        if sft is None and is_adapter(folder):
            found += adapter_warnings(name, folder, base, dtype)
            continue
        if sft is not None and manifest.inputs.get("sft") != sft.fingerprint:
            found.append(f"{name} was trained on another SFT model than the one that stands in the run now")
        if (manifest.config.get("model") or {}).get("load_in_4bit"):
            found.append(_quantised(name, dtype))
    return found


def _trained(run: RunDir) -> dict[str, Manifest]:
    """Every model of the run's `train` stage, by name."""
    if not run.root.is_dir():
        raise InputError(f"--run-dir {run.root}: no such folder")
    manifests = {name: run.manifest(f"train/{name}") for name in run.trained()}
    return {name: manifest for name, manifest in manifests.items() if manifest is not None}


def _wanted(config: ServeConfig, run: RunDir, trained: Iterable[str]) -> list[str]:
    names = [BASE, *trained]
    for name in config.models or []:
        if name not in names:
            raise InputError(f"models: {run.where} has no model `{name}`; there are {', '.join(names)}")
    return config.models or names


def _model_section(run: RunDir, trained: dict[str, Manifest]) -> BaseModelConfig:
    """How texts are laid out, as the run's models learned it."""
    manifests = [manifest for manifest in (run.manifest("sft"), *trained.values()) if manifest is not None]
    if not manifests:
        raise InputError(f"{run.where}: no `sft` yet; run `jpo sft` first (or `jpo run` for all of it)")
    sections = [manifest.config.get("model") or {} for manifest in manifests]
    # load_in_4bit shapes training alone; a model is served in its dtype
    return BaseModelConfig(model_name_or_path="", **{k: v for k, v in sections[0].items() if k != "load_in_4bit"})


def _base_folder(run: RunDir, trained: dict[str, Manifest]) -> Path:
    """The SFT model's folder; where the run has none, the base of its adapters."""
    own = own_base(run)
    if own is not None:
        return own
    for name, manifest in trained.items():
        folder = run.path(f"train/{name}")
        if is_adapter(folder):
            return base_of_adapter(run, manifest, folder, f"train/{name}")
    raise InputError(f"{run.where}: neither an `sft` model nor an adapter that names its base; run `jpo sft` first")


def _entry(run: RunDir, name: str, manifest: Manifest) -> Adapter:
    beta = manifest.config.get("train", {}).get("beta", TrainConfig().beta)
    return Adapter(name, run.path(f"train/{name}").resolve(), float(beta))
