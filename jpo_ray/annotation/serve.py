"""`jpo annotate`: serve comparisons to people until it is stopped, then export what they answered."""

import fcntl
import re
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.table import Table

from jpo_ray.annotation.app import PAGE, build_app
from jpo_ray.annotation.export import WRITTEN, export
from jpo_ray.annotation.store import PER_COMPARISON, Store
from jpo_ray.config_judge import PEOPLE
from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import Comparison
from jpo_ray.files import output_folder

DATABASE = "annotations.sqlite"
LOCK = ".annotate.lock"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
EVERY_ADDRESS = ("0.0.0.0", "::")
SHUTDOWN_S = 5  # for answers under way


def annotate(
    comparisons: Sequence[Comparison],
    out: Path,
    annotators: Sequence[str],
    *,
    per_comparison: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8420,
    guidelines: Path | None = None,
    release_after_hours: float = 24,
    console: Console,
) -> None:
    """Let people compare, each comparison by `per_comparison` of them until Ctrl-C or SIGTERM; then export into `out`.

    `per_comparison` is by default what it was before, 2 at first.

    What `out` holds already is gone on with: comparisons and annotators given now are added, so both may be empty
    then. Port 0 takes a free one. Must be called in the main thread. Raises `InputError` for what is wrong with its
    arguments, a folder that another server holds, and a port that is in use.
    """
    text = _guidelines(guidelines)
    _check_names(annotators)
    if per_comparison is not None and per_comparison < 1:
        raise InputError(f"{per_comparison} answers per comparison: at least one is needed")
    if not release_after_hours > 0:
        raise InputError(f"{release_after_hours:g} hours until a comparison is released: must be more than none")
    with output_folder(out):  # which also tells whether it can be written to
        lock = (out / LOCK).open("a")
    with (
        lock,
        _held(lock.fileno(), out),
        _listening(host, port) as listener,
        closing(_open(out, comparisons, annotators, per_comparison, release_after_hours * 3600)) as store,
    ):
        _print_links(console, store, host, listener.getsockname()[1])
        _serve(build_app(store, text), listener)
        _export(store, out, console, serving=True)


def export_folder(out: Path, console: Console) -> None:
    """Export what `out` holds, also while a server runs. Raises `InputError` where nothing was annotated there."""
    with closing(_open_existing(out)) as store:
        _export(store, out, console, serving=False)


def _guidelines(path: Path | None) -> str:
    try:
        return (path or PAGE / "guidelines.txt").read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"guidelines {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"guidelines {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _check_names(annotators: Sequence[str]) -> None:
    for index, name in enumerate(annotators):
        if name == PEOPLE:
            raise InputError(f"annotator {name}: that is what annotators say together; choose another name")
        if not NAME.fullmatch(name):
            raise InputError(f"annotator {name!r}: use up to 64 letters, digits, and . _ - after the first of them")
        if name in annotators[:index]:
            raise InputError(f"annotator {name}: named twice")


@contextmanager
def _held(lock: int, out: Path) -> Iterator[None]:
    """Hold the folder. The system lets go of the lock however this process ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{out}: another server holds it; stop that one, or use another --out") from error
    except OSError as error:
        raise InputError(f"{out}: cannot be locked ({error.strerror}); use a folder on a local disk") from error
    yield


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    if not 0 <= port < 2**16:  # the resolver would silently take its lower 16 bits
        raise InputError(f"--port {port}: must be 0 to 65535; 0 takes a free one")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there ({error}); choose another") from error
    with listener:
        yield listener


def _open(
    out: Path,
    comparisons: Sequence[Comparison],
    annotators: Sequence[str],
    per_comparison: int | None,
    release_after_s: float,
) -> Store:
    """The folder's store with what is new added. Nothing is made or added before all is known to be right."""
    path = out / DATABASE
    standing = Store(path) if path.exists() else None
    names = set(annotators)
    held, kept = 0, PER_COMPARISON
    if standing is not None:
        with closing(standing):
            names |= standing.tokens().keys()
            held, kept = standing.comparison_count(), standing.per_comparison
    wanted = per_comparison or kept
    if not comparisons and not held:
        raise InputError(f"{out}: no comparisons there and none given; nothing to annotate")
    if len(names) < wanted:
        raise InputError(f"{len(names)} annotators for {wanted} answers per comparison: name more annotators")
    store = Store(path, per_comparison=per_comparison, release_after_s=release_after_s)
    store.add(comparisons, annotators)
    return store


def _open_existing(out: Path) -> Store:
    if not (out / DATABASE).is_file():
        raise InputError(f"{out}: no {DATABASE} there; name the --out of a `jpo annotate`")
    return Store(out / DATABASE)


def _print_links(console: Console, store: Store, host: str, port: int) -> None:
    """Each annotator's own link, and how far all of it is."""
    name = socket.gethostname() if host in EVERY_ADDRESS else host
    address = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
    wanted, given = store.comparison_count() * store.per_comparison, len(store.answers())
    say = [
        f"{store.comparison_count():,} comparisons, {store.per_comparison} answers each: {given:,} of {wanted:,} given",
        "each annotator's own link, which is also the password:",
        *(f"  {annotator}  {address}/?token={token}" for annotator, token in store.tokens().items()),
    ]
    if host not in ("127.0.0.1", "::1", "localhost"):
        say.append("others on the network can read along: plain http; for more than a trusted one put TLS in front")
    say.append("Ctrl-C stops and exports")
    for line in say:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM. There is no access log, since it would hold the tokens of links."""
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    # uvicorn stops at either signal and then raises it again for the handler that stood before.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)


def _export(store: Store, out: Path, console: Console, *, serving: bool) -> None:
    """Write the files and say who did how much; how much is left only a server knows, since it sets how many answer."""
    with output_folder(out):
        count = export(store, out)
    table = Table(title="Annotators")
    for name in ("", "answered", *(["left"] if serving else [])):
        table.add_column(name, justify="right" if name else "left")
    for name in store.tokens():
        standing = store.standing(name)
        table.add_row(name, f"{standing.done:,}", *([f"{standing.left:,}"] if serving else []))
    console.print(table)
    console.print(f"{out}: {count:,} answers in {', '.join(WRITTEN)}", highlight=False, soft_wrap=True)
