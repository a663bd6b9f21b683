"""`jpo serve` beside a bare `vllm serve`, same machine, engine options and client; then what it withstands.

    python benchmarks/serving.py [--seconds 20] [--repeats 2] [--overload-seconds 60] [--only throughput latency ...]

The model is a Llama of 19 million parameters with random weights, four adapters of random weights on it, and the
sandbox's tokenizer. Servers take turns; each is warm before it is measured. The client, one process of its own, shares
the machine with the server.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from served.faults import drain, hostile, kill, overload
from served.load import measure
from served.run import make_run
from served.servers import Server, bare, ours, proxied, session

MAX_REQUESTS = 64  # of the overloaded server
SPEED = ("throughput", "latency", "adapters")
FAULTS = ("overload", "kill", "hostile", "drain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="of each throughput")
    parser.add_argument("--repeats", type=int, default=2, help="turns of both servers")
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--kill-seconds", type=float, default=45)
    parser.add_argument("--proxy", action="store_true", help="also `jpo serve direct=false`: through Serve's proxy")
    parser.add_argument("--only", nargs="+", choices=SPEED + FAULTS, default=list(SPEED + FAULTS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder))
        if set(given.only) & set(SPEED):
            Console().print(table(speed(run, given)))
        if "overload" in given.only:
            with ours(run, f"limits.max_requests={MAX_REQUESTS}") as server:
                print(asyncio.run(overload(server, given.overload_seconds, MAX_REQUESTS)))
        if "kill" in given.only:
            with ours(run, "replicas=2", "scoring=null") as server:
                print(asyncio.run(kill(server, given.kill_seconds)))
        if {"hostile", "drain"} & set(given.only):
            with ours(run) as server:
                if "hostile" in given.only:
                    print(asyncio.run(hostile(server, run / "train")))
                if "drain" in given.only:
                    print(asyncio.run(drain(server)))


def speed(run: Path, given: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """Of each work and server the values of all turns."""
    found: dict[tuple[str, str], list[float]] = {}

    async def measured(server: Server) -> dict[str, float]:
        async with session(server) as client:
            return await measure(client, given.seconds, given.only)

    for _ in range(given.repeats):
        for start in (bare, ours, *([proxied] if given.proxy else [])):
            with start(run) as server:
                for name, value in asyncio.run(measured(server)).items():
                    found.setdefault((name, server.name), []).append(value)
    return found


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
