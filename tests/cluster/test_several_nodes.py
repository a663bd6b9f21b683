"""The whole pipeline as a job on several real nodes, one of which dies while models are trained."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from s3 import start_s3
from safetensors.numpy import load_file

from cluster.nodes import Node, Nodes, ray_nodes
from jpo_ray.runs import RunDir
from jpo_ray.store import Store, is_uri

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LOG = logging.getLogger(__name__)
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
# Two models side by side, each in one process.
SIDE_BY_SIDE: dict[str, Any] = CONFIG | {
    "train": [CONFIG["train"][0] | {"name": name, "beta": beta} for name, beta in (("jpo", 0.1), ("other", 0.2))],
    "cluster": CONFIG["cluster"] | {"num_workers": 1, "trainings_at_once": 2},
}
SHARED, APART = "a shared folder", "disks of their own"
ARTIFACTS = ("items", "pairs", "judge", "sft", "reference", "train/jpo", "sample", "evaluate", "report")


@dataclass(frozen=True)
class Place:
    """A cluster, a folder on the head's disk, and where its runs are."""

    nodes: Nodes
    folder: Path
    where: str

    @property
    def run(self) -> RunDir:
        return RunDir(self.where if is_uri(self.where) else Path(self.where))

    def names(self) -> list[str]:
        """Of all files of the run directory."""
        if is_uri(self.where):
            return Store(self.where).names("")
        below = (Path(folder) / name for folder, _, names in os.walk(self.where) for name in names)
        return [path.relative_to(self.where).as_posix() for path in below]

    def forget(self, artifact: str) -> None:
        if is_uri(self.where):
            Store(self.where).delete(artifact)
        else:
            shutil.rmtree(Path(self.where) / artifact)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A head without CPUs and three nodes of one each: two work, one is spare. With disks of their own nodes share
    nothing of what is made but an S3 server.
    """
    apart = request.param == APART
    with ray_nodes(own_network=True, hidden=[tmp_path] if apart else []) as nodes:
        if apart and nodes.network is None:
            pytest.skip("this machine lets us make no namespaces")
        nodes.start_head(0)
        for _ in range(3):
            nodes.add(1)
        assert nodes.nodes[0].has(tmp_path)
        (tmp_path / "here").touch()
        assert nodes.nodes[1].has(tmp_path / "here") != apart
        if not apart:
            yield Place(nodes, tmp_path, str(tmp_path / "run"))
            return
        server = start_s3(nodes.head_address)
        try:
            yield Place(nodes, tmp_path, server.uri())
        finally:
            server.stop()


@contextmanager
def submitted(place: Place, config: dict[str, Any]) -> Iterator["subprocess.Popen[str]"]:
    """The pipeline, submitted by `jpo submit`."""
    folder = place.folder
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "env.yaml").write_text(yaml.safe_dump({"env_vars": {"JPO_CACHE": str(folder / "cache")}}))
    command = [
        sys.executable, "-m", "jpo_ray.cli", "submit", "--address", place.nodes.url, "--runtime-env",
        str(folder / "env.yaml"), "--", "python", "jobs/align.py", "--config", str(folder / "run.yaml"),
        "--run-dir", place.where,
    ]  # fmt: skip
    job = subprocess.Popen(
        command, cwd=REPOSITORY, env=place.nodes.environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield job
    finally:
        job.kill()
        job.wait()
        if job.stdout is not None:
            job.stdout.close()


def that_trains(place: Place, job: "subprocess.Popen[str]", worker: str) -> Node:
    """A node with such a process, once a checkpoint of the adapter is there."""
    deadline = time.monotonic() + 800
    while not any(name.startswith(".building/train-jpo-") and "/checkpoint-" in name for name in place.names()):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return next(node for node in place.nodes.nodes[1:] if node.runs(worker))


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("place", "config", "worker"),
    [(SHARED, CONFIG, "RayTrainWorker"), (APART, CONFIG, "RayTrainWorker"), (APART, SIDE_BY_SIDE, "ImplicitFunc")],
    indirect=["place"],
    ids=["shared", "apart", "side by side"],
)
def test_a_run_survives_the_loss_of_a_node(place: Place, config: dict[str, Any], worker: str) -> None:
    """With the same adapters as a run that nothing happened to."""
    began = time.monotonic()
    with submitted(place, config) as job:
        that_trains(place, job, worker).kill()
        killed = time.monotonic()
        assert "train/jpo/manifest.json" not in place.names()
        said, _ = job.communicate(timeout=900)
    assert job.returncode == 0, said
    ended = time.monotonic()
    assert [name for name in ARTIFACTS if place.run.manifest(name) is None] == []
    lost = adapters(place, config)

    place.forget("train")
    with submitted(place, config) as job:
        said, _ = job.communicate(timeout=600)
    assert job.returncode == 0, said
    LOG.info(
        "node lost while training, %s: %.0f s until it was, %.0f s to the end; undisturbed, from training on: %.0f s",
        place.where, killed - began, ended - killed, time.monotonic() - ended,
    )  # fmt: skip
    undisturbed = adapters(place, config)
    assert lost.keys() == undisturbed.keys()
    assert all(np.array_equal(lost[key], undisturbed[key]) for key in undisturbed)


def adapters(place: Place, config: dict[str, Any]) -> dict[str, Any]:
    """The weights of all models that were trained."""
    names = [entry.get("name", "jpo") for entry in config["train"]]
    files = {name: place.run.path(f"train/{name}") / "adapter_model.safetensors" for name in names}
    return {f"{name}/{key}": value for name, file in files.items() for key, value in load_file(file).items()}
