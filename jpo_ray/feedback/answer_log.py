"""Every answer of a language-model judge, on disk before it is used, so that none is paid twice.

A log is a folder for each endpoint, model and set of parameters, shared by all runs. Each process appends to a file of
its own, one JSON object a line in one write; what a kill cuts short is the last line, which readers leave out. Where
`JPO_CACHE` is a URI, new lines also go to the store every few seconds, as an object of their own: there is no appending
there, and machines are lost.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jpo_ray.cache import key_folder
from jpo_ray.errors import InputError
from jpo_ray.files import write_json
from jpo_ray.store import StoreError
from jpo_ray.stored import Place, place_of

KIND = "answers"
SYNC_EVERY_S = 1.0  # a machine that loses power loses at most so much; a kill loses nothing that was written
SEND_EVERY_S = 5.0  # a machine that is lost for good takes so much with it


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
        self._synced = self._sent = time.monotonic()
        self._unsent: list[bytes] = []
        self._objects = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / "key.json").exists():
                write_json(self._folder / "key.json", key)
            self._place = place_of(self._folder)
            if self._place is not None:
                _fetch(self._place, self._folder)
            for path in sorted(self._folder.glob("*.jsonl")):
                self._read(path)
        except StoreError:
            raise
        except OSError as error:
            raise InputError(f"{self._folder}: cannot keep answers there ({error.strerror})") from error

    def get(self, key: str) -> Reply | None:
        return self._known.get(key)

    def append(self, key: str, reply: Reply) -> None:
        """Write, then know."""
        line = json.dumps({"prompt": key, **asdict(reply)}).encode() + b"\n"
        with self._path.open("ab", buffering=0) as file:
            file.write(line)
            if time.monotonic() - self._synced > SYNC_EVERY_S:
                os.fsync(file.fileno())
                self._synced = time.monotonic()
        self._known[key] = reply
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        if self._place is not None:
            self._unsent.append(line)
            if time.monotonic() - self._sent > SEND_EVERY_S:
                self.send()

    def send(self) -> None:
        """Have on the store what was appended. Raises `StoreError` where it cannot be reached."""
        if self._place is None or not self._unsent:
            return
        name = f"{self._place.name}/{self._path.stem}-{self._objects}.jsonl"
        self._place.store.write(name, b"".join(self._unsent))
        self._unsent, self._objects, self._sent = [], self._objects + 1, time.monotonic()

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                key = row.pop("prompt")
                self._known[key] = Reply(**row)
            except (ValueError, TypeError, KeyError):  # cut short by a kill
                continue


def _fetch(place: Place, folder: Path) -> None:
    """Have here what is on the store."""
    names = place.store.names(place.name)
    lacking = [name for name in names if name.endswith(".jsonl") and not (folder / name).exists()]
    with TemporaryDirectory(dir=folder) as staged:  # or what Ctrl-C cuts short would be taken for all
        place.store.download(place.name, Path(staged), lacking)
        for name in lacking:
            (Path(staged) / name).rename(folder / name)
