"""A folder on an object store, by a URI that `pyarrow.fs` takes: S3 and what speaks like it, GCS, Azure, HDFS.

Stores have no rename and no append: an object is written whole, and what must appear at once hangs on one of them.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from jpo_ray.errors import InputError

TRANSFERS = 8  # files at a time
CHUNK_BYTES = 8 * 2**20
CONNECT_S, REQUEST_S = 5.0, 10.0  # S3: silence that ends a request, of which three are tried
ATTEMPTS = 3
GCS_RETRY_S = 30  # GCS: how long what failed is tried again, else 15 minutes; silence of 120 s ends a request
GOOGLE, GCS_HOST = ("gs", "gcs"), "storage.googleapis.com"
S3_OPTIONS = ("endpoint_override", "scheme", "region", "anonymous", "force_virtual_addressing", "tls_ca_file_path")
SECRET = re.compile(r"secret|password|token|key", re.IGNORECASE)
# What stores say, as pyarrow hands it on.
NO_BUCKET = re.compile(
    r"NO_SUCH_BUCKET|Bucket.*not found|NOT_FOUND.*function=(ListObjects|CreateResumable|InsertObject)", re.DOTALL
)
NO_TOKEN = re.compile(r"OAuth2 access token|AuthenticationException")
DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|HTTP 40[13]|"
    r"PERMISSION_DENIED|UNAUTHENTICATED"
)
CUT_SHORT = "Failed to flush response stream"  # S3's client, of an object that is deleted while it is read
CURL = re.compile(r"CURL error \[\d+\]=(.*?)(?: error_info=|$)", re.DOTALL)
OF_GCS = re.compile(r"with a last message of (.*?) error_info=", re.DOTALL)


class StoreError(OSError):
    """A store that does not answer, or says no, in the middle of the work."""


def location(text: str) -> Path | str:
    """What a user names as a place: a folder, or (as text) the URI of one on an object store."""
    if not is_uri(text):
        return Path(text).expanduser()
    return Path(unquote(urlsplit(text).path)) if text.startswith("file:") else text


def is_uri(where: Path | str) -> bool:
    return isinstance(where, str) and re.match(r"[a-z][a-z0-9+.-]+:/", where) is not None


class Store:
    """The folder of a URI. Names are relative to it, with slashes.

    Raises `InputError` where it cannot be reached as it stands in the URI; later failures are `StoreError`.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        parts = _checked(uri)
        self._shown = parts._replace(query="").geturl().rstrip("/")
        host = GCS_HOST if parts.scheme in GOOGLE else parts.netloc
        self._at = dict(parse_qsl(parts.query)).get("endpoint_override", host)
        try:
            with self._explained(""):
                self._fs, self._base = _connect(uri)
            self._require_bucket()
        except StoreError as error:
            raise InputError(str(error)) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.uri,)

    def _require_bucket(self) -> None:
        from pyarrow.fs import FileSelector

        with suppress(FileNotFoundError), self._explained(""):  # nothing there yet
            self._fs.get_file_info(FileSelector(self._base))

    def shown(self, name: str = "") -> str:
        """The URI of an object for people, without options."""
        return f"{self._shown}/{name}" if name else self._shown

    def top(self) -> list[str]:
        """Names of what is directly in the folder. All that is below it is listed: GCS names no folders else."""
        return sorted({name.split("/")[0] for name in self.names("")})

    def names(self, below: str) -> list[str]:
        """Names of all objects below a folder, relative to it."""
        start = len(self._path(below)) + 1
        return sorted(info.path[start:] for info in self._infos(below, recursive=True) if info.is_file)

    def times(self, below: str) -> dict[str, datetime]:
        """When each object directly in a folder was written, by the store's own clock."""
        return {info.base_name: info.mtime for info in self._infos(below, recursive=False) if info.is_file}

    def read(self, name: str) -> bytes | None:
        """An object's content, None where there is none."""
        try:
            with self._explained(name), self._fs.open_input_stream(self._path(name)) as stream:
                content: bytes = stream.read()
                return content
        except FileNotFoundError:
            return None
        except StoreError as error:
            if CUT_SHORT in str(error) and not self._exists(name):
                return None
            raise

    def write(self, name: str, content: bytes) -> None:
        """Write an object. Ctrl-C in the meantime does not cut it short."""

        def write(name: str, _stop: Event) -> None:
            with self._explained(name), self._fs.open_output_stream(self._path(name)) as stream:
                stream.write(content)

        _side_by_side(write, [name])

    def upload(self, folder: Path, below: str, names: Iterable[str]) -> None:
        """Write files of a local folder below one of the store. Interrupted, some of them may be cut short."""

        def upload(name: str, stop: Event) -> None:
            target = f"{below}/{name}"
            with (
                self._explained(target),
                (folder / name).open("rb") as source,
                self._fs.open_output_stream(self._path(target)) as stream,
            ):
                while (chunk := source.read(CHUNK_BYTES)) and not stop.is_set():
                    stream.write(chunk)

        _side_by_side(upload, names)

    def download(self, below: str, folder: Path, names: Iterable[str]) -> None:
        """Copy objects below a folder of the store into a local one. Raises `FileNotFoundError` for one not there."""

        def download(name: str, stop: Event) -> None:
            source, path = f"{below}/{name}", folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                self._explained(source),
                self._fs.open_input_stream(self._path(source)) as stream,
                path.open("wb") as to,
            ):
                while (chunk := stream.read(CHUNK_BYTES)) and not stop.is_set():
                    to.write(chunk)

        _side_by_side(download, names)

    def delete(self, name: str) -> None:
        """Delete an object, or all that is below a folder, if it is there."""
        from pyarrow.fs import FileType

        with self._explained(name):
            is_folder = self._fs.get_file_info(self._path(name)).type == FileType.Directory
            with suppress(FileNotFoundError):
                (self._fs.delete_dir if is_folder else self._fs.delete_file)(self._path(name))

    def _exists(self, name: str) -> bool:
        from pyarrow.fs import FileType

        with self._explained(name):
            return bool(self._fs.get_file_info(self._path(name)).type != FileType.NotFound)

    def _infos(self, below: str, *, recursive: bool) -> list[Any]:
        from pyarrow.fs import FileSelector

        with self._explained(below):
            selector = FileSelector(self._path(below), allow_not_found=True, recursive=recursive)
            return list(self._fs.get_file_info(selector))

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except StoreError:
            raise
        except (OSError, ValueError, ArrowException) as error:
            said = str(error)
            if isinstance(error, OSError) and error.errno is not None and "Detail: [errno" not in said:
                raise  # of the local disk
            missing = isinstance(error, FileNotFoundError) or said.startswith(("No such file", "No such directory"))
            if missing and not NO_BUCKET.search(said):
                raise FileNotFoundError(said) from error
            raise StoreError(f"{self.shown(name)}: {self._reason(said)}") from error

    def _reason(self, said: str) -> str:
        """The store's error in words; what it says itself is long."""
        if NO_BUCKET.search(said):
            return "there is no such bucket; make it first"
        if NO_TOKEN.search(said):
            return "got no access token; check the credentials (environment, profile or role) and the network"
        if DENIED.search(said):
            return "permission denied; check the credentials (environment, profile or role) and the bucket's policy"
        if "NETWORK_CONNECTION" in said:
            return f"no answer from {self._at} ({said.rsplit('; Details: ', 1)[-1].rsplit(': ', 1)[-1][:120]})"
        if found := CURL.search(said):
            return f"no answer from {self._at} ({found[1]})"
        found = OF_GCS.search(said)
        return (found[1] if found else said).strip().splitlines()[0][:300]


