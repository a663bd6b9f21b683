"""What holds of every object store."""

from pathlib import Path

import pytest

from jpo_ray.store import Store


def check_round_trip(folder: Store, tmp_path: Path) -> None:
    """Objects are written, listed, read, copied and deleted in an empty folder of the store."""
    assert folder.read("a.json") is None
    assert (folder.top(), folder.names(""), folder.times("b")) == ([], [], {})
    folder.write("a.json", b"first")
    folder.write("a.json", b"second")
    folder.write("b/c/d", b"")
    assert (folder.read("a.json"), folder.read("b/c/d")) == (b"second", b"")
    assert sorted(folder.top()) == ["a.json", "b"]
    assert (folder.names(""), folder.names("b")) == (["a.json", "b/c/d"], ["c/d"])
    assert list(folder.times("")) == ["a.json"]
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "file").write_bytes(bytes(9_000_000))
    folder.upload(tmp_path / "up", "e", ["file"])
    folder.download("e", tmp_path / "down", ["file"])
    assert (tmp_path / "down" / "file").read_bytes() == bytes(9_000_000)
    with pytest.raises(FileNotFoundError):
        folder.download("e", tmp_path / "down", ["missing"])
    for name in ("b", "e", "a.json", "never/there", "b"):
        folder.delete(name)
    assert folder.names("") == []
