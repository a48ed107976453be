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


def capturing() -> bool:
    """Whether a CUDA graph is being captured, during which the device cannot be waited for."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def here(device: str) -> bool:
    """Whether this machine has such a device."""
    return device == "cpu" or torch.cuda.is_available()


def room_bytes(device: str) -> int | None:
    """The memory that this process can hold in all, with what it holds now: on a GPU, or in RAM, where a container's
    limit counts; None where the system does not tell."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    found = _told(Path("/proc/meminfo"), "MemAvailable:", 1024)
    if found is None:
        return None
    groups = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        free = int((groups / "memory.max").read_text()) - int((groups / "memory.current").read_text())
        found = min(found, max(0, free) + (_told(groups / "memory.stat", "inactive_file", 1) or 0))
    return found + resident_bytes()


def _told(file: Path, name: str, unit: int) -> int | None:
    """A number of the system's, by the name in front of it."""
    with suppress(OSError):
        for line in file.read_text().splitlines():
            if line.split()[:1] == [name]:
                return int(line.split()[1]) * unit
    return None


def _of_process(quantity: str) -> int:
    """VmRSS or VmHWM, see proc(5)."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{quantity}:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
