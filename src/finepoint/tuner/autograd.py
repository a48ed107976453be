"""From a batch to the gradient of the chosen entries: what is hooked onto a model's modules, and the backward passes.

Before a module runs, its weight is made base + delta (`SparseWeight.catch_up_`). A plain linear layer's output, y, goes
on through an identity whose backward makes the weight's gradient at the chosen entries alone, from the layer's input
and dL/dy; an embedding's alike. The deltas have the gradient then, an optimizer moves them, and the weight follows.
In plain PyTorch the same is

    y = torch.nn.functional.linear(x, base.index_put((indices,), delta, accumulate=True))  # indices: rows, columns

whose backward makes the whole gradient of the weight first.

Plain linear layers and embeddings keep their forward. Any other weight (norms, biases, stacked experts, subclasses with
a forward of their own) stands in for itself while its module runs, as an identity whose backward gathers. A weight that
others use, without a call of its module, stands in for itself while the modules around it run (see `audit`).
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finepoint.adapters.entries import gather
from finepoint.errors import FinepointError
from finepoint.runtime import distributed
from finepoint.tuner.inputs import Again, made_again
from finepoint.tuner.kernels import sampled_embedding_gradient, sampled_gradient
from finepoint.tuner.kernels.groups import keeps_all
from finepoint.tuner.sparse_weight import SparseWeight, eagerly

AS_IT_IS = "_finepoint_as_it_is"  # on a head while its input is only taken, not multiplied
WHOLE = 1_000  # modules around a weight: all there are


def attach(model: nn.Module, entries: SparseWeight, reach: int = 0) -> list[Any]:
    """Hooks every module that uses the weight (several, if it is tied).

    Args:
        reach: how far around its module the weight stands in for itself: 0 at most there, and not at all where a plain
            layer's own arithmetic will do; 1 there in any case; 2 also in the module around it, and so on.

    Returns:
        What takes the hooks off again, by `remove`.
    """
    handles: list[Any] = []
    found = places(model, entries)
    entries.alone = not reach and [(type(module).forward, name) for module, name in found] == [
        (nn.Linear.forward, "weight")
    ]
    for module, attribute in found:
        handles.append(module.register_forward_pre_hook(entries.before_forward))
        handles.append(module.register_state_dict_pre_hook(entries.before_state_dict))
        # A subclass with a forward of its own may scale or reuse the weight: the stand-in is right for any use.
        forward = type(module).forward
        # Before the hooks of others, which may change the output.
        if not reach and attribute == "weight" and forward is nn.Linear.forward:
            handles.append(module.register_forward_hook(_Output(entries).of_linear, with_kwargs=True, prepend=True))
        elif not reach and attribute == "weight" and forward is nn.Embedding.forward and _is_plain(module):
            handles.append(module.register_forward_hook(_Output(entries).of_embedding, with_kwargs=True, prepend=True))
        elif not reach:
            handles += _StandIn(entries, [(module, attribute)]).around(module)
        if module is _head(model):
            bypass = _Bypass(entries, [(module, attribute)])
            handles.append(model.register_forward_pre_hook(bypass.enter_if_fused, with_kwargs=True))
            handles.append(model.register_forward_hook(bypass.leave, always_call=True))
    if reach:
        stand_in = _StandIn(entries, found)
        for module in surroundings(model, entries, reach):
            handles.append(module.register_forward_pre_hook(entries.before_forward))
            handles += stand_in.around(module)
    return handles


def fold_head_input(model: nn.Module) -> list[Any]:
    """Has a language model's frozen head take its input in one piece.

    The states at `logits_to_keep` are a slice with gaps, and PyTorch multiplies such a slice by a weight without a
    gradient batch by batch, over a copy of the weight for each row: a quarter of a step of a small model.

    Returns:
        What undoes it, by `remove`; nothing where the model does not tell its head.
    """
    head = _head(model)
    return [] if head is None else [head.register_forward_pre_hook(_in_one_piece)]


def _in_one_piece(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    states = args[0] if args else None
    if AS_IT_IS in vars(module) or not isinstance(states, Tensor) or states.is_contiguous():
        return None
    return (states.contiguous(), *args[1:])


def places(model: nn.Module, entries: SparseWeight) -> list[tuple[nn.Module, str]]:
    """Where the weight is a parameter: modules, with its name there."""
    weight = entries.weight
    return [(module, attribute) for module in model.modules()
            for attribute, parameter in module._parameters.items() if parameter is weight]  # fmt: skip


def refuse_unfit(model: nn.Module, names: Iterable[str]) -> None:
    """Refuses weights that TorchScript computes with, where nothing can be hooked on, or that a forward pass changes.

    Raises:
        FinepointError: a module that has one was scripted or traced, or is an embedding that shortens its rows.
    """
    reasons: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            why = "lies in a module that was scripted or traced (torch.jit), where no entry gets a gradient of its own"
            reasons |= {id(weight): why for weight in module.parameters(recurse=False)}
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            reasons[id(module.weight)] = "is an embedding with max_norm, which changes its weights in every forward"
    weights = dict(model.named_parameters(remove_duplicate=False)) if reasons else {}
    for name in names:
        if why := reasons.get(id(weights.get(name)), ""):
            raise FinepointError(f"{name} {why}; leave it out of the targets")


def surroundings(model: nn.Module, entries: SparseWeight, reach: int) -> list[nn.Module]:
    """The modules with a forward that are at most `reach` - 1 steps around one that has the weight as its parameter."""
    owners = {id(owner) for owner, _ in places(model, entries)}
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in owners:
            found |= {id(around): around for around in list(_outwards(model, name))[:reach]}
    return list(found.values())


def reaches_further(model: nn.Module, entries: SparseWeight, reach: int) -> bool:
    """Whether so wide a surrounding holds more modules than the next narrower one."""
    if reach in (1, WHOLE):
        return True
    wide, narrow = (surroundings(model, entries, steps) for steps in (reach, reach - 1))
    return len(wide) > len(narrow)


def _outwards(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """A module and those around it, from the inside out; lists and other containers, which nobody calls, left out."""
    parts = name.split(".") if name else []
    for depth in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        if type(module).forward is not nn.Module.forward:
            yield module


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's `once_differentiable`, which is asked only where a graph of the backward pass is made."""
    guarded = once_differentiable(backward)

    @wraps(backward)
    def either(ctx: Any, *gradients: Tensor) -> Any:
        return guarded(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return either


class _Output:
    """Hooked after a plain layer: its output goes on through an identity. Bound methods, not closures, so that a deep
    copy of the model has hooks on its own copies."""

    def __init__(self, entries: SparseWeight) -> None:
        self.entries = entries

    @eagerly
    def of_linear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        entries = self.entries
        if not entries.wanted():
            return output
        x = args[0] if args else kwargs["input"]
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return _SampledLinear.apply(output, entries.delta, x, entries)
        again = None if entries.sharded or not keeps_all(entries.groups) else made_again(x, entries.remade)
        return _sampled_linear(output, entries.delta, x if again is None else None, entries, again)

    @eagerly
    def of_embedding(
        self, module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if not self.entries.wanted():
            return output
        tokens = args[0] if args else kwargs["input"]
        return _SampledEmbedding.apply(output, self.entries.delta, tokens, self.entries, module.padding_idx)


class _SampledLinear(torch.autograd.Function):
    """Identity on a linear layer's output; its backward adds the sampled weight gradient."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, delta: Tensor, x: Tensor | None, entries: SparseWeight,
        again: tuple[Again, tuple[Tensor, ...]] | None = None,
    ) -> Tensor:  # fmt: skip
        ctx.entries, groups = entries, entries.groups
        if x is None:
            assert again is not None
            ctx.again, kept = again
        else:
            ctx.again, kept = None, (x if groups is None else groups.saved(x),)
        ctx.save_for_backward(*kept)
        # Declared as changed in place, so that the output is itself and no view: models may add to it in place.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dW at the chosen entries, (k,), from dy (.., out) and what was saved of x (.., in).

        In plain PyTorch: `(dy.reshape(-1, out).T @ x.reshape(-1, in)).reshape(-1)[indices]`.
        """
        saved, entries = ctx.saved_tensors, ctx.entries
        x = saved[0] if ctx.again is None else ctx.again.made(saved)
        groups = entries.groups
        gradient = sampled_gradient(dy, x, entries.indices) if groups is None else groups.gradient(dy, x)
        return dy, gradient, None, None, None


# Past the part of `apply` that unwraps what transforms of torch.func have left behind, a third of what it costs.
_sampled_linear: Callable[..., Tensor] = super(torch.autograd.Function, _SampledLinear).apply


class _SampledEmbedding(torch.autograd.Function):
    """Identity on an embedding's output; its backward adds the sampled gradient."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, delta: Tensor, tokens: Tensor, entries: SparseWeight, padding: int | None
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.entries, ctx.padding = entries, padding
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        gradient = sampled_embedding_gradient(dy, tokens, ctx.entries.indices, ctx.padding)
        return dy, gradient.to(ctx.entries.delta.dtype), None, None, None


class _GatheredWeight(torch.autograd.Function):
    """The weight itself; its backward keeps the gradient at the chosen entries and drops the rest.

    Only an audit lets the weight have its gradient too.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, delta: Tensor, entries: SparseWeight) -> Tensor:
        ctx.entries = entries
        return weight.view_as(weight)

    @staticmethod
    @_once
    def backward(ctx: Any, dense: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gather(dense, ctx.entries.indices).to(ctx.entries.delta.dtype)
        return dense if ctx.needs_input_grad[0] else None, gradient, None


class _StandIn:
    """Puts the gathering identity in a weight's place while a module runs, for modules of any kind."""

    def __init__(self, entries: SparseWeight, places: list[tuple[nn.Module, str]]) -> None:
        self.entries = entries
        self.places = places
        self.replaced: list[Tensor | None] = []
        """what to put back when the modules that run now are done, the innermost last; None for nothing"""
        self.removed = False

    def around(self, module: nn.Module) -> list[Any]:
        """Hooks it onto a module."""
        return [
            module.register_forward_pre_hook(self.enter),
            module.register_forward_hook(self.leave, always_call=True),
            _Eager(module),
            self,
        ]

    def remove(self) -> None:
        self.removed = True  # a module that is about to run calls hooks that are gone

    @torch.compiler.disable
    def enter(self, module: nn.Module, args: Any) -> None:
        owner, attribute = self.places[0]
        weight = owner._parameters[attribute]
        # Not a leaf: it stands in already, for a module around this one. Of a shard, a module inside makes the weight.
        needless = self.removed or weight is None or not weight.is_leaf or distributed.is_sharded(weight)
        if needless or not self.entries.wanted():
            self.replaced.append(None)
            return
        self.replaced.append(weight)
        self._put(_GatheredWeight.apply(weight, self.entries.delta, self.entries))

    @torch.compiler.disable
    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # Nothing is there where a hook before `enter` has raised.
        if self.replaced and (weight := self.replaced.pop()) is not None:
            self._put(weight)

    def _put(self, weight: Any) -> None:
        for owner, attribute in self.places:
            owner._parameters[attribute] = weight


class Aside(_StandIn):
    """Has a layer multiply by its weight without the gradient that the weight has meanwhile: whatever dense gradient it
    gets is of other uses then, and nothing is kept for that of the layer's own, which the chosen entries get."""

    @torch.compiler.disable
    def enter(self, module: nn.Module, args: Any) -> None:
        owner, attribute = self.places[0]
        weight = owner._parameters[attribute]
        if self.removed or weight is None or not (weight.is_leaf and weight.requires_grad):
            self.replaced.append(None)
            return
        self.replaced.append(weight)
        self._put(weight.detach())


class _Bypass(_StandIn):
    """Stands in for the head's weight while the whole model runs and is told to do without the head's forward.

    TRL's trainers call `model(.., fused_lm_head=True)` and multiply by `lm_head.weight` themselves: hooks on the head
    would see nothing, and its entries would silently get no gradient.
    """

    @torch.compiler.disable
    def enter_if_fused(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("fused_lm_head"):
            self.entries.before_forward(self.places[0][0], args)
            self.enter(module, args)


class _Eager:
    """Keeps torch.compile out of a module: code compiled for the weight itself would pass by what stands in for it."""

    COUNT = "_finepoint_eager"  # on the module: how many weights want it

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        own = vars(module)
        self.patched = isinstance(own.get("forward"), _Eagerly | None)  # one that others have put there stays theirs
        if self.patched:
            own[self.COUNT] = own.get(self.COUNT, 0) + 1
            own["forward"] = _Eagerly(module)

    def remove(self) -> None:
        if self.patched:
            own = vars(self.module)
            own[self.COUNT] -= 1
            if not own[self.COUNT]:
                del own[self.COUNT]
                if isinstance(own.get("forward"), _Eagerly):
                    del own["forward"]


class _Eagerly:
    """A module's own forward, for trainers that ask for its signature too; a copy of the module has one of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.module).forward, self.module))

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def _head(model: nn.Module) -> nn.Module | None:
    """The module of a language model's output matrix, where the model tells."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def _is_plain(embedding: nn.Module) -> bool:
    return embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
