"""Tasks of EleutherAI's lm-evaluation-harness on a model in memory, adapted or not (the extra `finepoint[lm-eval]`)."""

import copy
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finepoint.data.tokens import asking
from finepoint.errors import FinepointError, needing
from finepoint.runtime.settings import did_you_mean
from finepoint.selection.passes import evaluating
from finepoint.tuner.finite import refuse_not_numbers

BATCH = 16
NO_TASK = "; `lm-eval ls tasks` lists its own; those of a folder need --include-path"
CHATTY = ("lm_eval", "datasets", "httpx", "filelock")


@dataclass(frozen=True)
class Harness:
    """Tasks that are known to load."""

    tasks: tuple[str, ...]
    manager: Any
    """lm-evaluation-harness's TaskManager"""
    limit: int | None = None
    """so many documents of each task, its first"""

    @staticmethod
    def of(tasks: Sequence[str], include_path: str | None = None, limit: int | None = None) -> "Harness":
        """Finds the tasks, among lm-evaluation-harness's own and those of a folder, and loads their data once to see.

        Args:
            tasks: names of tasks, groups or tags, also several in a string with commas between.
            include_path: a folder with YAML files of tasks; they hide lm-evaluation-harness's own of the same name.
            limit: at most so many documents of each task.

        Raises:
            FinepointError: lm-evaluation-harness is not installed, there is no such folder or task, or its data cannot
                be loaded.
        """
        names = tuple(name.strip() for text in tasks for name in text.split(",") if name.strip())
        if include_path and not Path(include_path).is_dir():
            raise FinepointError(f"--include-path {include_path} is no folder; give the one with the tasks' YAML files")
        with _quiet():
            return Harness(names, _manager(names, include_path), limit)

    def scores(self, model: Any, tokenizer: Any, max_length: int) -> dict[str, dict[str, float]]:
        """{task: {"acc", "acc_stderr", .., "n"}} of the model as it is, groups of tasks included.

        Metrics have lm-evaluation-harness's names; of an answer that was extracted by a filter, `metric,filter`.
        """
        found = self.results(model, tokenizer, max_length)
        scores = {task: _plain(metrics) for task, metrics in found["results"].items()}
        for task, count in found["n-samples"].items():
            scores[task]["n"] = count["effective"]
        return scores

    def results(self, model: Any, tokenizer: Any, max_length: int) -> dict[str, Any]:
        """All that lm-evaluation-harness says, with every document's answers under `samples`.

        Raises:
            FinepointError: the model's logits are no numbers, of which the harness would make scores.
        """
        with _quiet(), evaluating(model):
            with torch.no_grad():
                refuse_not_numbers(model(input_ids=torch.arange(8, device=model.device)[None]).logits)
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            # The model continues its prompts, so no end token may close them; and it may set a padding token.
            lm = HFLM(model, tokenizer=copy.deepcopy(asking(tokenizer, model)), batch_size=BATCH, max_length=max_length)
            return simple_evaluate(lm, tasks=list(self.tasks), task_manager=self.manager, limit=self.limit)


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """A TaskManager that can load the tasks."""
    with needing("--tasks", "lm-eval"):
        from lm_eval.tasks import TaskManager
    # To know its own tasks it reads 13,000 files: only where the folder alone does not do.
    for defaults in (False, True) if include_path else (True,):
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown and not defaults:
            continue
        if unknown:
            raise FinepointError(f"lm-evaluation-harness knows no task {unknown[0]!r}"
                                 + (did_you_mean(unknown[0], manager.all_tasks, most=3) or NO_TASK))  # fmt: skip
        try:
            manager.load(list(names))
            return manager
        except Exception as error:  # whatever a task's file, or the loading of its data, makes of it
            if isinstance(error, KeyError) and not defaults:  # a group with tasks that are not in the folder
                continue
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise FinepointError(f"cannot load the tasks {', '.join(names)}: {reason}") from error
    raise AssertionError("the last of the managers knows all tasks")


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers among a task's results, without the name of the filter that changes nothing."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float) and "," in name}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-evaluation-harness and the data library below it from telling what they do; its bars are for people."""
    levels = {name: logging.getLogger(name).level for name in CHATTY}
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
