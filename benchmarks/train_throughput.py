"""Training throughput of this engine and of TRL's DPOTrainer: same items, comparisons, weights, tokens and updates.

    pip install -e '.[bench]'                                       # TRL
    python benchmarks/train_throughput.py --json runs/throughput.json
    python benchmarks/train_throughput.py --device cuda --shape 7b  # neither Ray nor a download

Four works: `degree8` (joint comparisons, 32 items and 128 comparisons per update), `degree2` (32 and 32), `d_m` (the
paper's mix of conditional and joint comparisons, 32 per update) and `conditional` (plain DPO, 32 per update). The
text is the authors' validation data (JPO_REAL_DATA, ../shared/data) or the sandbox's; on CUDA it is random tokens.

Every contender runs in a process of its own, one after another. Before anything is timed both train on each work's
first updates, starting from the same non-zero adapters, and the run ends with status 1 where the losses (in float32
also the gradient norms) differ by more than rounding; those of the timed updates are compared as well.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from throughput.figures import agreement, fastest, figures, merged, ratios
from throughput.job import Job
from throughput.model import FOUR_BIT, SHAPES, make_model
from throughput.report import machine, print_tables
from throughput.work import GROUP, WORKS, Items, Work, make_work, read_texts, save_work, synthetic_items, tokenize_texts

from jpo_ray.config_training import TrainConfig

CHECK_UPDATES = 2  # the first loss shows the forward pass, the second the gradient and the optimizer
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16", FOUR_BIT]}
# Of this engine, in tokens: a GPU is not filled by the default, which is meant for laptops.
MICRO_BATCH_TOKENS = {"cpu": [TrainConfig().max_micro_batch_tokens], "cuda": [4096, 16_384, 65_536]}

Result = dict[str, Any]
Runner = Callable[[Job], Result]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        from throughput.worker import run_worker

        return run_worker(Path(sys.argv[2]), Path(sys.argv[3]))
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory(prefix="train-throughput-") as name:
        folder = Path(name)
        run = partial(_run, folder=folder, threads=arguments.threads)
        items = _items(arguments)
        works = {name: make_work(name, items) for name in arguments.work}
        for work in works.values():
            save_work(work, folder / f"{work.name}.npz")
        _save_models(arguments, folder)
        if not arguments.trl:
            console.print("without TRL: nothing is compared, and no loss is checked")
        checks = _check(arguments, folder, run, console) if arguments.trl else []
        runs = {job: [_timed(job, run, console)] for job in _jobs(arguments, folder)}
        for _ in range(arguments.repeats - 1):  # contenders in turn, so that other work on the machine slows both alike
            for job in _fastest_jobs(runs):
                runs[job].append(_timed(job, run, console))
        found = {job: merged(results) for job, results in runs.items()}
        checks += _compare_timed(found)
    rows = [figures(job, Path(job.work).stem, result) for job, result in found.items()]
    print_tables(console, rows, with_targets=(arguments.device, arguments.shape) == ("cpu", "17m"))
    if arguments.json:
        data = {"text": items.source, "works": {name: _describe(work) for name, work in works.items()}}
        report = {"machine": machine(arguments.device), "data": data, "checks": checks, "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report | {"ratios": ratios(rows)}, indent=1))
    _refuse_disagreement(checks)
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--updates", type=int, default=6, help="timed updates")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each contender's fastest; medians are shown")
    parser.add_argument("--warmup", type=int, default=2, help="updates before them; flops are counted in the first")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", FOUR_BIT], help="default: by device")
    parser.add_argument("--shape", choices=SHAPES, help="random model; default 17m on cpu, 0.5b on cuda")
    parser.add_argument("--trl", action=argparse.BooleanOptionalAction, help="run TRL; default: where it is installed")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[4, 8, 16, 32], help="TRL's, in comparisons")
    parser.add_argument("--micro-batch-tokens", nargs="+", type=int, help="this engine's max_micro_batch_tokens")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    installed = importlib.util.find_spec("trl") is not None
    if arguments.trl and not installed:
        parser.error("--trl: TRL is not installed; pip install -e '.[bench]'")
    if any(size < 1 or GROUP % size for size in arguments.micro_batches):
        parser.error(f"--micro-batches: each must divide {GROUP}, so that updates hold the same comparisons")
    if min(arguments.updates, arguments.warmup, arguments.repeats) < 1:
        parser.error("--updates, --warmup and --repeats must be at least 1")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no CUDA device here")
    if arguments.device == "cpu" and FOUR_BIT in (arguments.dtype or []):
        parser.error("--dtype 4bit: needs --device cuda")
    arguments.trl = installed if arguments.trl is None else arguments.trl
    arguments.dtype = arguments.dtype or DTYPES[arguments.device]
    arguments.shape = arguments.shape or {"cpu": "17m", "cuda": "0.5b"}[arguments.device]
    arguments.micro_batch_tokens = arguments.micro_batch_tokens or MICRO_BATCH_TOKENS[arguments.device]
    return arguments


def _items(arguments: argparse.Namespace) -> Items:
    if arguments.device == "cpu":
        return tokenize_texts(read_texts())
    return synthetic_items(SHAPES[arguments.shape].vocabulary)


def _save_models(arguments: argparse.Namespace, folder: Path) -> None:
    """Where workers load the model: all dtypes on CPU, and 4 bits, which are made from a saved model."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if arguments.device == "cpu":
        make_model(SHAPES[arguments.shape], "cpu", torch.float32).save_pretrained(folder / "model")
    elif FOUR_BIT in arguments.dtype:
        make_model(SHAPES[arguments.shape], "cuda", torch.bfloat16).save_pretrained(folder / "model")
        torch.cuda.empty_cache()


