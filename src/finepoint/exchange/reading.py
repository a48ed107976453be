"""Positions and changes as others store them, checked against a base and made a change of ours."""

from math import prod

import torch
from torch import Tensor

from finepoint.adapters.change import Change
from finepoint.adapters.entries import checksum, gather
from finepoint.errors import FinepointError
from finepoint.exchange.checkpoint import Checkpoint

EXACT_IN_FLOAT32 = 1 << 24
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def change_of(
    name: str, places: Tensor, numbers: Tensor, checkpoint: Checkpoint, dtype: str | None, round_first: bool
) -> Change:
    """One weight's change from somebody else's file.

    Args:
        name: the weight.
        places: (dimensions, k) positions along each dimension of the weight, or (1, k) flat ones; integers, or whole
            floats as PEFT writes them on Windows.
        numbers: (k,) changes.
        dtype: the weights they are added to; None for the base's.
        round_first: the change is rounded to the weight's dtype before it is added, instead of the sum alone.

    Returns:
        A change of kind `delta`, or `value` where `round_first` matters; entries whose change is 0 are left out.

    Raises:
        FinepointError: a weight the base lacks, positions outside it or repeated, numbers that are not finite.
    """
    weight = checkpoint.weight(name)
    shape = tuple(weight.shape)
    if numbers.ndim != 1 or places.ndim != 2 or places.shape[1] != len(numbers) or len(numbers) > weight.numel():
        raise FinepointError(f"{name}: positions of shape {tuple(places.shape)} for changes of shape "
                             f"{tuple(numbers.shape)} in a weight of shape {shape}")  # fmt: skip
    if numbers.dtype not in FLOATS or places.dtype not in (*FLOATS, torch.int32, torch.int64):
        raise FinepointError(f"{name}: changes are stored as {numbers.dtype}, their positions as {places.dtype}")
    if not torch.isfinite(numbers).all():
        raise FinepointError(f"{name}: a change is not a finite number")
    flat = _flat(name, places, shape)
    indices, order = flat.sort()
    if bool((indices[1:] == indices[:-1]).any()):
        raise FinepointError(f"{name}: a position occurs twice")
    delta = numbers[order]
    indices, delta = indices[delta != 0], delta[delta != 0]
    kept: torch.dtype = getattr(torch, dtype or str(weight.dtype).removeprefix("torch."))
    base = gather(weight, indices).to(kept)
    facts = (shape, str(kept).removeprefix("torch."))
    if not bool((base + delta).to(kept).isfinite().all()):
        raise FinepointError(f"{name}: a change is too large a number for {kept}")
    if round_first and kept.itemsize == 2:
        return Change(*facts, "value", indices, base + delta.to(kept), checksum(base))
    return Change(*facts, "delta", indices, delta.to(torch.promote_types(kept, torch.float32)), checksum(base))


def _flat(name: str, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    if places.is_floating_point() and not bool((places < EXACT_IN_FLOAT32).all()):  # nor NaN
        raise FinepointError(f"{name}: its positions were stored as floats too large to be exact; save it elsewhere")
    places = places.long()
    sizes = (prod(shape),) if len(places) == 1 and len(shape) > 1 else shape
    if len(places) != len(sizes):
        raise FinepointError(f"{name}: positions of shape {tuple(places.shape)} do not fit a weight of shape {shape}")
    limits = torch.tensor(sizes)[:, None]
    if bool(((places < 0) | (places >= limits)).any()):
        raise FinepointError(f"{name}: a position lies outside the weight of shape {shape}")
    strides = torch.tensor([prod(sizes[i + 1 :]) for i in range(len(sizes))])[:, None]
    return (places * strides).sum(0)
