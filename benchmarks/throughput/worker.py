"""The body of one worker process."""

import json
from pathlib import Path
from typing import Any

import torch

from throughput.job import Job
from throughput.jpo_side import run_jpo
from throughput.measure import matrix_peak
from throughput.trl_side import run_trl
from throughput.work import batch_sequence, load_work, rows_of, unique_tokens


def work_on(job: Job) -> dict[str, Any]:
    """Run the job in this process. Raises torch.OutOfMemoryError where the device's memory does not suffice."""
    torch.set_num_threads(job.threads)
    work = load_work(Path(job.work))
    peak = matrix_peak(job.device, job.compute)
    batches = batch_sequence(work, job.warmup + job.updates)
    trace = (run_trl if job.contender == "trl" else run_jpo)(job, work, batches)
    peak = max(peak, matrix_peak(job.device, job.compute))
    tokens = [unique_tokens(work.tokens, batch) for batch in batches]
    return trace.__dict__ | {
        "matrix_peak": peak,
        "unique_tokens": tokens,
        "item_tokens": [int(work.tokens.lengths[rows_of(batch)].sum()) for batch in batches],
        "pair_tokens": [
            int(work.tokens.lengths[batch.chosen].sum() + work.tokens.lengths[batch.rejected].sum())
            for batch in batches
        ],
        "items": [len(rows_of(batch)) for batch in batches],
        "comparisons": [len(batch) for batch in batches],
    }


def run_worker(spec: Path, out: Path) -> None:
    """Run the job that `spec` describes and write its result to `out`."""
    try:
        result = work_on(Job(**json.loads(spec.read_text())))
    except torch.OutOfMemoryError:
        result = {"error": "out of memory"}
    out.write_text(json.dumps(result))
