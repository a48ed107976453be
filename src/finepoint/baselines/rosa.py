"""HybridTuner: chosen entries and low-rank factors of the same model, trained together (RoSA, arXiv:2401.04679)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.entries import scatter_
from finepoint.adapters.peft import SPARSE
from finepoint.baselines.peft import PeftTuner
from finepoint.runtime.devices import in_float64, norm_of
from finepoint.tuner.interface import Tuner
from finepoint.tuner.tuner import SparseTuner


class HybridTuner(Tuner):
    """y = (W + sparse) x + scaling B A x: a SparseTuner, and a PeftTuner that was made `beside` it.

    Args:
        head: weights of a new classification head, all of whose entries the SparseTuner trains.
    """

    def __init__(self, sparse: SparseTuner, low_rank: PeftTuner, head: Sequence[str] = ()) -> None:
        self.model: nn.Module = sparse.model
        self.sparse = sparse
        self.low_rank = low_rank
        self.head = head

    def trained(self) -> dict[str, nn.Parameter]:
        """The deltas by weight name, the factors by PEFT's names in the model."""
        return self.sparse.trained() | self.low_rank.trained()

    def follow_(self) -> None:
        """Has the weights follow their deltas; the factors are computed with as they are."""
        self.sparse.follow_()

    def merged(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """The name, base, wide new value and stored new value of each weight with factors, one at a time."""
        self.follow_()
        for name, weight, wide, stored in self.low_rank.merged():
            base = weight
            if name in self.sparse.entries:
                known = self.sparse.entries[name].known()
                base = weight.clone()
                scatter_(base, known.indices, known.base)
            yield name, base, wide, stored

    def scaler(self) -> Callable[[float], None]:
        """What scales both changes alike."""
        halves = self.sparse.scaler(), self.low_rank.scaler()

        def scale_(scale: float) -> None:
            for half in halves:
                half(scale)

        return scale_

    def changed(self) -> int:
        """How many entries of the weights, factors folded in, hold another value than the base's."""
        counts = {name: int((stored != base).sum()) for name, base, _, stored in self.merged()}
        rest = (entries.changed() for name, entries in self.sparse.entries.items() if name not in counts)
        return sum(counts.values()) + sum(rest)

    def norm(self, exclude: Iterable[str] = ()) -> float:
        """The Euclidean norm of the change of all weights, factors folded in, but the excluded ones."""
        norms = {name: norm_of([in_float64(wide) - in_float64(base)]) for name, base, wide, _ in self.merged()}
        norms = {name: norm for name, norm in norms.items() if name not in set(exclude)}
        return math.hypot(*norms.values(), self.sparse.norm({*exclude, *norms}))

    def adapter(
        self, store: str = "auto", full: Iterable[str] = (), info: Mapping[str, Any] | None = None
    ) -> SparseAdapter:
        """Whole weights, factors folded in, and the chosen entries of others, as an adapter on the CPU."""
        entries = self.sparse.adapter(store, full, info)
        return SparseAdapter({**entries.changes, **self.low_rank.adapter(info=info).changes}, dict(info or {}))

    def save(self, folder: Path, adapter: SparseAdapter, compact: bool = False) -> list[Path]:
        """Writes both halves as what they are: PEFT's files, and finepoint's adapter in a folder of its own there."""
        entries = self.sparse.adapter(full=self.head, info=adapter.info)
        return [*self.low_rank.save(folder, adapter), *self.sparse.save(folder / SPARSE, entries, compact)]

    def revert_(self) -> None:
        """Takes both halves back: the model computes what the base computes, and holds its exact bits."""
        self.low_rank.revert_()
        self.sparse.revert_()

    def close(self) -> None:
        """Gives back the plain model; closing twice is harmless."""
        self.low_rank.close()
        self.sparse.close()
