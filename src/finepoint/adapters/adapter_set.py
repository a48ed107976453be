"""Several adapters of one model in memory: switching between them takes milliseconds and restores exact bits."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from finepoint.adapters.adapter import SETS, SparseAdapter, base_beneath
from finepoint.adapters.change import Change
from finepoint.adapters.entries import gather, overlap, same_bits, scatter_
from finepoint.adapters.fingerprint import Fingerprint, Moved, contents_of, stamps, unlike
from finepoint.adapters.rows import Delta, Rows, Term, answering, outputs, refuse_mixed, terms_of
from finepoint.adapters.scaling import between, unscaled
from finepoint.errors import FinepointError

REPLACED = "does not hold what the adapters lie on: the weights were replaced; make a new AdapterSet of the model"


@dataclass(frozen=True)
class Swap:
    """What switching writes into a weight: (k,) positions, the base's values there, the adapter's at its strength."""

    weight: nn.Parameter
    change: Change | None
    """what `scale` scales; None for a classifier's new head, which stays as trained"""
    indices: Tensor
    base: Tensor
    values: Tensor

    @cached_property
    def delta(self) -> Delta | None:
        """What it adds; None where that is nothing."""
        numbers = self.values.to(wide := torch.promote_types(self.base.dtype, torch.float32)) - self.base.to(wide)
        moved = numbers != 0
        return Delta(tuple(self.weight.shape), self.indices.long()[moved], numbers[moved]) if moved.any() else None


