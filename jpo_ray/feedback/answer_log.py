"""Every answer of a language-model judge, on disk before it is used, so that none is paid twice.

A log is a folder for each endpoint, model and set of parameters, shared by all runs. Each process appends to a file of
its own, one JSON object a line in one write; what a kill cuts short is the last line, which readers leave out.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jpo_ray.cache import key_folder
from jpo_ray.errors import InputError
from jpo_ray.files import write_json

KIND = "answers"
SYNC_EVERY_S = 1.0  # a machine that loses power loses at most so much; a kill loses nothing that was written


@dataclass(frozen=True)
class Reply:
    """What a language model said to one prompt, and what that took."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: str = ""  # why the model or its provider would not answer
    share_a: float | None = None  # probability of (a) among (a) and (b), where log-probs were asked and given


def prompt_key(messages: Sequence[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps(list(messages)).encode()).hexdigest()[:32]


class AnswerLog:
    """Replies by the prompt they answer. Raises `InputError` where the folder cannot be read or written."""

    def __init__(self, cache: Path, key: dict[str, Any]) -> None:
        self._folder = key_folder(cache, KIND, key)
        self._known: dict[str, Reply] = {}
        self.prompt_tokens = self.completion_tokens = 0  # of what was appended: what this process has paid
        self._path = self._folder / f"{os.getpid()}-{secrets.token_hex(6)}.jsonl"
        self._synced = time.monotonic()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / "key.json").exists():
                write_json(self._folder / "key.json", key)
            for path in sorted(self._folder.glob("*.jsonl")):
                self._read(path)
        except OSError as error:
            raise InputError(f"{self._folder}: cannot keep answers there ({error.strerror})") from error

    def get(self, key: str) -> Reply | None:
        return self._known.get(key)

    def append(self, key: str, reply: Reply) -> None:
        """Write, then know."""
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps({"prompt": key, **asdict(reply)}).encode() + b"\n")
            if time.monotonic() - self._synced > SYNC_EVERY_S:
                os.fsync(file.fileno())
                self._synced = time.monotonic()
        self._known[key] = reply
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                key = row.pop("prompt")
                self._known[key] = Reply(**row)
            except (ValueError, TypeError, KeyError):  # cut short by a kill
                continue
