"""`finepoint sequence`: task after task on one model, each on entries of its own; what later ones do to earlier.

An adapter whose entries no other adapter owns can be taken out again at any time, exactly. For comparison the same
tasks are trained with overlap allowed.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finepoint.adapters.adapter import SparseAdapter, applied_to
from finepoint.adapters.entries import gather, overlap
from finepoint.data.examples import Example, Labelled, Text, read_examples, some
from finepoint.data.leaks import Seen, leaks, warn_of_leaks
from finepoint.errors import FinepointError
from finepoint.evaluation.metrics import sequence_metrics
from finepoint.evaluation.scoring import accuracy
from finepoint.models.loading import load_model, load_tokenizer
from finepoint.runtime.files import claim_folder, contents, read_json, read_record, write_json, write_record
from finepoint.runtime.settings import deciding, did_you_mean
from finepoint.studies.results import SEQUENCE, SEQUENCE_RESULT, WAYS, adapter_folder
from finepoint.studies.settings import SequenceConfig
from finepoint.training.context import TrainingContext, training_context
from finepoint.training.run import RECORD, fit, versions
from finepoint.training.settings import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SequenceState:
    """The tasks in order, with the model they are trained on."""

    config: SequenceConfig
    folder: Path
    model: Any
    tokenizer: Any
    tests: dict[str, Sequence[Example]]

    @property
    def tasks(self) -> list[str]:
        return list(self.tests)

    def adapter_folder(self, way: str, task: str) -> Path:
        return adapter_folder(self.folder, way, task, self.tasks)


def run_sequence(config: SequenceConfig) -> dict[str, Any]:
    """Trains the tasks in order and measures all of them after each; the same command goes on where it stopped.

    Returns:
        `base` (accuracies before), `leaks` (tests that hold examples which a task is trained on), and for each way of
        choosing (`exclude`, `allow`): `matrix` R[i][j], the accuracy on task j after training tasks 0..i, with
        `average_accuracy`, `backward_transfer`, `forgetting`; `overlaps`, entries that adapters share; `removable`,
        whether each adapter alone could be taken out, bit for bit.

    Raises:
        FinepointError: whatever the user can mend.
    """
    settings = _check(config)
    with claim_folder(config.output, overwrite=True) as folder:
        _claim(folder, settings)
        return _run(config, folder)


def _run(config: SequenceConfig, folder: Path) -> dict[str, Any]:
    state = SequenceState(
        config, folder, load_model(config.model, config.dtype), load_tokenizer(config.model), _tests(config)
    )
    leaked = _leaks(state)
    found: dict[str, Any] = {"tasks": state.tasks, "leaks": leaked,
                             "base": _remembered(folder / "base.json", lambda: _row(state))}  # fmt: skip
    for way in WAYS[config.overlap]:
        found[way] = _one_way(state, way)
    write_json(folder / SEQUENCE_RESULT, found | {"config": asdict(config), "versions": versions()})
    return found


def _leaks(state: SequenceState) -> dict[str, dict[str, dict[str, int]]]:
    """Of each task: which tests, its own or another's, hold examples that it is trained on; a line says so."""
    tests = {f"test of {name}": examples for name, examples in state.tests.items()}
    found = {}
    for task, files in state.config.tasks.items():
        if leaked := leaks(Seen.of(read_examples(files["train"])), tests):
            warn_of_leaks(leaked, f"task {task!r}")
            found[task] = leaked
    return found


def _one_way(state: SequenceState, way: str) -> dict[str, Any]:
    """All tasks in one way of choosing; the model is back at the base afterwards."""
    adapters: list[SparseAdapter] = []
    matrix, records = [], []
    try:
        for task in state.tasks:
            place = state.adapter_folder(way, task)
            if not (place / RECORD).is_file():
                _train(state, way, task, place)
            adapter = SparseAdapter.load(place)
            adapter.apply(state.model)
            adapters.append(adapter)
            records.append(read_record(place / RECORD))
            row = _remembered(place / "accuracies.json", lambda: _row(state))
            matrix.append([row[name] for name in state.tasks])
            logger.info("%s, after %s: %s", way, task, ", ".join(f"{name} {row[name]:.3f}" for name in state.tasks))
        removable = [_removable(state.model, adapters, i) for i in range(len(adapters))]
    finally:
        # Not `adapters`: an interruption may have come while one of them was out.
        for adapter in reversed(applied_to(state.model)):
            adapter.revert(state.model)
    return {
        "matrix": matrix,
        **sequence_metrics(matrix),
        "trained": [record["trained"] for record in records],
        "seconds": [record["seconds"] for record in records],
        "overlaps": [[shared(a, b) for b in adapters] for a in adapters],
        "removable": removable,
    }


