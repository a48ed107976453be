"""Reading and writing single entries of a weight, bit for bit."""

from hashlib import sha256

import torch
from torch import Tensor

from finepoint.quantised import float_values


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """The entries at flat positions: (k,), the weight's dtype and device, a copy; of a quantised weight its floats."""
    return float_values(weight).reshape(-1).index_select(0, indices.to(weight.device))


def scatter_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Writes (k,) values to flat positions of a weight of any layout; no autograd, no other entry touched."""
    indices = indices.to(weight.device, torch.long)
    values = values.to(weight.device, weight.dtype)
    weight = weight.detach()
    if weight.is_contiguous():
        # As integers where they have two bytes: torch scatters half-precision numbers ten times slower.
        bits = torch.int16 if weight.itemsize == 2 else weight.dtype
        weight.view(-1).view(bits).scatter_(0, indices, values.view(bits))
    else:
        weight.index_put_(torch.unravel_index(indices, weight.shape), values)


def moved(base: Tensor, delta: Tensor) -> Tensor:
    """base + delta, added in the delta's precision and rounded once to the base's dtype; both (k,).

    Where the delta is 0 the base's bits are kept: -0.0 + 0 would be +0.0.
    """
    return torch.where(delta == 0, base, (base.to(delta.dtype) + delta).to(base.dtype))


def checksum(values: Tensor) -> str:
    """A digest of (k,) values that is the same in every dtype that can hold them."""
    exact = values.detach().to("cpu", torch.float64).contiguous()
    return sha256(exact.numpy().tobytes()).hexdigest()[:32]


def overlap(a: Tensor, b: Tensor) -> int:
    """How many indices two ascending index tensors share."""
    return int(torch.isin(a, b, assume_unique=True).sum())
