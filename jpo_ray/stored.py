"""Artifacts and checkpoints on an object store, and the working copies that machines have of them.

An artifact there is `ARTIFACT/manifest.json`, which names the folder beside it that holds the files: a new version goes
into a folder of its own, the manifest is written over the old one when all of it is there, and only then is the old
folder deleted. So a reader gets one version or the other, and hashes tell it if it did not.

A working copy is a local folder with an `origin.json`. Whatever lies below it has its place in the store.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jpo_ray.artifacts import FORMAT, Manifest, of_other_format
from jpo_ray.errors import InputError
from jpo_ray.files import flush, hash_file, read_json, write_json
from jpo_ray.store import Store, is_uri

MANIFEST = "manifest.json"
HASHES = "files.json"  # of a folder that is no artifact (yet), written last
ORIGIN = "origin.json"


@cache
def open_store(uri: str) -> Store:
    return Store(uri)


def working_copy(kind: str, uri: str) -> Path:
    """The folder on this machine for what is at a URI; it may be deleted whenever nothing runs."""
    named = os.environ.get("JPO_CACHE") or ""
    cache = Path(named).expanduser() if named and not is_uri(named) else users_folder()
    return cache.resolve() / kind / hashlib.sha256(uri.encode()).hexdigest()[:16]


def users_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jpo-ray"


def make_working_copy(uri: str, root: Path) -> None:
    """Make `root` a working copy of the run directory (or cache) at a URI."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / ORIGIN).exists():
        write_json(root / ORIGIN, {"uri": uri})


@dataclass(frozen=True)
class Place:
    """Where on a store something is that lies in a working copy."""

    store: Store
    name: str
    root: Path  # of the working copy


def place_of(path: Path) -> Place | None:
    """The place of a path on a store; None where it lies in no working copy."""
    here = path.resolve()
    for root in here.parents:
        if (root / ORIGIN).exists():
            return Place(open_store(read_json(root / ORIGIN)["uri"]), here.relative_to(root).as_posix(), root)
    return None


@dataclass(frozen=True)
class Stored:
    """An artifact on a store."""

    manifest: Manifest
    folder: str  # of its files


def stored_artifact(store: Store, artifact: str) -> Stored | None:
    """The artifact, or None where it does not (fully) exist."""
    name = f"{artifact}/{MANIFEST}"
    content = store.read(name)
    try:
        values = json.loads(content or b"")
        folder = f"{artifact}/{values.pop('folder')}"
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    if values.get("format") != FORMAT:
        raise of_other_format(store.shown(name), values.get("format"))
    found = Stored(Manifest(**values), folder)
    return found if found.manifest.files.keys() <= set(store.names(folder)) else None


def commit_artifact(store: Store, artifact: str, folder: Path, manifest: Manifest) -> None:
    """Copy a built artifact to the store; it stands there with the last write."""
    version = f"{manifest.fingerprint}-{secrets.token_hex(4)}"
    store.upload(folder, f"{artifact}/{version}", manifest.files)
    store.write(f"{artifact}/{MANIFEST}", json.dumps(asdict(manifest) | {"folder": version}, indent=1).encode())
    for left in {name.split("/")[0] for name in store.names(artifact)} - {version, MANIFEST}:
        store.delete(f"{artifact}/{left}")


def fetch_artifact(store: Store, artifact: str, root: Path) -> Manifest | None:
    """Make the working copy `root` hold the artifact as it stands in the store; its manifest, or None for none.

    Raises `InputError` for a file whose hash is not the manifest's.
    """
    target = root / artifact
    with locked(root, artifact):
        found = stored_artifact(store, artifact)
        if found is None:
            if (target / MANIFEST).exists():  # of a run that was there before
                shutil.rmtree(target)
            return None
        if _manifest_at(target) == found.manifest:
            return found.manifest
        staged = root / ".building" / f"fetched-{artifact.replace('/', '-')}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        _download(store, found.folder, staged, found.manifest.files)
        write_json(staged / MANIFEST, asdict(found.manifest))
        flush(staged)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.rename(target)
        return found.manifest


def push(folder: Path, hashes: dict[str, str], names: Iterable[str] | None = None) -> None:
    """Copy files of a folder of a working copy to the store, where it has one, and then the hashes (name -> sha256).

    All that have hashes, or those of `names` where others are there already.
    """
    if (place := place_of(folder)) is not None:
        place.store.upload(folder, place.name, hashes if names is None else names)
        place.store.write(f"{place.name}/{HASHES}", json.dumps(hashes, indent=1).encode())


def pull(folder: Path) -> dict[str, str]:
    """Bring the files that were pushed into a folder of a working copy, but for those that it has; their hashes.

    Raises `InputError` for a file whose hash is not what was pushed.
    """
    if (place := place_of(folder)) is None:
        return {}
    with locked(place.root, place.name):
        hashes: dict[str, str] = json.loads(place.store.read(f"{place.name}/{HASHES}") or b"{}")
        lacking = {file: digest for file, digest in hashes.items() if not _has(folder / file, digest)}
        _download(place.store, place.name, folder, lacking)
    return hashes


def _download(store: Store, below: str, folder: Path, hashes: dict[str, str]) -> None:
    try:
        store.download(below, folder, hashes)
    except FileNotFoundError as error:
        raise InputError(
            f"{store.shown(below)}: a file is missing or was replaced in the meantime ({error}); try again"
        ) from error
    for name, digest in hashes.items():
        if hash_file(folder / name) != digest:
            (folder / name).unlink()
            raise InputError(
                f"{store.shown(f'{below}/{name}')}: is damaged, its sha256 is not the one that was recorded; delete "
                "the folder, and the same command makes it again"
            )


def _has(path: Path, digest: str) -> bool:
    return path.exists() and hash_file(path) == digest


def _manifest_at(folder: Path) -> Manifest | None:
    try:
        manifest = Manifest(**read_json(folder / MANIFEST))
    except (OSError, ValueError, TypeError):
        return None
    return manifest if all((folder / name).exists() for name in manifest.files) else None


@contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """One process of this machine at a time."""
    folder = root / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name.replace("/", "-")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Origin:
    """Whence any machine gets an artifact of a working copy, to the same path there as here."""

    uri: str
    root: Path
    artifact: str
    fingerprint: str

    def fetch(self) -> None:
        """Have the artifact on this machine. Raises `InputError` where the store has another or none."""
        make_working_copy(self.uri, self.root)
        store = open_store(self.uri)
        found = fetch_artifact(store, self.artifact, self.root)
        if found is None or found.fingerprint != self.fingerprint:
            raise InputError(f"{store.shown(self.artifact)}: was replaced by another run; start again")


def origins(*values: Any) -> list[Origin]:
    """Origins of all artifacts of working copies that paths in `values` (tuples, lists, dataclasses of them) name."""
    found = (_origin(path) for value in values for path in _paths(value))
    return list(dict.fromkeys(origin for origin in found if origin is not None))


def _paths(value: Any) -> Iterable[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _paths(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _paths(getattr(value, field.name))


def _origin(path: Path) -> Origin | None:
    place = place_of(path)
    here = path.resolve()
    folder = next((each for each in (here, *here.parents) if (each / MANIFEST).exists()), None)
    if place is None or folder is None:
        return None
    artifact = folder.relative_to(place.root).as_posix()
    return Origin(place.store.uri, place.root, artifact, read_json(folder / MANIFEST)["fingerprint"])
