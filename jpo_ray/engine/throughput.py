"""How much of the processor's matrix peak training uses (MFU, arXiv 2204.02311), with a peak that is measured."""

import time
from typing import Any

import torch

from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.scoring import Scorer
from jpo_ray.engine.step import Rows
from jpo_ray.engine.workers import rank_and_world

PEAK_SIZE = {"cpu": 1024, "cuda": 8192}
PEAK_TRIES = 8


class Meter:
    """Speed of training steps, over all workers."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._flops = flops_per_token(scorer.model)
        self._peak = matrix_peak(scorer.device, scorer.autocast or scorer.model.dtype) * rank_and_world()[1]

    def speed(self, tokens: TokenizedItems, rows: Rows, elapsed: float) -> dict[str, float]:
        """Tokens per second through the model, and the share of the matrix peak that the model's flops make (MFU)."""
        rate = self._scorer.computed_tokens(tokens, rows) / elapsed
        return {"tokens_per_second": rate, "mfu": rate * self._flops / self._peak}


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Flops per second of a square matrix product, the best of a few."""
    size = PEAK_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(PEAK_TRIES):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def flops_per_token(model: Any) -> int:
    """Model flops of forward and backward per token: 4 per frozen weight, 6 per trained one (attention left out).

    A token uses its experts only, and input embeddings are looked up, not multiplied.
    """
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    looked_up = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is looked_up
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter is looked_up and not tied:
            continue
        state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two weights into a byte
        count = state.shape.numel() if state is not None else parameter.numel()
        total += (6 if parameter.requires_grad else 4) * count * (share if ".experts." in name else 1.0)
    return int(total)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
