"""The adapters of a server: copies in its own folder, and a list that all its replicas read.

An adapter is copied (its two files, nothing else) under its hash, so that what was checked is what is served, on every
replica and after any restart, whatever becomes of the folder that it came from. The list is one small file, replaced
whole; a replica looks whether it changed before it answers.
"""

import fcntl
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jpo_ray.config_base import NAME_PATTERN
from jpo_ray.files import file_hashes, hash_file, read_json, write_json
from jpo_ray.serving.adapter_checks import WEIGHTS, AdapterError, Shapes, check_adapter
from jpo_ray.serving.models import ADAPTER_CONFIG, Adapter, beta_beside

LIST = "adapters.json"
RUNNING = ".running"
NAME = re.compile(NAME_PATTERN)


@dataclass(frozen=True)
class Listed:
    """An adapter on the list."""

    name: str
    folder: str  # the server's copy; its own before there is one
    rank: int
    beta: float
    source: str


class AdapterStore:
    """The list on disk. Every replica has one of its own, on the same folder."""

    def __init__(self, root: Path, shapes: Shapes, *, max_adapters: int, max_rank: int, beta: float) -> None:
        self.root = root
        self._shapes, self._max_adapters, self._max_rank, self._beta = shapes, max_adapters, max_rank, beta
        self._stamp: tuple[int, int] | None = None
        self._known: dict[str, Listed] = {}

    def begin(self, adapters: Sequence[Adapter]) -> dict[str, Listed]:
        """Start with these and no others. Raises `AdapterError` for one that cannot be served."""
        self.checked(adapters)
        self.root.mkdir(parents=True, exist_ok=True)
        listed = {adapter.name: self._copied(adapter) for adapter in adapters}
        with _locked(self.root):
            self._write(listed)
        kept = {Path(entry.folder).name for entry in listed.values()}
        for folder in (self.root / "adapters").glob("*"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)  # of a server before this one
        return listed

    def checked(self, adapters: Sequence[Adapter]) -> list[Listed]:
        """These where they lie, with nothing written. Raises `AdapterError` for one that cannot be served."""
        if len(adapters) > self._max_adapters:
            raise AdapterError(f"{len(adapters)} adapters, and max_adapters is {self._max_adapters}; raise it")
        return [self._checked(adapter) for adapter in adapters]

    def listed(self) -> dict[str, Listed]:
        """The adapters now, by name: read again where the list was replaced."""
        stat = (self.root / LIST).stat()
        stamp = (stat.st_mtime_ns, stat.st_ino)
        if stamp != self._stamp:
            content = read_json(self.root / LIST)
            self._known = {name: Listed(**fields) for name, fields in content.items()}
            self._stamp = stamp
        return self._known

    def prepare(self, name: str, folder: str, allowed: Sequence[Path]) -> Listed:
        """Check and copy an adapter that is to be added. Raises `AdapterError`."""
        if not NAME.fullmatch(name):
            raise AdapterError("name: up to 64 letters, digits, and . _ - after the first of them")
        return self._copied(Adapter(name, _inside(folder, allowed), None))

    def add(self, entry: Listed) -> None:
        """Put a prepared adapter on the list. Raises `AdapterError` where the name is taken or the list is full."""
        with _locked(self.root):
            now = dict(self.listed())
            if entry.name in now:
                raise name_taken(entry.name)
            if not Path(entry.folder).is_dir():  # the same one was removed meanwhile
                raise AdapterError(f"{entry.name}: removed while it was added; add it again", 409)
            if len(now) >= self._max_adapters:
                raise AdapterError(f"{self._max_adapters} adapters are served already; remove one first", 409)
            self._write(now | {entry.name: entry})

    def remove(self, name: str) -> None:
        """Take an adapter off the list, its copy with it. Raises `AdapterError` where there is none of that name."""
        with _locked(self.root):
            now = dict(self.listed())
            if name not in now:
                raise no_adapter()
            entry = now.pop(name)
            self._write(now)
            self._discard(entry, now)

    def discard(self, entry: Listed) -> None:
        """Delete the copy of an adapter that is not on the list; engines that hold its weights need it no more."""
        with _locked(self.root):
            self._discard(entry, self.listed())

    def _discard(self, entry: Listed, listed: Mapping[str, Listed]) -> None:
        if all(other.folder != entry.folder for other in listed.values()):
            shutil.rmtree(entry.folder, ignore_errors=True)

    def _checked(self, adapter: Adapter) -> Listed:
        rank = check_adapter(adapter.folder, self._shapes, self._max_rank)
        beta = adapter.beta or beta_beside(adapter.folder) or self._beta
        return Listed(adapter.name, str(adapter.folder), rank, beta, str(adapter.folder))

    def _copied(self, adapter: Adapter) -> Listed:
        entry = self._checked(adapter)
        digest = hash_file(adapter.folder / WEIGHTS)[:16] + hash_file(adapter.folder / ADAPTER_CONFIG)[:8]
        target = self.root / "adapters" / f"{adapter.name}-{digest}"
        if not target.is_dir():
            building = target.with_name(f".{secrets.token_hex(8)}")
            building.mkdir(parents=True)
            try:
                for file in (ADAPTER_CONFIG, WEIGHTS):
                    shutil.copyfile(adapter.folder / file, building / file)
                check_adapter(building, self._shapes, self._max_rank)  # what is served is what was checked
                with suppress(OSError):  # another replica was quicker
                    building.rename(target)
            finally:
                shutil.rmtree(building, ignore_errors=True)
        if set(file_hashes(target)) != {ADAPTER_CONFIG, WEIGHTS}:
            raise AdapterError(f"{adapter.name}: the same adapter was removed meanwhile; add it again", 409)
        return replace(entry, folder=str(target))

    def _write(self, listed: dict[str, Listed]) -> None:
        write_json(self.root / LIST, {name: asdict(entry) for name, entry in listed.items()})


def no_adapter() -> AdapterError:
    return AdapterError("there is no adapter of that name", 404)


def name_taken(name: str) -> AdapterError:
    return AdapterError(f"there is an adapter `{name}` already; remove it first", 409)


@contextmanager
def own_folder(root: Path) -> Iterator[Path]:
    """A folder below `root` for this process's server alone, until the block ends.

    What servers left that were killed is cleared away: nobody locks their folders any more.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"server-{secrets.token_hex(8)}"
    with _locked(root):
        for other in root.glob("server-*"):
            if not _running(other):
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir()
        running = (folder / RUNNING).open("a")
        fcntl.flock(running, fcntl.LOCK_EX)
    with running:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _running(folder: Path) -> bool:
    """Whether the server of that folder still holds its lock."""
    try:
        with (folder / RUNNING).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held; or another user's, which is not this one's to clear away
        return True
    return False


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    with (root / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _inside(folder: str, allowed: Sequence[Path]) -> Path:
    """The real path of a folder within an allowed one. The reply does not tell what exists elsewhere."""
    refusal = AdapterError("folder: not within a folder that adapters may come from", 403)
    if "\0" in folder or len(folder) > 4096:
        raise refusal
    for root in allowed:
        try:
            real = (root / folder).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            continue
        inside = real != root.resolve() and real.is_relative_to(root.resolve())
        if inside and real.is_dir():
            if any((real / file).is_symlink() for file in (ADAPTER_CONFIG, WEIGHTS)):
                raise refusal
            return real
    raise refusal
