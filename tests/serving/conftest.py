"""One server for all tests that ask one, with the models that it serves."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.endpoint import Endpoint, serving
from serving.served_run import make_adapter, make_run

STORE = "store"


def store_of(run_dir: Path) -> Path:
    return run_dir.parent / STORE


@pytest.fixture(scope="session")
def served_run(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:  # noqa: ARG001
    """`sft`, `jpo` and `dpo.one`; beside the run a folder of adapters that may be added."""
    root = tmp_path_factory.mktemp("served")
    run = make_run(root / "run")
    for number, name in enumerate(("extra", "other", "third", "fourth")):
        make_adapter(root / STORE / name, run / "sft", seed=100 + number)
    return run


@pytest.fixture(scope="session")
def endpoint(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    folders = f"adapter_folders=['{store_of(served_run)}']"
    options = (folders, "max_adapters=4", "limits.max_requests=48", "limits.max_tokens=64")
    with serving(served_run, tmp_path_factory.mktemp("endpoint"), *options) as started:
        yield started
