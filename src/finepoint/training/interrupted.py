"""What a run that is broken off leaves: its last good step, in an adapter that says so and in a checkpoint."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finepoint.runtime import distributed, interruption
from finepoint.runtime.interruption import BrokenOff

UNFINISHED = "unfinished"  # what an adapter's `info` calls it


def marked(step: int, steps: int) -> dict[str, str]:
    """What an adapter says of itself after `step` of `steps`; nothing once all are done."""
    return {UNFINISHED: f"step {step} of {steps}"} if step < steps else {}


def left_by(last: "LastStep", keep: Callable[[], object], folder: Path) -> BrokenOff | None:
    """Keeps what the last good step of an interrupted run has left; says what, or None where there is nothing.

    Args:
        keep: writes the adapter as it stands into the run's folder.
    """
    if not last.is_whole():
        return None
    interruption.hold()
    try:
        keep()
        resumable = last.checkpoint()
    finally:
        interruption.let_go(feel=False)
    steps = last.trainer.args.max_steps
    what = "the adapter so far, marked as unfinished," if marked(last.done, steps) else "the adapter"
    return BrokenOff(f"after step {last.done} of {steps}; {what} is in {folder}", resumable)


class LastStep(TrainerCallback):
    """Knows the last good step of a run, and how to go on from it as if nothing had been.

    From before the optimizer's step until the step is logged ctrl-C waits: deltas, optimizer, schedule and log are then
    of one step. Comes after the callbacks that log.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.done = 0
        self.stepping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._note(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        interruption.hold()  # first: an interruption here finds the last step whole
        self.stepping = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.stepping and logs and "loss" in logs:
            self._note(state)
            self.stepping = False
            interruption.let_go()

    def _note(self, state: Any) -> None:
        self.done = state.global_step
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._random = (random.getstate(), numpy.random.get_state(), torch.get_rng_state(), devices)

    def is_whole(self) -> bool:
        """Whether what is trained is what a step has left, with something to keep, by a process of its own."""
        return self.done > 0 and not self.stepping and distributed.count() == 1

    def checkpoint(self) -> bool:
        """Writes a checkpoint of the last good step, if there is none and steps are left; whether one is there."""
        trainer = self.trainer
        if self.done >= trainer.args.max_steps:
            return False
        if not (Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.done}").is_dir():
            python, arrays, cpu, devices = self._random
            random.setstate(python)
            numpy.random.set_state(arrays)
            torch.set_rng_state(cpu)
            if devices:
                torch.cuda.set_rng_state_all(devices)
            trainer._save_checkpoint(trainer.model, None)
        return True
