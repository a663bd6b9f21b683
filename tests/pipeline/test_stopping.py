"""Ctrl-C and SIGTERM at every kind of work: all of it ends within seconds, and the same command goes on."""

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jpo_ray import records
from jpo_ray.cli import main

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
LOG = logging.getLogger(__name__)
HAS_VLLM = importlib.util.find_spec("vllm") is not None
CONFIG: dict[str, Any] = {
    "items": {
        "train": [{"path": "sandbox", "limit": 200}],
        "validation": [{"path": "sandbox", "limit": 20}],
        "test": [{"path": "sandbox", "limit": 300}],
    },
    "model": {"model_name_or_path": "sandbox", "max_length": 256},
    "judge": {"annotator": "sandbox", "noise": 0.05},
    "sft": {"learning_rate": 1e-3, "num_train_epochs": 1, "items_per_step": 32, "warmup_steps": 0},
    "train": [{"name": "jpo", "beta": 0.2, "learning_rate": 1e-3, "num_train_epochs": 20, "save_steps": 5}],
    "sample": {"engine": "vllm" if HAS_VLLM else "transformers", "models": ["sft"], "max_new_tokens": 64},
    "cluster": {"num_workers": 2, "cpus_per_worker": 1},
}
STOPPED = "jpo: stopped; the same command goes on from the last finished stage or checkpoint"
Below = list[tuple[psutil.Process, str]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


@pytest.fixture(scope="module")
def before(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run up to the reference log-probs, and its cache."""
    folder = tmp_path_factory.mktemp("before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JPO_CACHE", str(folder / "cache"))
        for stage in ("items", "pairs", "judge", "sft", "reference"):
            assert main([stage, "--config", config, "--run-dir", str(folder / "run")]) == 0
    return folder


def below(process: "subprocess.Popen[str]") -> Below:
    """The processes that a command has started, directly or not, with their names."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            found.append((child, " ".join(child.cmdline()) or child.name()))
        except psutil.Error:
            continue
    return found


def start(stage: str, config: str, folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    """In a process group of its own, which gets the signal as a terminal would send it."""
    environment = os.environ | {"JPO_CACHE": str(folder / "cache")}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "jpo_ray.cli", stage, "--config", config, "--run-dir", str(folder / "run")]
    command += overrides
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def named(name: str) -> Callable[[Path, Below], bool]:
    return lambda _, processes: any(name in title for _, title in processes)


def a_checkpoint(folder: Path, _: Below) -> bool:
    return bool(list(folder.glob("run/.building/train-jpo-*/checkpoint-*")))


def an_answer(folder: Path, _: Below) -> bool:
    return any(path.stat().st_size for path in folder.glob("run/.building/sample-*/answered.jsonl"))


MOMENTS: dict[str, tuple[str, Callable[[Path, Below], bool], int]] = {
    "ray starts": ("train", named("raylet"), signal.SIGINT),
    "pairs are embedded": ("pairs", named("MapWorker"), signal.SIGINT),
    "training starts": ("train", named("TrainController"), signal.SIGINT),
    "training": ("train", a_checkpoint, signal.SIGINT),
    "training, SIGTERM": ("train", a_checkpoint, signal.SIGTERM),
    "the engine starts": ("sample", named("EngineCore" if HAS_VLLM else "MapWorker"), signal.SIGINT),
    "sampling": ("sample", an_answer, signal.SIGINT),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_it_stops_within_seconds_and_leaves_no_process(moment: str, config: str, before: Path, tmp_path: Path) -> None:
    stage, come, number = MOMENTS[moment]
    folder = shutil.copytree(before, tmp_path / "copy")
    if stage == "pairs":
        for name in ("cache", "run/embeddings", "run/pairs"):
            shutil.rmtree(folder / name)
    with start(stage, config, folder) as process:
        deadline = time.monotonic() + 300
        while not come(folder, processes := below(process)):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        began = time.monotonic()
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=120)
        took = time.monotonic() - began
    assert process.returncode == 130
    assert said.splitlines()[-1] == STOPPED
    assert not (folder / "run" / "lease.json").exists()
    gone, left = psutil.wait_procs([child for child, _ in processes], timeout=10)
    LOG.info(
        "%s: ended after %.1f s, its %d processes %.1f s after",
        moment,
        took,
        len(gone),
        time.monotonic() - began - took,
    )
    assert [" ".join(child.cmdline()) for child in left] == []
    assert took < 20


KILLED: dict[str, Callable[[Path, Below], bool]] = {
    "pairs": named("MapWorker"), "train": a_checkpoint, "sample": an_answer
}  # fmt: skip


@pytest.mark.parametrize("stage", KILLED)
def test_a_killed_driver_leaves_no_process_and_the_same_command_goes_on(
    stage: str, config: str, before: Path, tmp_path: Path
) -> None:
    """SIGKILL of the command alone, as the out-of-memory killer sends it; what was committed stays as it is."""
    folder = shutil.copytree(before, tmp_path / "copy")
    if stage == "pairs":
        for name in ("cache", "run/embeddings", "run/pairs", "run/judge"):
            shutil.rmtree(folder / name)
    overrides = ("sample.engine=transformers",) if stage == "sample" else ()
    with start(stage, config, folder, *overrides) as process:
        deadline = time.monotonic() + 300
        while not KILLED[stage](folder, processes := below(process)):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        began = time.monotonic()
        process.kill()
        process.communicate()
    _, left = psutil.wait_procs([child for child, _ in processes], timeout=90)
    LOG.info("driver killed in %s: its %d processes gone after %.1f s", stage, len(processes), time.monotonic() - began)
    assert [" ".join(child.cmdline()) for child in left] == []
    stood = {path: path.stat().st_mtime_ns for path in folder.glob("run/**/manifest.json")}
    kept = answers(folder) if stage == "sample" else []
    with start(stage, config, folder, *overrides) as again:
        _, said = again.communicate(timeout=600)
    assert again.returncode == 0, said
    assert {path: path.stat().st_mtime_ns for path in stood} == stood
    made = "train/jpo" if stage == "train" else stage
    assert (folder / "run" / made / "manifest.json").exists()
    if stage == "sample":
        assert len(kept) > 0
        table = records.read_table(folder / "run" / "sample" / "samples.parquet", records.SAMPLES).to_pylist()
        found = {(row["instruction_id"], row["temperature"]): row["response"] for row in table}
        assert all(found[row["instruction_id"], row["temperature"]] == row["response"] for row in kept)


def answers(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("run/.building/sample-*/answered.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")
def test_an_engine_that_hangs_ends_the_command_in_time(config: str, before: Path, tmp_path: Path) -> None:
    """SIGSTOP of vLLM's process: an error after `sample.timeout_s`, nothing left, and what was answered is kept."""
    folder = shutil.copytree(before, tmp_path / "copy")
    with start("sample", config, folder, "sample.timeout_s=100") as process:
        while not an_answer(folder, processes := below(process)):
            assert process.poll() is None
            time.sleep(0.05)
        (engine,) = (child for child, title in processes if "EngineCore" in title)
        engine.suspend()
        began = time.monotonic()
        _, said = process.communicate(timeout=200)
    LOG.info("hung engine, sample.timeout_s 100: ended after %.1f s", time.monotonic() - began)
    assert process.returncode == 1, said
    assert said.startswith("jpo: failed: TimeoutError: sample: nothing came for 100 s (sample.timeout_s)")
    assert "Traceback" not in said
    assert psutil.wait_procs([child for child, _ in processes], timeout=10)[1] == []
    assert an_answer(folder, [])
