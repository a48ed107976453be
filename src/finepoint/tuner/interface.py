"""What a training run asks of the method it drives: `Tuner`, which sparse tuning and every baseline offer alike."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.format import TENSORS, write
from finepoint.errors import FinepointError
from finepoint.tuner.optimizers import MovingAverage


class Tuner(Protocol):
    """Holds a model in training: what is trained, what has changed, and the way back to the base's exact bits.

    What stands last not every method can do: one that cannot refuses in one line.
    """

    model: nn.Module
    deltas: bool = False
    """whether what is trained are changes of the base's numbers, which begin at 0"""
    whole: Collection[str] = ()
    """weights that are stored whole, which lie on nothing of the base"""

    @property
    def count(self) -> int:
        """Trained numbers in all."""
        return sum(parameter.numel() for parameter in self.trained().values())

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer steps and a checkpoint keeps, by name: deltas, whole weights, low-rank factors."""
        ...

    def follow_(self) -> None:
        """Has the model's weights follow the trained parameters. Only needed after changing those by hand."""
        return  # where the model computes with these themselves

    @torch.no_grad()
    def put_(self, values: Mapping[str, Tensor]) -> None:
        """Gives what is trained these values, by name, and has the weights follow."""
        for name, value in self.trained().items():
            value.copy_(values[name])
        self.follow_()

    def changed(self) -> int:
        """How many entries of the model's weights hold (for LoRA: would hold) another stored value than the base's."""
        ...

    def norm(self, exclude: Iterable[str] = ()) -> float:
        """The Euclidean norm of the change of the model's weights, without those excluded (a new head has no base)."""
        ...

    def adapter(
        self, store: str = "auto", full: Iterable[str] = (), info: Mapping[str, Any] | None = None
    ) -> SparseAdapter:
        """The change so far, as an adapter on the CPU; `SparseTuner.adapter` explains the arguments."""
        ...

    def save(self, folder: Path, adapter: SparseAdapter, compact: bool = False) -> list[Path]:
        """Writes the change, which is also `adapter`, in the method's own form; returns the files with the tensors."""
        write(adapter, folder, compact)
        return [folder / TENSORS]

    def revert_(self) -> None:
        """Takes the training back: the model computes what the base computes, and holds its exact bits."""

    def close(self) -> None:
        """Gives back the plain model; closing twice is harmless."""

    def facts(self) -> dict[str, Any]:
        """What a run's record says of it besides: `vanished` (moved, and lost to rounding), `audit`; JSON-ready."""
        return {"vanished": 0, "audit": None}  # nothing is rounded away, and the gradients are PyTorch's own

    def as_it_is(self) -> Callable[[], AbstractContextManager[None]]:
        """Contexts in which the model computes what it computes now, before it is trained: DPO's reference."""
        raise self._cannot("give a reference model")

    def start_from_(self, folder: Path) -> None:
        """Goes on from what `save` wrote of a method like this one; what `revert_` goes back to is the base still."""
        raise self._cannot("go on from another adapter")

    def scaler(self) -> Callable[[float], None]:
        """What scales the change as it is now: at 1 it is that again, to the bit, at 0 the model is the base."""
        raise self._cannot("be scaled")

    def round_(self, dtype: torch.dtype) -> None:
        """Rounds what is trained to a narrower dtype, as if nothing wider were kept."""
        raise self._cannot("be rounded after its steps")

    def train_together(self) -> None:
        """From now on several processes train, each on batches of its own, and call `average_` before each step."""
        raise self._cannot("be trained by several processes")

    def average_(self) -> None:
        """Every gradient becomes the mean over all processes."""
        raise self._cannot("be trained by several processes")

    @contextmanager
    def unaveraged(self) -> Iterator[None]:
        """Inside, gradients are those of this process alone."""
        yield

    def places(self) -> dict[str, Tensor]:
        """Which entries are trained, where these can be chosen anew: what a checkpoint needs beside the parameters."""
        raise self._cannot("choose entries anew")

    def place_(self, places: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        """Goes back to what `places` gave, with the optimizer's state; nothing has changed there."""
        raise self._cannot("choose entries anew")

    def _cannot(self, what: str) -> FinepointError:
        return FinepointError(f"{type(self).__name__} cannot {what}; train chosen entries instead")


class Penalty(Protocol):
    """A term beside the loss: `strength` times something."""

    strength: float
    """may change from step to step"""

    def add_(self, step: int) -> None:
        """Adds its gradient to those of what is trained: once for each step, the one after so many."""

    def holds(self) -> list[Tensor]:
        """What it keeps in memory for that."""
        ...


class DisturbanceBudget(Protocol):
    """A budget of disturbance that is kept along a run; `training.budget.Holding` is one, as a callback."""

    tell: Callable[[dict[str, float]], None]
    """tells of a measurement"""

    def settle_(self) -> dict[str, Any]:
        """At the end: scales the change down to the budget, if it is above it; what a record says of it."""
        ...


@dataclass(frozen=True)
class Method:
    """A tuner, and what else its method brings to a run."""

    tuner: Tuner
    penalty: Penalty | None = None
    anchors: Sequence[Penalty] = ()
    """further terms, of earlier tasks"""
    steps: Mapping[str, Tensor] = field(default_factory=dict)
    """by what each step of what is trained is multiplied, by name; all of it is taken where nothing is said"""
    average: MovingAverage | None = None
    """what is left of it in place of the last step's"""
    optimizer: Optimizer | None = None
    """steps the trained parameters; AdamW where None"""
    after_step: Callable[[], None] | None = None
    """called after each step of the optimizer"""
    refresh: Callable[[int, int, Optimizer], dict[str, float]] | None = None
    """before each step, of a tuner with `places`: (steps done, steps in all, optimizer) may choose entries anew, and
    says what that has changed; empty where it is not time"""
    holding: DisturbanceBudget | None = None
    """keeps a budget of disturbance along the run"""

    def as_it_is_left(self) -> AbstractContextManager[None]:
        """Inside, the model is what the run would leave now: the average, if one is taken."""
        return self.average.inside() if self.average else nullcontext()
