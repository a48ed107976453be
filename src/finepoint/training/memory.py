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
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
