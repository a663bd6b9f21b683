"""How many tokens' activations may be kept between the forward and the backward pass."""

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.scoring import Scorer, score_items
from jpo_ray.engine.sharding import release
from jpo_ray.engine.step import UNLIMITED

PROBE_TOKENS = 512
GIB = 2**30


def tokens_to_keep(scorer: Scorer, tokens: TokenizedItems, budget_gib: float | None) -> int:
    """Tokens whose activations fit `budget_gib` (default: half of what is free), the same on every worker.

    What one token needs is measured: a forward pass over a few items, counting what autograd saves.
    """
    budget = budget_gib * GIB if budget_gib is not None else free_bytes(scorer.device) / 2
    keep = int(min(UNLIMITED, budget / max(1.0, activation_bytes(scorer, tokens))))
    if dist.is_available() and dist.is_initialized():
        shared = torch.tensor([keep], device=scorer.device)
        dist.all_reduce(shared, dist.ReduceOp.MIN)
        keep = int(shared)
    return keep


def activation_bytes(scorer: Scorer, tokens: TokenizedItems) -> float:
    """Bytes that autograd keeps per token, weights apart."""
    order = np.argsort(tokens.lengths, kind="stable")[len(tokens) // 2 :]  # from the median on
    count = max(1, int(np.searchsorted(np.cumsum(tokens.lengths[order]), PROBE_TOKENS)))
    rows = order[:count]
    kept: dict[int, int] = {}
    scorer.state.recomputed.kept = kept
    with torch.enable_grad():
        score_items(scorer, tokens, rows)
    scorer.state.recomputed.kept = None
    scorer.state.clear()
    release(scorer.model)
    return sum(kept.values()) / float(tokens.lengths[rows].sum())


def free_bytes(device: torch.device) -> float:
    """Free memory for this worker: its GPU's, or its share of the machine's (in a container, of the container's)."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = float(psutil.virtual_memory().available)
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used)
    return max(free, 0.0) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _number(path: Path) -> float | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return float(text) if text.isdigit() else None  # `max` where there is no limit
