"""A folder on a real S3 server: what is written is read, and what is wrong is said in a line, in time."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3 import S3
from store_checks import check_round_trip

from jpo_ray import store
from jpo_ray.errors import InputError
from jpo_ray.store import Store, StoreError, _checked, _connect, is_uri, location


@pytest.fixture
def folder(s3_server: S3) -> Store:
    return Store(s3_server.uri())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "REQUEST_S", 1.0)
    monkeypatch.setattr(store, "ATTEMPTS", 1)


def test_places() -> None:
    assert location("runs/a") == Path("runs/a")
    assert location("file:///tmp/with%20space") == Path("/tmp/with space")
    assert location("s3://bucket/run") == "s3://bucket/run"
    assert [is_uri(each) for each in ("gs://b/r", "s3:/b/r", "runs/a", "C:/a", Path("s3:/b"))] == [True, True] + [
        False
    ] * 3


def test_objects_make_the_round_trip(folder: Store, tmp_path: Path) -> None:
    check_round_trip(folder, tmp_path)


def test_files_of_many_chunks_make_the_round_trip(
    folder: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 1_000_000)
    content = {f"{name}/file": bytes([name]) * size for name, size in enumerate((0, 1, 999_999, 12_345_678))}
    for name, value in content.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True)
        (tmp_path / "here" / name).write_bytes(value)
    folder.upload(tmp_path / "here", "up", content)
    folder.download("up", tmp_path / "there", content)
    assert {name: (tmp_path / "there" / name).read_bytes() for name in content} == content
    with pytest.raises(FileNotFoundError):
        folder.download("up", tmp_path / "there", ["missing"])


class Deleting:
    """The file system of a store, where somebody deletes what is opened before it is read."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def open_input_stream(self, path: str) -> Any:
        stream = self._files.open_input_stream(path)
        self._files.delete_file(path)
        return stream


def test_what_is_deleted_while_it_is_read_is_not_there(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a claim of a run that ends just now."""
    folder.write("a.json", b"1")
    monkeypatch.setattr(folder, "_fs", Deleting(folder._fs))
    assert folder.read("a.json") is None


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://bucket", "is a whole bucket; name a folder in it, as s3://bucket/PATH"),
        ("s3:/bucket/run", "names no bucket; write it as s3://BUCKET/PATH"),
        ("s3://bucket/run?regoin=x", "unknown option regoin; there are endpoint_override, scheme"),
        ("foo://bucket/run", "Unrecognized filesystem type"),
    ],
)
def test_addresses_that_cannot_be_meant(uri: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Store(uri)


@pytest.mark.parametrize(
    "uri", [
        "s3://AKIA:hush@bucket/run", "s3://hush@bucket/run", "gs://hush@bucket/run", "s3://bucket/run?secret_key=hush",
        "abfs://b/r?sas_token=hush", "abfs://container:hush@account.dfs.core.windows.net/run", "hdfs://user:hush@host/run",
    ],
)  # fmt: skip
def test_credentials_in_an_address_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(InputError, match="credentials do not belong in a URI") as refused:
        Store(uri)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("abfs://container@account.dfs.core.windows.net/run", "container@account.dfs.core.windows.net"),
        ("hdfs://user@host:8020/run", "user@host:8020"),
        ("gs://anonymous@bucket/run", "anonymous@bucket"),
    ],
)
def test_what_stands_before_the_at_may_be_no_credential(uri: str, place: str) -> None:
    """Only parsed: no such server is here."""
    parts = _checked(uri)
    assert (parts.netloc, parts.path) == (place, "/run")


def test_an_anonymous_user_is_no_part_of_the_bucket() -> None:
    files, path = _connect("s3://anonymous@Bucket/a%20run?region=x")
    assert path == "Bucket/a run"
    assert files.equals(_connect("s3://Bucket/a%20run?region=x&anonymous=true")[0])


def test_a_missing_bucket_is_named(s3_server: S3) -> None:
    with pytest.raises(InputError, match=r"^s3://nowhere/run: there is no such bucket; make it first$"):
        Store(s3_server.uri("nowhere", "run"))


@pytest.mark.usefixtures("impatient")
def test_an_endpoint_where_nobody_listens_is_named() -> None:
    with pytest.raises(InputError, match=r"^s3://b/run: no answer from 127.0.0.1:1 \(Could not connect to server\)$"):
        Store("s3://b/run?endpoint_override=127.0.0.1:1&scheme=http")


@pytest.mark.usefixtures("impatient")
def test_an_endpoint_that_never_answers_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(InputError, match="no answer from"):
            Store(f"s3://b/run?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http")
        assert time.monotonic() - started < 20


@pytest.fixture
def denied(s3_server: S3) -> Iterator[None]:
    yield
    s3_server.deny(float("inf"))


@pytest.mark.usefixtures("denied")
def test_permission_denied_at_the_start_and_at_work(s3_server: S3, folder: Store) -> None:
    s3_server.deny(0)
    with pytest.raises(InputError, match=r"^s3://runs/run: permission denied; check the credentials"):
        Store(s3_server.uri(path="run"))
    with pytest.raises(StoreError, match=r"^s3://runs/.*/a.json: permission denied; check the credentials"):
        folder.write("a.json", b"1")
    with pytest.raises(StoreError, match="permission denied"):
        folder.read("a.json")


@pytest.mark.usefixtures("impatient")
def test_a_network_that_is_gone_ends_the_work_in_time(s3_server: S3, tmp_path: Path) -> None:
    folder = Store(s3_server.uri())
    folder.write("before", b"1")
    (tmp_path / "file").write_bytes(b"2")
    s3_server.freeze()
    try:
        started = time.monotonic()
        with pytest.raises(StoreError, match=r"after/file: no answer from 127.0.0.1:"):
            folder.upload(tmp_path, "after", ["file"])
        assert time.monotonic() - started < 20
    finally:
        s3_server.thaw()
    assert folder.read("before") == b"1"
