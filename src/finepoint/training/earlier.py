"""Earlier tasks as what is to be kept: EWC for several tasks (arXiv:1612.00796), at whatever is trained now.

Each has an anchor of its own: the Fisher information of its examples on the model as that task has left it, and the
values there. The entries of a task are known when it is its turn, so that their information is read then, from the
examples, which must still be at hand; for k entries an anchor is 2 k numbers.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from finepoint.adapters.adapter import as_before_latest
from finepoint.adapters.entries import gather
from finepoint.data.batches import Collator, Row
from finepoint.errors import FinepointError
from finepoint.runtime.files import VERSION, write_atomic
from finepoint.training.checkpoints import digest_of
from finepoint.training.keep import fisher_at
from finepoint.tuner.anchor import Anchor
from finepoint.tuner.interface import Method

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
