"""What the overload benchmark counts as served, refused and neither."""

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from served.faults import outcome, ready
from served.load import NEW_TOKENS

WHOLE = {"usage": {"completion_tokens": NEW_TOKENS}}


def asked(make: Callable[[], Any]) -> tuple[str, bool]:
    """How a request to a server that answers so ends, and whether the server says that it is ready."""

    async def scenario() -> tuple[str, bool]:
        async def answer(request: web.Request) -> web.Response:
            reply = make()
            if reply is None:
                assert request.transport is not None
                request.transport.abort()
            return reply or web.Response()

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address = runner.addresses[0]
        async with aiohttp.ClientSession(f"http://127.0.0.1:{address[1]}") as client:
            found = await outcome(client, 0), await ready(client)
        await runner.cleanup()
        return found

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: web.json_response(WHOLE), "served"),
        (lambda: web.json_response({}, status=429, headers={"Retry-After": "3"}), "refused"),
        (lambda: web.json_response({}, status=429), "other"),
        (lambda: web.json_response({"usage": {"completion_tokens": 1}}), "other"),
        (lambda: web.json_response([]), "other"),
        (lambda: web.Response(text="<html>", content_type="text/html"), "other"),
        (lambda: web.Response(text="{", content_type="application/json"), "other"),
        (lambda: web.json_response(WHOLE, status=500), "other"),
        (lambda: None, "other"),
    ],
)
def test_outcomes(make: Callable[[], Any], expected: str) -> None:
    assert asked(make)[0] == expected


def test_a_server_that_breaks_off_is_not_ready() -> None:
    assert not asked(lambda: None)[1]
