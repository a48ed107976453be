"""Weights that follow what is trained beside them: after every torch optimizer's step, by one global hook."""

import weakref
from functools import lru_cache
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_LIVE: "weakref.WeakSet[nn.ModuleDict]" = weakref.WeakSet()


def follow_after_steps(container: nn.ModuleDict) -> None:
    """From now on `follow_()` of every module in the container is called after each step of any torch optimizer."""
    _LIVE.add(container)
    _register()


def stop_following(container: nn.ModuleDict) -> None:
    """Ends what `follow_after_steps` began."""
    _LIVE.discard(container)


@lru_cache(maxsize=1)
def _register() -> None:
    """Registers the hook, once: it is never taken away, for a hook that goes while torch walks through them would
    break the walk."""

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for container in list(_LIVE):
            for member in container.values():
                member.follow_()  # type: ignore[operator]

    register_optimizer_step_post_hook(after_step)
