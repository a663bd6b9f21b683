"""Clients that ask as fast as they are answered."""

import asyncio
import time
from statistics import median
from typing import Any

import aiohttp

from served.run import ADAPTERS

CONCURRENCY = 32
NEW_TOKENS = 64


async def measure(client: aiohttp.ClientSession, seconds: float, only: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    if "throughput" in only:
        found["tokens/s, whole answers"] = await throughput(client, ("sft",), seconds)
        found["tokens/s, streams"] = await throughput(client, ("sft",), seconds, stream=True)
    if "adapters" in only:
        found["tokens/s, one adapter"] = await throughput(client, ADAPTERS[:1], seconds)
        found["tokens/s, four adapters"] = await throughput(client, ADAPTERS, seconds)
    if "latency" in only:
        found["ms to first token"] = 1000 * await first_token(client)
    return found


async def throughput(
    client: aiohttp.ClientSession,
    models: tuple[str, ...],
    seconds: float,
    *,
    stream: bool = False,
    clients: int = CONCURRENCY,
) -> float:
    """Tokens a second of so many clients that ask one question after the other."""
    done, number = 0, 0
    ends = time.monotonic() + seconds

    async def one_client(place: int) -> None:
        nonlocal done, number
        while time.monotonic() < ends:
            number += 1
            await complete(client, models[(place + number) % len(models)], number, stream=stream)
            done += 1

    began = time.monotonic()
    await asyncio.gather(*(one_client(place) for place in range(clients)))
    return done * NEW_TOKENS / (time.monotonic() - began)


def body(model: str, number: int, **more: Any) -> dict[str, Any]:
    prompt = f"### Instructions: Say something about the number {number}, please.\n\n### Response:"
    fields = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    return fields | more


async def complete(client: aiohttp.ClientSession, model: str, number: int, *, stream: bool) -> None:
    async with client.post("/v1/completions", json=body(model, number, stream=stream)) as reply:
        assert reply.status == 200, await reply.text()
        if stream:
            last = b""
            async for piece in reply.content.iter_any():
                last = (last + piece)[-64:]
            assert last.rstrip().endswith(b"[DONE]")
        else:
            answer = await reply.json()
            assert answer["usage"]["completion_tokens"] == NEW_TOKENS


async def first_token(client: aiohttp.ClientSession, requests: int = 100) -> float:
    """Median seconds from a request to its first event, one request at a time."""
    taken = []
    for number in range(requests):
        began = time.monotonic()
        async with client.post("/v1/completions", json=body("sft", number, stream=True, max_tokens=8)) as reply:
            await reply.content.readany()
            taken.append(time.monotonic() - began)
            await reply.read()
    return median(taken)
