"""`jpo serve` beside a bare `vllm serve`, same machine, engine options and client.

    python benchmarks/serving.py [--seconds 20] [--repeats 2] [--overload-seconds 60] [--only throughput latency ...]

The model is a Llama of 19 million parameters with random weights, four adapters of random weights on it, and the
sandbox's tokenizer. Servers take turns; each is warm before it is measured. The client, one process of its own, shares
the machine with the server.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table
from sampling import make_model

from jpo_ray.cluster.sampling import VLLM_CPU_ENV
from jpo_ray.config import TrainConfig
from jpo_ray.config_serve import ServeConfig
from jpo_ray.files import write_json
from jpo_ray.runs import RunDir
from jpo_ray.serving.plan import engine_options, make_plan

ADAPTERS = ("one", "two", "three", "four")
CONCURRENCY = 32
NEW_TOKENS = 64
MAX_REQUESTS = 64  # of the overloaded server
START_TIMEOUT_S = 300
KEY = "sk-benchmark-0123456789"
VLLM_SERVER = "vllm.entrypoints.openai.api_server"  # what `vllm serve` runs; that command fails beside vllm-cpu
ROWS = ("throughput", "latency", "adapters", "overload", "drain")


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    process: "subprocess.Popen[bytes]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="of each throughput")
    parser.add_argument("--repeats", type=int, default=2, help="turns of both servers")
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--proxy", action="store_true", help="also `jpo serve direct=false`: through Serve's proxy")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    given = parser.parse_args()
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder))
        for _ in range(given.repeats):
            for start in (bare, ours, *([proxied] if given.proxy else [])):
                with start(run) as server:
                    for name, value in asyncio.run(measure(server, given.seconds, given.only)).items():
                        found.setdefault((name, server.name), []).append(value)
        Console().print(table(found))
        if "overload" in given.only:
            with ours(run, f"limits.max_requests={MAX_REQUESTS}") as server:
                print(asyncio.run(overload(server, given.overload_seconds)))
        if "drain" in given.only:
            with ours(run) as server:
                print(asyncio.run(drain(server)))


def make_run(folder: Path) -> Path:
    """A run directory with the model as `sft` and four adapters."""
    import shutil

    model = make_model(folder)
    run = RunDir(folder / "run")
    (folder / "run").mkdir()
    section = {"max_length": 512, "dtype": "float32"}

    def copied(out: Path) -> dict[str, Any]:
        shutil.copytree(model.path, out, dirs_exist_ok=True)
        return {}

    sft, _ = run.build("sft", inputs={}, config={"model": section}, make=copied)
    for number, name in enumerate(ADAPTERS):
        config = {"model": section, "train": TrainConfig(name=name).model_dump()}
        make = adapter_maker(run.path("sft"), number)
        run.build(f"train/{name}", inputs={"sft": sft.fingerprint}, config=config, make=make)
    write_json(folder / "run" / "run.json", {"format": 1})
    return folder / "run"


def adapter_maker(base: Path, seed: int) -> Callable[[Path], dict[str, Any]]:
    def make(out: Path) -> dict[str, Any]:
        import torch

        from jpo_ray.engine.model import add_lora, load_model

        adapter = add_lora(load_model(base, dtype="float32"), TrainConfig(name="x"), seed=seed)
        with torch.no_grad():
            for key, weight in adapter.named_parameters():
                if "lora_B" in key:
                    weight.copy_(0.02 * torch.randn(weight.shape))
        adapter.save_pretrained(out)
        return {}

    return make


@contextmanager
def ours(run: Path, *overrides: str) -> Iterator[Server]:
    command = [Path(sys.executable).with_name("jpo"), "serve", "--run-dir", run, "port=8741", *overrides]
    with started("jpo serve", [str(part) for part in command], {"JPO_API_KEYS": KEY}, 8741) as server:
        yield server


@contextmanager
def proxied(run: Path) -> Iterator[Server]:
    with ours(run, "direct=false") as server:
        yield replace(server, name="jpo serve, proxy")


@contextmanager
def bare(run: Path) -> Iterator[Server]:
    """`vllm serve` with the engine options of `jpo serve` and the same adapters."""
    config = ServeConfig(run_dir=str(run))
    plan = make_plan(config, keys_required=False)
    options = engine_options(plan, config, plan.engines[0])
    command = [sys.executable, "-m", VLLM_SERVER, "--model", plan.base, "--port", "8742", "--api-key", KEY]
    command += ["--served-model-name", "sft", "--host", "127.0.0.1"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        command += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    command += ["--lora-modules", *(f"{entry.name}={entry.folder}" for entry in plan.adapters)]
    environment = VLLM_CPU_ENV | {"OMP_NUM_THREADS": str(os.cpu_count())}
    with started("vllm serve", command, environment, 8742) as server:
        yield server


@contextmanager
def started(name: str, command: list[str], environment: dict[str, str], port: int) -> Iterator[Server]:
    print(f"starting {name}", file=sys.stderr)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
        server = Server(name, f"http://127.0.0.1:{port}", process)
        try:
            asyncio.run(warm(server))
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


@asynccontextmanager
async def session(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {KEY}"}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(server.url, headers=headers, connector=connector, timeout=timeout) as opened:
        yield opened


async def warm(server: Server) -> None:
    """Wait until the server answers, then ask every model a few times."""
    deadline = time.monotonic() + START_TIMEOUT_S
    async with session(server) as client:
        while True:
            try:
                async with client.get("/v1/models") as reply:
                    if reply.status == 200:
                        break
            except aiohttp.ClientError:
                pass
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{server.name} did not start")
            await asyncio.sleep(0.5)
        for model in ("sft", *ADAPTERS):
            await asyncio.gather(*(complete(client, model, number, stream=False) for number in range(8)))


async def measure(server: Server, seconds: float, only: list[str]) -> dict[str, float]:
    async with session(server) as client:
        found: dict[str, float] = {}
        if "throughput" in only:
            found["tokens/s, whole answers"] = await throughput(client, ("sft",), seconds, stream=False)
            found["tokens/s, streams"] = await throughput(client, ("sft",), seconds, stream=True)
        if "adapters" in only:
            found["tokens/s, one adapter"] = await throughput(client, ADAPTERS[:1], seconds, stream=False)
            found["tokens/s, four adapters"] = await throughput(client, ADAPTERS, seconds, stream=False)
        if "latency" in only:
            found["ms to first token"] = 1000 * await first_token(client)
        return found


async def throughput(client: aiohttp.ClientSession, models: tuple[str, ...], seconds: float, *, stream: bool) -> float:
    """Tokens a second of `CONCURRENCY` clients that ask one question after the other."""
    done, number = 0, 0
    ends = time.monotonic() + seconds

    async def one_client(place: int) -> None:
        nonlocal done, number
        while time.monotonic() < ends:
            number += 1
            await complete(client, models[(place + number) % len(models)], number, stream=stream)
            done += 1

    began = time.monotonic()
    await asyncio.gather(*(one_client(place) for place in range(CONCURRENCY)))
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


async def overload(server: Server, seconds: float) -> str:
    """Ten times as many clients as the server takes at once, each asking again at once when it is refused."""
    served, refused, other = [], [], 0
    ends = time.monotonic() + seconds

    async def one_client(client: aiohttp.ClientSession, place: int) -> None:
        nonlocal other
        while time.monotonic() < ends:
            began = time.monotonic()
            async with client.post("/v1/completions", json=body("sft", place)) as reply:
                status = reply.status
                answer = await reply.json()
            taken = time.monotonic() - began
            if status == 200 and answer["usage"]["completion_tokens"] == NEW_TOKENS:
                served.append(taken)
            elif status == 429 and reply.headers["Retry-After"]:
                refused.append(taken)
                await asyncio.sleep(float(reply.headers["Retry-After"]))
            else:
                other += 1

    async with session(server) as client:
        await asyncio.gather(*(one_client(client, place) for place in range(10 * MAX_REQUESTS)))
        async with client.get("/ready") as reply:
            alive = reply.status == 200
    p99 = quantiles(refused, n=100)[98]
    return (
        f"overload: {10 * MAX_REQUESTS} clients for {seconds:g} s at a server of {MAX_REQUESTS}: {len(served)} served, "
        f"{len(refused)} refused, {other} otherwise; refusals took {1000 * median(refused):.0f} ms (median), "
        f"{1000 * p99:.0f} ms (99 %), {1000 * max(refused):.0f} ms (longest); alive after it: {alive}"
    )


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


def table(found: dict[tuple[str, str], list[float]]) -> Table:
    """Medians over the turns; below `vllm serve` the share of it."""
    servers = list(dict.fromkeys(server for _, server in found))
    shown = Table("", *servers)
    for name in dict.fromkeys(name for name, _ in found):
        theirs = median(found[name, servers[0]])
        cells = []
        for server in servers:
            values = found[name, server]
            share = "" if server == servers[0] else f"\n{median(values) / theirs:.1%}"
            cells.append(f"{median(values):,.1f}{share}")
        shown.add_row(name, *cells)
        print(name, {server: [round(v, 1) for v in found[name, server]] for server in servers})
    return shown


if __name__ == "__main__":
    main()