def _train(state: SequenceState, way: str, task: str, place: Path) -> None:
    """Trains one task on the model as the earlier ones have left it."""
    config = state.config
    earlier = state.tasks[: state.tasks.index(task)]
    exclude = [str(state.adapter_folder(way, name)) for name in earlier] if way == "exclude" else []
    settings = TrainConfig(**_own(config, task, str(place), exclude), **config.train)
    shutil.rmtree(place, ignore_errors=True)
    examples = read_examples(str(settings.data))
    where: TrainingContext = training_context(settings, state.model, state.tokenizer, examples)
    logger.info("%s: training %s on %s", way, task, "entries of its own" if settings.exclude else "any entries")
    fit(settings, where)


def _own(config: SequenceConfig, task: str, output: str, exclude: list[str]) -> dict[str, Any]:
    """What a sequence sets for every task by itself."""
    # Of one seed, random choices would be the same entries for every task.
    seed = config.seed + list(config.tasks).index(task)
    return {
        "model": config.model, "dtype": config.dtype, "quantise": None, "data": config.tasks[task]["train"],
        "output": output, "overwrite": True, "baseline": None, "rule": config.rule, "density": config.density,
        "exclude": exclude, "lr": config.lr, "seed": seed,
    }  # fmt: skip


def _row(state: SequenceState) -> dict[str, float]:
    """The accuracy on every task of the model as it is."""
    config = state.config
    return {
        name: accuracy(state.model, state.tokenizer, examples, max_length=config.train.get("max_length"),
                       new_tokens=config.new_tokens)["accuracy"]
        for name, examples in state.tests.items()
    }  # fmt: skip


def _removable(model: nn.Module, adapters: Sequence[SparseAdapter], which: int) -> bool:
    """Whether one adapter can be taken out alone: its entries are the base's again, all others' stay as they are.

    The model is left as it was.
    """
    adapter = adapters[which]
    others = [other for other in adapters if other is not adapter]
    before = [values_of(model, other) for other in others]
    try:
        adapter.revert(model)
    except FinepointError:
        return False  # a later one wrote over it
    back = not adapter.problems(model)  # the checksums are those of the base
    after = [values_of(model, other) for other in others]
    adapter.apply(model)
    return back and all(
        torch.equal(now[name], was[name]) for now, was in zip(after, before, strict=True) for name in was
    )


def values_of(model: nn.Module, adapter: SparseAdapter) -> dict[str, torch.Tensor]:
    """The model's values at an adapter's entries, by weight."""
    return {name: gather(model.get_parameter(name), adapter[name]) for name in adapter}


def shared(a: SparseAdapter, b: SparseAdapter) -> int:
    """How many entries two adapters both change."""
    return sum(overlap(a[name], b[name]) for name in a if name in b)


def _remembered(path: Path, make: Any) -> dict[str, float]:
    if not path.is_file():
        write_json(path, make())
    return read_json(path)


def _check(config: SequenceConfig) -> dict[str, Any]:
    """What decides the results, as the manifest keeps it."""
    if len(config.tasks) < 2:
        raise FinepointError("a sequence needs two tasks or more; give tasks: {a: {train: F, test: F}, b: ..}")
    for name, files in config.tasks.items():
        if set(files) != {"train", "test"}:
            raise FinepointError(f"task {name!r} has the sets {sorted(files)}; give train and test")
    known = {setting.name for setting in fields(TrainConfig)} - set(_own(config, next(iter(config.tasks)), "", []))
    if unknown := sorted(set(config.train) - known):
        raise FinepointError(f"train gives {unknown[0]!r}, which is no setting that a sequence takes there"
                             f"{did_you_mean(unknown[0], known)}")  # fmt: skip
    return deciding(config, "bits")


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    manifest = folder / SEQUENCE
    if manifest.is_file():
        before = read_record(manifest)
        for name, value in json.loads(json.dumps(settings)).items():
            if before.get(name) != value:
                raise FinepointError(f"the sequence in {folder} was begun with {name} {before.get(name)}, not {value}; "
                                     "choose another --output")  # fmt: skip
    elif contents(folder):
        raise FinepointError(f"{folder} is not empty and holds no sequence; choose another --output")
    else:
        write_record(manifest, settings)


def _tests(config: SequenceConfig) -> dict[str, Sequence[Example]]:
    tests: dict[str, Sequence[Example]] = {
        name: some(read_examples(files["test"]), config.test_limit) for name, files in config.tasks.items()
    }
    for name, examples in tests.items():
        if isinstance(examples[0], Text | Labelled):
            raise FinepointError(f"the test set of task {name!r} has no accuracy by choices or generation; give "
                                 '{"prompt", "choices", "answer"} or {"prompt", "completion"}')  # fmt: skip
    return tests
