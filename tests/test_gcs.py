"""A run directory on a GCS server of its own, which says things other than S3 does."""

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from gcs import GCS, gcs_uri, start_gcs
from store_checks import check_round_trip

from jpo_ray import store
from jpo_ray.errors import InputError
from jpo_ray.runs import RunDir, open_run
from jpo_ray.store import Store, StoreError


@pytest.fixture(scope="module")
def server() -> Iterator[GCS]:
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    found = start_gcs()
    yield found
    found.stop()


def test_objects_make_the_round_trip(server: GCS, tmp_path: Path) -> None:
    check_round_trip(Store(server.uri()), tmp_path)


def test_a_new_run_directory_is_made_held_and_found_again(
    server: GCS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "here"))
    uri = server.uri()

    def build(run: RunDir) -> bool:
        return run.build("items", inputs={}, config={}, make=make)[1]

    def make(folder: Path) -> dict[str, Any]:
        (folder / "rows").write_text("abc")
        return {}

    with open_run(uri) as run:
        assert build(run)
        with pytest.raises(InputError, match="in use by another run"), open_run(uri):
            pass
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "elsewhere"))
    with open_run(uri) as run:
        assert not build(run)
        assert (run.path("items") / "rows").read_text() == "abc"
    assert [name for name in Store(uri).names("") if name.startswith("lease")] == []


def test_a_folder_that_is_no_run_is_refused(server: GCS) -> None:
    """GCS lists no folders: what is in one must be seen too."""
    uri = server.uri()
    Store(uri).write("thesis/chapter.tex", b"mine")
    with pytest.raises(InputError, match=r"holds files that are not a run's"), open_run(uri):
        pass
    assert Store(uri).names("") == ["thesis/chapter.tex"]


def test_a_missing_bucket_is_named(server: GCS) -> None:
    with pytest.raises(InputError, match=r"^gs://anonymous@nowhere/run: there is no such bucket; make it first$"):
        Store(server.uri("nowhere", "run"))


def test_an_endpoint_where_nobody_listens_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "GCS_RETRY_S", 2)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"no answer from 127.0.0.1:1 \(Could not connect to server\)$"):
        Store(gcs_uri(1, "runs", "run"))
    assert time.monotonic() - started < 20


class Refusing(BaseHTTPRequestHandler):
    """Says 403 to everybody."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_permission_denied() -> None:
    with HTTPServer(("127.0.0.1", 0), Refusing) as refusing:
        Thread(target=refusing.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match=r"^gs://.*: permission denied; check the credentials"):
            Store(gcs_uri(refusing.server_port, "runs", "run"))
        refusing.shutdown()


def test_a_server_that_goes_away_at_work_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    monkeypatch.setattr(store, "GCS_RETRY_S", 2)
    own = start_gcs()
    try:
        folder = Store(own.uri())
        folder.write("before", b"1")
    finally:
        own.stop()
    for ask in (lambda: folder.read("before"), lambda: folder.write("after", b"2"), lambda: folder.times("")):
        with pytest.raises(StoreError, match=r"no answer from 127\.0\.0\.1"):
            ask()


def test_missing_credentials_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Azure's client, which asks nobody where it finds none; what pyarrow makes of it is an error of its own."""
    monkeypatch.setenv("PATH", "")  # where it looks for a command of Azure's
    here = "blob_storage_authority=127.0.0.1:1&dfs_storage_authority=127.0.0.1:1"
    with pytest.raises(InputError, match=r"^abfs://.*/run: got no access token; check the credentials"):
        Store(f"abfs://container@account/run?{here}")
