"""What a training run asks of the method it drives: `Tuner`, which sparse tuning and every baseline offer alike."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from finepoint.adapters.adapter import SparseAdapter

NOTHING_ELSE: dict[str, Any] = {"vanished": 0, "audit": None}
"""`facts` of a tuner that rounds nothing away and whose gradients are PyTorch's own"""


class Tuner(Protocol):
    """Holds a model in training: what is trained, what has changed, and the way back to the base's exact bits."""

    model: nn.Module

    @property
    def count(self) -> int:
        """Trained numbers in all."""

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer steps and a checkpoint keeps, by name: deltas, whole weights, low-rank factors."""

    def follow_(self) -> None:
        """Has the model's weights follow the trained parameters. Only needed after changing those by hand."""

    def changed(self) -> int:
        """How many entries of the model's weights hold (for LoRA: would hold) another stored value than the base's."""

    def norm(self, exclude: Iterable[str] = ()) -> float:
        """The Euclidean norm of the change of the model's weights, without those excluded (a new head has no base)."""

    def facts(self) -> dict[str, Any]:
        """What a run's record says of it besides: `vanished` (moved, and lost to rounding), `audit`; JSON-ready."""

    def adapter(
        self, store: str = "auto", full: Iterable[str] = (), info: Mapping[str, Any] | None = None
    ) -> SparseAdapter:
        """The change so far, as an adapter on the CPU; `SparseTuner.adapter` explains the arguments."""

    def save(self, folder: Path, adapter: SparseAdapter, compact: bool) -> list[Path]:
        """Writes the change, which is also `adapter`, in the method's own form; returns the files with the tensors."""

    def revert_(self) -> None:
        """Takes the training back: the model computes what the base computes, and holds its exact bits."""

    def close(self) -> None:
        """Gives back the plain model; closing twice is harmless."""


@dataclass(frozen=True)
class Method:
    """A tuner, and what else its method brings to a run."""

    tuner: Tuner
    penalty: Callable[[], None] | None = None
    """adds the gradient of a term beside the loss to the trained parameters' gradients, once for each step"""
    optimizer: Optimizer | None = None
    """steps the trained parameters; AdamW where None"""
    after_step: Callable[[], None] | None = None
    """called after each step of the optimizer"""
    refresh: Any = None
    """chooses entries anew between steps, of a tuner that can; see `training.refresh.Refresh`"""
