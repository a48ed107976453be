"""What this machine has, which kernels are the fastest on it, and what will be slow: `finepoint doctor`."""

import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finepoint.models.loading import cpu_has_bf16
from finepoint.models.packages import cache_folder
from finepoint.runtime.devices import room_bytes
from finepoint.tuner.kernels import Kernel, kernel_for, numba_kernels, plain

PACKAGES = ("finepoint", "torch", "transformers", "accelerate", "peft", "trl", "datasets", "numba", "gguf", "torchao",
            "bitsandbytes", "lm-eval", "ray", "matplotlib")  # fmt: skip
SHAPES = ((576, 1536, 512), (2048, 2048, 1024))  # rows and columns of a weight, tokens: SmolLM2-135M's, a 1B model's
DENSITIES = (1e-3, 1e-2)
TURNS = 5
GATHERED = 1e6  # products: more of them take gathering seconds


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
        "python": platform.python_version(), "system": platform.platform(terse=True), "processor": _processor(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "bfloat16 arithmetic": cpu_has_bf16(),
        "compiled kernels": numba_kernels() is not None, "memory free, GB": _gigabytes("cpu"),
        "cache": str(cache_folder()), "GPU": None,
    }  # fmt: skip
    if torch.cuda.is_available():
        found |= {"GPU": torch.cuda.get_device_name(), "CUDA": torch.version.cuda,
                  "GPU memory free, GB": _gigabytes("cuda")}  # fmt: skip
    return found


def _gigabytes(device: str) -> float | None:
    room = room_bytes(device)
    return None if room is None else round(room / 1e9, 1)


def _processor() -> str:
    """The processor's name, where the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _kernels() -> list[dict[str, Any]]:
    """Which kernel is taken for a weight of this shape and density, and what every one would take, in milliseconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = numba_kernels()
    # Gathering without a compiled kernel is far slower than all others, but where few entries of a small weight are it.
    first = compiled.by_tiles if compiled and device == "cpu" else plain.by_gather
    kernels: list[Kernel] = [first, plain.by_blocks, plain.by_product]
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for height, width, tokens in SHAPES:
            generator = torch.Generator().manual_seed(0)
            dy, x = (torch.randn(tokens, size, generator=generator).to(device, dtype) for size in (height, width))
            for density in DENSITIES:
                count = round(density * height * width)
                indices = torch.randperm(height * width, generator=generator)[:count].sort().values.to(device)
                taken = kernel_for(device, density)
                rows.append({
                    "weight": f"{height} x {width}", "tokens": tokens, "dtype": str(dtype).removeprefix("torch."),
                    "density": density, "taken": taken.__name__,
                    **{kernel.__name__: _milliseconds(kernel, dy, x, indices) for kernel in kernels
                       if kernel is not plain.by_gather or count * tokens < GATHERED},
                })  # fmt: skip
    return rows


def _milliseconds(kernel: Kernel, dy: Tensor, x: Tensor, indices: Tensor) -> float:
    times = []
    for _ in range(TURNS + 1):  # the first compiles, and fills caches
        started = time.perf_counter()
        kernel(dy, x, indices)
        if dy.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return round(statistics.median(times[1:]) * 1e3, 3)


def _slow(machine: dict[str, Any]) -> list[str]:
    found = []
    if not machine["GPU"] and not machine["bfloat16 arithmetic"]:
        found.append("this CPU has no bfloat16 arithmetic: models are loaded in float32, and --dtype bfloat16 takes "
                     "many times as long")  # fmt: skip
    if not machine["GPU"] and not machine["compiled kernels"]:
        found.append("Numba is not installed, so that gradients of chosen entries take plain PyTorch: pip install "
                     "'finepoint[cpu]'")  # fmt: skip
    if machine["threads"] < (machine["cores"] or 1):
        found.append(f"PyTorch uses {machine['threads']} of {machine['cores']} cores (OMP_NUM_THREADS)")
    return found
