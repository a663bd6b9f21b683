"""Reading a config: a YAML file, overrides from the command line, and errors that name the key and the mend.

Any key can be overridden as `section.key=value`, and an entry of the `train` list by its name: `train.jpo.beta=0.2`.
`train.*.beta=0.2` is of all entries.
"""

import copy
import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from jpo_ray.config import RunConfig
from jpo_ray.config_base import Section
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.errors import InputError

# Besides its own errors, PyYAML lets through those of impossible dates and of very deep nesting.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)

EVERY_ENTRY = "train.*."
Read = TypeVar("Read", bound=Section)


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML config and apply `section.key=value` overrides. Raises `InputError` naming the file and key."""
    values = read_yaml(path, "--config")
    if is_experiment(values):
        raise InputError(
            f"{path}: is an experiment: `jpo scale --experiment` carries it out, `jpo plan --config` says what it takes"
        )
    for override in overrides or []:
        apply_override(values, override)
    return parse_config(values, str(path))


def is_experiment(values: dict[str, Any]) -> bool:
    """Whether a file is one of `config_experiment.py`, of several runs or trainings."""
    return {"base", "grid"} <= values.keys()


def read_yaml(path: Path, option: str) -> dict[str, Any]:
    """A YAML file of sections. Raises `InputError` naming the `option` that named the file."""
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{option} {path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path}: cannot be read ({error})") from error
    except NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a mapping of sections ({', '.join(RunConfig.model_fields)})")
    return values


class FilesConfig(Section):
    """What commands on files, without a run directory, are told."""

    judge: AnnotatorConfig
    cluster: ClusterConfig


def load_files_config(overrides: list[str]) -> FilesConfig:
    """From `judge.key=value` and `cluster.key=value` alone; the judge is an endpoint by default."""
    values: dict[str, Any] = {"judge": {"annotator": "openai"}, "cluster": {}}
    for override in overrides:
        if override.partition(".")[0] not in values:
            raise InputError(f"`{override}`: without a config only judge.key=value and cluster.key=value can be set")
        apply_override(values, override)
    try:
        return FilesConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(_explain(error, FilesConfig)) from error


def parse_config(values: dict[str, Any], origin: str) -> RunConfig:
    """Validate a mapping; `origin` names it in errors."""
    return validated(RunConfig, values, origin)


def validated(kind: type[Read], values: dict[str, Any], origin: str) -> Read:
    """A section from a mapping. Raises `InputError`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{origin}: {_explain(error, kind)}") from error


def apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"`{override}`: an override is written section.key=value")
    try:
        value = yaml.safe_load(text)
    except NOT_YAML as error:
        raise InputError(f"`{override}`: the value is not valid YAML") from error
    set_key(values, key, value)


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.key` of a config that is not validated yet. Raises `InputError` where there is no such place."""
    if key.startswith("train.") and not values.get("train"):
        values["train"] = [{"objective": "jpo"}]  # the default entry, to be overridden
    if key.startswith(EVERY_ENTRY) and isinstance(values["train"], list):
        for number in range(len(values["train"])):
            set_key(values, f"train.{number}.{key.removeprefix(EVERY_ENTRY)}", copy.deepcopy(value))
        return
    node: Any = values
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, key)
    if isinstance(node, list):
        _child(node, last, key)  # raises where there is no such entry
        raise InputError(f"`{key}={value}`: name a key of the entry, as train.{last}.beta=0.2")
    if not isinstance(node, dict):
        raise InputError(f"`{key}={value}`: {'.'.join(parents)} is a value, it has no keys")
    node[last] = value


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    if isinstance(node, list):
        if part.isdigit() and int(part) < len(node):
            return node[int(part)]
        for entry in node:
            if isinstance(entry, dict) and part in (entry.get("name"), entry.get("name") or entry.get("objective")):
                return entry
        raise InputError(f"`{key}`: no entry `{part}` there (entries are named or numbered from 0)")
    raise InputError(f"`{key}`: `{part}` cannot be set there")


def _explain(error: ValidationError, root: type[Section]) -> str:
    """One line for the first problem, with the nearest known key where a key is unknown."""
    problems = error.errors()
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in first["loc"] if part != "function-after") or "config"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        known = _known_keys(root, first["loc"][:-1])
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean `{near[0]}`?" if near else f"; known here: {', '.join(known)}"
        return f"unknown key `{where}`{hint}{more}"
    if first["type"] == "missing":
        return f"`{where}` is required{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"`{where}`: {message}{shown}{more}"


def _known_keys(root: type[Section], location: tuple[int | str, ...]) -> list[str]:
    """Keys of the section at `location`."""
    model: Any = root
    for part in location:
        if isinstance(part, int):
            continue
        model = _section_of(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section_of(annotation: Any) -> Any:
    """The Section inside `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in getattr(annotation, "__args__", ()) if (found := _section_of(part))), None)
