"""Reading and writing single entries of a weight, bit for bit."""

from hashlib import sha256
from typing import Literal

import torch
from torch import Tensor

from finepoint.models.quantised import float_values
from finepoint.runtime import distributed


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """The entries at flat positions: (k,), the weight's dtype and device, a copy; of a quantised weight its floats.

    Those of a sharded weight come from all processes, each of which must ask for the same.
    """
    if distributed.is_sharded(weight):
        return _gather_sharded(weight, indices)
    return float_values(weight).reshape(-1).index_select(0, indices.to(weight.device))


def _gather_sharded(weight: Tensor, indices: Tensor) -> Tensor:
    local, first = distributed.own_rows(weight)
    indices = indices.to(local.device)
    mine = (indices >= first) & (indices < first + local.numel())
    found = torch.zeros(len(indices), dtype=weight.dtype, device=local.device)
    found[mine] = local.reshape(-1)[indices[mine] - first]
    # As bytes, of which those of a process that does not hold the entry are 0: numbers would lose the sign of -0.0.
    distributed.largest_(found.view(torch.uint8))
    return found


def scatter_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Writes (k,) values to flat positions of a weight of any layout; no autograd, no other entry touched."""
    if distributed.is_sharded(weight):
        local, first = distributed.own_rows(weight)
        mine = (indices >= first) & (indices < first + local.numel())
        scatter_(local, indices[mine] - first, values[mine.to(values.device)])
        return
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


def every(rows: Tensor, columns: Tensor, features: int) -> Tensor:
    """The flat positions where these rows and columns cross."""
    return (rows.long()[:, None] * features + columns).reshape(-1)


def lines_of(indices: Tensor, shape: tuple[int, ...]) -> tuple[Literal["rows", "columns"], Tensor] | None:
    """The whole rows or columns of a matrix that the indices are all of, if they are.

    indices: (k,), flat, ascending, unique.
    """
    if len(shape) != 2 or not len(indices):
        return None
    out, features = shape
    if len(indices) % features == 0:
        rows = indices[::features] // features
        if torch.equal(indices.long(), every(rows, torch.arange(features, device=indices.device), features)):
            return "rows", rows
    if len(indices) % out == 0:
        columns = indices[: len(indices) // out]
        if torch.equal(indices.long(), every(torch.arange(out, device=indices.device), columns, features)):
            return "columns", columns
    return None


def checksum(values: Tensor) -> str:
    """A digest of (k,) values that is the same in every dtype that can hold them."""
    exact = values.detach().to("cpu", torch.float64).contiguous()
    return sha256(exact.numpy().tobytes()).hexdigest()[:32]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype and shape and the same bits, -0.0 and NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.detach().contiguous().view(bits), b.detach().to(a.device).contiguous().view(bits))


def overlap(a: Tensor, b: Tensor) -> int:
    """How many indices two ascending index tensors share."""
    return int(torch.isin(a, b, assume_unique=True).sum())
