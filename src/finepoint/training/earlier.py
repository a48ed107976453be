"""Earlier tasks as what is to be kept: EWC for several tasks (arXiv:1612.00796), at whatever is trained now; and of
LoRA O-LoRA's (arXiv:2310.14152), which needs no examples.

Each task has an anchor of its own: the Fisher information of its examples on the model as that task has left it, and
the values there. The entries of a task are known when it is its turn, so that their information is read then, from the
examples, which must still be at hand; for k entries an anchor is 2 k numbers.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finepoint.adapters.adapter import as_before_latest
from finepoint.adapters.entries import gather
from finepoint.adapters.peft import PEFT_TENSORS, PREFIX
from finepoint.data.batches import Collator, Row
from finepoint.errors import FinepointError
from finepoint.runtime.files import VERSION, write_atomic
from finepoint.runtime.tensor_files import opened
from finepoint.training.checkpoints import digest_of
from finepoint.training.keep import fisher_at
from finepoint.tuner.anchor import Anchor
from finepoint.tuner.interface import Method, Penalty

logger = logging.getLogger(__name__)
EARLIER = "earlier"  # what an adapter's `info` calls them
ANCHORS = "earlier.safetensors"  # in the folder of an adapter


@dataclass(frozen=True)
class EarlierTasks:
    """What a model was trained on before, one task after the other: an applied adapter each, in this order."""

    tasks: Mapping[str, Sequence[Row]]
    """the examples of each to read"""
    strength: float
    seed: int
    """of the labels that the model draws"""

    def facts(self) -> dict[str, Any]:
        """What an adapter says of them."""
        tasks = {name: {"examples": len(rows), "digest": digest_of(rows)} for name, rows in self.tasks.items()}
        return {"strength": self.strength, "tasks": tasks}

    def anchors(self, method: Method, collator: Collator, folder: Path) -> list[Anchor]:
        """The pull towards what each task has left, where its examples need it; the model is as it was afterwards.

        Entries of a weight that no task so far had trained are pulled to the base's values. Those of chosen entries are
        kept in the folder.

        Raises:
            FinepointError: other entries may be chosen on the way.
        """
        tuner, model = method.tuner, method.tuner.model
        if method.refresh:
            raise FinepointError("earlier tasks hold entries that are chosen once; leave out refresh")
        now, found = _values(tuner), {}
        for later, (name, rows) in enumerate(reversed(list(self.tasks.items()))):
            with as_before_latest(model, later):
                logger.info("what task %r needs of what is trained now:", name)
                fisher = fisher_at(tuner, model, collator.batches(rows, 1), self.seed)
                found[name] = Anchor(tuner.trained, fisher, self.strength, _start(tuner, now))
        ordered = {name: found[name] for name in self.tasks}
        if tuner.deltas:
            self._keep(ordered, folder)
        return list(ordered.values())

    def _keep(self, anchors: Mapping[str, Anchor], folder: Path) -> None:
        """Writes the anchors beside the adapter that they hold."""
        kept = {f"{task}.{name}.{what}": numbers.detach().cpu()
                for task, anchor in anchors.items()
                for what, found in (("fisher", anchor.fisher), ("start", anchor.start or {}))
                for name, numbers in found.items()}  # fmt: skip
        told = {VERSION: "1", EARLIER: json.dumps(self.facts())}
        write_atomic(folder / ANCHORS, partial(save_file, kept, metadata=told))


@dataclass(frozen=True)
class EarlierFactors:
    """Low-rank factors that a model was trained with before, merged into it: folders of PEFT, by task."""

    folders: Mapping[str, Path]
    strength: float

    def facts(self) -> dict[str, Any]:
        """What an adapter says of them."""
        return {"strength": self.strength, "tasks": {name: {} for name in self.folders}}

    def anchors(self, method: Method, collator: Collator, folder: Path) -> list[Penalty]:
        """A term for each task, see `Apart`."""
        return [Apart(method.tuner.trained, input_factors(place), self.strength) for place in self.folders.values()]


Earlier = EarlierTasks | EarlierFactors


class Apart:
    """`strength` x the sum of |A A_t^T|, over all layers: what reads a layer's input looks elsewhere than earlier.

    That is O-LoRA's in its authors' code (0.5 x the sum of absolute values there, the paper has squares).

    Args:
        trained: gives what is trained, by name, factors among them.
        earlier: A of the earlier task, (rank, in), by the same names.
    """

    def __init__(
        self, trained: Callable[[], Mapping[str, nn.Parameter]], earlier: Mapping[str, Tensor], strength: float
    ) -> None:
        self.trained, self.earlier, self.strength = trained, earlier, strength

    def holds(self) -> list[Tensor]:
        """The earlier factors."""
        return list(self.earlier.values())

    @torch.no_grad()
    def add_(self, step: int = 0) -> None:
        """Adds the term's gradient to the gradients of the factors."""
        trained = self.trained()
        for name, before in self.earlier.items():
            factor = trained[name]
            before = before.to(factor)
            push = (factor @ before.T).sign() @ before * self.strength
            factor.grad = push if factor.grad is None else factor.grad.add_(push)


def input_factors(folder: Path) -> dict[str, Tensor]:
    """The factors A of an adapter that PEFT wrote, by their names in a model that has one."""
    with opened(folder / PEFT_TENSORS) as file:
        names = [name for name in file.keys() if name.endswith(".lora_A.weight")]  # noqa: SIM118 - not a dict
        return {name.removeprefix(PREFIX).removesuffix("weight") + "default.weight": file.get_tensor(name)
                for name in names}  # fmt: skip


def _values(tuner: Any) -> dict[str, Tensor]:
    """The model's values of what is trained, by name, in the dtype that is trained in."""
    if tuner.deltas:
        return {name: gather(entries.weight, entries.indices).to(entries.delta.dtype)
                for name, entries in tuner.entries.items()}  # fmt: skip
    return {name: tuner.model.get_parameter(name).detach().to(value.dtype, copy=True)
            for name, value in tuner.trained().items()}  # fmt: skip


def _start(tuner: Any, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where the pull goes: for deltas, how far the model's values lie from those now; nothing where they are these."""
    values = _values(tuner)
    if not tuner.deltas:
        return values
    moved = {name: value - now[name] for name, value in values.items()}
    return moved if any(bool(distance.any()) for distance in moved.values()) else {}
