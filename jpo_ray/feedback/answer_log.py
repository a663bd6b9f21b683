"""Every answer of a language-model judge, on disk before it is used, so that none is paid twice.

A log is a folder for each endpoint, model and set of parameters, shared by all runs. Each process appends to a file of
its own, one JSON object a line in one write; what a kill cuts short is the last line, which readers leave out. Where
`JPO_CACHE` is a URI a new file is begun every few seconds and the one before copied to the store: there is no appending
there, and machines are lost.
"""

import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
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
LEFT_S = 60.0  # a file that nobody has written to for so long is a dead process's


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
        self._name = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._synced = self._begun = time.monotonic()
        self._number = 0  # of the file that is written to
        self._closed: list[Path] = []  # files that are still to be sent
        self._sending: Future[None] | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / "key.json").exists():
                write_json(self._folder / "key.json", key)
            self._place = place_of(self._folder)
            if self._place is not None:
                _exchange(self._place, self._folder)
            for path in sorted(self._folder.glob("*.jsonl")):
                self._read(path)
        except StoreError:
            raise
        except OSError as error:
            raise InputError(f"{self._folder}: cannot keep answers there ({error.strerror})") from error

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._name}-{self._number}.jsonl"

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
        if self._place is not None and time.monotonic() - self._begun > SEND_EVERY_S:
            self._close_file()
            if self._sending is None or self._sending.done():  # one that failed is tried again with the next
                self._sending = self._begin_sending()

    def send(self) -> None:
        """Have on the store what was appended. Raises `StoreError` where it cannot be reached."""
        if self._place is None:
            return
        if self._sending is not None:
            wait([self._sending])
        self._close_file()
        self._send_closed()

    def _close_file(self) -> None:
        self._begun = time.monotonic()
        if self._path.exists():
            self._closed.append(self._path)
            self._number += 1

    def _begin_sending(self) -> "Future[None]":
        """In a thread of its own: the store may take long, and prompts are in flight meanwhile."""
        outcome: Future[None] = Future()

        def work() -> None:
            try:
                self._send_closed()
                outcome.set_result(None)
            except Exception as error:
                outcome.set_exception(error)

        threading.Thread(target=work, daemon=True, name="answers").start()
        return outcome

    def _send_closed(self) -> None:
        assert self._place is not None
        while self._closed:
            path = self._closed[0]
            self._place.store.write(f"{self._place.name}/{path.name}", path.read_bytes())
            self._closed.pop(0)

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                key = row.pop("prompt")
                self._known[key] = Reply(**row)
            except (ValueError, TypeError, KeyError):  # cut short by a kill
                continue


def _exchange(place: Place, folder: Path) -> None:
    """Have here what is on the store, and there what a process that was killed here had not sent."""
    names = set(place.store.names(place.name))
    lacking = [name for name in sorted(names) if name.endswith(".jsonl") and not (folder / name).exists()]
    with TemporaryDirectory(dir=folder) as staged:  # or what Ctrl-C cuts short would be taken for all
        place.store.download(place.name, Path(staged), lacking)
        for name in lacking:
            (Path(staged) / name).rename(folder / name)
    for path in sorted(folder.glob("*.jsonl")):
        if path.name not in names and time.time() - path.stat().st_mtime > LEFT_S:
            place.store.write(f"{place.name}/{path.name}", path.read_bytes())
