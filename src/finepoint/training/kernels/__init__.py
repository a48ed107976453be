"""The sampled weight gradient, by the kernel that suits device and density.

Every kernel takes dy (tokens, out), x (tokens, in), ascending flat indices (k,) and returns (k,), as documented in
`plain.py`; a test holds each against `plain.reference`.
"""

from collections.abc import Callable

from torch import Tensor

from finepoint.training.kernels import plain
from finepoint.training.kernels.plain import sampled_embedding_gradient

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

# Kernels by device, each with the density up to which it is the fastest; beyond all of them, the dense product in
# blocks. Measured on two AVX2 cores, 512 tokens, weights of 192 x 576 to 1536 x 576 (docs/benchmarks.md).
PLAIN: list[tuple[float, Kernel]] = [(0.02, plain.by_gather)]
CPU = PLAIN

try:
    from finepoint.training.kernels.numba import by_dots, by_tiles
except ImportError:  # the extra finepoint[cpu] is not installed
    pass
else:
    CPU = [(0.003, by_tiles), (0.06, by_dots)]


def sampled_gradient(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """dL/dW of a linear layer at flat `indices` (k,), from dy (.., out) and x (.., in): (k,), float32 or float64."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    return kernel_for(dy.device.type, len(indices) / (dy.shape[1] * x.shape[1]))(dy, x, indices)


def kernel_for(device: str, density: float) -> Kernel:
    """The fastest kernel on a device at a density."""
    for limit, kernel in CPU if device == "cpu" else PLAIN:
        if density <= limit:
            return kernel
    return plain.by_blocks


__all__ = ["kernel_for", "sampled_embedding_gradient", "sampled_gradient"]
