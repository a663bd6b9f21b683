"""The cache that all runs share: where it lies, and what others find there after Ctrl-C or damage."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from disks import small_disk
from s3 import S3

from jpo_ray.cache import append_part, cache_folder, fetch_parts, key_folder, read_parts
from jpo_ray.stored import Place, place_of

KEY = {"of": "test"}
VALUES = pa.schema([("value", pa.int64())])


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """JPO_CACHE, else the user's cache folder as the desktop standard has it."""
    monkeypatch.setenv("JPO_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("JPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/jpo-ray")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "jpo-ray"


@pytest.fixture
def shared(s3_server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The folder of a key, on a machine of that name, in a cache on a store."""
    monkeypatch.setenv("JPO_CACHE", s3_server.uri())

    def on(machine: str) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        return key_folder(cache_folder(), "reference", KEY)

    return on


def append(folder: Path, *values: int) -> None:
    append_part(folder, KEY, pa.table({"value": list(values)}, VALUES))


def read(folder: Path) -> list[int]:
    return sorted(value for part in read_parts(folder, VALUES) for value in part["value"].to_pylist())


def place(folder: Path) -> Place:
    found = place_of(folder)
    assert found is not None
    return found


class Interrupted:
    """The file system of a store, with Ctrl-C as soon as something is written."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def open_output_stream(self, path: str) -> Any:
        main = threading.main_thread().ident
        assert main is not None
        time.sleep(0.2)  # until it is waited for
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.2)  # until the writers are told
        return self._files.open_output_stream(path)


def test_ctrl_c_leaves_no_part_cut_short(shared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    here = shared("here")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores
    with monkeypatch.context() as patch:
        store = place(here).store
        patch.setattr(store, "_fs", Interrupted(store._fs))
        with pytest.raises(KeyboardInterrupt):
            append(here, 1, 2)
    signal.signal(signal.SIGINT, before)
    assert read(shared("elsewhere")) == [1, 2]
    append(here, 3)
    assert read(shared("elsewhere")) == [1, 2, 3]


def test_a_damaged_part_is_left_out_and_named(shared: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    here = shared("here")
    append(here, 1, 2)
    (name,) = (path.name for path in here.glob("part-*"))
    append(here, 3)
    where = place(here)
    where.store.write(f"{where.name}/{name}", (here / name).read_bytes()[:-9])
    elsewhere = shared("elsewhere")
    assert read(elsewhere) == [3]
    (said,) = caplog.messages
    assert said.startswith("s3://runs/")
    assert said.endswith(f"/{name}: is damaged and left out, its values are made again")
    assert where.store.read(f"{where.name}/{name}") is None
    assert read(elsewhere) == [3]
    assert len(caplog.messages) == 1  # at the second read it is no longer there
    append(elsewhere, 1, 2)  # made again: the same part, whole
    assert read(shared("third")) == [1, 2, 3]


def test_a_part_that_is_whole_when_read_again_stays(
    shared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad disk here, or an answer cut short, is no reason to delete what is good there."""
    here = shared("here")
    append(here, 1, 2)
    elsewhere = shared("elsewhere")
    store = place(elsewhere).store

    def cut_short(below: str, folder: Path, names: list[str]) -> None:
        for name in names:
            (folder / name).write_bytes((store.read(f"{below}/{name}") or b"")[:-9])

    with monkeypatch.context() as patch:
        patch.setattr(store, "download", cut_short)
        patch.setattr("jpo_ray.cache.place_of", lambda _: Place(store, place(elsewhere).name, elsewhere))
        assert read(elsewhere) == []
    assert read(elsewhere) == [1, 2]


def test_a_part_that_another_run_deletes_meanwhile_is_left_out(shared: Callable[[str], Path]) -> None:
    here = shared("here")
    append(here, 1, 2)
    (gone,) = (path.name for path in here.glob("part-*"))
    append(here, 3)
    elsewhere = place(shared("elsewhere"))
    names, listed = elsewhere.store.names, []

    def names_then_deleted(below: str) -> list[str]:
        listed.append(names(below))
        elsewhere.store.delete(f"{below}/{gone}")
        return listed[-1]

    elsewhere.store.names = names_then_deleted  # type: ignore[method-assign]
    folder = shared("elsewhere")
    fetch_parts(elsewhere, folder)
    assert gone in listed[0]
    assert read(folder) == [3]


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-9], lambda _: b"", lambda content: content[:9] + b"x" + content[10:]]
)
def test_a_damaged_local_part_is_deleted_named_and_made_again(
    damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    append(tmp_path, 1, 2)
    (part,) = tmp_path.glob("part-*")
    append(tmp_path, 3)
    content = part.read_bytes()
    part.write_bytes(damage(content))
    assert read(tmp_path) == [3]
    assert caplog.messages == [f"{part}: is damaged and left out, its values are made again"]
    assert not part.exists()
    append(tmp_path, 1, 2)
    assert part.read_bytes() == content
    assert read(tmp_path) == [1, 2, 3]


def test_a_part_damaged_here_is_fetched_from_the_store_again(shared: Callable[[str], Path]) -> None:
    here = shared("here")
    append(here, 1, 2)
    (part,) = here.glob("part-*")
    part.write_bytes(b"")
    assert read(here) == [1, 2]


def test_a_full_disk_leaves_no_part_and_nothing_half_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        append(disk.path / "key", 1, 2)
        before = sorted((disk.path / "key").iterdir())
        with pytest.raises(OSError, match="No space left on device"):
            append(disk.path / "key", *range(100_000))
        assert sorted((disk.path / "key").iterdir()) == before
        assert read(disk.path / "key") == [1, 2]
