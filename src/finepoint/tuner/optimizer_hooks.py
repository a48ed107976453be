"""Weights that follow what is trained beside them: around every torch optimizer's step, by two global hooks."""

import logging
import weakref
from collections.abc import Iterator
from functools import lru_cache
from math import inf
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from finepoint.errors import FinepointError
from finepoint.runtime import distributed
from finepoint.selection.rates import slow
from finepoint.tuner.finite import refuse_not_finite

logger = logging.getLogger(__name__)
_LIVE: "weakref.WeakSet[nn.ModuleDict]" = weakref.WeakSet()


def follow_after_steps(container: nn.ModuleDict) -> None:
    """From now on the container's `write_(modules)` is called after each step of a torch optimizer, with those of its
    modules whose parameters it steps.

    Such an optimizer is stopped before its step, with nothing changed, where a gradient is not finite, a container's
    `check_fit(modules)` refuses or its `spot_checks` do; each module's `pull_()` adds to its gradient before.
    Optimizers of other parameters are none of our business, whatever has become of the modules.
    """
    _LIVE.add(container)
    _register()


def stop_following(container: nn.ModuleDict) -> None:
    """Ends what `follow_after_steps` began."""
    _LIVE.discard(container)


def _stepped(optimizer: Optimizer) -> Iterator[tuple[nn.ModuleDict, dict[str, nn.Module]]]:
    """Each container with the modules, by name, of which the optimizer steps a parameter."""
    live = list(_LIVE)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} if live else set()
    for container in live:
        yield container, {name: member for name, member in container.items()
                          if not stepped.isdisjoint(map(id, member._parameters.values()))}  # fmt: skip


def _rate(optimizer: Optimizer, members: dict[str, nn.Module]) -> float:
    """The largest learning rate of the modules' parameters, before a schedule, if there is one; infinite where the
    optimizer tells none."""
    ours = {id(parameter) for member in members.values() for parameter in member.parameters(recurse=False)}
    return max(float(group.get("initial_lr", group.get("lr", inf))) for group in optimizer.param_groups
               if any(id(parameter) in ours for parameter in group["params"]))  # fmt: skip


def _pull_(member: Any, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Adds what pulls a module's parameters back to their gradients.

    Raises:
        FinepointError: these are not made yet, or parts of them lie elsewhere.
    """
    if kwargs.get("closure") or any(callable(given) for given in args[1:]):
        raise FinepointError("a closure makes the gradients within optimizer.step, where what is to be kept cannot be "
                             "added; call backward before step(), or leave out protect")  # fmt: skip
    if distributed.is_sharded(member.delta):
        raise FinepointError("the model was sharded after sparsify(protect=..), and what pulls its entries back was "
                             "not; call sparsify after fully_shard")  # fmt: skip
    member.pull_(getattr(optimizer, "grad_scale", None))


@lru_cache(maxsize=1)
def _register() -> None:
    """Registers the hooks, once: they are never taken away, for a hook that goes while torch walks through them would
    break the walk."""

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        scaled = getattr(optimizer, "found_inf", None) is not None
        for container, members in _stepped(optimizer):
            container.check_fit(members.values())  # type: ignore[operator]
            for member in members.values():
                if member._buffers.get("pull") is not None:
                    _pull_(member, optimizer, args, kwargs)
            # A gradient scaler has looked already, and the step will leave out what it found. `model/norm/weight` holds
            # the delta of model.norm.weight.
            trained = {name.replace("/", "."): parameter for name, member in members.items() if not scaled
                       for parameter in member._parameters.values() if parameter is not None}  # fmt: skip
            refuse_not_finite(trained, "; the step was not taken and the weights are as they were")
            if members and (checks := getattr(container, "spot_checks", None)):
                checks.before_step()
            if members and (wanted := getattr(container, "wanted", None)):
                container.wanted = None  # type: ignore[assignment]
                if told := slow(_rate(optimizer, members), *wanted):
                    logger.warning(told)

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for container, members in _stepped(optimizer):
            container.write_(members.values())  # type: ignore[operator]
            if members and (checks := getattr(container, "spot_checks", None)):
                checks.stepped()

    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)
