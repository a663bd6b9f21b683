"""A run directory on a real S3 server: whole artifacts or none, checked when they are read; one holder at a time."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3 import S3

from jpo_ray import lease
from jpo_ray.errors import InputError
from jpo_ray.lease import hold_lease
from jpo_ray.lease_holder import this_process
from jpo_ray.runs import RunDir, open_run
from jpo_ray.store import Store
from jpo_ray.store_lease import CLAIMS, StoreLease
from jpo_ray.stored import HASHES, origins, place_of, pull, push

DEAD_PID = 2**22 + 1  # above the largest that Linux gives out


def write(text: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        (folder / "data.txt").write_text(text)
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / "more.txt").write_text(text * 2)
        return {"letters": len(text)}

    return make


def build(run: RunDir, text: str = "abc", artifact: str = "items", **config: Any) -> bool:
    return run.build(artifact, inputs={}, config=config, make=write(text))[1]


def text_of(run: RunDir, artifact: str = "items") -> str:
    return (run.path(artifact) / "data.txt").read_text()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Work on a machine of that name from here on: it has a disk of its own."""

    def on(name: str) -> None:
        monkeypatch.setenv("JPO_CACHE", str(tmp_path / name))

    on("here")
    return on


@pytest.fixture
def uri(s3_server: S3, machine: Callable[[str], None]) -> str:  # noqa: ARG001
    return s3_server.uri()


@pytest.fixture
def run(uri: str) -> RunDir:
    return RunDir(uri)


def test_what_one_machine_builds_another_reads(run: RunDir, uri: str, machine: Callable[[str], None]) -> None:
    assert build(run, x=1)
    assert not build(run, "never written", x=1)
    manifest = run.require("items", "items")
    names = Store(uri).names("")
    (version,) = {name.split("/")[1] for name in names if name != "items/manifest.json"}
    assert version.startswith(manifest.fingerprint)
    assert names == sorted(["items/manifest.json", f"items/{version}/data.txt", f"items/{version}/deep/more.txt"])
    machine("there")
    there = RunDir(uri)
    assert there.root != run.root
    assert there.require("items", "items") == manifest
    assert (text_of(there), (there.path("items") / "deep" / "more.txt").read_text()) == ("abc", "abcabc")
    assert not build(there, "never written", x=1)


