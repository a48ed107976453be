"""Whether every chosen entry gets the gradient of the model's own loss: tried on the model itself.

The hooks of `autograd.py` see a weight where its own module is called. A model may use it elsewhere (by
`linear(x, child.weight)`, in a fused kernel, tied to another layer by hand), or something may change what the module
puts out. So one small backward pass makes both gradients of every weight at once, the one that its deltas get and the
dense one, which is reduced to the chosen entries as soon as it is made. A weight where they differ stands in for itself
in a wider and wider surrounding, up to the whole model, until they agree; where they never do, it is refused by name.
"""

import copy
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointError

from finepoint.adapters.entries import gather
from finepoint.errors import FinepointError
from finepoint.models.quantised import float_values
from finepoint.runtime import distributed
from finepoint.selection.passes import undisturbed
from finepoint.selection.rules import wide
from finepoint.tuner.sparse_weight import QuantisedSparseWeight, SparseWeight

logger = logging.getLogger(__name__)
PROBES = 16  # entries of a weight that are asked where the chosen ones have no gradient
QUANTISED_SHARE = 0.25  # of the quantised weights that hold float values at a time
Loss = Callable[[], Tensor | None]
"""A forward pass of the model; what it returns depends on the weights, None where nothing does."""


@dataclass
class Audit:
    """What an audit has found; what is `silent` may be audited with another input."""

    weights: set[str] = field(default_factory=set)
    """those whose entries get the gradient that they should"""
    widened: dict[str, int] = field(default_factory=dict)
    """those that stand in for themselves further than usual, with how far"""
    silent: set[str] = field(default_factory=set)
    """those that no gradient came to, and none like them"""
    statistics: set[str] = field(default_factory=set)
    """buffers that a forward pass in training mode changes"""
    seconds: float = 0.0

    def after(self, earlier: "Audit") -> "Audit":
        """Both together; what was silent earlier has been asked again."""
        return Audit(self.weights | earlier.weights, earlier.widened | self.widened, self.silent,
                     self.statistics | earlier.statistics, self.seconds + earlier.seconds)  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """For a record; JSON-ready."""
        return {"audited": len(self.weights), "stand_ins": sorted(self.widened), "not_reached": sorted(self.silent),
                "seconds": round(self.seconds, 3)}  # fmt: skip

    def told(self) -> str:
        """For a log."""
        words = [f"audited {len(self.weights)} weights in {self.seconds:.1f} s"]
        if self.widened:
            words.append(f"{len(self.widened)} are used around their layer and stand in there: {few(self.widened)}")
        if self.silent:
            words.append(f"the input came to no entry of {len(self.silent)}: {few(self.silent)}")
        return "; ".join(words)


def audit(
    model: nn.Module,
    members: Mapping[str, SparseWeight],
    names: Iterable[str],
    loss: Loss,
    widen: Callable[[str, int], bool],
) -> Audit:
    """Compares the gradients of all trained entries with the dense ones; the model is left as it is found.

    Args:
        members: all trained entries of the model, by weight name.
        names: the weights to ask about; such without a chosen entry are asked at a few.
        widen: has a weight stand in for itself so far around its module (see `autograd.attach`); says whether it can.

    Raises:
        FinepointError: entries of a weight that get another gradient in any surrounding.
    """
    begun = time.perf_counter()
    found, reach = Audit(), dict.fromkeys(names, 0)
    asked: dict[str, Tensor | None] = dict.fromkeys(reach)  # at the chosen entries first
    while asked:
        again: dict[str, Tensor | None] = {}
        for name, seen in _seen(model, members, asked, loss, found.statistics).items():
            if seen.none:
                found.silent.add(name)
            elif seen.elsewhere is not None:
                again[name] = seen.elsewhere
            elif seen.agrees():
                found.weights.add(name)
            else:
                reach[name] += 1
                if not widen(name, reach[name]):
                    raise refusal(name, seen)
                again[name] = asked[name]
        asked = again
    found.widened = {name: reach[name] for name in found.weights if reach[name]}
    if found.widened:
        _run_as_in_training(model, members, found.widened, loss)
    _like_the_others_(found, widen)
    found.seconds = time.perf_counter() - begun
    return found


