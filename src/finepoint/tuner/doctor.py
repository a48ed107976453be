"""What this machine has, which kernels are the fastest on it, and what will be slow: `finepoint doctor`."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from finepoint.models.loading import cpu_has_bf16
from finepoint.models.packages import cache_folder
from finepoint.runtime.devices import room_bytes
from finepoint.tuner.kernels import kernels_for, numba_kernels, usual_kernel
from finepoint.tuner.kernels.choice import (
    SWITCH,
    Case,
    Way,
    case_of,
    device_name,
    kept,
    measurable,
    measured,
    products,
    usual_product,
)

PACKAGES = ("finepoint", "torch", "transformers", "accelerate", "peft", "trl", "datasets", "numba", "gguf", "torchao",
            "bitsandbytes", "lm-eval", "ray", "matplotlib")  # fmt: skip
SHAPE = (1536, 576)  # rows and columns of a weight of SmolLM2-135M
DENSITIES = {"0.1 %": 1e-3, "1 %": 1e-2, "10 %": 0.1}
COLUMNS = {"columns, 1 %": 1e-2, "columns, 5 %": 0.05}


def diagnosis() -> dict[str, Any]:
    """{"versions": name to version, None where it is not installed; "machine": facts; "kernels": rows of milliseconds
    for the gradient of chosen entries, in each dtype; "slow": sentences}, JSON-ready. It takes some seconds.
    """
    machine = _machine()
    return {"versions": {name: _version(name) for name in PACKAGES}, "machine": machine, "kernels": _kernels(),
            "slow": _slow(machine)}  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(), "system": platform.platform(terse=True), "processor": device_name("cpu"),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "bfloat16 arithmetic": cpu_has_bf16(),
        "compiled kernels": numba_kernels() is not None, "memory free, GB": _gigabytes("cpu"),
        "cache": str(cache_folder()), "kernels known": _known(), "GPU": None,
    }  # fmt: skip
    if torch.cuda.is_available():
        found |= {"GPU": torch.cuda.get_device_name(), "CUDA": torch.version.cuda,
                  "GPU memory free, GB": _gigabytes("cuda")}  # fmt: skip
    return found


def _known() -> str:
    """Where the kernels that were measured here are kept, and how many."""
    place, found = kept("cuda" if torch.cuda.is_available() else "cpu")
    return f"{len(found)}, in {place.name}"


def _gigabytes(device: str) -> float | None:
    room = room_bytes(device)
    return None if room is None else round(room / 1e9, 1)


def _kernels() -> list[dict[str, Any]]:
    """Which kernel is taken for a weight of this shape, measured now, what every one took, in milliseconds, and why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        dy, x = (torch.empty(1, size, device=device, dtype=dtype) for size in SHAPE)
        for name, density in DENSITIES.items():
            size = dy.numel() * x.numel()
            count = round(density * size)
            case = case_of(dy, x, count)
            ways = kernels_for(case)
            rows.append(_row(name, case, ways, usual_kernel(ways, count / size)))
        for name, share in COLUMNS.items():
            case = case_of(dy, x[:, : max(1, round(share * x.numel()))])
            rows.append(_row(name, case, products(case), usual_product(case)))
    return rows


def _row(entries: str, case: Case, ways: Mapping[str, Way], usual: str) -> dict[str, Any]:
    row = {"entries": entries, "dtype": str(case.x).removeprefix("torch.")}
    if not measurable(case):
        return {**row, "taken": usual, "why": f"nothing is measured ({SWITCH})"}
    taken, found = measured(case, ways)
    others = [value for name, value in found.items() if name != taken]
    why = f"{min(others) / found[taken]:.1f} x as fast as the next" if others else "the only one here"
    if min(found.values()) < found[taken]:
        why = "the fastest that rounds no sum, near enough to one that does"
    return {**row, "taken": taken, "why": why, **found}


def _slow(machine: dict[str, Any]) -> list[str]:
    found = []
    if not machine["GPU"] and not machine["bfloat16 arithmetic"]:
        found.append("this CPU has no bfloat16 arithmetic: models are loaded in float32, and --dtype bfloat16 takes "
                     "many times as long")  # fmt: skip
    if not machine["GPU"] and not machine["compiled kernels"]:
        why = "is installed and does not work here" if _version("numba") else "is not installed"
        found.append(f"Numba {why}, so that gradients of chosen entries take plain PyTorch: pip install "
                     "'finepoint[cpu]'")  # fmt: skip
    if machine["threads"] < (machine["cores"] or 1):
        found.append(f"PyTorch uses {machine['threads']} of {machine['cores']} cores (OMP_NUM_THREADS)")
    return found
