"""The chosen entries of one weight while they are trained: deltas, the base's values, the weight that follows.

Other entries may be chosen on the way. Of those that are trained no more, which either go back to the base's bits or
settle as they are, the base's values stay known, so that an adapter covers all that has moved.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from finepoint.adapters.change import Change
from finepoint.adapters.entries import checksum, gather, moved, scatter_
from finepoint.adapters.fingerprint import Moved as BaseMoved
from finepoint.errors import FinepointError
from finepoint.models.grids import Grid
from finepoint.runtime import distributed
from finepoint.tuner.inputs import Record
from finepoint.tuner.kernels import follow_
from finepoint.tuner.kernels.all_weights import Row
from finepoint.tuner.kernels.groups import Groups, whole_groups


def eagerly(hook: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile leaves the hook alone, and all that it calls.

    torch's own `disable` is asked only within compiled code: it costs more than most hooks do.
    """
    disabled = torch.compiler.disable(hook)
    within = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)  # None where nothing is compiled
    if within is None:  # an earlier torch
        return disabled

    @torch._dynamo.decorators.skip
    @wraps(hook)
    def either(*args: Any) -> Any:
        return hook(*args) if within() is None else disabled(*args)

    return either


class Moved(NamedTuple):
    """Entries of a weight with how far they are from the base: each (k,), by ascending position."""

    indices: Tensor
    base: Tensor
    delta: Tensor

    def at(self, which: Tensor | slice) -> "Moved":
        """Some of them. which: a mask, (k,), or a stretch."""
        return Moved(*(part[which] for part in self))


