"""How much longer judging takes than its endpoint: 1,000 comparisons in both orders, 200 ms each, 64 at a time.

    python benchmarks/judging.py [--comparisons 1000] [--delay 0.2] [--concurrency 64] [--repeats 3]

The endpoint is the tests' own, on loopback, in a process of its own. Once from one process, once from two Ray actors
under one meter; the ideal is requests * delay / concurrency. Actors and client are started before the clock.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from jpo_ray.cluster.session import ray_session
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.feedback.annotators import Comparison
from jpo_ray.feedback.judge import judge
from jpo_ray.pipeline.annotating import open_annotator

SERVER = Path(__file__).parents[1] / "tests" / "feedback" / "fault_server.py"
WARM_UP = 50  # comparisons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=1000)
    parser.add_argument("--delay", type=float, default=0.2, help="seconds that the endpoint takes for a request")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = "none"
    table = Table("from", "seconds, each run", "median", "times the ideal")
    ideal = 2 * given.comparisons * given.delay / given.concurrency
    with ray_session(ClusterConfig()) as ray, endpoint(given.delay) as url:
        for actors in (None, 2):
            taken = []
            for _ in range(given.repeats):
                with tempfile.TemporaryDirectory() as cache:
                    os.environ["JPO_CACHE"] = cache
                    config = AnnotatorConfig(
                        annotator="openai", base_url=url, concurrency=given.concurrency, actors=actors
                    )
                    with open_annotator(config, lambda: ray, ClusterConfig(), 0) as annotator:
                        judge(comparisons("warm", WARM_UP), annotator)
                        started = time.monotonic()
                        rows = judge(comparisons("timed", given.comparisons), annotator)
                        taken.append(time.monotonic() - started)
                assert all(row["verdict"] == "b" for row in rows)
            name = f"{actors} Ray actors" if actors else "one process"
            each = ", ".join(f"{seconds:.2f}" for seconds in taken)
            table.add_row(name, each, f"{median(taken):.2f}", f"{median(taken) / ideal:.2f}")
    console = Console()
    console.print(table)
    console.print(f"ideal: {ideal:.2f} s", highlight=False)


@contextmanager
def endpoint(delay: float) -> Iterator[str]:
    command = [sys.executable, str(SERVER), json.dumps({"delay": delay})]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def comparisons(name: str, count: int) -> list[Comparison]:
    """Joint ones, of texts about as long as a forum post and its summaries."""
    post, summary = "a word or two of it " * 60, "said in short " * 10
    return [
        Comparison(
            f"{name}{n}", f"a{n}", f"b{n}", f"{name} {n}: {post}", summary, f"other {n}: {post}", summary + "here"
        )
        for n in range(count)
    ]


if __name__ == "__main__":
    main()
