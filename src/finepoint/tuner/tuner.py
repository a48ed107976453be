"""SparseTuner: deltas beside the weights; the weights follow.

The chosen entries of every weight are an ordinary float32 `nn.Parameter`, reachable from the model; the model itself
is frozen, keeps its layers and their forward, and always holds base + delta. Two things are attached by module hooks:

- a gradient: a linear layer's output passes through an identity whose backward computes the weight gradient at the
  chosen entries only, from the layer's input and the gradient of its output. Other weights (norms, biases, stacked
  experts) stand in for themselves during their module's forward as an identity whose backward gathers.
- the following: after a torch optimizer's step the weights take their new values, by torch's global post-step hook.
  Whoever else changes deltas is found out before the next forward, state dict or adapter: their bits are compared with
  those written last. Tensor version counters do not tell (fused AdamW does not raise them, nor do writes to `.data`).

With several processes the deltas are what is communicated: DDP sees no other parameter that is trained. Over weights
that FSDP2 has sharded the deltas stay whole in every process and are averaged by a hook of their own; of the weights
each process writes its rows. Sharded later, the deltas are among what FSDP2 shards.

Other entries may be chosen on the way (`choose_`): every weight's delta is then another parameter, of another length,
which takes the old one's place in the optimizer.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finepoint.adapters.adapter import SparseAdapter, base_beneath, moved_by_adapters
from finepoint.adapters.fingerprint import FINGERPRINT, Fingerprint, contents_of, fingerprint, form_of, unlike
from finepoint.data.small_input import made_up
from finepoint.errors import FinepointError
from finepoint.models.bitsandbytes import check_weight
from finepoint.models.grids import Grid
from finepoint.models.quantised import is_quantised, replace_forwards
from finepoint.models.weights import in_memory, is_outline
from finepoint.runtime import distributed
from finepoint.runtime.devices import norm_of
from finepoint.tuner.audit import AtFirst, Audit, Loss, audit, few, outcome
from finepoint.tuner.autograd import WHOLE, attach, fold_head_input, reaches_further, refuse_unfit
from finepoint.tuner.deltas import Deltas, LeftOutOfDDP
from finepoint.tuner.interface import Tuner
from finepoint.tuner.optimizer_hooks import stop_following
from finepoint.tuner.sparse_weight import QuantisedSparseWeight, SparseWeight
from finepoint.tuner.spot_checks import SpotChecks

logger = logging.getLogger(__name__)
AS_THEY_ARE = "set the layer's momentum to 0, or keep it in evaluation mode, and the statistics stay as they are"
CONTAINER = "finepoint"  # the name under which the deltas hang on the model
PEFT_WRAPS = re.compile(r"\.(base_layer|original_module)\.")


class SparseTuner(Tuner):
    """Makes chosen entries of a model trainable, in place; the model stays the same object.

    Args:
        model: its parameters are frozen until `close`. Several processes make their tuners together.
        indices: flat positions by weight name, (k,) int64, ascending and unique, as `finepoint.select` gives them.
        ready: further weights, of which entries may be chosen later.
        audit: try on the model that every chosen entry gets the gradient of its own loss, at once if an input can be
            made up for it, else with the first one that it is trained on; see `audit_`.
        base: the model's fingerprint, where it is known already.

    Raises:
        FinepointError: no index at all, an unknown weight, indices out of order or range, a weight that is not in
            memory, a model with a tuner, a weight that the model uses in a way that cannot be followed.
    """

    deltas = True

    def __init__(
        self, model: nn.Module, indices: Mapping[str, Tensor], ready: Iterable[str] = (), *, audit: bool = True,
        base: Fingerprint | None = None,
    ) -> None:  # fmt: skip
        if hasattr(model, CONTAINER):
            raise FinepointError("the model has a SparseTuner already; close that one first")
        self.model = model
        self.entries = _entries(model, indices, ready)
        if not self.count:
            raise FinepointError("there is no index to train; select some first")
        self.base = base or base_beneath(model)
        self.beneath = moved_by_adapters(model)
        self._handles: list[Any] = []  # whatever `remove` takes off the model
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._deltas = Deltas({name.replace(".", "/"): entries for name, entries in self.entries.items()}, self.base)
        self._freeze_()
        self._hooks = {name: attach(model, entries) for name, entries in self.entries.items()}
        self.audited: Audit | None = None
        if audit:
            self._audit()
            self.check_steps()

    def _freeze_(self) -> None:
        """Freezes the model, hangs the deltas on it, and has its weights follow them."""
        model, deltas = self.model, self._deltas
        quantised = [entries for entries in self.entries.values() if isinstance(entries, QuantisedSparseWeight)]
        self._handles += replace_forwards(model, {entries.name: entries.alter_ for entries in quantised})
        model.requires_grad_(False)
        setattr(model, CONTAINER, deltas)
        self._handles.append(model.register_forward_pre_hook(deltas.meet))
        for module in {id(each): each for each in (model, getattr(model, "base_model", model))}.values():
            self._handles.append(module.register_forward_pre_hook(deltas.enter, prepend=True))
            self._handles.append(module.register_forward_pre_hook(deltas.look, with_kwargs=True))
            self._handles.append(module.register_forward_hook(deltas.leave, always_call=True))
        self._handles.append(model.register_load_state_dict_pre_hook(deltas.refuse_other_base))
        self._handles += fold_head_input(model)
        self._handles.append(LeftOutOfDDP(model))

    def __enter__(self) -> "SparseTuner":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SparseTuner({self.count:,} entries of {len(self.entries)} weights of {type(self.model).__name__})"

    @property
    def count(self) -> int:
        """Trained entries in all."""
        return sum(len(entries.indices) for entries in self.entries.values())

    def parameters(self) -> list[nn.Parameter]:
        """The deltas, one (k,) parameter for each weight: what an optimizer needs."""
        return [entries.delta for entries in self.entries.values()]

    def trained(self) -> dict[str, nn.Parameter]:
        """The deltas by weight name."""
        return {name: entries.delta for name, entries in self.entries.items()}

    def audit_(self, loss: Loss, last: bool = False) -> Audit:
        """Compares the gradients of the deltas with the dense ones, in one small backward pass or a few.

        A weight that the model uses otherwise than by calling its layer stands in for itself from now on in the modules
        around. The model is left as it is found: weights, gradients, modes, buffers, random states.

        Args:
            loss: runs the model on a few examples; returns a scalar that depends on the weights, e.g. the loss.
            last: weights that nothing is known of then stand in for themselves in the whole model, which is right
                whatever it does with them.

        Returns:
            What is known of all weights by now; weights that an earlier audit has proven are not asked again.

        Raises:
            FinepointError: entries that would get another gradient whatever is done; the tuner is closed.
        """
        if self._is_sharded():
            logger.info("weights that are sharded over processes are not audited")
            return Audit()
        self.end_check()
        known = self.audited or Audit()
        names = [name for name in self.entries if name not in known.weights]
        self.follow_()
        try:
            found = audit(self.model, self.entries, names, loss, self._widen)
        except FinepointError:
            self.close()
            raise
        if last:
            for name in found.silent:
                self._widen(name, WHOLE)
        self.audited = found.after(known)
        logger.info("%s", self.audited.told())
        if kept := found.statistics & self.base.weights.keys():
            logger.warning("training mode changes %s, which no adapter holds, so that none can be saved after it; %s",
                           few(kept), AS_THEY_ARE)  # fmt: skip
        return self.audited

    def _audit(self) -> None:
        """Audits with an input that is made up, or waits for the first one that comes."""
        if self._is_sharded() or any(entries.weight.is_meta for entries in self.entries.values()):
            return
        try:
            if (inputs := made_up(self.model)) is not None:
                self.audit_(lambda: outcome(self.model(**inputs)))
        except FinepointError:
            raise
        except Exception as error:  # whatever a model says of an input that it does not take
            logger.debug("no input could be made up: %s", error)
        self.audit_later()

    def audit_later(self) -> None:
        """Has what no audit has met be audited with the first input that the model is trained on."""
        if self._is_sharded():
            return
        if self.audited is None:
            logger.info("no input could be made up for %s; its first one will audit the weights",
                        type(self.model).__name__)  # fmt: skip
        if self.audited is None or self.audited.silent:
            self._handles.append(AtFirst(self.model, partial(self.audit_, last=True)))

    def check_steps(self) -> None:
        """From now on looks at a few steps of whatever training comes; see `spot_checks`."""
        self._deltas.spot_checks = SpotChecks(self.entries)

    def hold_(self, fisher: Mapping[str, Tensor], strength: float) -> None:
        """From now on every torch optimizer's step has strength x F x delta added to the gradients: EWC
        (arXiv:1612.00796) at the trained entries, also in a copy of the model. Nothing else of the loop has to know.

        Args:
            fisher: F by weight name, (k,); weights that it does not name are not held.
        """
        for name, found in fisher.items():
            entries = self.entries[name]
            entries.pull = (strength * found).to(entries.delta)

    def snap_(self, grids: Mapping[str, Grid]) -> None:
        """From now on the weights hold what is nearest to base + delta on these grids. The gradient of an entry is
        that of its delta, as if nothing were rounded (straight through): steps too small to reach the next code add up.

        Args:
            grids: by weight name, of the chosen entries, (k,); see `on_grid`.
        """
        for name, entries in self.entries.items():
            entries.grid = grids[name]
        self._deltas.table = None  # it writes base + delta
        self.follow_()

    def want_(self, rate: float, what: str) -> None:
        """Has the first step of an optimizer whose learning rate is far below this one told.

        Args:
            what: the entries, in words.
        """
        self._deltas.wanted = rate, what

    def end_check(self) -> None:
        """Ends the look at a step that is going on, after which the deltas alone have gradients."""
        if self._deltas.spot_checks:
            self._deltas.spot_checks.cancel()

    def _is_sharded(self) -> bool:
        return any(entries.sharded for entries in self.entries.values())

    def _widen(self, name: str, reach: int) -> bool:
        """Has a weight stand in for itself so far around its module; False if that is no further than before."""
        entries = self.entries[name]
        if entries.quantised or not reaches_further(self.model, entries, reach):
            return False
        for handle in self._hooks[name]:
            handle.remove()
        self._hooks[name] = attach(self.model, entries, reach)
        return True

    def follow_(self) -> None:
        """Writes base + delta into the weights now: needed only by who reads them without calling the model."""
        self._deltas.follow_()

    def scaler(self) -> Callable[[float], None]:
        """What scales the deltas as they are now."""
        now = {name: delta.detach().clone() for name, delta in self.trained().items()}
        return lambda scale: self.put_({name: delta if scale == 1 else delta * scale for name, delta in now.items()})

    def choose_(
        self, indices: Mapping[str, Tensor], optimizer: Optimizer | None = None, keep: bool = False
    ) -> dict[str, int]:
        """Trains these entries from now on, instead of those so far; gradients that were made are lost.

        An entry goes on from where it is, whether it stays or comes back; a new one starts at the base.

        Args:
            indices: as for the tuner itself; of weights that it knows.
            optimizer: its state follows: that of entries that stay stays, that of all others is zero.
            keep: entries that are trained no more settle as they are, and belong to the adapter; else they get the
                base's bits back.

        Returns:
            How many entries `stayed`, were `dropped` and `grown`.

        Raises:
            FinepointError: no index at all, a weight the tuner does not know, a quantised one, a model within DDP; an
                optimizer whose state is not one number an entry. Nothing is changed then.
        """
        if any(entries.pull is not None for entries in self.entries.values()):
            raise FinepointError("entries that are held back by what is to be kept are chosen once; leave out protect")
        if any(entries.grid is not None for entries in self.entries.values()):
            raise FinepointError("entries on a grid are chosen once")
        if unknown := sorted({name for name in indices if len(indices[name])} - set(self.entries)):
            raise FinepointError(f"the tuner does not know {unknown[0]!r}; name it as `ready` when making the tuner")
        if not any(len(positions) for positions in indices.values()):
            raise FinepointError("there is no index to train; select some first")
        chosen = {name: indices.get(name, entries.indices[:0]) for name, entries in self.entries.items()}
        for name, entries in self.entries.items():
            entries.check(chosen[name])
            if optimizer is not None:
                check_exchangeable(optimizer, entries.delta)
        before, stayed = self.count, 0
        for name, entries in self.entries.items():
            old = entries.delta
            places = entries.choose_(chosen[name], keep)
            stayed += int((places >= 0).sum())
            if optimizer is not None:
                exchange_(optimizer, old, entries.delta, places)
        self._deltas.chosen_anew()
        return {"stayed": stayed, "dropped": before - stayed, "grown": self.count - stayed}

    def places(self) -> dict[str, Tensor]:
        """Which entries are trained and which have settled, and where: what a checkpoint needs beside the deltas."""
        found = {}
        for name, entries in self.entries.items():
            found[f"{name}.indices"] = entries.indices
            found[f"{name}.settled_indices"] = entries.settled_indices
            found[f"{name}.settled_delta"] = entries.settled_delta
        return found

    def place_(self, places: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        """Goes back to what `places` gave, with deltas of zero."""
        self.revert_()
        self.choose_({name: places[f"{name}.indices"] for name in self.entries}, optimizer)
        for name, entries in self.entries.items():
            entries.settle_(places[f"{name}.settled_indices"], places[f"{name}.settled_delta"])

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint of the deltas needs to know its base by."""
        return self._deltas.kept()

    def train_together(self) -> None:
        """From now on several processes train, each on batches of its own, and call `average_` before each step.

        Raises:
            FinepointError: other entries, or other weights there, in another process.
        """
        self._deltas.by_hand = True
        self._deltas.compare()

    @contextmanager
    def unaveraged(self) -> Iterator[None]:
        """Inside, gradients are those of this process alone, also beside a sharded model."""
        before, self._deltas.by_hand = self._deltas.by_hand, True
        try:
            yield
        finally:
            self._deltas.by_hand = before

    def average_(self) -> None:
        """The gradient of every delta becomes the mean over all processes: one message of `count` numbers."""
        self._deltas.average_()

    def facts(self) -> dict[str, Any]:
        """`vanished`: how many entries moved and were lost to rounding; `audit`: what it found, where it was made."""
        return {"vanished": self.vanished(), "audit": self.audited.facts() if self.audited else None}

    def changed(self) -> int:
        """How many chosen entries hold another stored value than the base's (bits; the effective count)."""
        self.follow_()
        return sum(entries.changed() for entries in self.entries.values())

    def vanished(self) -> int:
        """How many entries have a delta that is lost in the weight's dtype: too small a change for bfloat16, say."""
        self.follow_()
        return sum(entries.vanished() for entries in self.entries.values())

    def norm(self, exclude: Iterable[str] = ()) -> float:
        """The Euclidean norm of all deltas but those of the excluded weights (a new head has no base to compare)."""
        left_out = set(exclude)
        return norm_of(entries.known().delta for name, entries in self.entries.items() if name not in left_out)

    def adapter(
        self, store: str = "auto", full: Iterable[str] = (), info: Mapping[str, Any] | None = None
    ) -> SparseAdapter:
        """The change so far, as an adapter on the CPU.

        Args:
            store: `delta` keeps float32 deltas, `value` the exact trained values in the weight's dtype, `auto` values
                of half-precision weights and deltas of others. All reproduce the trained weights bit for bit.
            full: weights to store whole, without a base to compare with (a new classification head).
            info: where it comes from; JSON-ready.

        Raises:
            FinepointError: another `store`; a trained weight's module was replaced; anything else of the model was
                changed, by whatever way: all of it is looked at.
        """
        if store not in ("auto", "delta", "value"):
            raise FinepointError(f"store is {store!r}; give 'auto', 'delta' or 'value'")
        held = {id(parameter) for parameter in self.model.parameters()}
        for name, entries in self.entries.items():
            if id(entries.weight) not in held:
                raise FinepointError(f"{name} is no longer in the model, which has another module in its place and was "
                                     "not trained there; resize or replace layers first, then train")  # fmt: skip
        self.follow_()
        if not any(map(distributed.is_sharded, self.model.parameters())):  # whose look takes all processes
            self.check_base()
        whole = set(full)
        changes = {
            name: entries.whole() if name in whole else entries.change(store) for name, entries in self.entries.items()
        }
        kept = {name: change for name, change in changes.items() if len(change)}
        form = form_of(self.model)
        base = self.base.without(whole, form["tied"])
        return SparseAdapter(kept, dict(info or {}), form | {FINGERPRINT: base.as_json()})

    def check_base(self) -> None:
        """Looks at all of the model: beside the entries in training it has to be the base it was.

        Raises:
            FinepointError: a weight is not; it is named.
        """
        # PEFT wraps layers, whose weights go by other names then; what it adds is no part of the base.
        named = {PEFT_WRAPS.sub(".", name): tensor for name, tensor in contents_of(self.model).items()}
        contents = {name: named[name] for name in self.base.weights if name in named}
        moved = [one for entries in self.entries.values() for one in entries.moved()]
        here = fingerprint(contents, [*moved, *self.beneath], self.base.one_in, self.base.unknown)
        for name, _ in unlike(self.base, here):
            if name in contents and not isinstance(contents[name], nn.Parameter):
                raise FinepointError(f"{name} was changed since the training began, as training mode does, and an "
                                     f"adapter holds weights alone; {AS_THEY_ARE}")  # fmt: skip
            raise FinepointError(f"{name} was changed since the training began, beside the entries that are trained, "
                                 "and an adapter holds nothing else; load the base anew")  # fmt: skip

    def close(self) -> None:
        """Gives back the plain model with the trained values in its weights; closing twice is harmless.

        `adapter()` beforehand keeps the change; `revert_()` beforehand gives back the base. A quantised weight cannot
        take the trained values: it is the base's again.
        """
        if not self._handles:
            return
        self.end_check()
        self.follow_()
        for handle in [*self._handles, *chain.from_iterable(self._hooks.values())]:
            handle.remove()
        self._handles, self._hooks = [], {}
        stop_following(getattr(self.model, CONTAINER))
        delattr(self.model, CONTAINER)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags[name])

    def as_it_is(self) -> Callable[[], AbstractContextManager[None]]:
        """Contexts in which the model holds the values it holds now, whichever entries are trained then.

        The values are put in and taken out, (k,) each way. The writing goes past autograd's version counters: what a
        graph has saved of the weights is there again, bit for bit, before its backward pass.
        """
        self.follow_()
        before = {name: (entries.known(), entries.held(entries.known())) for name, entries in self.entries.items()}

        @contextmanager
        def inside() -> Iterator[None]:
            for name, entries in self.entries.items():
                entries.show_(*before[name])
            try:
                yield
            finally:
                for entries in self.entries.values():
                    entries.unshow_()

        return inside

    def round_(self, dtype: torch.dtype) -> None:
        """Rounds base + delta to a narrower dtype, as if nothing wider were kept: the negative control to deltas."""
        with torch.no_grad():
            for entries in self.entries.values():
                base = entries.base.to(entries.delta.dtype)
                stored = (base + entries.delta).to(dtype).to(entries.delta.dtype)
                entries.delta.copy_(torch.where(entries.delta == 0, 0.0, stored - base))
        self.follow_()

    def revert_(self) -> None:
        """Sets all deltas to zero and restores the base's exact bits; what has settled is forgotten."""
        for entries in self.entries.values():
            entries.revert_()