class SparseWeight(nn.Module):
    """The chosen entries of one weight: where they are, what they were, how far they have moved."""

    quantised = False
    delta: nn.Parameter
    indices: Tensor
    base: Tensor
    groups: Groups | None
    """the rows, columns or blocks that the entries are all of, or few columns that they lie in, if so: a shorter way to
    their gradient"""
    settled_indices: Tensor
    """entries that were trained, are no more, and stay as they are; with their `settled_base` and `settled_delta`"""
    settled_base: Tensor
    settled_delta: Tensor
    written: Tensor | None
    """the deltas that the weight was given last, (k,), where known"""
    pull: Tensor | None
    """how strongly each delta is pulled back to 0 before a step, (k,), its dtype; see `SparseTuner.hold_`"""
    shown: Tensor | None = None
    """what the entries hold instead of base + delta, (k,), for as long as they do"""
    alone: bool = False
    """whether a plain linear layer is all that has the weight, and its own output is where the gradient is made"""
    grid: Grid | None = None
    """where the entries can be, if not anywhere: the weight then holds what is nearest to base + delta"""

    def __init__(self, name: str, model: nn.Module, weight: nn.Parameter, indices: Tensor) -> None:
        super().__init__()
        _check(name, weight, indices)
        self.name = name
        owner, _, self.attribute = name.rpartition(".")
        # In a tuple: it belongs to the model, not to this module. The owner, not the weight: FSDP2 exchanges that.
        self._owner = (model.get_submodule(owner),)
        self.sharded, self.shape = distributed.is_sharded(weight), weight.shape
        given = indices
        # In four bytes where they fit: they stay in memory as long as the training lasts.
        # A copy, whatever becomes of what was given; contiguous, since compiled code reads them by their address.
        short = torch.int32 if weight.numel() <= 1 << 31 else torch.long
        indices = indices.detach().to(weight.device, short, copy=True).contiguous()
        wide = _wide(weight.dtype)
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("base", gather(weight, indices), persistent=False)
        self.delta = nn.Parameter(torch.zeros(len(indices), dtype=wide, device=weight.device))
        nothing = Moved(self.indices[:0], self.base[:0], self.delta.detach()[:0])
        for part, empty in zip(Moved._fields, nothing, strict=True):
            self.register_buffer(f"settled_{part}", empty.clone(), persistent=False)
        self.register_buffer("pull", None, persistent=False)
        self._find_groups(given)
        self.written = self.delta.detach().clone()
        self._stamp = self.stamp()
        self.remade = Record(name)  # of its layer's input
        self.looked_at: Callable[[], bool] = _never  # whether somebody has asked for all of the model's entries
        self._hidden: tuple[Tensor, Tensor] | None = None

    def extra_repr(self) -> str:
        return f"{len(self.indices):,} entries of {self.name}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes deltas from a state dict; where that says which entries they are of, they must be these.

        Raises:
            FinepointError: the deltas are of other entries.
        """
        kept = state_dict.pop(f"{prefix}indices", None)
        if kept is not None and not torch.equal(kept.to(self.indices), self.indices):
            raise FinepointError(f"the deltas of {self.name} to be loaded belong to other entries than the model's; "
                                 "choose the entries as that run did")  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.written = None  # of the weight too something may have been loaded

    @torch.no_grad()
    def pull_(self, factor: Tensor | None = None) -> None:
        """Adds what pulls the deltas back to 0 to their gradient.

        Args:
            factor: that the gradient is multiplied by as yet, (), if the optimizer will divide by it.
        """
        assert self.pull is not None
        pull = self.pull * self.delta if factor is None else self.pull * self.delta * factor
        self.delta.grad = pull if self.delta.grad is None else self.delta.grad.add_(pull)

    @property
    def weight(self) -> nn.Parameter:
        weight = self._owner[0]._parameters[self.attribute]
        assert weight is not None
        return weight

    def _find_groups(self, indices: Tensor) -> None:
        """Sees whether the entries are whole rows, columns or blocks, or lie in few columns.

        Args:
            indices: the entries as they were handed over, on whatever device that was.
        """
        groups = whole_groups(indices.long(), tuple(self.weight.shape))
        self.groups = None if groups is None else groups.to(self.indices.device)

    @property
    def settled(self) -> Moved:
        """Entries that were trained, are no more, and stay as they are."""
        return Moved(self.settled_indices, self.settled_base, self.settled_delta)

    def trained(self) -> Moved:
        """The entries in training."""
        return Moved(self.indices, self.base, distributed.whole(self.delta).detach())

    def known(self) -> Moved:
        """All entries that may differ from the base: those in training and those that have settled."""
        if not len(self.settled_indices):
            return self.trained()
        order = torch.cat([self.settled_indices, self.indices]).argsort()
        return Moved(*(torch.cat(parts)[order] for parts in zip(self.settled, self.trained(), strict=True)))

    def moved(self) -> list[BaseMoved]:
        """Where the weight does not hold the base's values."""
        known = self.known()
        return [BaseMoved(self.name, known.indices, known.base, self.held(known))]

    def check(self, indices: Tensor) -> None:
        """Refuses indices that `choose_` cannot take.

        Raises:
            FinepointError: they are out of order or range; FSDP2 has sharded the deltas; the weight is quantised.
        """
        if distributed.is_sharded(self.delta):
            raise FinepointError("FSDP2 has sharded the deltas, so that no others can be chosen; shard the model "
                                 "before making the tuner, as `finepoint train` does")  # fmt: skip
        _check(self.name, self.weight, indices)

    def choose_(self, indices: Tensor, keep: bool) -> Tensor:
        """Trains other entries from now on: those trained or settled before go on from where they are, new ones from 0.

        Args:
            indices: flat positions, (k,), ascending and unique; none is fine.
            keep: entries that are trained no more settle as they are; else they get the base's bits back.

        Returns:
            Where each entry stood among those trained before, -1 where it did not: (k,) int64.
        """
        self.follow_()
        indices = indices.to(self.indices, copy=True).contiguous()
        places, known = _places(self.indices, indices), self.known()
        again = _places(known.indices, indices)
        found = again >= 0
        base = gather(self.weight, indices)  # of an entry that never moved the weight holds the base's value
        base[found] = known.base[again[found]]
        delta = torch.zeros(len(indices), dtype=known.delta.dtype, device=known.delta.device)
        delta[found] = known.delta[again[found]]
        self._settle(known.at(_places(indices, known.indices) < 0), keep)
        self.indices, self.base = indices, base
        # Another parameter: graphs that are still about hold the old one to its shape.
        self.delta = nn.Parameter(delta, self.delta.requires_grad)
        self._find_groups(indices)
        self.follow_()
        return places

    def _settle(self, left: Moved, keep: bool) -> None:
        if not keep and len(left.indices):
            with self._writing():
                scatter_(self.weight, left.indices, left.base)
        left = left.at(left.delta != 0 if keep else slice(0))
        self.settled_indices, self.settled_base, self.settled_delta = left

    def settle_(self, indices: Tensor, delta: Tensor) -> None:
        """Moves entries that hold the base's values, and are not trained, by (m,) deltas, once and for all."""
        indices = indices.to(self.indices)
        base, delta = gather(self.weight, indices), delta.to(self.delta)
        with self._writing():
            scatter_(self.weight, indices, moved(base, delta))
        self.settled_indices, self.settled_base, self.settled_delta = indices, base, delta

    def revert_(self) -> None:
        """Sets the deltas to zero and restores the base's bits, of settled entries too, which are forgotten."""
        with torch.no_grad():
            self.delta.zero_()
        self._settle(self.settled, keep=False)
        self.follow_()

    def identity(self) -> tuple[bytes, ...]:
        """What all processes must have alike: the name, the positions and the base's values."""
        return self.name.encode(), self.indices.cpu().numpy().tobytes(), checksum(self.base).encode()

    def follow_(self) -> None:
        """weight[indices] = base + delta, rounded once to the weight's dtype, or to the grid."""
        self.write_(self.weight)

    def stamp(self) -> Any:
        """What a write to the weight changes, or another in its place; always the same where FSDP2 exchanges it."""
        weight = self.weight
        if distributed.is_sharded(weight):
            return None
        return id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version

    def overwritten(self) -> bool:
        """Whether somebody else has written to the weight since the deltas were; a cast one is told by `check_fit`."""
        if self.stamp() == self._stamp:
            return False
        cast = self.written is not None and self.written.dtype != self.delta.dtype
        stands_in = not self.weight.is_leaf  # for itself: see `autograd`
        exchanged = self.sharded or getattr(self._owner[0], "_is_fsdp_managed_module", False)
        return not (exchanged or cast or stands_in)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside, the weight is written to by ourselves."""
        yield
        self._stamp = self.stamp()

    def write_(self, weight: Tensor) -> None:
        """The same into a tensor of the weight's own memory, e.g. its `.data`, which has a version counter of its own.

        Raises:
            FinepointError: as for `check_fit`.
        """
        self.check_fit()
        delta = distributed.whole(self.delta).detach()
        with self._writing():
            if self.grid is None:
                follow_(weight, self.indices, self.base, delta)
            else:
                scatter_(weight, self.indices, self.grid.snapped(delta, weight.dtype))
        self.written, self.shown = delta.clone(), None

    def row(self) -> Row | None:
        """What `all_weights.write_` takes to have the weight hold base + delta; `is_written` is to be called then.
        None where the weight has a way of its own to `write_`.

        Raises:
            FinepointError: as for `check_fit`.
        """
        self.check_fit()
        weight, delta, written = self.weight, self.delta, self.written
        if self.sharded or distributed.is_sharded(weight) or distributed.is_sharded(delta):
            return None
        if self.grid is not None or weight.is_meta or weight.device != delta.device:
            return None
        if written is None or written.shape != delta.shape or not _alike(written, delta) or written.is_inference():
            written = torch.empty_like(delta, memory_format=torch.contiguous_format, requires_grad=False)
        return Row(weight, self.indices, self.base, delta.detach(), written)

    def is_written(self, row: Row) -> None:
        """To be told that the weight was written as `row` says."""
        own = vars(self)  # past nn.Module, which asks of every value whether it is a parameter
        own["written"], own["shown"], own["_stamp"] = row.written, None, self.stamp()

    def check_fit(self) -> None:
        """Refuses a weight that is no longer the one whose entries are trained.

        Raises:
            FinepointError: the model was cast, the weight has another shape, or the deltas have.
        """
        weight, delta, base, indices = self.weight, self.delta, self.base, self.indices
        if weight.dtype != base.dtype or delta.dtype != _wide(base.dtype):
            raise FinepointError(f"{self.name} was cast after SparseTuner; cast the model first, then make the tuner")
        if weight.shape != self.shape or delta.shape != indices.shape:
            now = f"{tuple(weight.shape)} with {tuple(delta.shape)} deltas"
            raise FinepointError(f"{self.name} is {now}, and was {tuple(self.shape)} with {len(indices)} when its "
                                 "SparseTuner was made; make another one")  # fmt: skip

    def lags(self) -> bool:
        """Whether the deltas are others than those the weight was given last, or the weight is, whoever changed them.

        Bits are compared, since version counters do not tell: neither fused optimizers nor writes to `.data` raise
        them. Of deltas on another device than the CPU the answer is waited for.

        Raises:
            FinepointError: a transform of torch.func runs over the deltas.
        """
        refuse_transforms(self.name, self.delta)
        delta = self.delta.detach()
        if self.written is None or distributed.is_sharded(delta):
            return True
        if delta.is_meta:
            return False
        if self.overwritten():
            return True
        self.written = self.written.to(delta.device)
        # A model that was cast has lost bits of its deltas, but nobody has changed them.
        return not torch.equal(_as_integers(self.written.to(delta.dtype)), _as_integers(delta))

    @property
    def follows(self) -> bool:
        """Whether the weight is to hold base + delta whenever it is asked for, not after optimizers' steps alone.

        A sharded weight is put together for one forward: what is written to it then is lost, and the shards were
        written after the step.
        """
        return self.shown is None and not self.sharded

    def catch_up_(self) -> None:
        """Has the weight follow where it lags; its version counter is raised only then, so that graphs stay valid."""
        if self.follows and self.lags():
            self.follow_()

    def show_(self, earlier: Moved, values: Tensor) -> None:
        """Has the weight hold what it held earlier, until `unshow_`; past autograd's version counters.

        Args:
            earlier: the entries that may have differed from the base then.
            values: what they held; all others hold the base's values.
        """
        self.write_(self.weight.data)  # or the next forward would write the deltas again
        now = self.known()
        indices = torch.cat([now.indices, earlier.indices])
        self._hidden = indices, gather(self.weight, indices)
        scatter_(self.weight.data, now.indices, now.base)
        scatter_(self.weight.data, earlier.indices, values)
        self.shown = values

    def unshow_(self) -> None:
        """Has the weight hold what it held before `show_`."""
        if self._hidden is not None:
            scatter_(self.weight.data, *self._hidden)
            self._hidden = self.shown = None

    def values(self) -> Tensor:
        """What the trained entries hold, in the weight's dtype: (k,)."""
        return self.held(self.trained())

    def held(self, entries: Moved) -> Tensor:
        """What these entries hold, in the weight's dtype: (k,)."""
        return gather(self.weight, entries.indices)

    def meant(self, entries: Moved) -> Tensor:
        """What these entries hold by their deltas, whatever the weight holds just now: (k,)."""
        if self.grid is None:
            return moved(entries.base, entries.delta)
        return self.grid.snapped(entries.delta, entries.base.dtype)  # chosen once: these are the ones in training

    def changed(self) -> int:
        """Entries whose stored value differs from the base's."""
        known = self.known()
        return int((self.held(known) != known.base).sum())

    def vanished(self) -> int:
        """Entries whose delta is not 0 and is lost in the weight's dtype: the stored value is the base's."""
        return int(((self.values() == self.base) & (distributed.whole(self.delta).detach() != 0)).sum())

    def change(self, store: str) -> Change:
        known = self.known()
        shape, dtype = tuple(self.weight.shape), str(self.weight.dtype).removeprefix("torch.")
        indices, base = known.indices.cpu().long(), checksum(known.base)
        if store == "value" or self.grid is not None or (store == "auto" and known.base.itemsize == 2):
            return Change(shape, dtype, "value", indices, self.held(known).cpu(), base)
        return Change(shape, dtype, "delta", indices, known.delta.cpu().clone(), base)

    def whole(self) -> Change:
        return Change.whole(distributed.whole(self.weight).detach().cpu().clone())

    def wanted(self) -> bool:
        """Whether the graph that is being made must lead to the deltas.

        Raises:
            FinepointError: it is made within a transform of torch.func.
        """
        found = torch.is_grad_enabled() and self.delta.requires_grad and self.indices.numel() > 0
        if found and torch._C._functorch.peek_interpreter_stack() is not None:
            raise FinepointError(f"the model computes with {self.name} within a transform of torch.func (vmap, grad), "
                                 "in which its entries get no gradient; leave it out of the targets")  # fmt: skip
        return found

    # The hooks. Bound methods, not closures, so that a deep copy of the model has hooks on its own copies.

    @eagerly
    def before_forward(self, module: nn.Module, args: Any) -> None:
        # A backward pass that computes a layer again wants it as it was.
        if not (self.looked_at() or torch._C._current_graph_task_id() != -1):
            self.catch_up_()

    def before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.catch_up_()


