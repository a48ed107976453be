"""Weights that are not simply there to be changed: on disk or the meta device until their layer runs, or of half
precision, where a float32 master keeps the small steps that rounding would lose."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from finepoint.errors import FinepointError


class Master(nn.Module):
    """The float32 value of a half-precision weight, which takes over the weight's gradients."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self._weight = (weight,)  # in a tuple: the weight belongs to the model, not to this module
        self.value = nn.Parameter(weight.detach().float())
        self.handle = weight.register_post_accumulate_grad_hook(partial(_move_gradient, self.value))

    @torch.no_grad()
    def follow_(self) -> None:
        """The weight takes the master's value, rounded once."""
        self._weight[0].detach().copy_(self.value.detach())


class Masters(nn.ModuleDict):
    """The masters of a model, which its weights follow after an optimizer's steps."""

    def check_fit(self, masters: Iterable[Master]) -> None:
        """A weight of any floating-point dtype can take its master's value."""

    def write_(self, masters: Iterable[Master]) -> None:
        """Has the weights take their masters' values."""
        for master in masters:
            master.follow_()


def _move_gradient(value: nn.Parameter, weight: Tensor) -> None:
    assert weight.grad is not None
    gradient = weight.grad.float()
    value.grad = gradient if value.grad is None else value.grad.add_(gradient)
    weight.grad = None


Weights = TypeVar("Weights", bound=Mapping[str, Tensor])


def in_memory(weights: Weights) -> Weights:
    """The same weights, of a model that holds the values of all of them.

    Raises:
        FinepointError: the first that has none to be read or changed is named.
    """
    for name, weight in weights.items():
        if weight.is_meta:
            raise FinepointError(absent(name))
    return weights


def absent(name: str) -> str:
    """What is said of a weight that is not in memory."""
    return f"{name} is not in memory (offloaded); load the model without offloading, e.g. with another device_map"


def is_outline(model: nn.Module) -> bool:
    """Whether the whole model is shapes without values, and nothing would bring these in when it runs."""
    if any("_hf_hook" in vars(module) for module in model.modules()):  # accelerate's
        return False
    return all(parameter.is_meta for parameter in model.parameters())


def names_of_weights(model: nn.Module) -> list[list[str]]:
    """The names of each weight of a model: several of a tied one."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, weight in model.named_parameters(remove_duplicate=False):
        groups[id(weight)].append(name)
    return list(groups.values())
