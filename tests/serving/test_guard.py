"""Keys, limits, request ids and the closed door, on an application that would answer anything."""

import asyncio
import base64
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from jpo_ray.config_serve import Limits, ServeConfig
from jpo_ray.serving.guard import Guard
from jpo_ray.serving.keys import Keys

KEY, OTHER = "sk-canary-0123456789", "sk-second-0123456789"
JSON = {"content-type": "application/json"}
BEARER = {"authorization": f"Bearer {KEY}"}


class Recorded:
    """Telemetry that remembers how many requests it was told of."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def under_way(self, requests: int) -> None:
        self.seen.append(requests)

    def end(self, path: str, status: int, seconds: float) -> None: ...


async def echo(_: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def guarded(app: Any = echo, keys: list[str] | None = None, telemetry: Any = None, **config: Any) -> Guard:
    given = [KEY, OTHER] if keys is None else keys
    return Guard(app, ServeConfig(**config), Keys(given), telemetry or Recorded())


def asked(
    guard: Guard, path: str = "/v1/models", method: str = "GET", client: str = "127.0.0.1", **more: Any
) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(guard, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as session:
            return await session.request(method, path, **more)

    return asyncio.run(ask())


PATHS = ["/", "/v1/models", "/v1/chat/completions", "/page.js", "/metrics", "/nothing", "/health/", "//health"]


@pytest.mark.parametrize("path", PATHS)
def test_every_route_but_health_needs_a_key(path: str) -> None:
    refused = asked(guarded(), path)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Basic")
    assert refused.json()["error"]["type"] == "authentication_error"
    assert asked(guarded(), path, headers=BEARER).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_health_is_open(path: str) -> None:
    assert asked(guarded(), path).status_code == 200
    assert asked(guarded(), path, "POST", headers=JSON).status_code == 401


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer  {OTHER}", 200),
        ("Basic " + base64.b64encode(f"any:{KEY}".encode()).decode(), 200),
        (f"Bearer {KEY} ", 200),
        (f"Bearer {KEY[:-1]}", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY.upper()}", 401),
        (KEY, 401),
        (f"Token {KEY}", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("", 401),
        ("Basic ====", 401),
        ("Basic " + base64.b64encode(KEY.encode()).decode(), 401),
        ("Basic " + base64.b64encode(b"\xff:\xff").decode(), 401),
    ],
)
def test_keys(header: str, status: int) -> None:
    assert asked(guarded(), headers={"authorization": header}).status_code == status


def test_without_keys_only_this_machine_is_answered() -> None:
    open_guard = guarded(keys=[])
    assert asked(open_guard).status_code == 200
    assert asked(open_guard, headers={"host": "localhost:8000"}).status_code == 200
    assert asked(open_guard, headers={"host": "[::1]:8000"}).status_code == 200
    assert asked(open_guard, client="10.0.0.7").status_code == 403
    assert asked(open_guard, headers={"host": "rebound.example:8000"}).status_code == 403


def test_adapters_are_never_changed_without_a_key() -> None:
    for method, path in (("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/x")):
        refused = asked(guarded(keys=[]), path, method, headers=JSON, content=b"{}")
        assert refused.status_code == 403
        assert "adapters are changed with an API key only" in refused.json()["error"]["message"]
        assert asked(guarded(), path, method, headers=JSON | BEARER, content=b"{}").status_code == 200


def test_a_prefix_changes_nothing() -> None:
    """Serve keeps the prefix of its deploy file in the path, and names it as the root path."""

    def below(guard: Guard, path: str, method: str = "GET", **more: Any) -> int:
        async def mounted(scope: Any, receive: Any, send: Any) -> None:
            await guard({**scope, "root_path": "/prefix"}, receive, send)

        return asked(mounted, path, method, **more).status_code  # type: ignore[arg-type]

    assert below(guarded(), "/prefix/health") == below(guarded(), "/prefix/ready") == 200
    assert below(guarded(), "/prefix/v1/models") == below(guarded(), "/prefixed/health") == 401
    keyless = guarded(keys=[])
    assert below(keyless, "/prefix/v1/models") == 200
    for method, path in (("POST", "/prefix/v1/adapters"), ("DELETE", "/prefix/v1/adapters/x")):
        assert below(keyless, path, method, headers=JSON, content=b"{}") == 403


def test_bodies_are_limited_declared_or_not() -> None:
    guard = guarded(limits=Limits(max_body_bytes=1000))
    headers = JSON | BEARER

    async def pieces(count: int) -> Any:
        for _ in range(count):
            yield b"x" * 100

    assert asked(guard, "/v1/score", "POST", headers=headers, content=b"x" * 1000).text == "1000"
    assert asked(guard, "/v1/score", "POST", headers=headers, content=b"x" * 1001).status_code == 413
    assert asked(guard, "/v1/score", "POST", headers=headers, content=pieces(10)).text == "1000"
    assert asked(guard, "/v1/score", "POST", headers=headers, content=pieces(11)).status_code == 413
    odd = headers | {"content-length": "-1"}
    assert asked(guard, "/v1/score", "POST", headers=odd, content=b"x").status_code == 400


def test_only_json_is_read() -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = asked(guarded(), "/v1/score", "POST", headers=BEARER | {"content-type": kind}, content=b"{}")
        assert reply.status_code == 415
    reply = asked(guarded(), "/v1/score", "POST", headers=BEARER | {"content-type": "application/json; charset=utf-8"})
    assert reply.status_code == 200


def test_pages_of_other_sites_are_refused() -> None:
    origin = {"origin": "https://other.example"}
    preflight = asked(guarded(), "/v1/score", "OPTIONS", headers=origin)
    assert preflight.status_code == 401
    assert "access-control-allow-origin" not in preflight.headers
    assert "access-control-allow-origin" not in asked(guarded(), headers=BEARER | origin).headers
    assert asked(guarded(), "/v1/adapters/x", "DELETE", headers=BEARER | origin).status_code == 403
    assert asked(guarded(), "/v1/adapters/x", "DELETE", headers=BEARER).status_code == 200
    friendly = guarded(allowed_origins=["https://other.example"])
    preflight = asked(friendly, "/v1/score", "OPTIONS", headers=origin)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (204, "https://other.example")
    assert asked(friendly, "/v1/adapters/x", "DELETE", headers=BEARER | origin).status_code == 200


def test_request_ids() -> None:
    assert asked(guarded(), headers=BEARER | {"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("a b", "x" * 65, "a\tb", ""):
        assert len(asked(guarded(), headers=BEARER | {"x-request-id": odd}).headers["x-request-id"]) == 24


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[logging.LogRecord]]]:
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield lambda: [record for record in caplog.records if record.name == "ray.serve"]
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def test_a_line_is_logged_for_each_request_and_no_key(lines: Callable[[], list[logging.LogRecord]]) -> None:
    asked(guarded(), "/v1/score", "POST", headers=JSON | BEARER | {"x-request-id": "mine-2"}, content=b"12345")
    asked(guarded(), headers={"authorization": "Bearer sk-wrong-canary-000"})
    first, second = lines()[0].__dict__, lines()[-1].__dict__
    facts = {name: first[name] for name in ("jpo_request_id", "method", "path", "status", "bytes")}
    assert facts == {"jpo_request_id": "mine-2", "method": "POST", "path": "/v1/score", "status": 200, "bytes": 1}
    assert second["status"] == 401
    assert not any("canary" in json.dumps(record.__dict__, default=str) for record in lines())


def test_more_requests_than_the_limit_are_told_to_wait() -> None:
    telemetry = Recorded()

    async def scenario() -> list[int]:
        release, begun = asyncio.Event(), asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            begun.set()
            await release.wait()
            await echo(scope, receive, send)

        guard = guarded(slow, telemetry=telemetry, limits=Limits(max_requests=2, retry_after_s=3))
        transport = httpx.ASGITransport(guard)
        base = "http://127.0.0.1"
        async with httpx.AsyncClient(transport=transport, base_url=base, headers=JSON | BEARER) as session:
            held = [asyncio.create_task(session.post("/v1/score", content=b"{}")) for _ in range(2)]
            await asyncio.sleep(0.05)
            refused = await session.post("/v1/score", content=b"{}")
            assert refused.headers["retry-after"] == "3"
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert guard.under_way == 2
            assert (await session.get("/v1/models")).status_code == 429  # all routes are counted
            assert (await session.delete("/v1/adapters/x")).status_code == 429
            release.set()
            done = [(await reply).status_code for reply in held]
            again = await session.post("/v1/score", content=b"{}")
            assert guard.under_way == 0
            return [refused.status_code, *done, again.status_code]

    assert asyncio.run(scenario()) == [429, 200, 200, 200]
    assert telemetry.seen == [1, 2, 1, 0, 1, 0]  # after each change; who is refused is none


def test_requests_that_crash_are_no_longer_under_way() -> None:
    async def crashing(*_: Any) -> None:
        raise RuntimeError

    telemetry = Recorded()
    asked(guarded(crashing, telemetry=telemetry), "/v1/score", "POST", headers=JSON | BEARER, content=b"{}")
    assert telemetry.seen == [1, 0]


def test_a_crash_is_an_answer_without_its_reasons() -> None:
    async def crashing(*_: Any) -> None:
        raise RuntimeError("secret inner state")

    reply = asked(guarded(crashing), headers=BEARER)
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.json()["error"]["type"] == "server_error"
