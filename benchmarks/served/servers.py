"""`jpo serve` and a bare `vllm serve` on the same run, each in processes of its own."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from jpo_ray.cluster.sampling import VLLM_CPU_ENV
from jpo_ray.config_serve import ServeConfig
from jpo_ray.serving.plan import engine_options, make_plan
from served.load import complete
from served.run import ADAPTERS

START_TIMEOUT_S = 300
KEY = "sk-benchmark-0123456789"
VLLM_SERVER = "vllm.entrypoints.openai.api_server"  # what `vllm serve` runs; that command fails beside vllm-cpu


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    process: "subprocess.Popen[bytes]"


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
