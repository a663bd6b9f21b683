"""From the workers' results to figures: rates, shares, agreement of losses, ratios."""

from dataclasses import asdict
from typing import Any

import numpy as np

from throughput.job import Job
from throughput.model import FOUR_BIT

# Relative difference of two computations of one loss that rounding explains.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, FOUR_BIT: 5e-2}
MIB = 2**20

Row = dict[str, Any]
Result = dict[str, Any]


def merged(results: list[Result]) -> Result:
    """One result of several runs of the same updates: medians of times, memory and matrix peaks, else the first's."""
    if len(results) == 1 or any("error" in result for result in results):
        return next((result for result in results if "error" in result), results[0])
    medians = ("reference_s", "peak_bytes", "held_bytes", "matrix_peak")
    middle = {name: float(np.median([result[name] for result in results])) for name in medians}
    seconds = np.median([result["seconds"] for result in results], axis=0).tolist()
    return results[0] | middle | {"seconds": seconds, "runs": len(results)}


def figures(job: Job, work: str, result: Result) -> Row:
    """One row of the table. Rates are over the timed updates; the reference pass is spread over the comparisons it
    served, once: for this engine those of an epoch, for TRL those of the run.
    """
    row: Row = asdict(job) | {"work": work}
    if "error" in result:
        return row | {"error": result["error"]}
    timed = slice(job.warmup, None)
    seconds, comparisons, tokens = (sum(result[name][timed]) for name in ("seconds", "comparisons", "unique_tokens"))
    reference_s = result["reference_s"] / result["reference_comparisons"]  # per comparison
    # What the first update's matrix products took, for each of its tokens.
    flops_per_token = result["first_flops"] / result["unique_tokens"][0]
    return row | {
        "comparisons_per_s": comparisons / seconds,
        "comparisons_per_s_with_reference": 1 / (seconds / comparisons + reference_s),
        "tokens_per_s": tokens / seconds,
        "peak_mib": result["peak_bytes"] / MIB,
        "held_mib": result["held_bytes"] / MIB,
        # LoRA: 2 flops per parameter and token forward, 2 backward; frozen weights have no gradient of their own.
        "model_flops_share": 4 * result["parameters"] * tokens / seconds / result["matrix_peak"],
        "hardware_flops_share": flops_per_token * tokens / seconds / result["matrix_peak"],
        "hardware_flops_per_parameter_token": flops_per_token / result["parameters"],
        "matrix_peak_gflops": result["matrix_peak"] / 1e9,
        "raw": result,
    }


def agreement(ours: Result, theirs: Result, dtype: str) -> dict[str, Any]:
    """Largest relative differences of losses and gradient norms, update by update, and whether they are small enough.

    Gradient norms, in which a wrong scale would show that clipping hides from the losses, are judged in float32 alone.
    """
    pairs = {name: list(zip(ours[name], theirs[name], strict=True)) for name in ("losses", "grad_norms")}
    # numpy's maximum, which a NaN does not get past.
    worst = {name: float(np.max([abs(a - b) / abs(b) for a, b in found])) for name, found in pairs.items()}
    judged = worst if dtype == "float32" else {"losses": worst["losses"]}
    agrees = all(value <= TOLERANCE[dtype] for value in judged.values())  # false for NaN too
    return {"agrees": agrees, "worst": worst} | pairs


def fastest(rows: list[Row], work: str, contender: str, dtype: str) -> Row | None:
    """Of a contender's micro-batch sizes the one with most comparisons per second; None where none ran."""
    wanted = (work, contender, dtype)
    found = [row for row in rows if (row["work"], row["contender"], row["dtype"]) == wanted and "error" not in row]
    return max(found, key=lambda row: float(row["comparisons_per_s"]), default=None)


def ratios(rows: list[Row]) -> list[Row]:
    """For each work and dtype that both contenders ran: ours in multiples of theirs, each at its fastest."""
    found = []
    for work, dtype in dict.fromkeys((row["work"], row["dtype"]) for row in rows):
        ours, theirs = fastest(rows, work, "jpo", dtype), fastest(rows, work, "trl", dtype)
        if ours is None or theirs is None:
            continue
        speed = {name: ours[name] / theirs[name] for name in ("comparisons_per_s", "comparisons_per_s_with_reference")}
        memory = {"memory": theirs["peak_mib"] / ours["peak_mib"]}
        found.append({"work": work, "dtype": dtype, "trl_micro_batch": theirs["micro_batch"]} | speed | memory)
    return found
