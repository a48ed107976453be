"""Weights that are elsewhere than in memory: on disk, or on the meta device until their layer runs."""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from finepoint.errors import FinepointError

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
