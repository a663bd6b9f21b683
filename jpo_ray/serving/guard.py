"""What stands before every route: keys, size limits, a bounded number of requests, request ids and a log line each.

Pure ASGI, so that streams pass through untouched. Everything but health and readiness needs a key, where the server has
any; a server without keys answers this machine alone.
"""

import contextvars
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from jpo_ray.config_serve import KEYS_VARIABLE, LOOPBACK, ServeConfig
from jpo_ray.serving.keys import Keys
from jpo_ray.serving.telemetry import Telemetry

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/ready")
KEYED = "/v1/adapters"  # not without a key, even where the rest needs none
DIALOG = b'Basic realm="jpo serve", charset="UTF-8"'  # browsers ask for a password then: the key
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
LOGGER = logging.getLogger("ray.serve")  # which writes JSON lines where Serve's logs are
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")


class TooLarge(Exception):
    """A body that grew beyond the limit while it was read."""


@dataclass(frozen=True)
class Refusal:
    status: int
    message: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Guard:
    def __init__(self, app: App, config: ServeConfig, keys: Keys, telemetry: Telemetry) -> None:
        self._app, self._keys, self._telemetry = app, keys, telemetry
        self._limits = config.limits
        self._origins = {origin.encode() for origin in config.allowed_origins}
        self.under_way = 0  # requests that were let in and are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        identity = given.decode() if REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        token = request_id.set(identity)
        reply = _Reply(send, identity, self._allowed_origin(headers))
        started = time.monotonic()
        try:
            refusal = self._refusal(scope, headers)
            if refusal is None:
                await self._admit(scope, receive, reply)
            else:
                await reply.refuse(refusal)
        finally:
            seconds = time.monotonic() - started
            self._telemetry.end(_route(scope), reply.status, seconds)
            _log(scope, identity, reply, seconds)
            request_id.reset(token)

    async def _admit(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        counted = _route(scope) not in OPEN
        if counted and self.under_way >= self._limits.max_requests:
            wait = str(self._limits.retry_after_s).encode()
            await reply.refuse(Refusal(429, "too many requests are under way; try again", ((b"retry-after", wait),)))
            return
        self._count(counted)
        try:
            await self._app(scope, _limited(receive, self._limits.max_body_bytes), reply.send)
        except TooLarge:
            await reply.refuse(self._too_large())
        except Exception as error:
            LOGGER.exception("a request failed", extra={"jpo_request_id": request_id.get()})
            if reply.status:  # it began already: cut it off, so that nobody takes it for whole
                raise
            await reply.refuse(Refusal(500, f"the server failed ({type(error).__name__})"))
        finally:
            self._count(-counted)

    def _count(self, change: int) -> None:
        self.under_way += change
        self._telemetry.under_way(self.under_way)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Refusal | None:
        """Why a request is not let in, or None."""
        route = _route(scope)
        if route in OPEN and scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] == "OPTIONS" and self._allowed_origin(headers) is not None:
            return _preflight()
        if not self._keys:
            if not _from_here(scope, headers):
                return Refusal(403, "this server has no API keys and answers this machine alone")
            if route.startswith(KEYED):
                return Refusal(403, f"adapters are changed with an API key only; start the server with {KEYS_VARIABLE}")
        elif not self._keys.opened_by(headers.get(b"authorization", b"")):
            return Refusal(401, "an API key is needed", ((b"www-authenticate", DIALOG),))
        if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            return self._body_refusal(scope["method"], headers)
        return None

    def _body_refusal(self, method: str, headers: dict[bytes, bytes]) -> Refusal | None:
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if method != "DELETE" and kind != b"application/json":  # which no form of another site can send
            return Refusal(415, "Content-Type must be application/json")
        if method == "DELETE" and headers.get(b"origin") not in (None, *self._origins) and not _same_origin(headers):
            return Refusal(403, "not from a page of another site")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18:
            return Refusal(400, "Content-Length is no number")
        return self._too_large() if int(length) > self._limits.max_body_bytes else None

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self._limits.max_body_bytes} bytes")

    def _allowed_origin(self, headers: dict[bytes, bytes]) -> bytes | None:
        origin = headers.get(b"origin")
        return origin if origin in self._origins else None


class _Reply:
    """Sends, and remembers what was sent."""

    def __init__(self, send: Send, identity: str, origin: bytes | None) -> None:
        self._send = send
        self.status, self.bytes = 0, 0
        self._extra = [*HEADERS, (b"x-request-id", identity.encode())]
        if origin is not None:
            self._extra += [(b"access-control-allow-origin", origin), (b"vary", b"origin")]

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = {name.lower() for name, _ in message.get("headers", [])}
            added = [(name, value) for name, value in self._extra if name not in names]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        elif message["type"] == "http.response.body":
            self.bytes += len(message.get("body", b""))
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        if self.status:
            return
        body = error_body(refusal.message, refusal.status) if refusal.status >= 400 else b""
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        start = {"type": "http.response.start", "status": refusal.status, "headers": [*headers, *refusal.headers]}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body})


def error_body(message: str, status: int, param: str | None = None) -> bytes:
    """An error as OpenAI's clients expect it."""
    kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    name = kind.get(status, "invalid_request_error" if status < 500 else "server_error")
    return json.dumps({"error": {"message": message, "type": name, "param": param, "code": status}}).encode()


def _route(scope: Scope) -> str:
    """The path below the prefix that the application is deployed at, as the routes behind the guard see it."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(prefix) :] if path.startswith(f"{prefix}/") else path


def _limited(receive: Receive, most: int) -> Receive:
    """`receive` that raises `TooLarge` where the body, declared or not, grows beyond `most` bytes."""
    read = 0

    async def limited() -> Message:
        nonlocal read
        message = await receive()
        if message["type"] == "http.request":
            read += len(message.get("body", b""))
            if read > most:
                raise TooLarge(f"the body is larger than {most} bytes")
        return message

    return limited


def _from_here(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Whether the client is this machine, and took it for that: else a page elsewhere could name itself 127.0.0.1."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    client = scope.get("client")
    try:
        near = client is None or ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        near = client is not None and client[0] in LOOPBACK
    return near and name.strip("[]") in LOOPBACK


def _same_origin(headers: dict[bytes, bytes]) -> bool:
    origin = headers.get(b"origin", b"")
    return origin.partition(b"://")[2] == headers.get(b"host", b"-")


def _preflight() -> Refusal:
    allowed = (
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
        (b"access-control-max-age", b"600"),
    )
    return Refusal(204, "", allowed)


def _log(scope: Scope, identity: str, reply: _Reply, seconds: float) -> None:
    facts = {
        "jpo_request_id": identity,
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": reply.status,
        "seconds": round(seconds, 4),
        "bytes": reply.bytes,
    }
    LOGGER.info("request", extra=facts)
