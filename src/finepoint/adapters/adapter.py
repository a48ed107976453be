"""How a trained change goes into a model and out again, exactly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from finepoint.adapters.change import Change as Change  # under its former name
from finepoint.adapters.change import Contents
from finepoint.adapters.entries import gather, overlap, same_bits, scatter_
from finepoint.adapters.fingerprint import Fingerprint, Moved, contents_of, differences, fingerprint, unlike
from finepoint.adapters.format import read, save, say_unfinished
from finepoint.adapters.inspection import html
from finepoint.errors import FinepointError
from finepoint.models.bitsandbytes import check_weight
from finepoint.models.quantised import Replaced, is_quantised, replace_forwards
from finepoint.models.weights import absent
from finepoint.runtime import distributed

Switch = Callable[[bool], None]
"""Puts an adapter in (True), or takes it out (False)."""
APPLIED = "_finepoint_applied"  # the attribute of a model that lists what is applied to it
SETS: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()
"""The `AdapterSet`s of a model; what they have switched on is in its weights too."""
OTHER_VALUES = "its values are not those of the base model the adapter was trained on"
ANY_BASE = "load that base, or take this one by name (finepoint.rebased(adapter, model), --any-base)"


class SparseAdapter(Contents):
    """The trained change of a whole model, which can be written into the model and taken out of it.

    A mapping from weight name to flat indices, (k,) int64; `changes` has what is written there.
    """

    def _repr_html_(self) -> str:
        return html(self)

    def save(self, folder: str | Path, overwrite: bool = False, compact: bool = False) -> Path:
        """Writes `finepoint.safetensors`, `finepoint_config.json` and a README; returns the folder.

        Args:
            compact: write the gaps between the indices, in one or two bytes each instead of four; as exact.

        Raises:
            FinepointError: the folder holds something and `overwrite` is not given, or cannot be written.
        """
        return save(self, folder, overwrite, compact)

    @staticmethod
    def load(folder: str | Path) -> "SparseAdapter":
        """Reads an adapter folder and checks all of it; load(save(a)) equals a bit for bit.

        Args:
            folder: a folder, or (as a string) the id of an adapter on the hub, which is fetched.

        Raises:
            FinepointError: missing, truncated or inconsistent file, unknown version; the weight is named.
        """
        adapter = SparseAdapter.read(folder)
        say_unfinished(folder, adapter.info)
        return adapter

    @staticmethod
    def read(folder: str | Path) -> "SparseAdapter":
        """Like `load`, without the warning for unfinished training."""
        return SparseAdapter(**vars(read(folder)))

    def problems(self, model: nn.Module) -> list[str]:
        """Why this adapter does not belong to the model as it is now; empty if it does."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = []
        for name, change in self.changes.items():
            if name not in parameters:
                found.append(f"{name}: the model has no such weight")
                continue
            weight = parameters[name]
            if weight.is_meta:
                found.append(absent(name))
                continue
            dtype = str(weight.dtype).removeprefix("torch.")
            if tuple(weight.shape) != change.shape:
                found.append(f"{name}: shape {tuple(weight.shape)} in the model, {change.shape} in the adapter")
            elif dtype != change.dtype:
                wider = torch.promote_types(weight.dtype, getattr(torch, change.dtype)) == weight.dtype
                other = " (or take finepoint.in_wider_dtype(adapter, model), in eval, generate and chat --any-dtype)"
                way = other if wider else ""
                found.append(f"{name}: {dtype} in the model, {change.dtype} in the adapter; load it as "
                             f"{change.dtype}{way}")  # fmt: skip
            elif not change.lies_on(weight):
                found.append(f"{name}: {OTHER_VALUES}{self._hint(weight)}")
            elif not change.stays_finite(weight):
                found.append(f"{name}: base + delta is too large a number for {dtype}")
        found += differences(self.base, model, [name for name in self.changes if name in parameters])
        found += self._other_classes(model)
        return found or self._problems_elsewhere(model)

    def _problems_elsewhere(self, model: nn.Module) -> list[str]:
        """In what the base differs beside the chosen entries, as far as that is known."""
        known = self.fingerprint
        if known is None:
            return []
        weights = dict(model.named_parameters(remove_duplicate=False))
        told = {
            "values": lambda name: f"{OTHER_VALUES}, beside the entries it changes{self._hint(weights.get(name))}",
            "missing": lambda _: "the model has no such weight, and the adapter's base has",
            "more": lambda _: "the adapter's base has no such weight",
        }
        here = base_beneath(model, known)
        return [f"{name}: {told[how](name)}; {ANY_BASE}" for name, how in unlike(known, here)]

    def _hint(self, weight: Tensor | None) -> str:
        bits = self.info.get("quantise")
        wanted = bits and weight is not None and not is_quantised(weight)
        return f"; it was quantised: --quantise {bits}" if wanted else ""

    def _other_classes(self, model: nn.Module) -> list[str]:
        """A line if the classifier's classes have other names or another order; default names (LABEL_0) are ignored."""
        told = getattr(getattr(model, "config", None), "id2label", None)
        labels = list(self.info.get("labels") or ()) if self.info.get("task") == "classification" else []
        if not told or not labels:
            return []
        own = [str(told[i]) for i in sorted(told)]
        numbers = [str(i) for i in range(len(own))]
        if own in (labels, [f"LABEL_{i}" for i in numbers]) or (labels == numbers and len(own) == len(labels)):
            return []
        return [f"its classes are {', '.join(labels)}, in this order, and the model's {', '.join(own)}; load the model "
                "with the adapter's labels"]  # fmt: skip

    def check(self, model: nn.Module, in_place: bool = True) -> None:
        """Refuses a model that this adapter does not belong to as it is now.

        Args:
            in_place: the adapter is to be written into the weights.

        Raises:
            FinepointError: the first of its `problems`, or the model is being trained, or it is applied already, or a
                weight to be written into is quantised.
        """
        if hasattr(model, "finepoint"):
            raise FinepointError("the model is being trained; close its SparseTuner before applying an adapter")
        if any(self.equals(adapter) for adapter in applied_to(model)):
            raise FinepointError("the adapter is applied to the model already; finepoint.unload(model) or "
                                 "adapter.revert(model) takes it out")  # fmt: skip
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in self.changes.keys() & parameters.keys():
            check_weight(name, parameters[name])
        if problems := self.problems(model):
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            beside = "" if not applied_to(model) else (
                "; another adapter is applied to it, which finepoint.unload(model) takes out, and "
                "finepoint.AdapterSet holds several")  # fmt: skip
            raise FinepointError(f"the adapter does not fit this model: {problems[0]}{more}{beside}")
        if in_place and (quantised := self.quantised_in(model)):
            raise FinepointError(
                f"{quantised[0]} is quantised: its entries share scales, so that none can be set on its own; use "
                "`with adapter.applied(model)` or `adapter.attach(model)`, which add the change in the layer's forward"
            )

    def quantised_in(self, model: nn.Module) -> list[str]:
        """Names of the weights this adapter changes that are quantised in the model."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return [name for name in self if name in parameters and is_quantised(parameters[name])]

    def apply(self, model: nn.Module) -> None:
        """Writes the adapter into the model's weights, exactly as they were at the end of training.

        The bits it replaces are kept on the model, for `revert`. Adapters that share no entry can be applied together.

        Raises:
            FinepointError: the model is not the one the adapter was trained on, or is quantised; nothing is changed
                then.
        """
        self.check(model)
        weights = dict(model.named_parameters(remove_duplicate=False))
        originals = {name: gather(weights[name], self[name]) for name in self}
        _applied(model).append((self, originals))
        for name, change in self.changes.items():
            scatter_(weights[name], self[name], change.new_values(originals[name]))

    def equals(self, other: "SparseAdapter") -> bool:
        """Whether another adapter writes the same numbers to the same entries, as that of a copied model does."""
        return self is other or (
            self.changes.keys() == other.changes.keys()
            and all(change.equals(other.changes[name]) for name, change in self.changes.items())
        )

    def revert(self, model: nn.Module) -> None:
        """Restores the exact bits that `apply` replaced, also in a copy of the model made since.

        Raises:
            FinepointError: the adapter is not applied, or one applied later shares entries with it, or the weights do
                not hold what it wrote; nothing is changed then.
        """
        stack = _applied(model)
        places = [i for i, (adapter, _) in enumerate(stack) if self.equals(adapter)]
        if not places:
            raise FinepointError("the adapter is not applied to this model, so there is nothing to revert")
        for later, _ in stack[places[-1] + 1 :]:
            for name in set(self) & set(later):
                if overlap(self[name], later[name]):
                    raise FinepointError(f"an adapter applied later shares entries of {name}; revert that one first")
        originals = stack[places[-1]][1]
        weights = dict(model.named_parameters(remove_duplicate=False))
        for name, values in originals.items():
            written = self.changes[name].new_values(values)
            if name not in weights or not same_bits(gather(weights[name], self[name]), written):
                raise FinepointError(f"{name} does not hold what the adapter wrote: the weights were replaced since, "
                                     "so that there is no base to go back to; load the base anew")  # fmt: skip
        stack.pop(places[-1])
        for name, values in originals.items():
            scatter_(weights[name], self[name], values)

    def attach(self, model: nn.Module) -> "Attached":
        """Adds the adapter to a model with quantised weights in its layers' forward; no quantised weight is changed.

        From now on the quantised layers multiply by their float values, with this adapter's entries in place: the model
        computes what the model with dequantised weights computes with the adapter applied, bit for bit.

        Returns:
            What takes it off again, by `remove()`.

        Raises:
            FinepointError: the model is not the one the adapter was trained on, or something is attached already.
        """
        self.check(model, in_place=False)
        weights = dict(model.named_parameters(remove_duplicate=False))
        altered = {}
        for name in self.quantised_in(model):
            altered[name] = Overwrite(self[name], self.changes[name].new_values(gather(weights[name], self[name])))
        layers = replace_forwards(model, altered)
        rest = SparseAdapter({name: change for name, change in self.changes.items() if name not in altered})
        rest.apply(model)
        return Attached(model, layers, rest)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside, the adapter is applied; afterwards, also after an exception, the original bits are back.

        To a quantised model it is attached.
        """
        if self.quantised_in(model):
            attached = self.attach(model)
            try:
                yield model
            finally:
                attached.remove()
            return
        self.apply(model)
        try:
            yield model
        finally:
            self.revert(model)

    @contextmanager
    def alternating(self, model: nn.Module) -> Iterator[Switch]:
        """Inside, a function puts the adapter in (True) and takes it out (False), at the cost of its entries alone.

        The model is looked at once, as it comes; nobody else may change it meanwhile. The adapter is out at the
        beginning, and out afterwards, also after an exception.
        """
        if self.quantised_in(model):
            attached: list[Attached] = []

            def attach(on: bool) -> None:
                while attached:
                    attached.pop().remove()
                if on:
                    attached.append(self.attach(model))

            try:
                yield attach
            finally:
                attach(False)
            return
        with self.applied(model):
            weights = dict(model.named_parameters(remove_duplicate=False))
            before = dict(_applied(model)[-1][1])
            after = {name: change.new_values(before[name]) for name, change in self.changes.items()}
            places = {name: self[name].to(weights[name].device) for name, change in self.changes.items()
                      if change.kind != "full" or distributed.is_sharded(weights[name])}  # fmt: skip

            def switch(on: bool) -> None:
                for name, values in (after if on else before).items():
                    if name in places:
                        scatter_(weights[name], places[name], values)
                    else:
                        weights[name].detach().copy_(values.view(weights[name].shape))

            switch(False)
            try:
                yield switch
            finally:
                switch(True)


