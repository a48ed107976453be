"""Several adapters of one model in memory: switching between them takes milliseconds and restores exact bits."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from finepoint.adapters.adapter import Change, SparseAdapter
from finepoint.adapters.entries import gather, overlap, scatter_
from finepoint.errors import FinepointError


@dataclass(frozen=True)
class Swap:
    """What switching writes into a weight: (k,) positions, the base's values there, the adapter's."""

    weight: nn.Parameter
    indices: Tensor
    base: Tensor
    values: Tensor


class AdapterSet:
    """Holds adapters ready to be switched on: everything is checked and computed when an adapter is added.

    Each costs 8 bytes an entry for the positions and two values in the weight's dtype.

    Args:
        model: with no adapter applied and not being trained; it stays the same object.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: tuple[str, ...] = ()
        self._swaps: dict[str, dict[str, Swap]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, adapter: SparseAdapter) -> None:
        """Makes an adapter ready under a name.

        Raises:
            FinepointError: the name is taken, or the adapter does not fit the model.
        """
        if name in self._swaps:
            raise FinepointError(f"there is an adapter named {name!r} already; remove that one first")
        with self._lock:
            active = self.active
            self._switch([])
            try:
                adapter.check(self.model)
                weights = dict(self.model.named_parameters(remove_duplicate=False))
                self._swaps[name] = {at: _swap(weights[at], change) for at, change in adapter.changes.items()}
            finally:
                self._switch(active)

    def remove(self, name: str) -> None:
        """Forgets an adapter; it is switched off first."""
        self._known(name)
        with self._lock:
            self._switch([other for other in self.active if other != name])
            del self._swaps[name]

    def set(self, names: str | Sequence[str]) -> None:
        """Switches these adapters on and all others off.

        Raises:
            FinepointError: an unknown name, or two adapters that share entries; nothing is changed then.
        """
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            self._known(name)
        for i, name in enumerate(names):
            for other in names[:i]:
                self._refuse_overlap(other, name)
        with self._lock:
            self._switch(names)

    def disable(self) -> None:
        """Switches all adapters off: the base model, bit for bit."""
        self.set([])

    def __contains__(self, name: object) -> bool:
        return name in self._swaps

    def __len__(self) -> int:
        return len(self._swaps)

    def _switch(self, names: Sequence[str]) -> None:
        # First all that goes, then all that comes: what two adapters share ends as the one that stays has it.
        for name in self.active:
            if name not in names:
                for swap in self._swaps[name].values():
                    scatter_(swap.weight, swap.indices, swap.base)
        for name in names:
            if name not in self.active:
                for swap in self._swaps[name].values():
                    scatter_(swap.weight, swap.indices, swap.values)
        self.active = tuple(names)

    def _known(self, name: str) -> None:
        if name not in self._swaps:
            raise FinepointError(f"there is no adapter {name!r}; there are: {', '.join(self._swaps) or 'none'}")

    def _refuse_overlap(self, a: str, b: str) -> None:
        for weight in set(self._swaps[a]) & set(self._swaps[b]):
            if shared := overlap(self._swaps[a][weight].indices, self._swaps[b][weight].indices):
                raise FinepointError(f"{a!r} and {b!r} share {shared} entries of {weight}: they cannot both be on")


def _swap(weight: nn.Parameter, change: Change) -> Swap:
    indices = change.positions().to(weight.device)
    base = gather(weight, indices)
    return Swap(weight, indices, base, change.new_values(base).to(weight.device, weight.dtype))
