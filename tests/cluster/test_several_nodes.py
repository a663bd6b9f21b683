"""The whole pipeline as a job on several real nodes, one of which dies while models are trained."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from cluster.nodes import LINK, Node, Nodes, ray_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "items": {
        "train": [{"path": "sandbox", "limit": 120}],
        "validation": [{"path": "sandbox", "limit": 20}],
        "test": [{"path": "sandbox", "limit": 10}],
    },
    "model": {"model_name_or_path": "sandbox", "max_length": 256},
    "judge": {"annotator": "sandbox", "noise": 0.05},
    "sft": {"learning_rate": 1e-3, "num_train_epochs": 1, "items_per_step": 32, "warmup_steps": 0},
    "train": [
        {"learning_rate": 1e-3, "num_train_epochs": 6, "warmup_steps": 0, "save_steps": 2, "lora_dropout": 0.0},
    ],
    "sample": {"engine": "transformers", "temperatures": [0.0], "max_new_tokens": 16},
    "cluster": {
        "num_workers": 2, "cpus_per_worker": 1, "collective_timeout_s": 60,
        "stages": {"reference": {"num_actors": 2}},
    },
}  # fmt: skip


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """A head without CPUs and three nodes of one each: two work, one is spare."""
    with ray_nodes(own_network=True) as cluster:
        cluster.start_head(0)
        for _ in range(3):
            cluster.add(1)
        yield cluster


@contextmanager
def submitted(nodes: Nodes, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """The pipeline, submitted by `jpo submit` with a run directory in `folder`."""
    variables = {"JPO_CACHE": str(folder / "cache")}
    if nodes.network is not None:
        variables["GLOO_SOCKET_IFNAME"] = LINK
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "env.yaml").write_text(yaml.safe_dump({"env_vars": variables}))
    command = [
        sys.executable, "-m", "jpo_ray.cli", "submit", "--address", nodes.url, "--runtime-env",
        str(folder / "env.yaml"), "--", "python", "jobs/align.py", "--config", str(folder / "run.yaml"),
        "--run-dir", str(folder / "run"),
    ]  # fmt: skip
    job = subprocess.Popen(
        command, cwd=REPOSITORY, env=nodes.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield job
    finally:
        job.kill()
        job.communicate()


def that_trains(nodes: Nodes, run_dir: Path, job: "subprocess.Popen[str]") -> Node:
    """A node with a training worker, once a checkpoint of the adapter is there."""
    deadline = time.monotonic() + 800
    while not list(run_dir.glob(".building/train-jpo-*/checkpoint-*")):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return next(node for node in nodes.nodes[1:] if node.runs("RayTrainWorker"))


@pytest.mark.timeout(2400)
def test_a_run_survives_the_loss_of_a_node(nodes: Nodes, tmp_path: Path) -> None:
    """With the same adapter as a run that nothing happened to."""
    with submitted(nodes, tmp_path) as job:
        that_trains(nodes, tmp_path / "run", job).kill()
        said, _ = job.communicate(timeout=900)
    assert job.returncode == 0, said
    for name in ("items", "pairs", "judge", "sft", "reference", "train/jpo", "sample", "evaluate", "report"):
        assert (tmp_path / "run" / name / "manifest.json").exists(), name

    again = tmp_path / "undisturbed"
    shutil.copytree(tmp_path / "run", again / "run")
    shutil.rmtree(again / "run" / "train")
    with submitted(nodes, again) as job:
        said, _ = job.communicate(timeout=600)
    assert job.returncode == 0, said
    adapters = [load_file(folder / "run/train/jpo/adapter_model.safetensors") for folder in (tmp_path, again)]
    assert all(np.array_equal(adapters[0][key], adapters[1][key]) for key in adapters[1])