def _check(arguments: argparse.Namespace, folder: Path, run: Runner, console: Console) -> list[Result]:
    """Both contenders' first updates on each work; ends the run where they do not compute the same."""
    checks = []
    for dtype in _compared_dtypes(arguments):
        for work in arguments.work:
            job = partial(_job, arguments, folder, work, dtype, warmup=CHECK_UPDATES, updates=0)
            ours = run(job("jpo", min(arguments.micro_batch_tokens)))
            theirs = run(job("trl", min(arguments.micro_batches)))
            if "error" in ours:
                raise SystemExit(f"{work} {dtype}: {ours['error']} in the smallest micro-batch")
            if "error" in theirs:  # a large model that only this engine fits: there is nothing to compare
                console.print(f"check {work} {dtype}: TRL: {theirs['error']} in its smallest micro-batch")
                continue
            found = {"work": work, "dtype": dtype} | agreement(ours, theirs, dtype)
            checks.append(found)
            losses = ", ".join(f"{a:.6f} and {b:.6f}" for a, b in found["losses"])
            console.print(f"check {work} {dtype}: losses {losses}; largest relative differences {_worst(found)}")
    _refuse_disagreement(checks)
    return checks


def _compare_timed(found: dict[Job, Result]) -> list[Result]:
    """The losses of every TRL run against this engine's in the same dtype."""
    checks = []
    ran = {job: result for job, result in found.items() if "error" not in result}
    ours = {(job.work, job.dtype): result for job, result in ran.items() if job.contender == "jpo"}
    for job, result in ran.items():
        mine = ours.get((job.work, job.dtype))
        if job.contender == "trl" and mine is not None:
            name = {"work": Path(job.work).stem, "dtype": job.dtype, "micro_batch": job.micro_batch}
            checks.append(name | agreement(mine, result, job.dtype))
    return checks


def _refuse_disagreement(checks: list[Result]) -> None:
    wrong = [found for found in checks if not found["agrees"]]
    if wrong:
        lines = [f"{found['work']} {found['dtype']}: {_worst(found)}; losses {found['losses']}" for found in wrong]
        raise SystemExit("the two contenders do not compute the same loss:\n" + "\n".join(lines))


def _worst(found: Result) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in found["worst"].items())


def _compared_dtypes(arguments: argparse.Namespace) -> list[str]:
    """On CPU bfloat16 is a row of this engine's own, with its own matrix peak."""
    if not arguments.trl:
        return []
    return [dtype for dtype in arguments.dtype if arguments.device == "cuda" or dtype == "float32"]


def _jobs(arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """What is timed, in turn: this engine beside each of TRL's micro-batch sizes, work by work."""
    jobs = []
    for work in arguments.work:
        for dtype in arguments.dtype:
            job = partial(_job, arguments, folder, work, dtype, warmup=arguments.warmup, updates=arguments.updates)
            jobs += [job("jpo", tokens) for tokens in arguments.micro_batch_tokens]
            if dtype in _compared_dtypes(arguments):
                jobs += [job("trl", size) for size in arguments.micro_batches]
    return jobs


def _fastest_jobs(runs: dict[Job, list[Result]]) -> list[Job]:
    """Of each work, contender and dtype the one with most comparisons per second, in the order of `runs`."""
    rows = [figures(job, Path(job.work).stem, results[0]) for job, results in runs.items()]
    best = [fastest(rows, row["work"], row["contender"], row["dtype"]) for row in rows]
    return [job for job, row in zip(runs, rows, strict=True) if any(row is other for other in best)]


def _job(
    arguments: argparse.Namespace,
    folder: Path,
    work: str,
    dtype: str,
    contender: str,
    micro_batch: int,
    *,
    warmup: int,
    updates: int,
) -> Job:
    return Job(
        contender=contender,
        work=str(folder / f"{work}.npz"),
        model=str(folder / "model"),
        shape=arguments.shape,
        device=arguments.device,
        dtype=dtype,
        micro_batch=micro_batch,
        warmup=warmup,
        updates=updates,
        threads=arguments.threads,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )


def _timed(job: Job, run: Runner, console: Console) -> Result:
    result = run(job)
    row = figures(job, Path(job.work).stem, result)
    rate = row.get("error") or f"{row['comparisons_per_s']:.2f} comparisons/s"
    console.print(f"{row['work']} {job.contender} {job.dtype}, micro-batch {job.micro_batch}: {rate}")
    return result


def _run(job: Job, *, folder: Path, threads: int) -> Result:
    """The job's result, from a process of its own."""
    spec, out, log = (folder / name for name in ("job.json", "result.json", "log.txt"))
    spec.write_text(json.dumps(job.__dict__))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "HF_HUB_OFFLINE": "1",  # everything is made here
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, __file__, "--worker", str(spec), str(out)]
    with log.open("w") as stream:
        ended = subprocess.run(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        raise SystemExit(f"{job}\nended with status {ended.returncode}:\n{log.read_text()[-4000:]}")
    result: Result = json.loads(out.read_text())
    out.unlink()
    return result


def _describe(work: Work) -> dict[str, Any]:
    return {
        "items": len(work.tokens),
        "mean_tokens": float(work.tokens.lengths.mean()),
        "comparisons": len(work.edges),
        "joint": int(work.edges.joint.sum()),
        "comparisons_per_update": work.per_update,
    }


if __name__ == "__main__":
    main()
