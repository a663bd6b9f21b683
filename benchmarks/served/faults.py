"""What breaks servers: overload, a killed replica, hostile requests, and an end while streams are open."""

import asyncio
import itertools
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
import openai
import psutil

from served.load import NEW_TOKENS, body, throughput
from served.run import ADAPTERS
from served.servers import KEY, Server, session

TESTS = Path(__file__).parents[2] / "tests"
REPLICA = "ray::ServeReplica:jpo:FrontServer"
STARTING = ".initialize"  # part of a process's title while the replica starts
KILL_CLIENTS = 16
CAPACITY_SECONDS = 20


async def overload(server: Server, seconds: float, most: int) -> str:
    """Ten times as many requests a second as the server can answer, at random times, whether it answers or not. What it
    can answer is measured first, with as many clients as it takes at once.
    """
    found: dict[str, list[float]] = {"served": [], "refused": [], "other": []}  # seconds that each took
    gaps = random.Random(0)

    async def one_request(client: aiohttp.ClientSession, number: int) -> None:
        began = time.monotonic()
        kind = await outcome(client, number)
        found[kind].append(time.monotonic() - began)

    async with session(server) as client:
        capacity = await throughput(client, ("sft",), CAPACITY_SECONDS, clients=most) / NEW_TOKENS
        began = due = time.monotonic()
        async with asyncio.TaskGroup() as requests:
            for number in itertools.count():
                due += gaps.expovariate(10 * capacity)
                if due > began + seconds:
                    break
                await asyncio.sleep(due - time.monotonic())
                requests.create_task(one_request(client, number))
        took_s = time.monotonic() - began
        alive = await ready(client)
    served, refused = found["served"], found["refused"]
    if len(served) < 2 or len(refused) < 2:
        return f"overload: no overload: {len(served)} served, {len(refused)} refused, {len(found['other'])} other"
    return (
        f"overload: a server of {most} that answers {capacity:.1f} requests/s, asked {number / seconds:.0f}/s for "
        f"{seconds:g} s: {len(served)} served ({len(served) / took_s:.1f}/s, {median(served):.1f} s median), "
        f"{len(refused)} refused, {len(found['other'])} other; refusals took {1000 * median(refused):.0f} ms (median), "
        f"{1000 * quantiles(refused, n=100)[98]:.0f} ms (99 %), {1000 * max(refused):.0f} ms (longest); "
        f"alive after it: {alive}"
    )


async def outcome(client: aiohttp.ClientSession, number: int) -> str:
    """How a request ended. `other` is all that a client does not expect: a broken connection, an answer that is no JSON
    or not whole, a refusal that names no time to wait.
    """
    try:
        async with client.post("/v1/completions", json=body("sft", number)) as reply:
            answer = await reply.json()
            if reply.status == 200 and answer["usage"]["completion_tokens"] == NEW_TOKENS:
                return "served"
            if reply.status == 429 and float(reply.headers["Retry-After"]) > 0:
                return "refused"
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
        pass
    return "other"


async def ready(client: aiohttp.ClientSession) -> bool:
    try:
        async with client.get("/ready") as reply:
            return reply.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def kill(server: Server, seconds: float) -> str:
    """One of two replicas is killed a third of the way through a load of clients with OpenAI's own two retries."""
    done: list[float] = []
    failed: list[str] = []
    ends = time.monotonic() + seconds

    async def one_client(client: openai.AsyncOpenAI, place: int) -> None:
        while time.monotonic() < ends:
            began, fields = time.monotonic(), body(("sft", *ADAPTERS)[place % 5], place)
            more = {"ignore_eos": fields.pop("ignore_eos")}  # vLLM's, not OpenAI's
            try:
                reply = await client.completions.create(**fields, extra_body=more)
                assert reply.usage is not None
                assert reply.usage.completion_tokens == NEW_TOKENS
                done.append(time.monotonic() - began)
            except (openai.OpenAIError, AssertionError) as error:
                failed.append(repr(error))

    async def kill_one() -> None:
        await asyncio.sleep(seconds / 3)
        replicas(server)[0].kill()

    assert len(replicas(server)) == 2
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=120, max_retries=2) as client:
        await asyncio.gather(kill_one(), *(one_client(client, place) for place in range(KILL_CLIENTS)))
    began = time.monotonic() - seconds * 2 / 3
    while len(replicas(server)) < 2 and time.monotonic() - began < 240:
        await asyncio.sleep(0.5)
    return (
        f"replica killed under {KILL_CLIENTS} clients: {len(done)} answered (longest {max(done):.1f} s), {len(failed)} "
        f"failed after the client's retries {failed[:2]}; {len(replicas(server))} replicas after "
        f"{time.monotonic() - began:.0f} s"
    )


def replicas(server: Server) -> list[psutil.Process]:
    """Those that have started."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if any(part.startswith(REPLICA) and STARTING not in part for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


async def hostile(server: Server, store: Path) -> str:
    """A thousand malformed bodies, traversals, pickled adapters and wrong keys: those of the tests."""
    sys.path.insert(0, str(TESTS))  # before this folder, whose `serving` is another one
    from serving.malformed import hostile_bodies, pickled_adapters
    from serving.traversal import TRAVERSALS

    pickled = pickled_adapters(next(store.glob("*")), store)
    folders = [*TRAVERSALS, *(path.name for path in pickled)]
    bodies = hostile_bodies(1000)
    keyed = {"Content-Type": "application/json"}
    async with session(server) as client:
        by_body = [await status(client, path, headers=keyed, data=content) for path, content in bodies]
        by_folder = [await status(client, "/v1/adapters", json={"name": "bad", "folder": folder}) for folder in folders]
        wrong = [{**keyed, "Authorization": f"Bearer {key}"} for key in ("", KEY[:-1], KEY + "x", KEY.upper(), "null")]
        by_key = [
            await status(client, path, headers=headers, data=content)
            for headers in wrong
            for path, content in bodies[:20]
        ]
        async with client.get("/ready") as reply:
            alive = reply.status == 200
    for folder in pickled:
        shutil.rmtree(folder)
    shown = [str(dict(sorted(Counter(statuses).items()))) for statuses in (by_body, by_folder, by_key)]
    return (
        f"{len(bodies)} malformed bodies: {shown[0]}; {len(TRAVERSALS)} traversals "
        f"and {len(pickled)} pickled adapters: {shown[1]}; wrong keys: {shown[2]}; ready after it: {alive}"
    )


async def status(client: aiohttp.ClientSession, path: str, **options: Any) -> int:
    async with client.post(path, **options) as reply:
        await reply.read()
        return reply.status


async def drain(server: Server, streams: int = 16) -> str:
    """SIGTERM while streams are open."""
    whole = 0

    async with session(server) as client:
        opened = asyncio.Semaphore(0)

        async def one(number: int) -> None:
            nonlocal whole
            fields = body("sft", number, stream=True, max_tokens=400)
            async with client.post("/v1/completions", json=fields) as reply:
                pieces = [await reply.content.readany()]
                opened.release()
                pieces.append(await reply.content.read())
                whole += b"".join(pieces).rstrip().endswith(b"[DONE]")

        tasks = [asyncio.create_task(one(number)) for number in range(streams)]
        for _ in range(streams):
            await opened.acquire()
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*tasks)
        streaming = time.monotonic() - began
    code = await asyncio.to_thread(server.process.wait, 120)
    return (
        f"SIGTERM with {streams} open streams: {whole} came whole, the last {streaming:.1f} s after the signal; the "
        f"server ended after {time.monotonic() - began:.1f} s with code {code}"
    )
