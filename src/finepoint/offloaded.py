"""Weights that are elsewhere than in memory: on disk, or on the meta device until their layer runs."""

from collections.abc import Iterable

from torch import Tensor, nn

from finepoint.errors import FinepointError

SAYS = "not in memory (offloaded)"
WAY_OUT = "load the model without offloading, e.g. with another device_map"


def check_in_memory(model: nn.Module, names: Iterable[str]) -> None:
    """Refuses a model of whose named weights one has no values here that could be read or changed.

    Raises:
        FinepointError: the first such weight is named.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name in parameters and is_absent(parameters[name]):
            raise FinepointError(f"{name} is {SAYS}; {WAY_OUT}")


def is_absent(weight: Tensor) -> bool:
    """Whether the weight has a shape and no values."""
    return weight.is_meta


def is_outline(model: nn.Module) -> bool:
    """Whether the whole model is shapes without values, and nothing would bring these in when it runs."""
    if any("_hf_hook" in vars(module) for module in model.modules()):  # accelerate's
        return False
    return all(is_absent(parameter) for parameter in model.parameters())
