"""Two replicas: what one learns the other knows, and clients do not notice that one dies. Bodies by the thousand."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from serving.conftest import store_of
from serving.endpoint import BEARER, KEY, Endpoint, serving
from serving.malformed import hostile_bodies, pickled_adapters
from serving.traversal import TRAVERSALS

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

JSON = BEARER | {"content-type": "application/json"}
REPLICA = "ray::ServeReplica:jpo:FrontServer"
STARTING = ".initialize"  # part of a process's title while the replica starts
LOAD_S = 40
SCALING_S = 240


@pytest.fixture(scope="module")
def two_replicas(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A server of one replica that load has made two of."""
    folder = tmp_path_factory.mktemp("two")
    folders = f"adapter_folders=['{store_of(served_run)}']"
    options = ("max_replicas=2", "target_requests=4", f"state_dir={folder / 'state'}", folders, "scoring=null")
    with serving(served_run, folder, *options) as started:
        assert len(replicas(started)) == 1
        done, failed = asyncio.run(load_until_there_are_two(started))
        assert (len(replicas(started)), failed) == (2, [])
        assert done > 100
        yield started


async def load_until_there_are_two(endpoint: Endpoint) -> tuple[int, list[Exception]]:
    grown = asyncio.Event()

    async def watch() -> None:
        while len(await asyncio.to_thread(replicas, endpoint)) < 2:
            await asyncio.sleep(1)
        grown.set()

    watching = asyncio.create_task(watch())
    found = await load(endpoint, lambda: not grown.is_set(), SCALING_S)
    watching.cancel()
    return found


def replicas(endpoint: Endpoint) -> list[psutil.Process]:
    """Those that have started."""
    processes = psutil.Process(endpoint.process.pid).children(recursive=True)
    return [process for process in processes if process.name().startswith(REPLICA[:15]) and named(process)]


def named(process: psutil.Process) -> bool:
    try:
        return any(part.startswith(REPLICA) and STARTING not in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


async def load(endpoint: Endpoint, more: Callable[[], bool], seconds: float) -> tuple[int, list[Exception]]:
    """Answers given to sixteen clients while there is to be `more`, and errors that OpenAI's retries did not mend."""
    done, failed = 0, []
    ends = time.monotonic() + seconds

    async def one_client(client: openai.AsyncOpenAI, place: int) -> None:
        nonlocal done
        while time.monotonic() < ends and more():
            try:
                await ask(client, ("sft", "jpo", "dpo.one")[place % 3], place)
                done += 1
            except openai.OpenAIError as error:
                failed.append(error)

    async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key=KEY, timeout=60) as client:
        await asyncio.gather(*(one_client(client, place) for place in range(16)))
    return done, failed


async def ask(client: openai.AsyncOpenAI, model: str, number: int) -> str:
    reply = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": f"Copy: {number}"}], temperature=0, max_tokens=16
    )
    return str(reply.choices[0].message.content)


def test_an_adapter_is_there_on_all_replicas_at_once(two_replicas: Endpoint) -> None:
    """Thirty requests right after it was added, and after it was removed: whichever replica they reach."""

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{two_replicas.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, "new", n) for n in range(30)), return_exceptions=True)

    with two_replicas.http() as http:
        assert http.post("/v1/adapters", json={"name": "new", "folder": "extra"}).status_code == 201
        assert all(isinstance(answer, str) for answer in asyncio.run(ask_all()))
        assert http.delete("/v1/adapters/new").status_code == 200
        assert all(isinstance(answer, openai.NotFoundError) for answer in asyncio.run(ask_all()))


def test_load_adds_a_replica(two_replicas: Endpoint) -> None:
    assert len(replicas(two_replicas)) == 2


def test_no_request_is_lost_when_a_replica_is_killed(two_replicas: Endpoint) -> None:
    """Sixteen clients with OpenAI's own retries; after five seconds one of two replicas dies. Both serve in the end."""

    async def scenario() -> tuple[int, list[Exception]]:
        async def kill() -> None:
            await asyncio.sleep(5)
            replicas(two_replicas)[0].kill()

        killing = asyncio.create_task(kill())
        found = await load(two_replicas, lambda: True, LOAD_S)
        await killing
        return found

    done, failed = asyncio.run(scenario())
    assert failed == []
    assert done > 100
    deadline = time.monotonic() + SCALING_S
    while len(replicas(two_replicas)) < 2 and time.monotonic() < deadline:
        time.sleep(1)
    assert len(replicas(two_replicas)) == 2


def test_nothing_malformed_is_let_in_or_the_servers_fault(two_replicas: Endpoint) -> None:
    """A thousand bodies, fifty traversals, ten pickles and wrong keys: all 4xx."""
    store = store_of(two_replicas.run_dir)
    pickled = pickled_adapters(store / "extra", store / "bad_too")
    bodies = hostile_bodies(1000)
    assert len(bodies) == 1000
    with two_replicas.http(headers=JSON) as http:
        statuses = [(http.post(path, content=body).status_code, path, body) for path, body in bodies]
        assert [entry for entry in statuses if not 400 <= entry[0] < 500] == []
        for folder in [*TRAVERSALS, *(f"bad_too/{path.name}" for path in pickled)]:
            reply = http.post("/v1/adapters", json={"name": "bad", "folder": folder})
            assert 400 <= reply.status_code < 500, (folder, reply.text)
        assert http.get("/ready").status_code == 200
    for key in ("", "sk-wrong-0123456789", KEY[:-1], KEY + "x", KEY.upper(), "null", "*"):
        headers = {"authorization": f"Bearer {key}".strip(), "content-type": "application/json"}
        for path, body in bodies[:20]:
            assert httpx.post(two_replicas.url + path, headers=headers, content=body).status_code == 401