@dataclass(frozen=True)
class Overwrite:
    """Writes an adapter's (k,) values into a dequantised weight."""

    indices: Tensor
    values: Tensor

    def __call__(self, weight: Tensor) -> None:
        scatter_(weight, self.indices, self.values)


@dataclass(frozen=True)
class Attached:
    """An adapter on a quantised model."""

    model: nn.Module
    layers: list[Replaced]
    rest: SparseAdapter
    """what it changes in weights that are not quantised, which is applied"""

    def remove(self) -> None:
        """Gives the model its own forward and bits again."""
        for layer in self.layers:
            layer.remove()
        self.rest.revert(self.model)


def check_base(model: nn.Module) -> None:
    """Refuses a model whose values are not the base's alone.

    Raises:
        FinepointError: an adapter is applied to it.
    """
    if getattr(model, APPLIED, None):
        raise FinepointError("an adapter is applied to the model, which must be the base here; revert it first")


def base_beneath(model: nn.Module, like: Fingerprint | None = None) -> Fingerprint:
    """The fingerprint of the base beneath the adapters that are applied to a model.

    Args:
        like: the fingerprint it is to be compared with; weights missing from `like` are skipped.
    """
    without = like.unknown if like else ()
    return fingerprint(contents_of(model), moved_by_adapters(model), like.one_in if like else None, without)


