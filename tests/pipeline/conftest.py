"""Fixtures of the pipeline's tests."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster.running import ray_cluster  # noqa: F401

from pipeline.inline import Cluster, install, run, small_config


@dataclass(frozen=True)
class Finished:
    """A run of `small_config()` that went through, and the reference cache that it filled."""

    run_dir: Path
    cache: Path
    calls: list[str]
    shown: str


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Cluster:  # noqa: ARG001
    """What would run on Ray runs here."""
    return install(monkeypatch)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Finished:  # noqa: ARG001
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JPO_CACHE", str(folder / "cache"))
        made = install(patch)
        shown = run(small_config(), folder / "run")
    return Finished(folder / "run", folder / "cache", made.calls, shown)


@pytest.fixture
def run_dir(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, and of its cache, to change."""
    monkeypatch.setenv("JPO_CACHE", str(shutil.copytree(finished.cache, tmp_path / "cache")))
    return shutil.copytree(finished.run_dir, tmp_path / "run")
