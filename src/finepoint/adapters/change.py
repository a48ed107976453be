"""What a trained change is: numbers at chosen entries of weights, and what is known of the base they belong to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from finepoint.adapters.entries import checksum, gather, moved
from finepoint.adapters.fingerprint import FINGERPRINT, Fingerprint

Kind = Literal["delta", "value", "full"]


@dataclass(frozen=True)
class Change:
    """The trained change of one weight."""

    shape: tuple[int, ...]
    dtype: str
    """of the weight, e.g. `bfloat16`"""
    kind: Kind
    """`delta`: added to the base; `value`: replaces it exactly; `full`: replaces the whole weight, whatever it was"""
    indices: Tensor
    """(k,) int64, ascending, unique; empty for `full`"""
    numbers: Tensor
    """(k,) float32 deltas (float64 over float64), or (k,) values in the weight's dtype, or the whole weight"""
    base: str = ""
    """checksum of the base's values at the indices; empty for `full` and where there are parts"""
    parts: tuple[tuple[Tensor, str], ...] = ()
    """of a merged change: the indices and the base's checksum of each change it was made of, where the base itself was
    not at hand to take one over all of them"""

    @staticmethod
    def whole(weight: Tensor) -> "Change":
        """A weight's value as it is now, whatever it was before; it shares memory with a weight on the CPU."""
        dtype = str(weight.dtype).removeprefix("torch.")
        return Change(tuple(weight.shape), dtype, "full", torch.empty(0, dtype=torch.long), weight.detach().cpu())

    def __len__(self) -> int:
        return self.numbers.numel()

    def equals(self, other: "Change") -> bool:
        """Whether another change writes the same numbers to the same entries."""
        alike = self.kind == other.kind and self.numbers.dtype == other.numbers.dtype
        return alike and torch.equal(self.indices, other.indices) and torch.equal(self.numbers, other.numbers)

    def __repr__(self) -> str:
        return f"Change({len(self):,} entries of {self.dtype} {tuple(self.shape)}, kind {self.kind})"

    def positions(self) -> Tensor:
        """The flat indices this change writes to, (k,) int64."""
        return torch.arange(self.numbers.numel()) if self.kind == "full" else self.indices

    def checksums(self) -> tuple[tuple[Tensor, str], ...]:
        """What is known of the base: indices and the checksum of its values there."""
        return self.parts or (() if self.kind == "full" else ((self.indices, self.base),))

    def lies_on(self, weight: Tensor) -> bool:
        """Whether a weight of the right shape holds the base's values, wherever they are known."""
        return all(checksum(gather(weight, indices)) == digest for indices, digest in self.checksums())

    def stays_finite(self, weight: Tensor) -> bool:
        """Whether no finite value of the base becomes one that is not: float32 deltas can leave float16's range."""
        base = gather(weight, self.positions())
        return self.kind != "delta" or bool((self.new_values(base).isfinite() | ~base.isfinite()).all())

    def is_idle(self) -> bool:
        """Whether the base's values stay what they are; of a whole weight, whose base is not known, never."""
        if self.kind == "delta":
            return not bool(self.numbers.any())
        return self.kind == "value" and bool(self.base) and checksum(self.numbers) == self.base

    def new_values(self, base: Tensor) -> Tensor:
        """What the entries become, given the base's values there: (k,), the base's dtype."""
        numbers = self.numbers.to(base.device)
        return moved(base, numbers) if self.kind == "delta" else numbers.reshape(-1)


@dataclass(frozen=True, eq=False)
class Contents(Mapping[str, Tensor]):
    """What an adapter's file holds: a mapping from weight name to indices, with what is written there.

    `info` says where it comes from (base model, rule, density, data, ..): JSON-ready, for people and for `inspect`.
    """

    changes: dict[str, Change]
    info: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    """the base's form (see `form_of`) and fingerprint; empty where they are not known"""

    def __getitem__(self, name: str) -> Tensor:
        return self.changes[name].positions()

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def __repr__(self) -> str:
        rule, base = self.info.get("rule"), self.info.get("base_model")
        told = f"{f', rule {rule}' if rule else ''}{f', base {base}' if base else ''}"
        return f"{type(self).__name__}({self.count:,} entries of {len(self)} weights{told})"

    @property
    def count(self) -> int:
        """Trained entries in all."""
        return sum(len(change) for change in self.changes.values())

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Of the whole base; None where only the values at the entries are known."""
        return Fingerprint.of_json(self.base[FINGERPRINT]) if FINGERPRINT in self.base else None

    def changes_nothing(self) -> bool:
        """Whether no value it stores differs from the base: a choice that has not been trained."""
        return all(change.is_idle() for change in self.changes.values())
