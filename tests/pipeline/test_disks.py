"""A disk that is full, read-only or gone: one clear line, and what stood before stands."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from disks import small_disk

from jpo_ray.cli import main
from jpo_ray.files import file_hashes

CONFIG = {
    "items": {"train": [{"path": "sandbox", "limit": 3000}]},
    "model": {"model_name_or_path": "sandbox"},
    "pairs": {"joint": None},
    "sample": None,
    "evaluate": None,
}
AGAIN = "jpo: the same command goes on where this one stopped"


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


def test_a_full_disk_is_said_and_the_same_command_goes_on_once_there_is_room(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first artifact fits on the disk, the same with more items does not."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        command = ["items", "--config", config, "--run-dir", str(disk.path / "run")]
        assert main([*command, "items.train.0.limit=200"]) == 0
        before = file_hashes(disk.path / "run" / "items")
        (disk.path / "other").write_bytes(bytes(shutil.disk_usage(disk.path).free - 2**14))
        capsys.readouterr()
        assert main(command) == 1
        first, *rest = capsys.readouterr().err.splitlines()
        assert first.startswith("jpo: failed: OSError: ")
        assert "No space left on device" in first
        assert len(rest) == 1
        assert file_hashes(disk.path / "run" / "items") == before
        assert list((disk.path / "run" / ".building").iterdir()) == []
        assert not (disk.path / "run" / "lease.json").exists()
        disk.remount("size=16m")
        assert main(command) == 0
        assert file_hashes(disk.path / "run" / "items") != before


def test_a_disk_without_any_room_is_no_run_directory(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk.path / "other").write_bytes(bytes(shutil.disk_usage(disk.path).free))
        assert main(["items", "--config", config, "--run-dir", str(disk.path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"jpo: {disk.path / 'run'}: cannot be written (No space left on device)")
        assert error.count("\n") == 1


def test_a_read_only_disk_is_said_and_what_stands_there_stays(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "16m") as disk:
        command = ["items", "--config", config, "--run-dir", str(disk.path / "run")]
        assert main([*command, "items.train.0.limit=200"]) == 0
        before = file_hashes(disk.path)
        disk.remount("ro")
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"jpo: {disk.path / 'run'}: cannot be written (Read-only file system)")
        assert error.count("\n") == 1
        assert file_hashes(disk.path) == before


def test_a_folder_of_somebody_else_is_said(config: str, tmp_path: Path) -> None:
    """As another user, since root may do everything."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user takes root")
    code = (
        "import os, sys; from jpo_ray.cli import main; import jpo_ray.pipeline, rich.console\n"
        "os.setgid(65534); os.setuid(65534); sys.exit(main(sys.argv[1:]))"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o5 != 0o5:  # pytest's own folders are nobody else's to see
            folder.chmod(folder.stat().st_mode | 0o5)
    (tmp_path / "mine").mkdir(mode=0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, "items", "--config", config, "--run-dir", str(tmp_path / "mine")],
        capture_output=True, text=True, check=False, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"jpo: {tmp_path / 'mine'}: cannot be written (Permission denied)")
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize("how", ["unmounted", "deleted"])
def test_a_run_whose_directory_goes_away_stops_and_says_so(how: str, tmp_path: Path) -> None:
    code = (
        "import time\nfrom pathlib import Path\nfrom jpo_ray import lease\nfrom jpo_ray.errors import InputError\n"
        "from jpo_ray.runs import open_run\n"
        "import sys\nlease.HEARTBEAT_S = 0.1\n"
        "try:\n    with open_run(Path(sys.argv[1])):\n        print('open', flush=True)\n        time.sleep(60)\n"
        "except InputError as error:\n    print(error)\n"
    )
    with small_disk(tmp_path / "disk", "1m") as disk:
        run = disk.path / "run"
        command = [sys.executable, "-c", code, str(run)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            started = time.monotonic()
            if how == "unmounted":
                disk.unmount()
            else:
                shutil.rmtree(run)
            said = process.stdout.read()
        assert time.monotonic() - started < 5
        assert said == f"{run}: cannot be reached any more (No such file or directory); this run has stopped\n"


def test_a_suspended_run_is_taken_over_and_stops_when_it_wakes(tmp_path: Path) -> None:
    """Two processes; the first is held by SIGSTOP until its lease has expired."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom jpo_ray import lease\nfrom jpo_ray.errors import InputError\n"
        "from jpo_ray.runs import open_run\nlease.HEARTBEAT_S, lease.LEASE_EXPIRES_S = 0.1, 1.0\n"
        "try:\n    with open_run(Path(sys.argv[1])):\n        print('open', flush=True)\n"
        "        time.sleep(float(sys.argv[2]))\n        print('done')\n"
        "except InputError as error:\n    print(error)\n"
    )

    def start(seconds: float) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", code, str(tmp_path / "run"), str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with start(60) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        with start(0) as second:
            refused = second.communicate()[0]
        assert f"in use by another run (process {first.pid} on " in refused
        first.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        with start(1.5) as third:
            assert third.stdout is not None
            assert third.stdout.readline() == "open\n"
            first.send_signal(signal.SIGCONT)
            assert "another run took it over while this one was silent" in first.stdout.read()
            assert third.stdout.read() == "done\n"
    with start(0) as last:
        assert last.communicate()[0] == "open\ndone\n"