class AdapterSet:
    """Holds adapters ready to be switched on: everything is checked and computed when an adapter is added.

    Each costs 8 bytes an entry for the positions and two values in the weight's dtype, besides the adapter itself.

    Threads: every method waits for another thread's to end. `with adapters.using("a"): model.generate(..)` keeps what
    is on until the block ends, so that no other thread switches in the middle of a generation; forward passes outside
    of such a block are not guarded.

    Args:
        model: with no adapter applied and not being trained; it stays the same object.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: tuple[str, ...] = ()
        self._swaps: dict[str, dict[str, Swap]] = {}
        self._lock = threading.RLock()
        self._in_use = False
        self._stamps: dict[str, Any] = {}
        self._base: Fingerprint | None = None
        self._tried: set[str] = set()
        self._added: tuple[tuple[str, ...], dict[str, list[Term]]] | None = None
        SETS.setdefault(model, WeakSet()).add(self)

    def __repr__(self) -> str:
        on = f", on: {', '.join(self.active)}" if self.active else ""
        return f"AdapterSet({', '.join(self._swaps) or 'empty'}{on})"

    def add(self, name: str, adapter: SparseAdapter) -> None:
        """Makes an adapter ready under a name.

        Raises:
            FinepointError: the name is taken, the adapter does not fit the model, or this thread is `using` the set.
        """
        with self._changing():
            if name in self._swaps:
                raise FinepointError(f"there is an adapter named {name!r} already; remove that one first")
            active = self.active
            self._switch([])
            try:
                adapter.check(self.model)
                weights = dict(self.model.named_parameters(remove_duplicate=False))
                if self._base is None:
                    self._base = base_beneath(self.model)
                    self._stamps = stamps(contents_of(self.model))
                fixed = unscaled(adapter, self.model)
                self._swaps[name] = {
                    at: _swap(weights[at], change, at not in fixed) for at, change in adapter.changes.items()
                }
            finally:
                self._switch(active)

    def remove(self, name: str) -> None:
        """Forgets an adapter; it is switched off first.

        Raises:
            FinepointError: an unknown name, or this thread is `using` the set.
        """
        with self._changing():
            self._known(name)
            self._switch([other for other in self.active if other != name])
            del self._swaps[name]
            self._tried.discard(name)
            self._added = None

    def set(self, names: str | Sequence[str] | None) -> None:
        """Switches these adapters on and all others off; None, or no name at all, is the base.

        Raises:
            FinepointError: an unknown name, two adapters that share entries, weights that were replaced since the
                adapters were added, or this thread is `using` the set; nothing is changed then.
        """
        with self._changing():
            self._set(names)

    def scale(self, name: str, factor: float) -> None:
        """The strength an adapter is on with from now: base + factor x (trained - base), in float64, rounded once.

        1 gives the trained bits again, 0 the base's; it holds until the next `scale`, also over switches. A
        classifier's new head, which has no base, stays as it was trained.

        Raises:
            FinepointError: an unknown name, a factor that is not finite, or this thread is `using` the set.
        """
        if not isfinite(factor):
            raise FinepointError(f"the scale of {name!r} is {factor}; expected a finite number")
        with self._changing():
            self._known(name)
            active = self.active
            self._switch([other for other in active if other != name])
            swaps = self._swaps[name]
            self._swaps[name] = {at: _scaled(swap, factor) for at, swap in swaps.items()}
            self._added = None
            self._switch(active)

    def disable(self) -> None:
        """Switches all adapters off: the base model, bit for bit.

        Raises:
            FinepointError: this thread is `using` the set.
        """
        self.set([])

    @contextmanager
    def using(self, names: str | Sequence[str] | None) -> Iterator[nn.Module]:
        """Inside, these adapters are on and stay on: other threads that switch or use wait until it ends.

        Afterwards, also after an exception, what was on before is on again.

        Raises:
            FinepointError: as for `set`, which this thread cannot call inside, nor `using` again.
        """
        with self._changing():
            before = self.active
            self._set(names)
            self._in_use = True
            try:
                yield self.model
            finally:
                self._in_use = False
                self._switch(before)

    @contextmanager
    def rows(self, names: Sequence[str | None], each: int = 1) -> Iterator[nn.Module]:
        """Inside, each row of every batch is computed with the adapter that is named for it, None for the base.

        Linear layers multiply all rows by the base's weight and add to each row what its adapter adds, summed in
        float32 at least: equal to each adapter by itself up to rounding. Where one name is all rows', it is `using`,
        to the bit. Afterwards what was on before is on again.

        Args:
            names: one for each row of the batch.
            each: so many rows of the batch belong to a name, one after the other: `num_beams`, `num_return_sequences`.

        Raises:
            FinepointError: as for `using`; an adapter changes something else than plain linear layers and embeddings,
                or a trial with a small input shows that rows do not keep apart; inside, a batch of another size.
        """
        if len(set(names)) < 2:
            with self.using([name for name in names[:1] if name is not None]) as model:
                yield model
            return
        with self._changing():
            before, known = self.active, sorted({name for name in names if name is not None})
            for name in known:
                self._known(name)
            self._switch([])
            self._in_use = True
            try:
                contents = contents_of(self.model)
                self._refuse_other_weights(contents)
                self._refuse_other_entries(contents, known, "base")
                self._try(known)
                with answering(self.model, Rows.of(names, known, each), self._terms(known)):
                    yield self.model
            finally:
                self._in_use = False
                self._switch(before)

    def _terms(self, names: Sequence[str]) -> dict[str, list[Term]]:
        """By module, what these adapters add; the last ones are kept."""
        if self._added is None or self._added[0] != tuple(names):
            self._added = tuple(names), _terms(self.model, [self._swaps[name] for name in names])
        return self._added[1]

    def _try(self, names: Sequence[str]) -> None:
        """Tries, for adapters that were not tried yet, that their rows are what they compute by themselves.

        At their entries numbers are drawn, so that a fault cannot hide in rounding.
        """
        for name in [name for name in names if name not in self._tried]:
            drawn = {at: _drawn(swap) for at, swap in self._swaps[name].items()}
            terms, base = _terms(self.model, [drawn]), outputs(self.model)
            try:
                for swap in drawn.values():
                    scatter_(swap.weight, swap.indices, swap.values)
                changed = outputs(self.model)
            finally:
                for swap in drawn.values():
                    scatter_(swap.weight, swap.indices, swap.base)
                self._stamps = stamps(contents_of(self.model))
            refuse_mixed(self.model, Rows.of([name, None], [name]), terms, [changed, base])
            self._tried.add(name)

    def __contains__(self, name: object) -> bool:
        return name in self._swaps

    def __len__(self) -> int:
        return len(self._swaps)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            if self._in_use:  # by this thread: the lock keeps out all others
                raise FinepointError("the adapters are in use by this thread; leave its `using` block first")
            yield

    def moved(self) -> Iterator[Moved]:
        """Where the model does not hold the base's values, since adapters of this set are on."""
        for name in self.active:
            for at, swap in self._swaps[name].items():
                yield Moved(at, swap.indices, swap.base, swap.values)

    def _set(self, names: str | Sequence[str] | None) -> None:
        names = [names] if isinstance(names, str) else list(names or ())
        for name in names:
            self._known(name)
        for i, name in enumerate(names):
            for other in names[:i]:
                self._refuse_overlap(other, name)
        self._switch(names)

    def _switch(self, names: Sequence[str]) -> None:
        if set(names) == set(self.active):
            self.active = tuple(names)
            return
        contents = contents_of(self.model)
        going, coming = ([name for name in some if name not in others]
                         for some, others in ((self.active, names), (names, self.active)))  # fmt: skip
        self._refuse_other_weights(contents)
        self._refuse_other_entries(contents, going, "values")
        # First all that goes, then all that comes: what two adapters share ends as the one that stays has it.
        self._write(going, "base")
        try:
            self._refuse_other_entries(contents, coming, "base")
        except FinepointError:
            self._write(going, "values")
            raise
        self._write(coming, "values")
        self.active = tuple(names)
        self._stamps = stamps(contents)

    def _write(self, names: Sequence[str], what: Literal["base", "values"]) -> None:
        for swap in (swap for name in names for swap in self._swaps[name].values()):
            scatter_(swap.weight, swap.indices, getattr(swap, what))

    def _refuse_other_entries(
        self, contents: Mapping[str, Tensor], names: Sequence[str], what: Literal["base", "values"]
    ) -> None:
        """Looks at every entry that is to be written: it holds what these adapters lie on, or have written."""
        for at, swap in (pair for name in names for pair in self._swaps[name].items()):
            held = contents.get(at) is swap.weight and gather(swap.weight, swap.indices)
            if held is False or not same_bits(held, getattr(swap, what)):
                raise FinepointError(f"{at} {REPLACED}")

    def _refuse_other_weights(self, contents: Mapping[str, Tensor]) -> None:
        """Looks at all weights, where something else has written to one of them."""
        if self._base is None or stamps(contents) == self._stamps:
            return
        for at, _ in unlike(self._base, base_beneath(self.model, self._base)):
            raise FinepointError(f"{at} {REPLACED}")

    def _known(self, name: str) -> None:
        if name not in self._swaps:
            raise FinepointError(f"there is no adapter {name!r}; there are: {', '.join(self._swaps) or 'none'}")

    def _refuse_overlap(self, a: str, b: str) -> None:
        for weight in set(self._swaps[a]) & set(self._swaps[b]):
            if shared := overlap(self._swaps[a][weight].indices, self._swaps[b][weight].indices):
                raise FinepointError(f"{a!r} and {b!r} share {shared} entries of {weight}: they cannot both be on; "
                                     "choose one's with another seed, or with exclude of the other's")  # fmt: skip


