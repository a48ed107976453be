"""The sampled weight gradient, by the kernel that is the fastest here; and the weights that follow their deltas.

Every gradient kernel takes dy (.., out), x (.., in), ascending flat indices (k,) of int32 or int64 and returns (k,), as
documented in `plain.py`; a test holds each against `plain.reference`. Where Numba is there, the CPU's are compiled;
what a machine is unable to build or run gives way to plain PyTorch.
"""

import logging
from collections.abc import Callable, Iterable
from functools import lru_cache, partial, wraps
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from finepoint.adapters.entries import moved, scatter_
from finepoint.runtime import distributed
from finepoint.tuner.kernels import plain
from finepoint.tuner.kernels.choice import KNOWN, Case, case_of, may_round, way
from finepoint.tuner.kernels.plain import HALF, PRODUCTS, sampled_embedding_gradient

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


@lru_cache
def numba_kernels() -> Any:
    """The module of what Numba compiles; None where the extra finepoint[cpu] is not installed, or is broken."""
    try:
        return import_module("finepoint.tuner.kernels.numba")
    except ModuleNotFoundError:
        return None
    except Exception as error:  # versions that do not fit each other, a library that does not load
        logger.warning("Numba cannot be used (%s); plain PyTorch, slower, takes its place", _in_a_line(error))
        return None


def or_plain(compiled: Callable[..., Result], plain: Callable[..., Result]) -> Callable[..., Result]:
    """`compiled` until it fails for the first time; from then on `plain`, which gives the same. One line says so."""
    works = True

    @wraps(compiled)
    def either(*arguments: object) -> Result:
        nonlocal works
        if works:
            try:
                return compiled(*arguments)
            except Exception as error:  # whatever a compiler, a driver or a cache on disk may raise
                result = plain(*arguments)  # first: if the arguments are at fault, this raises too
                works = False
                logger.warning("the compiled kernel %s does not run on this machine (%s); plain PyTorch, slower, takes "
                               "its place", compiled.__name__, _in_a_line(error))  # fmt: skip
                return result
        return plain(*arguments)

    return either


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


# The kernels by device; the fastest of those that are right for a case is measured (`choice`).
IN_BLOCKS: dict[str, Kernel] = {name: partial(plain.by_blocks, multiply=one) for name, one in PRODUCTS.items()}
KERNELS: dict[str, dict[str, Kernel]] = {
    "cpu": {"gather": plain.by_gather, **IN_BLOCKS},
    "meta": {"shape": plain.by_shape},
}
# On all other devices the dense product is so fast that no way of gathering comes near it, at any density: on an H100
# 0.20 ms against 0.28 at least (4096 x 4096, 4,096 tokens, bfloat16; docs/benchmarks.md).
ELSEWHERE: dict[str, Kernel] = {
    name: partial(plain.by_product, multiply=one) for name, one in PRODUCTS.items() if name not in HALF
}
# Up to which density gathering is taken where nothing is measured, on two AVX2 cores (docs/benchmarks.md).
USUAL = {"tiles": 0.1, "gather": 0.02}
# How a weight follows, by its dtype: the loop, and what NumPy is to take the weight's bits for.
ONE_PASS: dict[torch.dtype, tuple[Any, torch.dtype]] = {}

if numba := numba_kernels():
    KERNELS["cpu"] = {"tiles": or_plain(numba.by_tiles, plain.by_gather), **KERNELS["cpu"]}
    ONE_PASS = {
        torch.float32: (numba.add_at, torch.float32),
        torch.float64: (numba.add_at, torch.float64),
        torch.bfloat16: (numba.add_at_half, torch.uint16),
    }


def sampled_gradient(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """dL/dW of a linear layer at flat `indices` (k,), from dy (.., out) and x (.., in): (k,), float32 or float64."""
    return kernel_for(dy, x, len(indices))(dy, x, indices)


def kernel_for(dy: Tensor, x: Tensor, count: int) -> Kernel:
    """The fastest kernel for so many entries of a layer: see `choice`."""
    key = dy.device.type, dy.dtype, x.dtype, dy.shape[-1], x.shape[-1], count
    if (known := KNOWN.get(key)) is None:
        density, case = count / (dy.shape[-1] * x.shape[-1]), case_of(dy, x, count)
        ways = kernels_for(case)
        known = KNOWN[key] = way(case, ways, usual_kernel(ways, density))
    return known


def usual_kernel(ways: Iterable[str], density: float) -> str:
    """The name of the kernel that is taken where nothing is measured."""
    return next(name for name in ways if density <= USUAL.get(name, 1))


def kernels_for(case: Case) -> dict[str, Kernel]:
    """The kernels that are right for a case, by name."""
    ways = KERNELS.get(case.device, ELSEWHERE)
    return ways if may_round(case) else {name: one for name, one in ways.items() if name not in HALF}


def follow_(weight: Tensor, indices: Tensor, base: Tensor, delta: Tensor) -> None:
    """weight[indices] = base + delta, added in the delta's precision and rounded once to the weight's dtype.

    weight: any shape and float dtype; indices (int32 or int64), base, delta: (k,). Where delta is 0 the base's bits
    are kept. Of a weight sharded by rows this process writes its own. The weight's version counter is raised, so that
    autograd refuses graphs that have saved it; that of `weight.data` is another.
    """
    delta = delta.detach()  # within a forward pass nothing of this may be recorded: checkpointing counts what is
    if distributed.is_sharded(weight):
        weight, first = distributed.own_rows(weight)
        edges = torch.tensor([first, first + weight.numel()], dtype=indices.dtype, device=indices.device)
        start, end = torch.searchsorted(indices, edges).tolist()
        indices, base, delta = indices[start:end] - first, base[start:end], delta[start:end]
    assert indices.shape == base.shape == delta.shape == (len(indices),)  # compiled code asks nothing
    if weight.dtype in ONE_PASS and weight.device.type == "cpu" and weight.is_contiguous():
        _write_(weight, indices, base, delta)
    else:
        in_steps_(weight, indices, base, delta)


def in_one_pass_(weight: Tensor, indices: Tensor, base: Tensor, delta: Tensor) -> None:
    """The compiled loop."""
    loop, bits = ONE_PASS[weight.dtype]
    loop(weight.detach().view(-1).view(bits).numpy(), indices.numpy(), base.view(bits).numpy(), delta.numpy())
    if not weight.is_inference():
        torch.autograd.graph.increment_version(weight)  # as torch does for what it writes itself


def in_steps_(weight: Tensor, indices: Tensor, base: Tensor, delta: Tensor) -> None:
    """Plain PyTorch."""
    scatter_(weight, indices, moved(base, delta))


_write_ = or_plain(in_one_pass_, in_steps_)

__all__ = ["follow_", "kernel_for", "sampled_embedding_gradient", "sampled_gradient"]