def _entries(model: nn.Module, indices: Mapping[str, Tensor], ready: Iterable[str]) -> dict[str, SparseWeight]:
    """The chosen entries by each weight's first name, and those weights that have none yet, first."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    later = dict.fromkeys(ready, torch.empty(0, dtype=torch.long))
    wanted = {**later, **indices}
    if not is_outline(model):  # which is there to be planned with
        in_memory({name: parameters[name] for name in wanted if name in parameters})
    refuse_unfit(model, wanted)
    found: dict[str, SparseWeight] = {}
    for name, positions in wanted.items():
        if name not in parameters:
            raise FinepointError(f"the model has no weight {name!r} to train entries of")
        if len(positions) or name in later:
            weight = parameters[name]
            check_weight(name, weight)
            first_name = names[id(weight)]
            if first_name in found:
                raise FinepointError(f"{name!r} is tied to {first_name!r}: give the indices of one of them")
            kind = QuantisedSparseWeight if is_quantised(weight) else SparseWeight
            found[first_name] = kind(first_name, model, weight, positions)
    return found


def check_exchangeable(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Refuses an optimizer whose state cannot go along when a parameter's entries change.

    Raises:
        FinepointError: what it keeps is neither a float for each entry nor a number for all: bitsandbytes' eight bits,
            whose blocks share a scale, or a state with more than one number for some entries and none for others.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.numel() <= 1:
            continue
        plain = type(value) in (Tensor, nn.Parameter) or distributed.is_sharded(value)
        if not plain or value.shape != parameter.shape or not value.is_floating_point():
            dtype = str(value.dtype).removeprefix("torch.")
            raise FinepointError(f"{type(optimizer).__name__} keeps {key!r} in {dtype} of shape "
                                 f"{tuple(value.shape)} for {parameter.numel()} trained entries: not a number "
                                 "for each, so that entries cannot be chosen anew; take torch.optim.AdamW")  # fmt: skip


@torch.no_grad()
def exchange_(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, places: Tensor) -> None:
    """Puts a parameter in another's place in an optimizer, with its state entry by entry.

    Args:
        places: where each of the new parameter's entries stood in the old one, -1 where it did not: its state is zero.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old not in optimizer.state:
        return
    stays = places >= 0
    state = optimizer.state[new] = optimizer.state.pop(old)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:  # else of the whole parameter: a count of steps
            state[key] = value.new_zeros(len(places))
            state[key][stays] = value[places[stays]]
