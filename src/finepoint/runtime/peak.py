"""Peak memory of a stretch of work."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


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