def _run_as_in_training(
    model: nn.Module, members: Mapping[str, SparseWeight], widened: Iterable[str], loss: Loss
) -> None:
    """Runs forward and backward with frozen weights, as training does.

    Raises:
        FinepointError: a stand-in is in a checkpointed function's forward and not in its recomputation.
    """
    with _as_found(model), ExitStack() as stack:
        for entries in members.values():
            stack.enter_context(_asked_at(entries, None))
        result = loss()
        try:
            if result is not None and result.requires_grad:
                result.backward()
        except CheckpointError as error:
            raise FinepointError("gradient checkpointing recomputes a function that uses a weight without its layer, "
                                 f"one of {few(widened)}; train without it or them") from error  # fmt: skip


def _like_the_others_(found: Audit, widen: Callable[[str, int], bool]) -> None:
    """Has silent weights do as those that are called like them but for a number, in other layers or experts."""
    kinds: dict[str, int] = {}
    for name in found.weights:
        kinds[_kind(name)] = max(kinds.get(_kind(name), 0), found.widened.get(name, 0))
    for name in sorted(found.silent):
        if _kind(name) in kinds:
            if reach := kinds[_kind(name)]:
                widen(name, reach)
                found.widened[name] = reach
            found.silent.remove(name)
            found.weights.add(name)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def refusal(name: str, seen: "Seen") -> FinepointError:
    """What a user is told of a weight whose entries cannot be trained rightly."""
    return FinepointError(f"the chosen entries of {name} would get another gradient than the model's loss gives them "
                          f"(off by {100 * seen.error():.0f} %): the model uses the weight in a way that cannot be "
                          "followed; leave it out of the targets")  # fmt: skip


@dataclass
class Seen:
    """The gradients of some entries of one weight in a backward pass."""

    epsilon: float
    """of the arithmetic"""
    count: int
    """entries of the weight"""
    dense: Tensor | None = None
    """(k,), out of the dense gradient; None where none was made"""
    sparse: Tensor | None = None
    """(k,), what the deltas got; None where no graph led to them"""
    square: float = 0.0
    """of the dense gradient's norm"""
    largest: Tensor | None = None
    """where the dense gradient is largest, flat positions, if it is 0 at all these entries"""

    @property
    def quiet(self) -> bool:
        """Whether the deltas got no gradient, or nothing but 0."""
        return self.sparse is None or not bool(self.sparse.any())

    @property
    def none(self) -> bool:
        """Whether nothing can be told: no gradient at all, or one that is no number."""
        return (self.square == 0 and self.quiet) or not self.square < float("inf")

    @property
    def elsewhere(self) -> Tensor | None:
        """Where to ask again, if there is no gradient at these entries but at others."""
        return self.largest if self.quiet else None

    def error(self) -> float:
        """How far the deltas' gradient is from the dense one, as a share of the larger."""
        if self.dense is None or self.sparse is None:
            return 1.0
        sparse, larger = self.sparse, max(float(self.sparse.norm()), float(self.dense.norm()))
        if not larger:  # the graph leads to the deltas, and nothing comes
            return 0.0
        # Sums of many numbers cancel down to their rounding errors, which are in proportion to the others.
        noise = 16 * min(self.epsilon, 2.0**-23) * (len(sparse) * self.square / self.count) ** 0.5
        return max(0.0, float((sparse - self.dense).norm()) - noise) / larger

    def agrees(self) -> bool:
        return self.error() <= self.epsilon**0.5


