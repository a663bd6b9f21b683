"""The base of a run's adapters: the run's own, or the model that they name, wherever that is now."""

import re
from pathlib import Path

from jpo_ray.artifacts import Manifest
from jpo_ray.cache import cache_folder
from jpo_ray.files import read_json
from jpo_ray.runs import RunDir

ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
OF_FILES = {".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".safetensors"}
OWN = ("sft", "base")  # artifacts that are the base of a run's adapters: fine-tuned, or an SFT adapter merged


def base_of_adapter(run: RunDir, manifest: Manifest, folder: Path, key: str) -> Path:
    """The run's own base, wherever the run has been moved to; else the one that the adapter in `folder` names, or where
    that folder is another machine's, the one on the Hub that the run began with.

    Raises `InputError`, naming `key`, where it is not there, and where its weights are others.
    """
    from jpo_ray.engine.adapters import base_of, check_base
    from jpo_ray.engine.model import resolve_model

    own, on_hub = own_base(run), hub_base(run, manifest)
    if own is not None:
        base = own
    elif on_hub is not None and not Path(named_base(folder)).is_dir():
        base = resolve_model(on_hub, key)
    else:
        return base_of(folder, key, cache_folder())
    check_base(folder, base, key, cache_folder())
    return base


def own_base(run: RunDir) -> Path | None:
    return next((run.path(name) for name in OWN if run.manifest(name) is not None), None)


def hub_base(run: RunDir, manifest: Manifest) -> str | None:
    """What the Hub calls the base of a run without a fine-tuning of its own; peft calls it by where it was loaded."""
    name = str(manifest.counts.get("base_model") or "")
    return name if own_base(run) is None and is_on_hub(run, name) else None


def named_base(folder: Path) -> str:
    return str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")


def is_on_hub(run: RunDir, name: str) -> bool:
    """Whether a name is certainly no path: neither by its look, nor by what the run read, nor by what stands here."""
    if not ON_HUB.fullmatch(name) or Path(name).suffix.lower() in OF_FILES:
        return False
    items = run.manifest("items")
    read = items.inputs.items() if items else ()
    if any(key.partition(":")[2] == name and found != name for key, found in read):  # the hash of a file or folder
        return False
    places = (Path.cwd(), *run.root.absolute().parents)
    return not any((place / name).exists() or (place / name).parent.is_dir() for place in places)
