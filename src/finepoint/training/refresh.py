"""Choosing anew while a run goes on: when, what, and what is told of it."""

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finepoint.errors import FinepointError
from finepoint.models.quantised import is_quantised
from finepoint.runtime import interruption
from finepoint.selection.select import Budget, compared, largest
from finepoint.selection.targets import Targets, target_weights
from finepoint.training.context import TrainingContext, select_for
from finepoint.training.schedule import SCHEDULES as SCHEDULES  # its former place
from finepoint.training.schedule import Schedule as Schedule
from finepoint.training.schedule import schedule_of
from finepoint.training.settings import TrainConfig
from finepoint.tuner.tuner import SparseTuner

logger = logging.getLogger(__name__)


def refreshable(model: nn.Module, targets: Targets) -> dict[str, nn.Parameter]:
    """The weights among which entries can be chosen anew.

    Raises:
        FinepointError: one of them is quantised.
    """
    weights = target_weights(model, targets)
    if quantised := [name for name, weight in weights.items() if is_quantised(weight)]:
        raise FinepointError(f"{quantised[0]} is quantised, and entries of such weights are chosen once; "
                             "leave out --refresh")  # fmt: skip
    return weights


class Refresh:
    """Chooses entries anew before a step, by the schedule of a run; the model is scored as it stands then.

    Args:
        steps: those of the run.
        head: weights that are trained whole, all the while.
    """

    def __init__(
        self, config: TrainConfig, context: TrainingContext, tuner: SparseTuner, head: Sequence[str], steps: int
    ) -> None:
        assert config.refresh is not None
        self.schedule = schedule_of(config.refresh)
        self.config = config
        self.context = context
        self.tuner = tuner
        self.head = {name: tuner.entries[name].indices.cpu().long() for name in head}
        if config.indices and config.structure == "entry" and not isinstance(config.targets, dict):
            count = tuner.count - sum(len(indices) for indices in self.head.values())
            self.config = replace(config, density=None, count=count)
        if self.schedule.every >= steps:
            logger.warning("entries are chosen anew every %d steps, and the run ends after %d: the first choice holds",
                           self.schedule.every, steps)  # fmt: skip

    def choose_(self, done: int, steps: int, optimizer: Optimizer) -> dict[str, float]:
        """Chooses anew after `done` of `steps` steps, if it is time; says what that has changed, and the seconds."""
        if not self.schedule.due(done):
            return {}
        started = time.perf_counter()
        indices = self._replaced(done, steps) if self.schedule.fraction else self._chosen(done)
        # Ctrl-C waits until the step is done that trains them: whoever goes on from here would choose again.
        interruption.hold()
        counts = self.tuner.choose_({**indices, **self.head}, optimizer, keep=self.config.dropped == "keep")
        return {**counts, "refresh_seconds": round(time.perf_counter() - started, 3)}

    def _now(self, done: int) -> TrainConfig:
        """The configuration of a choice: with other scoring examples, and other draws, than those before."""
        return replace(self.config, seed=random.Random(f"{self.config.seed}:{done}").getrandbits(31))

    def _chosen(self, done: int) -> Mapping[str, Tensor]:
        """The entries that the run's rule chooses now."""
        return select_for(self._now(done), self.context)

    def _replaced(self, done: int, steps: int) -> Mapping[str, Tensor]:
        """The entries with a share of them, those that moved least, replaced by those with the largest gradient.

        As RigL (arXiv:1911.11134) and SpIEL (arXiv:2401.16405) do: what is dropped competes with all that is not
        trained, and stays if its gradient is large enough.
        """
        model, targets = self.context.model, self.config.targets
        among = target_weights(model, targets)
        names = [name for name in among if name not in self.head]
        left = {name: entries.indices.cpu().long() for name, entries in self.tuner.entries.items()
                if name not in self.head}  # fmt: skip
        plan = [Budget(tuple(name for name in self.head if name in among), 0)]
        for group in compared(model, names, self.config.scope, targets):
            moved = torch.cat([self.tuner.entries[name].delta.detach().abs().cpu() for name in group])
            going = int(self.schedule.rate(done, steps) * len(moved))
            staying = torch.zeros(len(moved), dtype=torch.bool)
            staying[largest(moved, len(moved) - going)] = True
            for name, stays in zip(group, staying.split([len(left[name]) for name in group]), strict=True):
                left[name] = left[name][stays]
            plan.append(Budget(tuple(group), going))
        if not any(budget.k for budget in plan):
            return left
        by_gradient = replace(self._now(done), rule="gradient", rule_options={}, density=None, count=None)
        grown = select_for(by_gradient, self.context, taken=[left], plan=plan)
        return left | {name: torch.cat([left[name], grown[name]]).sort().values for name in grown}
