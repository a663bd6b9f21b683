"""The run directory: every path in it, artifacts that exist whole or not at all, and the lease that guards it.

An artifact is a folder whose `manifest.json` is written last. It is built aside, under `.building/`, flushed to disk
and renamed into place, so a reader never meets half of one, also after a power cut. Its fingerprint hashes what it was
made from (the config slice, the fingerprints of its inputs); a stage whose fingerprint stands already is skipped, any
other is built again.

A run directory may be a URI of an object store. What happens then happens in a working copy on this machine, artifacts
are copied to the store as they are finished, and what stands is what stands there.
"""

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jpo_ray.artifacts import (
    FINGERPRINT_DIGITS,
    FORMAT,
    Manifest,
    of_other_format,
    package_versions,
    stage_fingerprint,
)
from jpo_ray.errors import InputError
from jpo_ray.files import file_hashes, flush, flush_one, read_json, write_json
from jpo_ray.lease import FileLease, hold_lease
from jpo_ray.store import Store, is_uri
from jpo_ray.store_lease import CLAIMS, StoreLease
from jpo_ray.stored import (
    commit_artifact,
    fetch_artifact,
    make_working_copy,
    open_store,
    stored_artifact,
    working_copy,
)

MARKER = "run.json"


class RunDir:
    """A run directory: a folder, or a URI (text). Open it with `open_run`, which takes the lease.

    What stands in one of the run directories `others`, with the same fingerprint, is taken over instead of made.
    Raises `InputError` where a URI's store cannot be reached.
    """

    def __init__(self, where: Path | str, others: Sequence[Path | str] = ()) -> None:
        self.where = where
        self.root = run_root(where)
        self._store: Store | None = None
        if is_uri(where):
            self._store = open_store(str(where))
            make_working_copy(str(where), self.root)
        self._others = [RunDir(other) for other in others]

    def absolute(self) -> Path | str:
        """Where it is, for a process that works elsewhere."""
        return self.where if isinstance(self.where, str) else self.where.resolve()

    def below(self, name: str) -> Path | str:
        """The place of a run within this one."""
        if isinstance(self.where, Path):
            return self.root / name
        path, *options = self.where.split("?", 1)
        return "?".join([f"{path.rstrip('/')}/{name}", *options])

    def path(self, artifact: str) -> Path:
        """Folder of an artifact such as `items` or `train/jpo`; of one on a store it is fetched first."""
        if self._store is not None:
            fetch_artifact(self._store, artifact, self.root)
        return self.root / artifact

    def manifest(self, artifact: str) -> Manifest | None:
        """The artifact's manifest, or None where the artifact does not (fully) exist."""
        if self._store is not None:
            found = stored_artifact(self._store, artifact)
            return None if found is None else found.manifest
        path = self.path(artifact) / "manifest.json"
        try:
            fields = read_json(path)
        except (FileNotFoundError, ValueError):
            return None
        if fields.get("format") != FORMAT:
            raise of_other_format(path, fields.get("format"))
        manifest = Manifest(**fields)
        return manifest if all((path.parent / name).exists() for name in manifest.files) else None

    def trained(self) -> list[str]:
        """Names of what stands, or stood half, below `train/`."""
        if self._store is not None:
            return sorted({name.split("/")[0] for name in self._store.names("train")})
        return sorted(path.name for path in (self.root / "train").glob("*") if path.is_dir())

    def require(self, artifact: str, stage: str) -> Manifest:
        """The manifest of an artifact that must exist. Raises `InputError` naming the stage that makes it."""
        manifest = self.manifest(artifact)
        if manifest is None:
            raise InputError(f"{self.where}: no `{artifact}` yet; run `jpo {stage}` first (or `jpo run` for all of it)")
        return manifest

    def build(
        self,
        artifact: str,
        *,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        make: Callable[[Path], dict[str, Any]],
        keep_partial: bool = False,
    ) -> tuple[Manifest, bool]:
        """Make the artifact unless it stands already with the same fingerprint.

        `make(folder)` fills an empty folder and returns its counts. With `keep_partial` the folder of an interrupted
        build with the same fingerprint is handed to `make` as it was left (training resumes from its checkpoints).
        Returns the manifest and whether it was built now.
        """
        fingerprint = stage_fingerprint(artifact, inputs, config)
        standing = self.manifest(artifact)
        if standing is not None and standing.fingerprint == fingerprint:
            return standing, False
        building = self.root / ".building" / f"{artifact.replace('/', '-')}-{fingerprint}"
        for left in self._unfinished(artifact):
            if left != building or not keep_partial:
                shutil.rmtree(left, ignore_errors=True)  # a training beside this one may delete it too
        self._forget_partial(artifact, building.name if keep_partial else None)
        building.mkdir(parents=True, exist_ok=True)
        (building / "manifest.json").unlink(missing_ok=True)  # of a build that ended just before it was renamed
        if (taken := self._taken_over(artifact, fingerprint, building)) is not None:
            self._replace(artifact, building, taken)
            return taken, False
        started = time.monotonic()
        try:
            counts = make(building)
        except BaseException:
            if not keep_partial:
                shutil.rmtree(building, ignore_errors=True)
            raise
        manifest = Manifest(
            artifact=artifact,
            fingerprint=fingerprint,
            inputs=dict(inputs),
            config=dict(config),
            files=file_hashes(building),
            counts=counts,
            versions=package_versions(),
            seconds=round(time.monotonic() - started, 3),
        )
        write_json(building / "manifest.json", manifest.__dict__)
        self._replace(artifact, building, manifest)
        return manifest, True

    def _taken_over(self, artifact: str, fingerprint: str, building: Path) -> Manifest | None:
        """The manifest of another run's artifact, whose files are then in `building` (linked: nobody changes them)."""
        for other in self._others:
            found = other.manifest(artifact)
            if found is not None and found.fingerprint == fingerprint:
                shutil.rmtree(building)
                shutil.copytree(other.path(artifact), building, copy_function=_link_or_copy)
                return found
        return None

    def _unfinished(self, artifact: str) -> list[Path]:
        """What interrupted builds of the artifact left, of any fingerprint, and replaced artifacts half deleted."""
        name = artifact.replace("/", "-")
        building = self.root / ".building"
        found = [*building.glob(f"{name}-{'[0-9a-f]' * FINGERPRINT_DIGITS}"), *building.glob("old-*")]
        return [path for path in found if path.is_dir()]

    def _forget_partial(self, artifact: str, keep: str | None = None) -> None:
        """Delete what interrupted builds of the artifact (trainings) left in the store."""
        if self._store is None:
            return
        name = re.compile(rf"{re.escape(artifact.replace('/', '-'))}-[0-9a-f]{{{FINGERPRINT_DIGITS}}}")
        for left in {path.split("/")[0] for path in self._store.names(".building")} - {keep}:
            if name.fullmatch(left):
                self._store.delete(f".building/{left}")

    def _replace(self, artifact: str, built: Path, manifest: Manifest) -> None:
        if self._store is not None:
            commit_artifact(self._store, artifact, built, manifest)
            self._forget_partial(artifact)
        flush(built)
        target = self.root / artifact
        target.parent.mkdir(parents=True, exist_ok=True)
        old = self.root / ".building" / f"old-{secrets.token_hex(4)}"
        if target.exists():
            target.rename(old)
        built.rename(target)
        flush_one(target.parent)  # the old one is gone only where the new one stands, whatever happens
        shutil.rmtree(old, ignore_errors=True)  # there may be none, and a training beside this one may delete it too


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def run_root(where: Path | str) -> Path:
    """The folder of a run directory; of a URI that of its working copy."""
    return working_copy("runs", where) if isinstance(where, str) and is_uri(where) else Path(where)


