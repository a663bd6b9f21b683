"""The whole pipeline on Ray, as people start it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jpo_ray import records
from jpo_ray.cli import main
from jpo_ray.files import file_hashes, read_json

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]
LORA = {
    "name": "jpo", "beta": 0.2, "learning_rate": 1e-2, "num_train_epochs": 1, "warmup_steps": 0, "save_steps": 2,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "items": {
        "train": [{"path": "sandbox", "limit": 120}],
        "validation": [{"path": "sandbox", "limit": 30}],
        "test": [{"path": "sandbox", "limit": 20}],
    },
    "model": {"model_name_or_path": "sandbox", "max_length": 256},
    "judge": {"annotator": "sandbox", "noise": 0.05},
    "sft": {"learning_rate": 1e-3, "num_train_epochs": 1, "items_per_step": 32, "warmup_steps": 0},
    "train": [LORA, LORA | {"name": "full", "use_peft": False, "learning_rate": 2e-3, "max_train_comparisons": 64}],
    "sample": {"engine": "transformers", "temperatures": [0.0, 1.0], "max_new_tokens": 32},
    "cluster": {"num_workers": 2, "cpus_per_worker": 1},
}
ARTIFACTS = [
    "items", "embeddings", "pairs", "judge", "sft", "reference", "train/jpo", "train/full", "sample", "evaluate",
    "report",
]  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def run_dir(ray_cluster: Any, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    """A run of it all: 2 training workers, 1 actor, an adapter and a model with all its parameters trained."""
    folder = tmp_path_factory.mktemp("end-to-end")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JPO_CACHE", str(folder / "cache"))
        assert main(["run", "--config", str(config), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_every_artifact_is_there_whole(run_dir: Path) -> None:
    for name in ARTIFACTS:
        files = file_hashes(run_dir / name)
        files.pop("manifest.json")
        assert read_json(run_dir / name / "manifest.json")["files"] == files
    assert list((run_dir / ".building").iterdir()) == []
    assert "<html" in (run_dir / "report" / "index.html").read_text()


def test_an_adapter_and_a_full_model_are_sampled_beside_the_sft_model(run_dir: Path) -> None:
    rows = records.read_table(run_dir / "sample" / "samples.parquet", records.SAMPLES).to_pylist()
    texts = {(row["model"], row["temperature"], row["instruction_id"]): row["response"] for row in rows}
    assert len(rows) == len(texts) == 3 * 2 * 20
    assert (run_dir / "train" / "jpo" / "adapter_model.safetensors").exists()
    assert not (run_dir / "train" / "full" / "adapter_config.json").exists()
    sft, full = (load_file(run_dir / name / "model.safetensors") for name in ("sft", "train/full"))
    assert max(float(np.abs(sft[name] - full[name]).max()) for name in sft) > 1e-4
    differing = {
        name: sum(texts[name, 1.0, i] != texts["sft", 1.0, i] for i in {row["instruction_id"] for row in rows})
        for name in ("jpo", "full")
    }
    assert min(differing.values()) > 0  # drawn with the same seeds: only the weights differ
    table = read_json(run_dir / "evaluate" / "win_rates.json")
    assert "full" in str(table)


def test_the_script_of_the_whole_pipeline_finds_it_done_and_starts_no_ray(run_dir: Path, config: Path) -> None:
    """With an address where no cluster answers, so that connecting would fail."""
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "JPO_CACHE": str(run_dir.parent / "cache")}
    command = [sys.executable, "jobs/align.py", "--config", str(config), "--run-dir", str(run_dir)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("stands already") == len(ARTIFACTS)


@pytest.mark.slow
def test_data_stages_are_byte_for_byte_the_same_whatever_the_number_of_actors(
    run_dir: Path, config: Path, tmp_path: Path
) -> None:
    for stage in ("items", "pairs", "judge"):
        assert main([stage, "--config", str(config), "--run-dir", str(tmp_path), "cluster.num_actors=2"]) == 0
    for name in ("items/items", "items/labels", "embeddings/embeddings", "pairs/pairs", "judge/judgments"):
        assert (tmp_path / f"{name}.parquet").read_bytes() == (run_dir / f"{name}.parquet").read_bytes()


def test_a_gpu_that_no_node_has_is_bad_input(
    ray_cluster: Any, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if ray_cluster.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    command = ["--config", str(config), "--run-dir", str(tmp_path), "cluster.gpus_per_worker=1"]
    assert main(["items", *command]) == 0
    started = time.monotonic()
    assert main(["pairs", *command]) == 2
    assert time.monotonic() - started < 5
    error = capsys.readouterr().err
    assert error.startswith("jpo: pairs: asks for 1 x 1 CPU + 1 GPU, but the cluster has ")
    assert error.count("\n") == 1


def _without_training(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the run whose training is still to be done."""
    again = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(again / "train")
    return again


def _train(again: Path, run_dir: Path, config: Path) -> dict[str, Any]:
    """How to start `jpo train` in a process of its own, on a Ray of its own."""
    environment = os.environ | {"JPO_CACHE": str(run_dir.parent / "cache")}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "jpo_ray.cli", "train", "--config", str(config), "--run-dir", str(again)]
    return {"args": command, "cwd": REPOSITORY, "env": environment, "text": True}


def _wait_for_a_checkpoint(training: "subprocess.Popen[str]", again: Path) -> None:
    deadline = time.monotonic() + 200
    while not list(again.glob(".building/train-jpo-*/checkpoint-*")):
        assert training.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_ctrl_c_while_training_stops_it_all_and_says_how_to_go_on(run_dir: Path, config: Path, tmp_path: Path) -> None:
    again = _without_training(run_dir, tmp_path)
    with subprocess.Popen(**_train(again, run_dir, config), stderr=subprocess.PIPE) as first:
        _wait_for_a_checkpoint(first, again)
        first.send_signal(signal.SIGINT)
        _, error = first.communicate(timeout=60)
    assert first.returncode == 130
    assert error.splitlines()[-1].startswith("jpo: stopped; the same command goes on")
    assert not (again / "lease.json").exists()
    assert list(again.glob(".building/train-jpo-*/checkpoint-*"))
    assert not list(again.glob(".building/ray-*"))


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(run_dir: Path, config: Path, tmp_path: Path) -> None:
    """SIGKILL of the driver while it trains; the same command ends where an undisturbed run ends."""
    again = _without_training(run_dir, tmp_path)
    command = _train(again, run_dir, config)
    with subprocess.Popen(**command, stdout=subprocess.DEVNULL) as first:
        _wait_for_a_checkpoint(first, again)
        first.send_signal(signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL
    assert not (again / "train" / "jpo").exists()
    assert (again / "lease.json").exists()
    done = subprocess.run(**command, capture_output=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert not (again / "lease.json").exists()
    for name in ("jpo/adapter_model.safetensors", "full/model.safetensors"):
        resumed, whole = (load_file(folder / "train" / name) for folder in (again, run_dir))
        assert all(np.array_equal(resumed[key], whole[key]) for key in whole)
