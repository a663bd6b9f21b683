"""`jpo submit`: as `ray job submit`, but it says first what would go wrong, and ends with the job's exit code."""

import asyncio
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jpo_ray.errors import InputError

# Words between underscores, by their ends: OPENAI_API_KEY and PGPASSWORD, but not TOKENIZERS_PARALLELISM.
SECRET = re.compile(r"(key|token|secret|passwd|password|passphrase|credential)s?(?![a-z])", re.IGNORECASE)
NAMES_A_FILE = re.compile(r"_(path|file)$", re.IGNORECASE)
# Of keys and tokens, as they lie about in a checkout. Written as in .gitignore.
SECRET_FILES = (".env", ".env.*", "*.pem", "*.key")
SHOWN = 3  # of the largest entries of a folder that is too large, and of files that are not sent
MIB = 2**20
Say = Callable[[str], Any]  # takes text as it is, line ends included


def submit(
    address: str | None, entrypoint: Sequence[str], runtime_env: Path | None, working_dir: Path, say: Say, *, wait: bool
) -> int:
    """Submit a job and, with `wait`, say what it prints until it ends. Returns its exit code (0 without `wait`).

    Raises `InputError` for a file or folder that cannot be sent, and where no cluster answers or it refuses the token.
    """
    environment = read_runtime_env(runtime_env)
    if "working_dir" in environment:
        say(f"{runtime_env}: its working_dir is not used, but --working-dir ({working_dir})\n")
    asked = environment.get("excludes", [])
    # First, so that the user's own may bring one back (`!ca.pem`).
    environment |= {"working_dir": str(working_dir), "excludes": [*SECRET_FILES, *asked]}
    require_small(working_dir, environment["excludes"])
    for module in environment.get("py_modules", []):
        if "://" not in module:
            require_small(Path(module), environment["excludes"], f"{runtime_env}: py_modules")
    if left := sorted(sent_files(working_dir, asked).keys() - sent_files(working_dir, environment["excludes"]).keys()):
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        say(
            f"not sent, since they may hold secrets: {', '.join(left[:SHOWN])}{more} (`excludes: ['!NAME']` in the "
            "runtime environment sends one)\n"
        )
    with _explained(address):
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=shlex.join(entrypoint), runtime_env=environment)
    say(f"job {job} at {client.get_address()}\n")
    if not wait:
        return 0
    try:
        asyncio.run(_follow(client, job, say))
    except (KeyboardInterrupt, RuntimeError) as lost:
        say(f"\njob {job} goes on; `ray job logs --follow {job}` shows it again, `ray job stop {job}` ends it\n")
        return 130 if isinstance(lost, KeyboardInterrupt) else 1
    ended = client.get_job_info(job)
    code = ended.driver_exit_code
    if code is None or code < 0:  # it never began, or was killed
        say(f"job {job}: {ended.status.lower()}: {ended.message}\n")
        return 1
    return int(code)


def read_runtime_env(path: Path | None) -> dict[str, Any]:
    """A YAML file as Ray reads it, without what is left empty in it.

    Raises `InputError` for what is none, and for secrets: everybody could read them.
    """
    if path is None:
        return {}
    from ray.runtime_env import RuntimeEnv

    from jpo_ray.config_file import read_yaml

    found = {name: value for name, value in read_yaml(path, "--runtime-env").items() if value is not None}
    names = found["env_vars"] if isinstance(found.get("env_vars"), dict) else {}
    for name in map(str, names):  # before Ray says what is wrong, which shows values
        if SECRET.search(name) and not NAMES_A_FILE.search(name):
            raise InputError(
                f"{path}: env_vars.{name}: the dashboard shows a job's environment to everybody; set it on the nodes, "
                "where they are started"
            )
    try:
        RuntimeEnv(**{str(name): value for name, value in found.items() if name != "working_dir"})
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error
    return found


def require_small(path: Path, excludes: Sequence[str], option: str = "--working-dir") -> None:
    """Raise `InputError` where what Ray would send of a folder (of `py_modules` also a file) is more than the cluster
    takes; nothing is packed."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    of_folder = option == "--working-dir"
    if not path.is_dir() and (of_folder or not path.is_file()):
        raise InputError(f"{option} {path}: no such folder")
    sizes = upload_sizes(path, excludes, defaults=of_folder)
    total = sum(sizes.values())
    if total < DASHBOARD_CLIENT_MAX_SIZE:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:SHOWN]
    shown = ", ".join(f"{name} {sizes[name] / MIB:,.0f} MiB" for name in largest)
    raise InputError(
        f"{option} {path}: {total / MIB:,.0f} MiB would be sent and Ray takes less than "
        f"{DASHBOARD_CLIENT_MAX_SIZE / MIB:.0f}; name what is not needed in a file .rayignore (written as .gitignore "
        f"is) or in the runtime environment's `excludes`. The largest: {shown}"
    )


def upload_sizes(path: Path, excludes: Sequence[str], *, defaults: bool = True) -> dict[str, int]:
    """Bytes that Ray would send of each entry of a folder."""
    sizes: dict[str, int] = {}
    for name, size in sent_files(path, excludes, defaults=defaults).items():
        entry = Path(name).parts[0]
        sizes[entry] = sizes.get(entry, 0) + size
    return sizes


def sent_files(path: Path, excludes: Sequence[str], *, defaults: bool = True) -> dict[str, int]:
    """The files that Ray would send of a folder (or that file), and their bytes, by Ray's own rules: .gitignore,
    .rayignore, `excludes`, and (`defaults`) what it always leaves out of a working directory."""
    # Ray has no public way to ask for this, and the version is pinned; a test compares with the package that it makes.
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    if path.is_file():
        return {path.name: path.stat().st_size}
    sizes: dict[str, int] = {}
    root = path.absolute()

    def add(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(root))] = path.stat().st_size

    left_out = [_get_excludes(root, [*(get_runtime_env_default_excludes() if defaults else []), *excludes])]
    gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(root, left_out, add, include_gitignore=gitignore, logger=logging.getLogger(__name__))
    return sizes


async def _follow(client: Any, job: str, say: Say) -> None:
    async for lines in client.tail_job_logs(job):
        say(lines)


@contextmanager
def _explained(address: str | None) -> Iterator[None]:
    """Ray's errors of a cluster that cannot be reached, as one line."""
    from ray.exceptions import AuthenticationError

    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        yield
    except AuthenticationError as error:
        raise InputError(
            f"--address {where}: the cluster wants a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the one it was started with"
        ) from error
    except ConnectionError as error:
        raise InputError(f"--address {where}: no Ray dashboard answers there ({error})") from error