class QuantisedSparseWeight(SparseWeight):
    """The chosen entries of a quantised weight, which stays as it is: its layer's forward adds the deltas."""

    quantised = True

    def alter_(self, weight: Tensor) -> None:
        """weight[indices] = base + delta in the dequantised weight, which is a copy; or what it is to show instead."""
        if self.shown is not None:
            scatter_(weight, self.indices, self.shown)
        elif self.grid is not None:
            scatter_(weight, self.indices, self.grid.snapped(self.delta.detach(), weight.dtype))
        else:
            follow_(weight, self.indices, self.base, distributed.whole(self.delta))

    def show_(self, earlier: Moved, values: Tensor) -> None:
        self.shown = values  # its entries are chosen once

    def unshow_(self) -> None:
        self.shown = None

    def held(self, entries: Moved) -> Tensor:
        return self.meant(entries)

    def moved(self) -> list[BaseMoved]:
        return []

    def write_(self, weight: Tensor) -> None:
        self.shown = None

    def row(self) -> None:
        """Nothing is written."""

    def lags(self) -> bool:
        return False

    def check(self, indices: Tensor) -> None:
        raise FinepointError(f"{self.name} is quantised, and entries of such weights are chosen once; train on a float "
                             "base to choose anew")  # fmt: skip


def _never() -> bool:
    return False