def test_what_is_fetched_is_on_disk_before_it_counts(
    run: RunDir, uri: str, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave a working copy whose manifest stands beside empty files."""
    build(run)
    machine("there")
    there, flushed, fsync = RunDir(uri), set[str](), os.fsync

    def remember(handle: int) -> None:
        flushed.add(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", remember)
    there.path("items")
    assert flushed >= {"data.txt", "more.txt", "deep", "manifest.json", "fetched-items"}


def test_a_new_version_takes_the_place_of_the_old_one_everywhere(
    run: RunDir, uri: str, machine: Callable[[str], None]
) -> None:
    build(run, x=1)
    machine("there")
    there = RunDir(uri)
    assert text_of(there) == "abc"
    assert build(there, "new", x=2)
    machine("here")
    assert (text_of(run), text_of(there)) == ("new", "new")
    assert len({name.split("/")[0] for name in Store(uri).names("items")}) == 2  # the manifest and one version
    assert not build(run, x=2)


KILLED = """
import os, signal, sys
from pathlib import Path
from jpo_ray.runs import RunDir
from jpo_ray.store import Store

written = Store.write
def write(self, name, content):
    if name == "items/manifest.json":
        os.kill(os.getpid(), signal.SIGKILL)
    written(self, name, content)
Store.write = write
def make(folder):
    (folder / "data.txt").write_text("half")
    return {}
RunDir(sys.argv[1]).build("items", inputs={}, config={"x": int(sys.argv[2])}, make=make)
"""


def test_killed_between_files_and_manifest_leaves_what_was_there(run: RunDir, uri: str) -> None:
    def killed(x: int) -> None:
        done = subprocess.run([sys.executable, "-c", KILLED, uri, str(x)], check=False)
        assert done.returncode == -signal.SIGKILL

    killed(1)
    assert any(name.endswith("data.txt") for name in Store(uri).names("items"))
    assert run.manifest("items") is None
    assert not run.path("items").exists()
    assert build(run, "whole", x=1)
    killed(2)
    assert text_of(RunDir(uri)) == "whole"
    assert not build(run, x=1)
    assert build(run, "new", x=3)
    assert len(Store(uri).names("items")) == 3  # what the killed ones left is gone


def test_damaged_objects_are_named_and_missing_ones_made_again(
    run: RunDir, uri: str, machine: Callable[[str], None]
) -> None:
    build(run, x=1)
    store = Store(uri)
    name = next(f"items/{name}" for name in store.names("items") if name.endswith("/data.txt"))
    machine("there")
    there = RunDir(uri)
    for content in (b"ab", b"abd"):
        store.write(name, content)
        with pytest.raises(InputError, match=rf"^s3://runs/.*/{name}: is damaged, its sha256 is not the one that was"):
            there.path("items")
    store.delete(name)
    assert there.manifest("items") is None
    assert build(there, "again", x=1)
    assert text_of(there) == "again"


@pytest.mark.parametrize("content", [b"", b"{half", b"[1]", b'{"format": 1}'])
def test_a_manifest_that_is_none_is_no_artifact(run: RunDir, uri: str, content: bytes) -> None:
    build(run, x=1)
    Store(uri).write("items/manifest.json", content)
    assert run.manifest("items") is None


def test_other_versions_and_other_folders_are_refused(run: RunDir, uri: str) -> None:
    build(run, x=1)
    store = Store(uri)
    store.write(
        "items/manifest.json", (store.read("items/manifest.json") or b"").replace(b'"format": 1', b'"format": 9')
    )
    with pytest.raises(
        InputError, match=r"^s3://.*/items/manifest.json: written by another version .* \(format 9, this"
    ):
        run.manifest("items")
    with pytest.raises(InputError, match="holds files that are not a run's"), open_run(uri):
        pass
    store.write("run.json", b'{"format": 99}')
    with (
        pytest.raises(InputError, match=r"^--run-dir s3://.*: written by another version of jpo-ray \(format 99"),
        open_run(uri),
    ):
        pass


def test_an_artifact_of_another_run_is_taken_over(run: RunDir, s3_server: S3, tmp_path: Path) -> None:
    build(run, x=1)
    other = RunDir(s3_server.uri(), [run.where])
    assert not build(other, "never made", x=1)
    folder = RunDir(tmp_path / "folder", [run.where])
    assert not build(folder, "never made", x=1)
    assert text_of(other) == text_of(folder) == "abc"


def test_what_is_pushed_is_pulled_and_checked(run: RunDir, uri: str, machine: Callable[[str], None]) -> None:
    work = run.root / ".building" / "train-x"
    work.mkdir(parents=True)
    (work / "weights").write_text("w")
    digest = "50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326"  # sha256 of "w"
    push(work, {"weights": digest})
    machine("there")
    there = RunDir(uri).root / ".building" / "train-x"
    assert pull(there) == {"weights": digest}
    assert (there / "weights").read_text() == "w"
    place = place_of(there)
    assert place is not None
    assert json.loads(place.store.read(f"{place.name}/{HASHES}") or b"") == {"weights": digest}
    place.store.write(f"{place.name}/weights", b"W")
    assert pull(there) == {"weights": digest}  # what is here is whole
    (there / "weights").unlink()
    with pytest.raises(InputError, match="is damaged"):
        pull(there)


def test_folders_say_whence_another_machine_gets_them(
    run: RunDir, machine: Callable[[str], None], tmp_path: Path
) -> None:
    build(run, x=1)
    build(run, artifact="train/jpo", x=1)
    assert origins(tmp_path, "text", run.root) == []
    found = origins((run.path("items"), [run.path("train/jpo") / "deep"]), run.path("items"))
    assert [each.artifact for each in found] == ["items", "train/jpo"]
    (tmp_path / "here").rename(tmp_path / "away")  # as on a machine that has nothing yet
    machine("elsewhere")
    for origin in found:
        origin.fetch()
    assert (run.root / "train" / "jpo" / "data.txt").read_text() == "abc"
    build(run, "new", x=2)
    with pytest.raises(InputError, match=r"s3://.*/items: was replaced by another run; start again"):
        found[0].fetch()


# The lease.


def claims(uri: str) -> list[str]:
    return Store(uri).names(CLAIMS)


DEAD = {"pid": DEAD_PID}
ELSEWHERE = {"host": "elsewhere", "boot": "another", "pid": 1}


def leave_claim(uri: str, holder: dict[str, Any]) -> None:
    """Of a process of this machine, but for what `holder` says."""
    claim = this_process() | holder | {"token": "other"}
    Store(uri).write(f"{CLAIMS}/other.json", json.dumps(claim).encode())


def test_a_run_directory_is_marked_and_its_lease_ends_with_it(uri: str) -> None:
    with open_run(uri) as run:
        assert json.loads(Store(uri).read("run.json") or b"") == {"format": 1}
        (claim,) = claims(uri)
        holder = json.loads(Store(uri).read(f"{CLAIMS}/{claim}") or b"")
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
        build(run)
        with (
            pytest.raises(InputError, match=rf"^s3://runs/.*: in use by another run \(process {os.getpid()} on"),
            open_run(uri),
        ):
            pass
        assert claims(uri) == [claim]
    assert claims(uri) == []
    with open_run(uri) as run:
        assert not build(run)


def test_the_lease_of_a_dead_process_here_is_taken_over(uri: str) -> None:
    leave_claim(uri, DEAD)
    with open_run(uri):
        assert claims(uri) != ["other.json"]
        assert len(claims(uri)) == 1


def test_a_silent_holder_elsewhere_is_waited_for_until_it_expires(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_claim(uri, ELSEWHERE)
    with pytest.raises(InputError, match=r"process 1 on elsewhere"), open_run(uri):
        pass
    assert claims(uri) == ["other.json"]
    monkeypatch.setattr(lease, "LEASE_EXPIRES_S", 1.0)
    time.sleep(2.1)  # the server's clock tells seconds
    with open_run(uri):
        assert claims(uri) != ["other.json"]


def test_a_holder_is_waited_for_where_that_is_asked(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)
    leave_claim(uri, ELSEWHERE)
    with pytest.raises(InputError, match=r"process 1 on elsewhere"), open_run(uri, wait_s=0.5):
        pass
    assert claims(uri) == ["other.json"]
    monkeypatch.setattr(lease, "LEASE_EXPIRES_S", 2.0)
    with open_run(uri, wait_s=20):
        assert len(claims(uri)) == 1
        assert claims(uri) != ["other.json"]


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        (True, r"^s3://.*: another run took it over while this one was silent"),
        (False, r"^s3://.*: the lease of this run is gone from there \(deleted, or .*this one has stopped$"),
    ],
)
def test_a_run_that_lost_its_lease_is_stopped_and_told(
    uri: str, taken: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)

    def lose_it() -> None:
        with open_run(uri):
            (claim,) = claims(uri)
            if taken:
                leave_claim(uri, ELSEWHERE)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:  # a claim may be written just after it was deleted
                Store(uri).delete(f"{CLAIMS}/{claim}")
                time.sleep(0.05)

    with pytest.raises(InputError, match=said):
        lose_it()
    assert claims(uri) == ["other.json"] * taken


def test_a_claim_that_comes_back_late_is_deleted_again(uri: str) -> None:
    """Its holder slept between looking at its claim and writing it."""
    leave_claim(uri, DEAD)
    held = StoreLease(Store(uri))
    held.acquire()
    leave_claim(uri, ELSEWHERE)
    held.beat()
    assert "other.json" not in claims(uri)
    held.release()
    assert claims(uri) == []


def test_a_store_that_is_silent_as_long_as_a_lease_lasts_ends_the_run(
    s3_server: S3, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jpo_ray.store.REQUEST_S", 1.0)
    monkeypatch.setattr("jpo_ray.store.ATTEMPTS", 1)
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lease, "LEASE_EXPIRES_S", 0.5)
    ended = float("inf")

    def silent() -> None:
        nonlocal ended
        with hold_lease(StoreLease(Store(uri))):
            s3_server.freeze()
            try:
                time.sleep(30)
            finally:
                ended = time.monotonic()

    with pytest.raises(TimeoutError, match=r"^s3://.* could not be reached .*\(no answer"):
        silent()
    assert time.monotonic() - ended < 0.5  # it is not asked once more


@pytest.fixture(autouse=True)
def _thawed(s3_server: S3) -> Iterator[None]:
    yield
    s3_server.thaw()


def contend(uri: str, start: Any, held: Any, most: Any) -> None:
    start.wait()
    try:
        with hold_lease(StoreLease(Store(uri))):
            with held.get_lock():
                held.value += 1
                most.value = max(most.value, held.value)
            time.sleep(0.5)
            with held.get_lock():
                held.value -= 1
    except InputError:
        return


def test_of_many_that_come_at_once_at_most_one_holds_it(uri: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    held, most = spawn.Value("i", 0), spawn.Value("i", 0)
    start = spawn.Barrier(4)
    processes = [spawn.Process(target=contend, args=(uri, start, held, most)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert most.value <= 1
    assert claims(uri) == []
    with open_run(uri):  # and those that gave way left nothing
        pass
