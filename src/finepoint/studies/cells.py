"""One cell of a study: train as its arm says, then measure; and the measurement of the base."""

import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.format import TENSORS
from finepoint.adapters.scaling import scale_by_depth, wise_ft
from finepoint.data.examples import Example, Labelled, Text, read_examples, some
from finepoint.data.leaks import Seen, leaks
from finepoint.data.sources import name_of
from finepoint.errors import FinepointError
from finepoint.evaluation.evaluate import Evaluation
from finepoint.evaluation.generation import frequent_answers
from finepoint.evaluation.scoring import accuracy
from finepoint.models.loading import load_model, load_tokenizer
from finepoint.runtime import interruption
from finepoint.studies.settings import CompareConfig
from finepoint.studies.sharing import shared_selection
from finepoint.studies.study import Arm, Cell, Study, train_config
from finepoint.training.context import TrainingContext, training_context
from finepoint.training.logfile import LOG, read_log
from finepoint.training.run import fit, versions
from finepoint.training.settings import TrainConfig
from finepoint.training.texts import examples_to_keep, to_measure

COST = ("trained", "changed", "adapter_bytes", "step_seconds", "train_seconds", "peak_bytes", "tokens_per_second")

Job = tuple[Cell | None, Mapping[str, Any] | None]
"""A cell (None: the base itself) and what was measured of the base."""


@dataclass(frozen=True)
class Failure:
    """Why a cell gave no result."""

    error: str
    traceback: str


Outcome = dict[str, Any] | Failure | str


@dataclass
class WorkerState:
    """What a process keeps from cell to cell: the model, at the base between them, and the examples."""

    study: Study
    folder: Path
    base: Mapping[str, Any] | None = None
    """what `measure_base` found"""
    model: Any = None
    tokenizer: Any = None
    contexts: dict[tuple[str, int | None], TrainingContext] = field(default_factory=dict)
    sets: dict[tuple[str, int | None], list[Example]] = field(default_factory=dict)

    @staticmethod
    def at(study: Study) -> "WorkerState":
        """A worker with the study's model on it.

        Raises:
            FinepointError: the model cannot be loaded.
        """
        config = study.config
        model = load_model(config.model, config.dtype, quantise=config.quantise)
        return WorkerState(study, Path(config.output), model=model, tokenizer=load_tokenizer(config.model))

    def context(self, config: TrainConfig, task: str) -> TrainingContext:
        known = (task, config.max_length)
        if known not in self.contexts:
            examples = self.examples(name_of(config.data), None)
            self.contexts[known] = training_context(config, self.model, self.tokenizer, examples)
        return self.contexts[known]

    def examples(self, path: str, limit: int | None) -> list[Example]:
        if (path, limit) not in self.sets:
            self.sets[path, limit] = some(read_examples(path, self.study.config.train.get("columns")), limit)
        return self.sets[path, limit]

    def evaluation(self, task: str | None) -> Evaluation:
        """The test sets: that of `task` is in distribution, all others are out of it."""
        config = self.study.config
        tests = {name: self.examples(files["test"], config.test_limit) for name, files in config.tasks.items()}
        return Evaluation(
            id={name: examples for name, examples in tests.items() if name == task},
            ood={name: examples for name, examples in tests.items() if name != task},
            probe={name: self.examples(path, config.probe_limit) for name, path in config.probes.items()},
            protect=self.protected(),
            max_length=config.train.get("max_length"),
            new_tokens=config.new_tokens,
            generate=config.generate,
            trained_answers=self.trained_answers(task) if task and config.generate else (),
        )

    def protected(self) -> Sequence[Example]:
        """What any arm protects: on the same texts all are measured."""
        told = (self.study.config.train, *(arm.train for arm in self.study.arms))
        sources = next((settings["protect"] for settings in told if settings.get("protect")), None)
        return examples_to_keep(sources, None, to_measure(self.model, self.tokenizer)) if sources else ()

    def trained_answers(self, task: str) -> list[str]:
        return frequent_answers(self.examples(self.study.config.tasks[task]["train"], None))


def check_sets(config: CompareConfig) -> None:
    """Reads every file of a study once, so that a bad one is found before hours of work.

    Raises:
        FinepointError: a bad file, a form that cannot be used where it stands.
    """
    columns = config.train.get("columns")
    for name, files in config.tasks.items():
        for part, path in files.items():
            first = read_examples(path, columns)[0]
            if isinstance(first, Text):
                raise FinepointError(
                    f"{part} of task {name!r} is plain text, which has no accuracy; give it as a probe"
                )
            if isinstance(first, Labelled):
                raise FinepointError(f"{part} of task {name!r} has class labels, and tasks of a study share one model "
                                     'without heads; give the labels as "choices"')  # fmt: skip
    for path in config.probes.values():
        read_examples(path, columns)


def leaks_in(config: CompareConfig) -> dict[str, dict[str, dict[str, int]]]:
    """Which sets hold examples of which task's training data, and how many: {task: {set: counts}}."""
    columns = config.train.get("columns")
    sets: dict[str, list[Example]] = {}
    limits = {"validation": config.validation_limit, "test": config.test_limit}
    for name, files in config.tasks.items():
        for part, limit in limits.items():
            if part in files:  # a task that is not trained on is only tested
                sets[f"{part} of {name}"] = some(read_examples(files[part], columns), limit)
    for name, path in config.probes.items():
        sets[f"probe {name}"] = some(read_examples(path, columns), config.probe_limit)
    trained = {name: files["train"] for name, files in config.tasks.items() if "train" in files}
    found = {name: leaks(Seen.of(read_examples(file, columns)), sets) for name, file in trained.items()}
    return {name: leaked for name, leaked in found.items() if leaked}


