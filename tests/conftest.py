"""Fixtures of all tests: tiny models on disk, made once. Nothing heavy is imported before a test asks for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import s3

if TYPE_CHECKING:
    from engine.tiny import World
    from playwright.sync_api import Browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference cache of a test is never that of whoever runs it."""
    monkeypatch.setenv("JPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True, scope="session")
def _no_account_of_the_user() -> None:
    """Object stores of tests are never asked with the keys of whoever runs them."""
    os.environ |= s3.ACCOUNT


@pytest.fixture(scope="session")
def s3_server() -> Iterator[s3.S3]:
    """A real S3 server on this machine."""
    server = s3.start_s3()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


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
