"""The cache that all runs share: where it lies."""

from pathlib import Path

import pytest

from jpo_ray.cache import cache_folder


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """JPO_CACHE, else the user's cache folder as the desktop standard has it."""
    monkeypatch.setenv("JPO_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("JPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/jpo-ray")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "jpo-ray"
