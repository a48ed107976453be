"""What a run does from step to step, however it is trained: its log, its limits, and what an interruption leaves.

The log holds a JSON object a line, each with its step; a resumed run goes on where its checkpoint stands. What a run
that is broken off leaves is its last good step, in an adapter that says so and in a checkpoint.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finepoint.errors import FinepointError
from finepoint.runtime import distributed, interruption
from finepoint.runtime.files import write_json
from finepoint.runtime.interruption import BrokenOff
from finepoint.runtime.progress import Bar
from finepoint.training.logfile import UNDER_WAY as UNDER_WAY  # its former place
from finepoint.training.logfile import append, cut_log_, figures
from finepoint.training.logfile import read_log as read_log  # its former place
from finepoint.tuner.finite import NotFiniteError, refuse_not_finite

logger = logging.getLogger(__name__)
UNFINISHED = "unfinished"  # what an adapter's `info` calls it


@dataclass(frozen=True)
class Tokens:
    """What has been trained on so far, and how long it took."""

    real: int = 0
    places: int = 0
    """tokens and padding"""
    seconds: float = 0.0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.real + other.real, self.places + other.places, self.seconds + other.seconds)

    def __sub__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.real - other.real, self.places - other.places, self.seconds - other.seconds)

    def of_all(self) -> "Tokens":
        """Those of all processes together; the seconds are this one's."""
        sums = torch.tensor([self.real, self.places], device=distributed.device())
        distributed.add_up_(sums)
        real, places = sums.tolist()
        return Tokens(real, places, self.seconds)

    def rates(self) -> dict[str, float]:
        """Real tokens a second, and the share of all places that is padding; nothing where they are not counted."""
        if not self.places:
            return {}
        return {
            "tokens_per_second": round(self.real / self.seconds, 1),
            "padding": round(1 - self.real / self.places, 4),
        }


class Watch(TrainerCallback):
    """Stops before a gradient that is not finite reaches the weights; has entries chosen anew; writes the log; moves
    the progress bar; keeps the parameters of the best evaluation and stops when patience is out.

    Args:
        trainer: a trainer with `SparseCheckpoints`.
        best: file for the parameters with the lowest validation loss so far; none are kept where None.
        patience: evaluations without a lower validation loss after which training stops.
        summed_up: whether the log's last line is of the run as a whole.
    """

    def __init__(
        self, trainer: Any, log: Path, bar: Bar, best: Path | None = None, patience: int | None = None,
        summed_up: bool = True,
    ) -> None:  # fmt: skip
        self.trainer = trainer
        self.log = log
        self.bar = bar
        self.best = best
        self.patience = patience
        self.summed_up = summed_up
        self.steps = 0
        self.logged = Tokens()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()
        self.bar.start(state.global_step)
        if distributed.is_first():
            cut_log_(self.log, state.global_step)
            write_json(self.log.with_name(UNDER_WAY), {"steps": state.max_steps, "from": state.global_step})

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if refresh := self.trainer.method.refresh:
            self.trainer.tell(refresh(state.global_step, state.max_steps, optimizer))
        self.step_started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trained = self.trainer.method.tuner.trained()
        refuse_not_finite(trained, f" at step {state.global_step + 1}")
        if all(parameter.grad is None for parameter in trained.values()):
            raise FinepointError("no chosen entry received a gradient: the loss does not depend on the target weights")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if after_step := self.trainer.method.after_step:
            after_step()
        if average := self.trainer.method.average:
            average.step_()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.tokens += Tokens(seconds=time.perf_counter() - self.step_started)
        self.steps += 1
        self.bar(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # From the history, which a checkpoint brings along, so that a resumed run judges as if it had never stopped.
        losses = [loss for _, loss in validation_losses(state)]
        first_best = losses.index(min(losses))
        if self.best and first_best == len(losses) - 1:
            distributed.on_first(partial(self.trainer.keep, self.best))
        if out_of_patience(losses, self.patience):
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if math.isinf((logs or {}).get("grad_norm") or 0.0):
            raise NotFiniteError(f"the norm of the gradient became infinite at step {state.global_step}, and clipping "
                                 "has made it 0")  # fmt: skip
        found = {
            key: value for key, value in (logs or {}).items() if not isinstance(value, float) or math.isfinite(value)
        }
        record = {"step": state.global_step, "seconds": round(time.perf_counter() - self.started, 3), **found}
        if "loss" in record:
            record |= (self.trainer.tokens - self.logged).rates()
            self.logged = self.trainer.tokens
        if distributed.is_first() and ("loss" in record or self.summed_up):
            append(self.log, record)
            _tell(record, state.max_steps, self.bar)


def _tell(record: Mapping[str, Any], steps: int, bar: Bar) -> None:
    """Beside the bar, and as a line of the log where it is worth one."""
    step = record["step"]
    if "loss" in record:
        bar.tell(figures(record), record["loss"])
    if "eval_loss" in record:
        last = f"{bar.points[-1]:.4f}" if bar.points else "-"
        bar.note({"step": step, "training loss": last, "validation loss": f"{record['eval_loss']:.4f}"})
        logger.info("step %d: validation loss %.4f", step, record["eval_loss"])
    elif "grown" in record:
        logger.info("before step %d chosen anew: %d entries stayed, %d gave way to %d others, in %.1f s", step,
                    record["stayed"], record["dropped"], record["grown"], record["refresh_seconds"])  # fmt: skip
    elif "loss" in record and (step % 10 == 0 or step == steps):
        left = f", {bar.left()} left" if step < steps and bar.left() else ""
        logger.info("step %d of %d: %s%s", step, steps, figures(record), left)


def refreshes(state: TrainerState) -> list[dict[str, Any]]:
    """Every choice made anew so far: the step before which, what it changed, and the seconds it took."""
    told = ("step", "stayed", "dropped", "grown", "refresh_seconds")
    return [{key: record[key] for key in told} for record in state.log_history if "grown" in record]


def validation_losses(state: TrainerState) -> list[tuple[int, float]]:
    """The step and the loss of every evaluation so far."""
    return [(record["step"], record["eval_loss"]) for record in state.log_history if "eval_loss" in record]


def out_of_patience(losses: Sequence[float], patience: int | None) -> bool:
    """Whether the last so many evaluations had no lower loss than one before them."""
    if not patience or not losses:
        return False
    return len(losses) - 1 - losses.index(min(losses)) >= patience


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
