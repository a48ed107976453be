"""The sampled weight gradient, by the kernel that suits device and density.

Every kernel takes dy (tokens, out), x (tokens, in), ascending flat indices (k,) and returns (k,), as documented in
`plain.py`; a test holds each against `plain.reference`.
"""

from torch import Tensor

from finepoint.training.kernels import plain
from finepoint.training.kernels.plain import sampled_embedding_gradient

try:
    from finepoint.training.kernels.numba import by_dots
except ImportError:  # the extra finepoint[cpu] is not installed
    by_dots = None  # type: ignore[assignment]

# The density above which the dense product is faster; measured on two AVX2 cores, 512 tokens, 576 x 576 to 1536 x 576.
DOTS_UP_TO = 0.05
GATHER_UP_TO = 0.02


def sampled_gradient(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """dL/dW of a linear layer at flat `indices` (k,), from dy (.., out) and x (.., in): (k,), float32 or float64."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    density = len(indices) / (dy.shape[1] * x.shape[1])
    if by_dots is not None and dy.device.type == "cpu" and density <= DOTS_UP_TO:
        return by_dots(dy, x, indices)
    return plain.by_gather(dy, x, indices) if density <= GATHER_UP_TO else plain.by_blocks(dy, x, indices)


__all__ = ["sampled_embedding_gradient", "sampled_gradient"]
