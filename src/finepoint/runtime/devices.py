"""What a device has: float64, which Apple's MPS lacks, and memory, of which a stretch of work has a peak."""

import math
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


def in_float64(values: Tensor) -> Tensor:
    """The values in float64: on their device, or on the CPU where that has no float64."""
    return values.to(home_of_float64(values.device), torch.float64)


def home_of_float64(device: torch.device) -> torch.device:
    """The device itself, or the CPU where it has no float64."""
    return device if _has_float64(device.type) else torch.device("cpu")


@lru_cache
def _has_float64(kind: str) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return False
    return True


def norm_of(parts: Iterable[Tensor]) -> float:
    """The Euclidean norm of all tensors together, which may lie on several devices; 0 without any."""
    return math.hypot(*(float(in_float64(part).norm()) for part in parts))


def reset_peak() -> None:
    """Starts a new measurement, where the system can (CUDA, Linux); elsewhere the peak is the process's so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def peak_bytes() -> int:
    """The most memory held since `reset_peak`: on the GPU where one is used, else resident in RAM."""
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return on_gpu or _of_process("VmHWM")


def resident_bytes() -> int:
    """The memory this process has in RAM now; its peak where the system does not tell."""
    return _of_process("VmRSS")


def _of_process(quantity: str) -> int:
    """VmRSS or VmHWM, see proc(5)."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{quantity}:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