def _swap(weight: nn.Parameter, change: Change, scales: bool) -> Swap:
    indices = change.positions().to(weight.device)
    base = gather(weight, indices)
    values = change.new_values(base).to(weight.device, weight.dtype)
    return Swap(weight, change if scales else None, indices, base, values)


def _scaled(swap: Swap, factor: float) -> Swap:
    if swap.change is None:
        return swap
    return replace(swap, values=between(swap.change, swap.base, factor).to(swap.base))


def _terms(model: nn.Module, adapters: Sequence[Mapping[str, Swap]]) -> dict[str, list[Term]]:
    """What adapters add, by the module that computes with the weights."""
    changed = [{id(swap.weight): swap.delta for swap in swaps.values()} for swaps in adapters]
    found: dict[str, list[Term]] = {}
    for name, module in model.named_modules():
        for attribute, weight in module._parameters.items():
            deltas = [deltas.get(id(weight)) for deltas in changed]
            if any(deltas):
                found.setdefault(name, []).extend(terms_of(f"{name}.{attribute}", module, attribute, deltas))
    return found


def _drawn(swap: Swap) -> Swap:
    """Other values at the same entries, as large as the weight's."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(swap.base.shape, generator=generator).to(swap.base.device)
    size = swap.weight.detach().float().square().mean().sqrt().clamp(min=1e-3)
    return replace(swap, values=(swap.base.float() + noise * size).to(swap.base.dtype))
