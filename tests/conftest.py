"""Fixtures of all tests: tiny models on disk, made once. Nothing heavy is imported before a test asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from engine.tiny import World


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference cache of a test is never that of whoever runs it."""
    monkeypatch.setenv("JPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Sums of floats are then the same whatever else the machine does."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:  # noqa: ARG001
    """Folder of a Llama of two layers, width 64, random weights, with its tokenizer (BOS, EOS)."""
    from engine.tiny import make_llama

    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:  # noqa: ARG001
    """Folder of a GPT-2 of two layers, width 64, dropout 0.1 everywhere, and a tokenizer without BOS."""
    from engine.tiny import make_gpt2

    return make_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def world(llama: Path) -> World:
    """Items, edges and their log-probs under the Llama."""
    from engine.tiny import make_world

    return make_world(llama)


@pytest.fixture
def tokenizer(llama: Path) -> Any:
    from jpo_ray.engine.model import load_tokenizer

    return load_tokenizer(llama)