@lru_cache
def _wide(dtype: torch.dtype) -> torch.dtype:
    """That of the deltas over a weight of this dtype."""
    return torch.promote_types(dtype, torch.float32)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


def _as_integers(numbers: Tensor) -> Tensor:
    return numbers.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.itemsize])


def refuse_transforms(name: str, delta: Tensor) -> None:
    """Refuses deltas that stand for several models at once, or for a model and its derivative.

    Raises:
        FinepointError: they do.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(delta)
    if wrapped or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(delta).tangent is not None):
        raise FinepointError(f"the deltas of {name} are transformed (vmap, grad or jvp of torch.func, forward_ad), and "
                             "weights can hold one model at a time; use functional_call and backward()")  # fmt: skip


def _check(name: str, weight: Tensor, indices: Tensor) -> None:
    if not weight.is_floating_point():
        raise FinepointError(f"{name} is {weight.dtype}: a quantised weight cannot be trained in place")
    if indices.ndim != 1 or indices.is_floating_point():
        raise FinepointError(f"the indices of {name} have shape {tuple(indices.shape)}; give flat integer positions")
    if bool((indices[1:] <= indices[:-1]).any()):
        raise FinepointError(f"the indices of {name} are not ascending and unique")
    if len(indices) and (int(indices[0]) < 0 or int(indices[-1]) >= weight.numel()):
        raise FinepointError(f"an index of {name} lies outside its {weight.numel()} entries")


def _places(among: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted number stands among ascending ones, -1 where it does not: (len(wanted),) int64."""
    if not len(among):
        return torch.full_like(wanted, -1, dtype=torch.long)
    places = torch.searchsorted(among, wanted).clamp(max=len(among) - 1)
    return torch.where(among[places] == wanted, places, -1)
