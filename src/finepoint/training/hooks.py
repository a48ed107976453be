"""What is hooked onto a model's modules, so that trained entries get gradients and weights follow their deltas.

Plain linear layers and embeddings keep their forward. Any other weight (norms, biases, stacked experts, subclasses with
a forward of their own) stands in for itself while its module runs, as an identity whose backward gathers.
"""

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finepoint.adapters.entries import gather
from finepoint.training.trained import TrainedEntries


def attach(model: nn.Module, entries: TrainedEntries) -> list[Any]:
    """Hooks every module that uses the weight (several, if it is tied)."""
    handles: list[Any] = []
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not entries.weight:
                continue
            handles.append(module.register_forward_pre_hook(entries.before_forward))
            # A subclass with a forward of its own may scale or reuse the weight: the stand-in is right for any use.
            forward = type(module).forward
            if attribute == "weight" and forward is nn.Linear.forward:
                handles.append(module.register_forward_hook(entries.after_linear, with_kwargs=True))
            elif attribute == "weight" and forward is nn.Embedding.forward and _is_plain(module):
                handles.append(module.register_forward_hook(entries.after_embedding, with_kwargs=True))
            else:
                stand_in = _StandIn(entries, module, attribute)
                handles.append(module.register_forward_pre_hook(stand_in.enter))
                handles.append(module.register_forward_hook(stand_in.leave, always_call=True))
                handles.append(_Eager(module))
            if module is _head(model):
                bypass = _Bypass(entries, module, attribute)
                handles.append(model.register_forward_pre_hook(bypass.enter_if_fused, with_kwargs=True))
                handles.append(model.register_forward_hook(bypass.leave, always_call=True))
    return handles


class _GatheredWeight(torch.autograd.Function):
    """The weight itself; its backward keeps the gradient at the chosen entries and drops the rest."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, delta: Tensor, entries: TrainedEntries) -> Tensor:
        ctx.entries = entries
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dense: Tensor) -> tuple[Tensor | None, ...]:
        ctx.entries.stale = True
        return None, gather(dense, ctx.entries.indices).to(ctx.entries.delta.dtype), None


class _StandIn:
    """Puts the gathering identity in a weight's place while its module runs, for modules of any kind."""

    def __init__(self, entries: TrainedEntries, owner: nn.Module, attribute: str) -> None:
        self.entries = entries
        self.owner = owner
        self.attribute = attribute
        self.replaced: list[Tensor | None] = []

    @torch.compiler.disable
    def enter(self, module: nn.Module, args: Any) -> None:
        weight = self.owner._parameters[self.attribute]
        self.replaced.append(weight)
        if self.entries.wanted() and weight is not None:
            stand_in = _GatheredWeight.apply(weight.detach(), self.entries.delta, self.entries)
            self.owner._parameters[self.attribute] = stand_in

    @torch.compiler.disable
    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.replaced:  # empty where a hook before `enter` has raised
            self.owner._parameters[self.attribute] = self.replaced.pop()  # type: ignore[assignment]


class _Bypass(_StandIn):
    """Stands in for the head's weight while the whole model runs and is told to do without the head's forward.

    TRL's trainers call `model(.., fused_lm_head=True)` and multiply by `lm_head.weight` themselves: hooks on the head
    would see nothing, and its entries would silently get no gradient.
    """

    @torch.compiler.disable
    def enter_if_fused(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("fused_lm_head"):
            self.entries.before_forward(self.owner, args)
            self.enter(module, args)


class _Eager:
    """Keeps torch.compile out of a module: code compiled for the weight itself would pass by what stands in for it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.patched = "forward" not in vars(module)
        if self.patched:
            vars(module)["forward"] = _Eagerly(module)

    def remove(self) -> None:
        if self.patched:
            vars(self.module).pop("forward", None)


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
