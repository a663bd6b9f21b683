"""`configs/reference.yaml` shows every key with its default."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from jpo_ray.config import RunConfig, Source
from jpo_ray.config_file import load_config

REFERENCE = Path(__file__).parent.parent / "configs" / "reference.yaml"
REQUIRED = {"path", "train", "model_name_or_path"}  # the file must give these, whatever the default


def test_every_key_stands_there_with_its_default() -> None:
    written = yaml.safe_load(REFERENCE.read_text())
    parsed = load_config(REFERENCE)
    _compare(written, parsed, "")
    _compare(written["items"]["train"][0], parsed.items.train[0], "items.train.0")
    _compare(written["train"][0], parsed.train[0], "train.0")


def _compare(written: dict[str, Any], section: BaseModel, where: str) -> None:
    assert set(written) == set(type(section).model_fields), where
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            _compare(written[name], value, f"{where}.{name}")
        elif name not in REQUIRED and not (name == "name" and not isinstance(section, Source)):
            default = field.get_default(call_default_factory=True)
            assert value == default, f"{where}.{name}: {value!r} in the file, default {default!r}"


def test_it_is_a_run_config() -> None:
    assert isinstance(load_config(REFERENCE), RunConfig)