def measure_base(worker: WorkerState) -> dict[str, Any]:
    """{"tests": {task: scores}, "probes": {name: nll}, "validation": {task: scores}} of the model before training."""
    found = worker.evaluation(None).scores(worker.model, worker.tokenizer, "base")
    return {
        "tests": found["ood"],
        "probes": found["probe"],
        "validation": {task: validated(worker, task) for task in worker.study.tasks},
    }


def run_cell(worker: WorkerState, cell: Cell) -> dict[str, Any]:
    """Trains one arm at one rate and seed, measures it, and leaves the model at the base.

    Raises:
        FinepointError: whatever `finepoint train` refuses.
    """
    started = datetime.now(UTC)
    output = worker.folder / "adapters" / cell.id
    config = train_config(worker.study, cell, str(output))
    context = worker.context(config, cell.task)
    selection: dict[str, Any] = {}
    chosen_in = None
    if config.baseline is None:
        chosen_in, selection = shared_selection(config, context, worker.folder)
        config = replace(config, indices=str(chosen_in))
    record, adapter = fit(config, context)
    found = measured(worker, cell.task, adapter)
    arm = worker.study.arm(cell.arm)
    log = read_log(output / LOG)
    result = {
        **asdict(cell),
        "id": cell.id,
        **found,
        "validation": found["validation"] | {"loss": record["validation_loss"]},
        "antidotes": [measured_antidote(worker, cell.task, adapter, *antidote) for antidote in antidotes(arm)],
        "curve": [point for point in log if {"loss", "eval_loss"} & set(point)],
        "cost": {name: record[name] for name in COST} | {"selection_seconds": selection.get("seconds", 0.0)},
        "update_norm": record["update_norm"],
        "best_step": record["best_step"],
        "selection": summary(selection["statistics"]) if selection else None,
        "indices": str((chosen_in / TENSORS).relative_to(worker.folder)) if chosen_in else None,
        "settings": asdict(config) | {"output": None, "steps": record["steps"]},
        "versions": versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    result["cost"]["seconds"] = round((datetime.now(UTC) - started).total_seconds(), 1)
    if not worker.study.config.keep_adapters:
        shutil.rmtree(output)
    return result


def measured(worker: WorkerState, task: str, adapter: SparseAdapter) -> dict[str, Any]:
    """`validation`, `scores` and `changes` of the model with an adapter on."""
    assert worker.base is not None
    tests = worker.base["tests"]
    before = {
        "id": {task: tests[task]},
        "ood": {name: tests[name] for name in tests if name != task},
        "probe": worker.base["probes"],
    }
    with adapter.applied(worker.model):
        validation = validated(worker, task)
    found = worker.evaluation(task).compared(worker.model, worker.tokenizer, before, adapter, task)
    scores = {kind: found.pop(kind) for kind in before}
    return {"validation": validation, "scores": scores, "changes": found}


def antidotes(arm: Arm) -> list[tuple[str, float]]:
    return [("wise-ft", alpha) for alpha in arm.wise_ft] + [("lines", alpha) for alpha in arm.lines]


def measured_antidote(worker: WorkerState, task: str, adapter: SparseAdapter, how: str, alpha: float) -> dict[str, Any]:
    """A run measured again with its change weakened after training."""
    weakened = {"wise-ft": wise_ft, "lines": scale_by_depth}[how](adapter, worker.model, alpha)
    return {"how": how, "alpha": alpha} | measured(worker, task, weakened)


def validated(worker: WorkerState, task: str) -> dict[str, Any]:
    """Accuracy on the validation examples of a task, of the model as it is."""
    config = worker.study.config
    examples = worker.examples(config.tasks[task]["validation"], config.validation_limit)
    return accuracy(worker.model, worker.tokenizer, examples, max_length=config.train.get("max_length"),
                    new_tokens=config.new_tokens)  # fmt: skip


def summary(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """What of a selection's statistics a report needs."""
    weights = {name: {"chosen": found["chosen"], "size": prod(found["shape"])}
               for name, found in statistics["weights"].items()}  # fmt: skip
    return {"density": statistics["density"], "near_zero": statistics["near_zero_share"], "weights": weights}


def work(worker: WorkerState | None, study: Study, job: Job) -> tuple[WorkerState | None, Outcome]:
    """Does one job at a worker, which is set up first if there is none yet; errors become a `Failure`."""
    cell, base = job
    try:
        worker = worker or WorkerState.at(study)
        worker.base = base
        return worker, measure_base(worker) if cell is None else run_cell(worker, cell)
    except Exception as error:
        interruption.check()
        # A model that an error may have left in any state is not used again.
        mistake = isinstance(error, FinepointError)
        text = " ".join(str(error).split()) if mistake else f"{type(error).__name__}: {error}"
        return None, Failure(text, traceback.format_exc())