def _checked(uri: str) -> Any:
    """The parts of a URI. Raises `InputError` where it holds what must not be shown, or names no bucket."""
    parts = urlsplit(uri)
    secret = [key for key, _ in parse_qsl(parts.query) if SECRET.search(key)]
    # Elsewhere what stands before the @ is no credential: a container (abfs), a user that HDFS takes at its word.
    key_id = parts.scheme in ("s3", *GOOGLE) and parts.username not in (None, "", "anonymous")
    if parts.password or key_id or secret:
        raise InputError(
            f"{parts.scheme}://...: credentials do not belong in a URI, which is shown and written down; give them by "
            "environment variables, a profile or a role"
        )
    if not parts.netloc:
        raise InputError(f"{uri}: names no bucket; write it as {parts.scheme}://BUCKET/PATH")
    if not parts.path.strip("/"):
        raise InputError(f"{uri}: is a whole bucket; name a folder in it, as {parts.scheme}://{parts.netloc}/PATH")
    return parts


def _connect(uri: str) -> tuple[Any, str]:
    """File system and path of a URI."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, S3FileSystem, resolve_s3_region

    parts = urlsplit(uri)
    if parts.scheme != "s3":  # pyarrow reads the options of others by itself
        if parts.scheme in GOOGLE and "retry_limit_seconds" not in parts.query:
            uri = parts._replace(query=f"{parts.query}&retry_limit_seconds={GCS_RETRY_S}".lstrip("&")).geturl()
        found, path = FileSystem.from_uri(uri)
        return found, path.rstrip("/")
    user, _, bucket = parts.netloc.rpartition("@")
    options: dict[str, Any] = ({"anonymous": "true"} if user else {}) | dict(parse_qsl(parts.query))
    if unknown := sorted(options.keys() - set(S3_OPTIONS)):
        raise InputError(f"{uri}: unknown option {unknown[0]}; there are {', '.join(S3_OPTIONS)}")
    for name in ("anonymous", "force_virtual_addressing"):
        if name in options:
            options[name] = options[name].lower() == "true"
    endpoint = options.get("endpoint_override", "")
    if "://" in endpoint:
        options["scheme"], options["endpoint_override"] = endpoint.split("://", 1)
    if "region" not in options:
        named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        options["region"] = named or ("us-east-1" if endpoint else resolve_s3_region(bucket))
    found = S3FileSystem(
        connect_timeout=CONNECT_S,
        request_timeout=REQUEST_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # small objects in one request
        **options,
    )
    return found, bucket + unquote(parts.path).rstrip("/")


def _side_by_side(work: Callable[[str, Event], None], names: Iterable[str]) -> None:
    """`work` on every name, in threads: Ctrl-C interrupts the waiting at once, and tells them to stop."""
    stop = Event()
    with ThreadPoolExecutor(TRANSFERS) as pool:
        futures = [pool.submit(work, name, stop) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
