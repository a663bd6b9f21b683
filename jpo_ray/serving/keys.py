"""API keys: read inside the process that compares them, never logged."""

import base64
import binascii
import hashlib
import hmac
import os
import re
from pathlib import Path

from jpo_ray.config_serve import KEYS_VARIABLE, LOOPBACK, ServeConfig
from jpo_ray.errors import InputError

SHORTEST_KEY = 16  # characters; a shorter one can be guessed


class Keys:
    """The keys that open the server. Holds their hashes alone, and compares in a time that does not tell them apart."""

    def __init__(self, keys: list[str]) -> None:
        self._hashes = [_hash(key) for key in keys]

    def __len__(self) -> int:
        return len(self._hashes)

    def opened_by(self, authorization: bytes) -> bool:
        """Whether an Authorization header holds a key: as bearer token, or as the password of a browser's dialog."""
        offered = _hash(_offered(authorization))
        matches = [hmac.compare_digest(offered, known) for known in self._hashes]  # all of them, always
        return any(matches)


def read_keys(config: ServeConfig) -> Keys:
    """Keys of the file and the environment. Raises `InputError` for a file that cannot be read, and for weak keys."""
    found = re.split(r"[,\s]+", os.environ.get(KEYS_VARIABLE, ""))
    if config.keys_file is not None:
        path = Path(config.keys_file).expanduser()
        try:
            found += path.read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"keys_file {path}: cannot be read as ASCII text ({type(error).__name__})") from error
    keys = [key for key in found if key]
    if any(len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() for key in keys):
        raise InputError(
            f"an API key is shorter than {SHORTEST_KEY} characters or not plain ASCII; `python -c 'import secrets; "
            "print(secrets.token_urlsafe(32))'` makes a good one"
        )
    if config.keys_file is not None and not keys:
        raise InputError(f"keys_file {config.keys_file}: holds no key")
    return Keys(keys)


def require_keys(keys: Keys, *hosts: str) -> None:
    """Raise `InputError` where a server without keys would listen to the network."""
    beyond = [host for host in hosts if host not in LOOPBACK]
    if beyond and not keys:
        raise InputError(
            f"host {beyond[0]}: listens beyond this machine, which needs API keys; set {KEYS_VARIABLE} or keys_file"
        )


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _offered(authorization: bytes) -> str:
    scheme, _, rest = authorization.decode("latin-1").strip().partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""