def _seen(
    model: nn.Module, members: Mapping[str, SparseWeight], asked: Mapping[str, Tensor | None], loss: Loss,
    statistics: set[str],
) -> dict[str, Seen]:  # fmt: skip
    """Both gradients at the entries of each weight, at its chosen ones where None is asked; adds to `statistics`."""
    found: dict[str, Seen] = {}
    for names in _chunks(members, asked):
        with _as_found(model, statistics), ExitStack() as stack:
            for name in members.keys() - set(names):  # the graph is that of training, where these are trained as well
                stack.enter_context(_asked_at(members[name], None))
            for name in names:
                entries = members[name]
                stack.enter_context(_as_float(entries))
                stack.enter_context(_asked_at(entries, asked[name]))
                weight = entries.weight
                found[name] = Seen(epsilon_of(weight), weight.numel())
                weight.requires_grad_(True)
                collect = partial(collect_, found[name], entries)
                stack.callback(weight.register_post_accumulate_grad_hook(collect).remove)
                stack.callback(entries._owner[0].register_forward_pre_hook(partial(look_, found[name])).remove)
            result = loss()
            if result is not None and result.requires_grad:
                result.backward()
            for name in names:
                gradient = members[name].delta.grad
                found[name].sparse = None if gradient is None else wide(gradient)
    return found


def collect_(seen: Seen, entries: SparseWeight, weight: Tensor) -> None:
    """Takes of a dense gradient what is asked for, and drops it; called again where a graph is run in parts."""
    gradient = weight.grad
    assert gradient is not None
    weight.grad = None
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    part = wide(gather(gradient, entries.indices))
    seen.dense = part if seen.dense is None else seen.dense + part
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    seen.square += float(torch.linalg.vector_norm(gradient, dtype=dtype)) ** 2
    if not bool(seen.dense.any()):
        seen.largest = gradient.abs().flatten().topk(min(PROBES, gradient.numel())).indices.sort().values


def look_(seen: Seen, module: nn.Module, args: Any) -> None:
    """Within the model's forward autocast is on where it is never seen from outside."""
    for weight in module._parameters.values():
        if weight is not None:
            seen.epsilon = max(seen.epsilon, epsilon_of(weight))


def _chunks(members: Mapping[str, SparseWeight], names: Iterable[str]) -> Iterator[list[str]]:
    """All weights at once, but of quantised ones, which must become floats, a share at a time."""
    quantised = [name for name in names if members[name].quantised]
    if plain := [name for name in names if name not in set(quantised)]:
        yield plain
    room = QUANTISED_SHARE * sum(members[name].weight.numel() for name in quantised)
    chunk: list[str] = []
    for name in quantised:
        chunk.append(name)
        if sum(members[held].weight.numel() for held in chunk) >= room:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@contextmanager
def _asked_at(entries: SparseWeight, positions: Tensor | None) -> Iterator[None]:
    """Inside, the deltas are a copy with no hook, or those of other entries where positions are given."""
    kept = entries.indices, entries.base, entries.delta, entries.groups, entries.written
    if positions is None:
        entries.delta = nn.Parameter(entries.delta.detach().clone())
    else:  # their base is what they hold, so that nothing moves if the weight follows meanwhile
        entries.indices = positions.to(entries.indices)
        entries.base = gather(entries.weight, entries.indices)
        entries.delta = nn.Parameter(kept[2].detach().new_zeros(len(positions)))
        entries.written = entries.delta.detach().clone()
        entries._find_groups(positions)
    try:
        yield
    finally:
        entries.indices, entries.base, entries.delta, entries.groups, entries.written = kept


@contextmanager
def _as_float(entries: SparseWeight) -> Iterator[None]:
    """Inside, a quantised weight is its float values, and its layer has its own forward instead of what replaces it."""
    if not isinstance(entries, QuantisedSparseWeight):
        yield
        return
    layer, weight = entries._owner[0], entries.weight
    forward = vars(layer).pop("forward", None)
    values = float_values(weight)
    entries.alter_(values)
    layer._parameters["weight"] = nn.Parameter(values)
    try:
        yield
    finally:
        layer._parameters["weight"] = weight
        if forward is not None:
            vars(layer)["forward"] = forward


