"""Clock, memory, and what the machine's matrix products reach."""

import ctypes
import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)


def now(device: str) -> float:
    """Seconds, after all work given to the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


class MatrixFlops(TorchDispatchMode):
    """Counts the flops of all matrix products within it, backward and recomputation included; attention kernels are
    left out, since on CPU torch has no count for them (at 88 tokens they are below 2 % of the rest).
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in PRODUCTS:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


class PeakMemory:
    """Largest memory since `start` above what was held at `start`, in bytes: resident on CPU, allocated on CUDA."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.base = 0

    def start(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # what earlier passes freed would otherwise count as held
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.base = _status_bytes("VmRSS")

    def above(self) -> int:
        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated()) - self.base
        return _status_bytes("VmHWM") - self.base


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """Best flops per second of square products, over a few sizes and tries."""
    sizes, tries = ((4096, 8192), 10) if device == "cuda" else ((1024, 1536, 2048), 4)
    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(tries):
            started = now(device)
            left @ right
            best = max(best, 2 * size**3 / (now(device) - started))
    return best


def matrix_parameters(model: nn.Module) -> int:
    """Parameters that every token is multiplied with: the base model's linear layers, the output projection included,
    the input embedding not. Counted by shape, since 4-bit weights are packed. `model` has no adapters yet.
    """
    return sum(module.in_features * module.out_features for module in model.modules() if isinstance(module, nn.Linear))