@contextmanager
def open_run(where: Path | str, others: Sequence[Path | str] = (), wait_s: float = 0.0) -> Iterator[RunDir]:
    """Open (or create) a run directory and hold its lease until the block ends.

    Raises `InputError` where another run holds it (for longer than `wait_s`), or where another version of jpo-ray wrote
    it.
    """
    if isinstance(where, str) and is_uri(where):
        store = open_store(where)
        written = store.read(MARKER)
        _check_marker(where, written, [] if written else (name for name in store.top() if name != CLAIMS))
        with hold_lease(StoreLease(store), wait_s):
            store.write(MARKER, json.dumps({"format": FORMAT}).encode())
            yield RunDir(where, others)
        return
    root = Path(where)
    if root.exists() and not root.is_dir():
        raise InputError(f"--run-dir {root}: is a file; name a folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--run-dir {root}: cannot be made ({error.strerror})") from error
    marker = root / MARKER
    entries = (entry.name for entry in root.iterdir())
    own = ("lease.json", ".lease-", ".run.json")
    _check_marker(
        root, marker.read_bytes() if marker.exists() else None, (name for name in entries if not name.startswith(own))
    )
    with hold_lease(FileLease(root / "lease.json"), wait_s):
        if not marker.exists():
            write_json(marker, {"format": FORMAT})
        yield RunDir(root, others)


def _check_marker(where: Path | str, marker: bytes | None, others: Iterable[str]) -> None:
    """Raise `InputError` for a folder that holds another version's run, or (`others`) no run but something else."""
    if marker is None:
        if any(others):
            raise InputError(f"--run-dir {where}: holds files that are not a run's; name an empty or new folder")
        return
    try:
        found = json.loads(marker).get("format")
    except (ValueError, AttributeError):  # another program's run.json
        found = None
    if found != FORMAT:
        raise of_other_format(f"--run-dir {where}", found)