@contextmanager
def _as_found(model: nn.Module, statistics: set[str] | None = None) -> Iterator[None]:
    """Inside, the model is in training mode and frozen; afterwards it is as before, with its buffers and every random
    state; the names of buffers that were changed meanwhile are added to `statistics`."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if not name.startswith("finepoint.")}
    kept = {name: buffer.clone() for name, buffer in buffers.items()}
    states = random.getstate(), np.random.get_state()
    try:
        with undisturbed(model):
            model.train()
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for name, buffer in buffers.items():
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._buffers[attribute] = buffer
            if not torch.equal(buffer, kept[name]):
                buffer.copy_(kept[name])
                if statistics is not None:
                    statistics.add(name)


def epsilon_of(weight: Tensor) -> float:
    """The relative rounding error of the arithmetic with a weight."""
    device = weight.device.type
    dtypes = [weight.dtype]
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    found = max(torch.finfo(dtype).eps for dtype in dtypes)
    # TF32 has the mantissa of float16.
    return found if device == "cpu" or weight.dtype == torch.float64 else max(found, torch.finfo(torch.float16).eps)


def outcome(output: Any) -> Tensor | None:
    """A number that depends on all that a model puts out: its loss, or a fixed mixture of its tensors."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss.sum()
    parts = [_mixture(tensor) for tensor in _tensors(output) if tensor.requires_grad]
    return torch.stack(parts).sum() if parts else None


def _mixture(tensor: Tensor) -> Tensor:
    # No pattern in it: the sum of a normalised output, for one, has no gradient.
    factors = torch.arange(1, tensor.numel() + 1, device=tensor.device, dtype=torch.float32).mul_(1.7).square_().sin_()
    factors /= tensor.numel() ** 0.5
    numbers = (tensor.abs() if tensor.is_complex() else tensor).reshape(-1)
    return (wide(numbers) * factors).sum().cpu().double()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for part in output.values() for tensor in _tensors(part))
    elif isinstance(output, list | tuple):
        yield from (tensor for part in output for tensor in _tensors(part))
    elif hasattr(output, "__dict__") and not isinstance(output, nn.Module):
        yield from (part for part in vars(output).values() if isinstance(part, Tensor))


def few(names: Iterable[str]) -> str:
    """The first names of many."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class AtFirst:
    """Audits a model with the first input that it is trained on, before it takes it."""

    def __init__(self, model: nn.Module, audit_: Callable[[Loss], Any]) -> None:
        self.model = model
        self.audit_ = audit_
        self.handle = model.register_forward_pre_hook(self.meet, with_kwargs=True, prepend=True)

    def remove(self) -> None:
        self.handle.remove()

    @torch.compiler.disable
    def meet(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        self.remove()
        name = type(model).__name__
        if distributed.is_fsdp(model):
            logger.info("%s is in the middle of a sharded forward; its weights could not be audited", name)
            return
        try:
            _copy((args, kwargs))
        except Exception as error:  # of whatever a user's class says
            logger.info("the input of %s cannot be copied; its weights could not be audited: %s", name, error)
            return
        hooks = set(model._forward_pre_hooks)

        def loss() -> Tensor | None:
            inputs, named = _copy((args, kwargs))
            return outcome(model(*inputs, **named))

        self.audit_(loss)
        for key, hook in list(model._forward_pre_hooks.items()):
            if key not in hooks:  # which this call would leave out
                hook(model, args, *([kwargs] if key in model._forward_pre_hooks_with_kwargs else []))


def _copy(inputs: Any) -> Any:
    """An input that a pass may change, or leave gradients on, without a trace: caches, tensors that are added to."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        return copy.deepcopy(value)

    return tree_map(leaf, inputs)
