"""Trackers of experiments (TensorBoard, Trackio, Weights & Biases, MLflow), through transformers' own callbacks.

Ours to add: names that tell runs apart and hold over a resume, folders inside the output, what the run was asked to do,
and an end for runs that fail.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finepoint.errors import needing
from finepoint.runtime import distributed
from finepoint.runtime.files import read_json, write_json
from finepoint.training.settings import Training

PROJECT = "finepoint"
EXTRAS = {"tensorboard": "tracking", "trackio": "tracking", "wandb": "wandb", "mlflow": "mlflow"}
FOLDER = "tensorboard"
NAME = "tracking.json"  # what a resumed run must be called


def require(trackers: Sequence[str]) -> None:
    """Refuses trackers that are not installed.

    Raises:
        FinepointError: the package and the extra are named.
    """
    for tracker in trackers:
        with needing(f"--report-to {tracker}", EXTRAS[tracker]):
            import_module(tracker)


def run_name(folder: Path, resumed: bool) -> str:
    """What the run in a folder is called: the folder's name and the time it was begun, also after a resume."""
    file = folder / NAME
    if resumed and file.is_file():
        return str(read_json(file)["name"])
    name = f"{folder.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    write_json(file, {"name": name})
    return name


@contextmanager
def tracked(config: Training, folder: Path, done: int | None) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """What TrainingArguments need, and the callbacks to add, for as long as the run takes; nothing without trackers.

    Args:
        done: the step of the checkpoint that a resumed run goes on from.
    """
    if not config.report_to:
        yield {"report_to": "none"}, []
        return
    first = distributed.is_first()  # of several processes one reports
    name = run_name(folder, done is not None) if first else None
    writer = _writer(folder / FOLDER, done) if first and "tensorboard" in config.report_to else None
    others = [tracker for tracker in config.report_to if tracker != "tensorboard"]
    settings = {"report_to": others or "none", "run_name": name, "project": PROJECT}
    failed = True
    with _environment(folder, name), redirect_stdout(sys.stderr):  # stdout is for results
        try:
            yield settings, [*_tensorboard(writer), Facts(config, writer)]
            failed = False
        finally:
            for tracker in others if first else ():
                END[tracker](import_module(tracker), failed)
            if writer:
                writer.close()


class Facts(TrainerCallback):
    """Tells the trackers what finepoint was asked to do; of the trainer's own settings transformers tells them."""

    def __init__(self, config: Training, writer: Any) -> None:
        self.config = config
        self.writer = writer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        facts = {f"finepoint/{key}": value for key, value in asdict(self.config).items()}
        if self.writer:
            self.writer.add_text("finepoint", f"```json\n{json.dumps(asdict(self.config), indent=1)}\n```")
        for tracker in self.config.report_to:
            if tracker in TELL:
                TELL[tracker](import_module(tracker), facts)


TELL: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "trackio": lambda trackio, facts: trackio.config.update(facts),
    "wandb": lambda wandb, facts: wandb.config.update(facts, allow_val_change=True),
    "mlflow": lambda mlflow, facts: mlflow.log_params({key: str(value) for key, value in facts.items()}),
}


def _end_trackio(trackio: Any, failed: bool) -> None:
    if trackio.context_vars.current_run.get() is not None:
        trackio.finish()


END: dict[str, Callable[[Any, bool], Any]] = {
    "trackio": _end_trackio,
    "wandb": lambda wandb, failed: wandb.finish(exit_code=int(failed)),
    "mlflow": lambda mlflow, failed: mlflow.end_run(status="FAILED" if failed else "FINISHED"),
}


def _writer(folder: Path, done: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    if done is None:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, whose output this one replaces
    # What was logged after the checkpoint is about to happen again: TensorBoard forgets it.
    return SummaryWriter(str(folder), purge_step=None if done is None else done + 1)


def _tensorboard(writer: Any) -> list[Any]:
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(writer)] if writer else []


@contextmanager
def _environment(folder: Path, name: str | None) -> Iterator[None]:
    """The settings that only the environment can give to Weights & Biases and MLflow, where the user's does not."""
    wanted = {
        "WANDB_PROJECT": PROJECT, "WANDB_DIR": str(folder), "WANDB_RUN_ID": name, "WANDB_RESUME": "allow",
        "MLFLOW_EXPERIMENT_NAME": PROJECT,
    }  # fmt: skip
    ours = {key: value for key, value in wanted.items() if value and key not in os.environ}
    os.environ |= ours
    try:
        yield
    finally:
        for key in ours:
            os.environ.pop(key, None)