def moved_by_adapters(model: nn.Module) -> list[Moved]:
    """What the adapters that are applied to a model have changed in it."""
    moved = [
        Moved(name, adapter[name], base, adapter.changes[name].new_values(base))
        for adapter, originals in vars(model).get(APPLIED, [])
        for name, base in originals.items()
    ]
    for adapters in SETS.get(model, ()):
        moved += adapters.moved()
    return moved


def applied_to(model: nn.Module) -> list[SparseAdapter]:
    """The adapters that are applied to a model, first to last."""
    return [adapter for adapter, _ in vars(model).get(APPLIED, [])]


@contextmanager
def as_before_latest(model: nn.Module, count: int) -> Iterator[None]:
    """Inside, the weights are as they were before so many of the adapters were applied; for reading, and in training
    too: nothing trained may have moved."""
    # `.data`: past the version counters, by which a tuner would take it for somebody else's change.
    weights = {name: weight.data for name, weight in model.named_parameters(remove_duplicate=False)}
    latest = _applied(model)[len(_applied(model)) - count :]
    written = []
    for adapter, originals in reversed(latest):
        written.append({name: gather(weights[name], adapter[name]) for name in originals})
        for name, values in originals.items():
            scatter_(weights[name], adapter[name], values)
    try:
        yield
    finally:
        for (adapter, _), held in zip(latest, reversed(written), strict=True):
            for name, values in held.items():
                scatter_(weights[name], adapter[name], values)


def _applied(model: nn.Module) -> list[tuple[SparseAdapter, dict[str, Tensor]]]:
    """The adapters applied to a model, first to last, with the bits they replaced: kept on the model itself, so that
    they live exactly as long and a deep copy of the model can be reverted too."""
    return model.__dict__.setdefault(APPLIED, [])
