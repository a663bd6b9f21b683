"""The run directory: every path in it, artifacts that exist whole or not at all, and the lease that guards it.

An artifact is a folder whose `manifest.json` is written last. It is built aside, under `.building/`, and renamed into
place, so a reader never meets half of one. Its fingerprint hashes what it was made from (the config slice, the
fingerprints of its inputs); a stage whose fingerprint stands already is skipped, any other is built again.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jpo_ray.artifacts import FINGERPRINT_DIGITS, FORMAT, Manifest, package_versions, stage_fingerprint
from jpo_ray.errors import InputError
from jpo_ray.files import file_hashes, read_json, write_json
from jpo_ray.lease import hold_lease


class RunDir:
    """A run directory. Open it with `open_run`, which takes the lease.

    What stands in one of the run directories `others`, with the same fingerprint, is taken over instead of made.
    """

    def __init__(self, root: Path, others: Sequence[Path] = ()) -> None:
        self.root = root
        self._others = [RunDir(other) for other in others]

    def path(self, artifact: str) -> Path:
        """Folder of an artifact such as `items` or `train/jpo`."""
        return self.root / artifact

    def manifest(self, artifact: str) -> Manifest | None:
        """The artifact's manifest, or None where the artifact does not (fully) exist."""
        path = self.path(artifact) / "manifest.json"
        try:
            fields = read_json(path)
        except (FileNotFoundError, ValueError):
            return None
        if fields.get("format") != FORMAT:
            raise InputError(
                f"{path}: written by another version of jpo-ray (format {fields.get('format')}, this one reads "
                f"{FORMAT}); use a new --run-dir"
            )
        manifest = Manifest(**fields)
        return manifest if all((path.parent / name).exists() for name in manifest.files) else None

    def require(self, artifact: str, stage: str) -> Manifest:
        """The manifest of an artifact that must exist. Raises `InputError` naming the stage that makes it."""
        manifest = self.manifest(artifact)
        if manifest is None:
            raise InputError(f"{self.root}: no `{artifact}` yet; run `jpo {stage}` first (or `jpo run` for all of it)")
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
        building.mkdir(parents=True, exist_ok=True)
        (building / "manifest.json").unlink(missing_ok=True)  # of a build that ended just before it was renamed
        if (taken := self._taken_over(artifact, fingerprint, building)) is not None:
            self._replace(artifact, building)
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
        self._replace(artifact, building)
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

    def _replace(self, artifact: str, built: Path) -> None:
        target = self.path(artifact)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            old = self.root / ".building" / f"old-{secrets.token_hex(4)}"
            target.rename(old)
            built.rename(target)
            shutil.rmtree(old)
        else:
            built.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@contextmanager
def open_run(root: Path, others: Sequence[Path] = ()) -> Iterator[RunDir]:
    """Open (or create) a run directory and hold its lease until the block ends.

    Raises `InputError` where another run holds it, or where another version of jpo-ray wrote it.
    """
    if root.exists() and not root.is_dir():
        raise InputError(f"--run-dir {root}: is a file; name a folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--run-dir {root}: cannot be made ({error.strerror})") from error
    marker = root / "run.json"
    if marker.exists():
        found = _format_of(marker)
        if found != FORMAT:
            raise InputError(
                f"--run-dir {root}: written by another version of jpo-ray (format {found}, this one reads {FORMAT}); "
                "use a new folder"
            )
    elif any(not entry.name.startswith(("lease.json", ".lease-", ".run.json")) for entry in root.iterdir()):
        raise InputError(f"--run-dir {root}: holds files that are not a run's; name an empty or new folder")
    with hold_lease(root / "lease.json"):
        if not marker.exists():
            write_json(marker, {"format": FORMAT})
        yield RunDir(root, others)


def _format_of(marker: Path) -> Any:
    try:
        return read_json(marker).get("format")
    except (ValueError, AttributeError):  # another program's run.json
        return None
