"""What several adapters hold of one weight, side by side over the union of their entries."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.change import Change
from finepoint.adapters.entries import gather
from finepoint.errors import FinepointError


@dataclass(frozen=True)
class Aligned:
    """n adapters' changes of one weight, over the u entries that any of them holds; all on the CPU."""

    name: str
    changes: Sequence[Change | None]
    indices: Tensor
    """(u,) int64, ascending: the union"""
    places: Sequence[Tensor]
    """for each adapter, where its indices lie in the union: (k,) int64"""
    present: Tensor
    """(n, u) bool"""
    weight: Tensor | None
    """the base's, where it is at hand"""

    @cached_property
    def base(self) -> Tensor:
        """The base's values: (u,), the weight's dtype.

        Raises:
            FinepointError: the base is not at hand.
        """
        if self.weight is None:
            raise FinepointError(
                f"{self.name}: an adapter holds exact values, whose change is known only against the base; "
                "give the base model (model=.., --model M)"
            )
        return gather(self.weight, self.indices).cpu()

    @cached_property
    def deltas(self) -> Tensor:
        """(n, u) float64, 0 where an adapter has no entry.

        Raises:
            FinepointError: the base is not at hand, and needed.
        """
        found = torch.zeros(self.present.shape, dtype=torch.float64)
        for row, change, place in zip(found, self.changes, self.places, strict=True):
            if change is not None:
                numbers = change.numbers.detach().to("cpu", torch.float64)
                row[place] = numbers if change.kind == "delta" else numbers - self.base[place].double()
        return found

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """(n, u) float64: what each adapter says of its own entries, 0 elsewhere."""
        found = torch.zeros(self.present.shape, dtype=torch.float64)
        for row, place, value in zip(found, self.places, values, strict=True):
            row[place] = value.double()
        return found


def aligned(name: str, adapters: Sequence[SparseAdapter], weight: Tensor | None = None) -> Aligned:
    """The adapters' changes of a weight; takes O(n u) numbers, whatever the size of the weight.

    Args:
        weight: the base's, which tells the deltas of exact values.

    Raises:
        FinepointError: whole weights, other shapes or dtypes, other bases, numbers that are not finite.
    """
    changes = [adapter.changes.get(name) for adapter in adapters]
    _check(name, changes)
    held = [torch.empty(0, dtype=torch.long) if change is None else change.indices.cpu() for change in changes]
    indices = torch.cat(held).unique()
    places = [torch.searchsorted(indices, own) for own in held]
    present = torch.zeros(len(changes), len(indices), dtype=torch.bool)
    for row, place in zip(present, places, strict=True):
        row[place] = True
    return Aligned(name, changes, indices, places, present, weight)


def _check(name: str, changes: Sequence[Change | None]) -> None:
    """Whether the adapters' changes of one weight go together, as far as they tell by themselves."""
    held = [(number, change) for number, change in enumerate(changes, 1) if change is not None]
    number, some = held[0]
    known: list[tuple[int, Tensor, str]] = []
    for other, change in held:
        if change.kind == "full":
            raise FinepointError(
                f"{name}: adapter {other} holds the whole weight (a new head or dense training), "
                "but only chosen entries can be merged"
            )
        if (change.shape, change.dtype) != (some.shape, some.dtype):
            raise FinepointError(
                f"{name}: {change.dtype} {change.shape} in adapter {other}, {some.dtype} {some.shape} in adapter "
                f"{number}; merge adapters of one base model"
            )
        if not bool(torch.isfinite(change.numbers).all()):
            raise FinepointError(f"{name}: a number of adapter {other} is not finite")
        for indices, digest in change.checksums():
            for earlier, known_indices, known_digest in known:
                if digest != known_digest and torch.equal(indices, known_indices):
                    raise FinepointError(f"{name}: adapters {earlier} and {other} were trained on different bases")
            known.append((other, indices, digest))
