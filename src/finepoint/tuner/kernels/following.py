"""The weights follow their deltas: in one pass on the CPU where Numba is there, else in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from finepoint.adapters.entries import moved, scatter_
from finepoint.runtime import distributed
from finepoint.tuner.kernels.compiled import numba_kernels, or_plain

# By the weight's dtype: the loop, and what NumPy is to take the weight's bits for.
ONE_PASS: dict[torch.dtype, tuple[Any, torch.dtype]] = {}
if numba := numba_kernels():
    ONE_PASS = {
        torch.float32: (numba.add_at, torch.float32),
        torch.float64: (numba.add_at, torch.float64),
        torch.bfloat16: (numba.add_at_half, torch.uint16),
    }


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
