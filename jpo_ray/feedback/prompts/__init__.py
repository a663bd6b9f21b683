"""Prompts of language-model judges, and what their answers mean."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import Comparison, Verdict

SETS = ("paper", "hardened")
FIELDS = {
    "system": set(),
    "conditional": {"instruction", "output_a", "output_b"},
    "joint": {"instruction_a", "output_a", "instruction_b", "output_b"},
    "repair": set(),
}
MARK = "mark"
_FIELD = re.compile(r"\{([a-z_]+)\}")
# The two answers, with what models like to put around them: quotes, emphasis, a full stop.
_ANSWER = re.compile(r"[\s*_`'\"“”‘’]*output \(([ab])\)[\s*_`'\"“”‘’.]*", re.IGNORECASE)

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompts:
    """Templates of the two protocols. `{mark}` is a hash of the judged texts, so that none can contain it."""

    system: str
    conditional: str
    joint: str
    repair: str

    def messages(self, comparison: Comparison) -> Messages:
        """The chat messages that ask which of the two is better."""
        shown = {
            "instruction": comparison.instruction_a,
            "instruction_a": comparison.instruction_a,
            "instruction_b": comparison.instruction_b,
            "output_a": comparison.response_a,
            "output_b": comparison.response_b,
        }
        shown[MARK] = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12]
        asked = self.joint if comparison.protocol == "joint" else self.conditional
        return [
            {"role": "system", "content": _filled(self.system, shown)},
            {"role": "user", "content": _filled(asked, shown)},
        ]

    def repair_messages(self, messages: Messages, answer: str) -> Messages:
        """The same conversation, asked once more after an answer that is neither of the two."""
        return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": self.repair}]


def load_prompts(name: str) -> Prompts:
    """`paper`, `hardened` or a YAML file with the same keys. Raises `InputError` where it lacks one or a field."""
    path = Path(__file__).parent / f"{name}.yaml" if name in SETS else Path(name).expanduser()
    try:
        read: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        sets = ", ".join(SETS)
        raise InputError(f"judge.prompts: {name}: {error.strerror or error} (nor one of {sets})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"judge.prompts: {name}: is no YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(read, dict) or set(read) != set(FIELDS) or not all(isinstance(v, str) for v in read.values()):
        raise InputError(f"judge.prompts: {name}: must have the texts {', '.join(FIELDS)}, and nothing else")
    for key, wanted in FIELDS.items():
        found = set(_FIELD.findall(read[key])) - {MARK}
        if found != wanted:
            fields = ", ".join(f"{{{field}}}" for field in sorted(wanted ^ found))
            raise InputError(f"judge.prompts: {name}: {key}: lacks or does not know {fields}")
    return Prompts(**{key: read[key] for key in FIELDS})


def parse_answer(text: str) -> Verdict:
    """`a` or `b` for one of the two exact answers, else `invalid`."""
    found = _ANSWER.fullmatch(text)
    return "invalid" if found is None else ("a" if found[1].lower() == "a" else "b")


def _filled(template: str, texts: dict[str, str]) -> str:
    """In one pass, so that a judged text with braces in it stays as it is."""
    return _FIELD.sub(lambda field: texts[field[1]], template)
