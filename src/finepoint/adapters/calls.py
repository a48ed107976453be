"""Whether a model uses a layer by calling it and in no other way: PEFT adapts the call, a merged weight all of it."""

import logging
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finepoint.inputs import made_up
from finepoint.probing import undisturbed

logger = logging.getLogger(__name__)


def used_beside_calls(model: nn.Module, layers: Collection[str]) -> list[str]:
    """The layers whose weight the model uses otherwise than by calling the layer, as far as an input meets them.

    One forward pass of an input that is made up, also on the meta device; where none can be, none is found.

    Args:
        layers: names of modules with a `weight`.
    """
    named = {name: model.get_submodule(name) for name in layers}
    watch = _Watch({id(module.weight): name for name, module in named.items()})
    # That of `nn.MultiheadAttention`, which hands its weight to a function: it may lie where no input comes.
    watch.found |= {name for name, module in named.items() if isinstance(module, NonDynamicallyQuantizableLinear)}
    inputs = made_up(model)
    if inputs is None:
        return sorted(watch.found)
    with ExitStack() as stack:
        for name, module in named.items():
            stack.callback(module.register_forward_pre_hook(partial(watch.enter, name), prepend=True).remove)
            stack.callback(module.register_forward_hook(partial(watch.leave, name), always_call=True).remove)
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Answers())
        stack.enter_context(watch)
        try:
            model(**inputs)
        except Exception as error:  # whatever a model says of an input that it does not take
            logger.debug("no input could be made up: %s", error)
    return [name for name in named if name in watch.found]


class _Answers(TorchDispatchMode):
    """What a model asks of numbers that are not there is made up: a bool is true, a number 1."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        return operation(*args, **(kwargs or {}))


class _Watch(TorchFunctionMode):
    """Notes the weights that anything is computed of while their layers are not running."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.running: list[str] = []
        self.found: set[str] = set()

    def enter(self, name: str, *_: Any) -> None:
        self.running.append(name)

    def leave(self, name: str, *_: Any) -> None:
        self.running.remove(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # not what is asked of a shape or dtype
            given = (self.weights.get(id(leaf)) for leaf in tree_leaves((args, kwargs)))
            self.found |= {name for name in given if name and name not in self.running}
        return result
