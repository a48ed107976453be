"""The sampled weight gradient, by the kernel that suits device and density.

Every kernel takes dy (.., out), x (.., in), ascending flat indices (k,) of int32 or int64 and returns (k,), as
documented in `plain.py`; a test holds each against `plain.reference`.
"""

from collections.abc import Callable

from torch import Tensor

from finepoint.tuner.kernels import plain
from finepoint.tuner.kernels.compiled import numba_kernels, or_plain
from finepoint.tuner.kernels.following import follow_
from finepoint.tuner.kernels.plain import sampled_embedding_gradient

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

# Kernels by device, each with the density up to which it is the fastest; beyond all of them, the dense product in
# blocks. Measured on two AVX2 cores, 512 tokens, weights of 192 x 576 to 1536 x 576 (docs/benchmarks.md).
KERNELS: dict[str, list[tuple[float, Kernel]]] = {"cpu": [(0.02, plain.by_gather)], "meta": [(1.0, plain.by_shape)]}
# On all other devices the dense product is so fast that no way of gathering comes near it, at any density: on an H100
# 0.20 ms against 0.28 at least (4096 x 4096, 4,096 tokens, bfloat16; docs/benchmarks.md).
ELSEWHERE: list[tuple[float, Kernel]] = [(1.0, plain.by_product)]

if numba := numba_kernels():
    KERNELS["cpu"] = [(0.1, or_plain(numba.by_tiles, plain.by_gather))]


def sampled_gradient(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """dL/dW of a linear layer at flat `indices` (k,), from dy (.., out) and x (.., in): (k,), float32 or float64."""
    return kernel_for(dy.device.type, len(indices) / (dy.shape[-1] * x.shape[-1]))(dy, x, indices)


def kernel_for(device: str, density: float) -> Kernel:
    """The fastest kernel on a device at a density."""
    for limit, kernel in KERNELS.get(device, ELSEWHERE):
        if density <= limit:
            return kernel
    return plain.by_blocks


__all__ = ["follow_", "kernel_for", "sampled_embedding_gradient", "sampled_gradient"]
