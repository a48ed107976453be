"""float64, on devices that have it and on those that do not (Apple's MPS)."""

import math
from collections.abc import Iterable
from functools import lru_cache

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
