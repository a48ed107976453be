"""`finepoint sequence`: task after task on one model, each on entries of its own; what later ones do to earlier.

An adapter whose entries no other adapter owns can be taken out again at any time, exactly. For comparison the same
tasks are trained with overlap allowed.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finepoint.adapters.adapter import SparseAdapter, applied_to
from finepoint.adapters.entries import gather, overlap
from finepoint.adapters.peft import is_peft, load_merged
from finepoint.data.batches import context_length, learned
from finepoint.data.examples import Example, Labelled, Text, read_examples, some
from finepoint.data.leaks import Seen, leaks, warn_of_leaks
from finepoint.data.tokens import encode_all
from finepoint.errors import FinepointError
from finepoint.evaluation.metrics import losses_metrics, sequence_metrics
from finepoint.evaluation.scoring import accuracy, mean_nll
from finepoint.models.loading import load_model, load_tokenizer
from finepoint.models.packages import digest
from finepoint.runtime.files import claim_folder, contents, read_json, read_record, write_json, write_record
from finepoint.runtime.settings import deciding
from finepoint.studies.results import SEQUENCE, SEQUENCE_RESULT, WAYS, adapter_folder
from finepoint.studies.settings import SequenceConfig
from finepoint.studies.ways import check, told, ways_of
from finepoint.training.context import TrainingContext, training_context
from finepoint.training.earlier import Earlier, EarlierFactors, EarlierTasks
from finepoint.training.resolve import resolve, spec_for
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
        `base` (accuracies before), `leaks` (tests that hold examples which a task is trained on), and for each way
        (`exclude`, `allow`, ..): `matrix` R[i][j], the accuracy on task j after training tasks 0..i, with
        `average_accuracy`, `backward_transfer`, `forgetting`; `losses`, as the matrix, of the right answers, in nats a
        token (`base_losses` before), with `average_loss` and `loss_rise`; `overlaps`, entries that adapters share;
        `removable`, whether each adapter alone could be taken out, bit for bit.

    Raises:
        FinepointError: whatever the user can mend.
    """
    check(config)
    settings = deciding(config, "bits") | {"contents": _contents(config)}
    with claim_folder(config.output, overwrite=True) as folder:
        _claim(folder, settings, ways_of(config))
        return _run(config, folder)


def _run(config: SequenceConfig, folder: Path) -> dict[str, Any]:
    state = SequenceState(
        config, folder, load_model(config.model, config.dtype), load_tokenizer(config.model), _tests(config)
    )
    leaked = _leaks(state)
    found: dict[str, Any] = {
        "tasks": state.tasks,
        "leaks": leaked,
        "base": _remembered(folder / "base.json", lambda: _row(state)),
        "base_losses": _remembered(folder / "base-losses.json", lambda: _losses(state)),
    }
    for way in ways_of(config):
        found[way] = _one_way(state, way)
    write_json(folder / SEQUENCE_RESULT, found | {"config": asdict(config), "versions": versions()})
    return found


def _leaks(state: SequenceState) -> dict[str, dict[str, dict[str, int]]]:
    """Of each task: which tests, its own or another's, hold examples that it is trained on; a line says so."""
    tests = {f"test of {name}": examples for name, examples in state.tests.items()}
    found = {}
    for task, files in state.config.tasks.items():
        if leaked := leaks(Seen.of(read_examples(files["train"], state.config.train.get("columns"))), tests):
            warn_of_leaks(leaked, f"task {task!r}")
            found[task] = leaked
    return found


def _one_way(state: SequenceState, way: str) -> dict[str, Any]:
    """All tasks in one way of choosing; the model is back at the base afterwards."""
    adapters: list[SparseAdapter] = []
    matrix, losses, records = [], [], []
    try:
        for task in state.tasks:
            place = _place(state, way, task)
            if WAYS[way].goes_on and adapters:
                adapters[-1].revert(state.model)
            if not (place / RECORD).is_file():
                _train(state, way, task, place)
            adapter = load_merged(place, state.model) if is_peft(place) else SparseAdapter.load(place)
            adapter.apply(state.model)
            adapters.append(adapter)
            records.append(read_record(place / RECORD))
            row = _remembered(place / "accuracies.json", lambda: _row(state))
            matrix.append([row[name] for name in state.tasks])
            loss = _remembered(place / "losses.json", lambda: _losses(state))
            losses.append([loss[name] for name in state.tasks])
            logger.info("%s, after %s: %s", way, task, ", ".join(f"{name} {row[name]:.3f}" for name in state.tasks))
        removable = [_removable(state.model, adapters, i) for i in range(len(adapters))]
    finally:
        # Not `adapters`: an interruption may have come while one of them was out.
        for adapter in reversed(applied_to(state.model)):
            adapter.revert(state.model)
    return {
        "matrix": matrix,
        **sequence_metrics(matrix),
        "losses": losses,
        **losses_metrics(losses),
        "trained": [record["trained"] for record in records],
        "seconds": [record["seconds"] for record in records],
        "overlaps": [[shared(a, b) for b in adapters] for a in adapters],
        "removable": removable,
    }


def _place(state: SequenceState, way: str, task: str) -> Path:
    """Where a task's adapter lies, or is to lie: the first one is shared by ways that train it at the same rate."""
    place = state.adapter_folder(way, task)
    own = state.folder / way / task
    if place == own or not (place / RECORD).is_file():
        return place
    spec = spec_for(resolve(told(state.config, way, task, str(place), [])), state.model)
    return place if read_record(place / RECORD)["lr"] == spec.lr else own


def _train(state: SequenceState, way: str, task: str, place: Path) -> None:
    """Trains one task on the model as the earlier ones have left it."""
    config = state.config
    before = state.tasks[: state.tasks.index(task)]
    exclude = [str(state.adapter_folder(way, name)) for name in before] if WAYS[way].exclude else []
    settings = told(config, way, task, str(place), exclude)
    shutil.rmtree(place, ignore_errors=True)
    examples = read_examples(settings.data, settings.columns)
    where: TrainingContext = training_context(settings, state.model, state.tokenizer, examples)
    logger.info("training %s, %s", task, WAYS[way].title)
    earlier: Earlier | None = None
    if before and WAYS[way].anchored:
        earlier = _earlier(state, settings, before)
    elif before and WAYS[way].apart:
        earlier = EarlierFactors({name: state.adapter_folder(way, name) for name in before}, config.apart_strength)
    fit(settings, where, earlier, state.adapter_folder(way, before[-1]) if before and WAYS[way].goes_on else None)


def _earlier(state: SequenceState, settings: TrainConfig, before: Sequence[str]) -> EarlierTasks:
    """What a task is held to: some training examples of each that came before."""
    config, limit = state.config, context_length(state.model, settings.max_length)
    rows = {}
    for task in before:
        examples = some(read_examples(config.tasks[task]["train"], settings.columns), config.earlier_examples)
        found = encode_all(state.tokenizer, examples, limit, what=f"example of {task}", model=state.model)
        rows[task] = [row for row in found if learned(row)]
    return EarlierTasks(rows, config.earlier_strength, settings.seed)


def _row(state: SequenceState) -> dict[str, float]:
    """The accuracy on every task of the model as it is."""
    config = state.config
    return {
        name: accuracy(state.model, state.tokenizer, examples, max_length=config.train.get("max_length"),
                       new_tokens=config.new_tokens)["accuracy"]
        for name, examples in state.tests.items()
    }  # fmt: skip


def _losses(state: SequenceState) -> dict[str, float]:
    """The loss on every task of the model as it is: it tells more than few right answers do."""
    longest = state.config.train.get("max_length")
    return {name: mean_nll(state.model, state.tokenizer, examples, max_length=longest)["nll"]
            for name, examples in state.tests.items()}  # fmt: skip


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


def _contents(config: SequenceConfig) -> dict[str, str]:
    """Digests of the tasks' files: what is resumed is of the same examples."""
    files = sorted({file for parts in config.tasks.values() for file in parts.values()})
    return {file: digest(Path(file)) for file in files if Path(file).is_file()}


def _claim(folder: Path, settings: dict[str, Any], ways: Sequence[str]) -> None:
    manifest = folder / SEQUENCE
    if manifest.is_file():
        before = read_record(manifest)
        for name, value in json.loads(json.dumps(settings)).items():
            if name == "contents":
                _refuse_other_contents(folder, before.get(name, {}), value)
            elif name == "rates":
                settings[name] = _rates(folder, before.get(name, {}), value, ways)
            elif name in before and before[name] != value:
                raise FinepointError(f"the sequence in {folder} was begun with {name} {before.get(name)}, not {value}; "
                                     "choose another --output")  # fmt: skip
        write_record(manifest, before | {"rates": settings["rates"]})
    elif contents(folder):
        raise FinepointError(f"{folder} is not empty and holds no sequence; choose another --output")
    else:
        write_record(manifest, settings)


def _rates(
    folder: Path, before: Mapping[str, float], now: Mapping[str, float], ways: Sequence[str]
) -> dict[str, float]:
    """The rates by way of all that is trained in a folder: a way may be given one as long as no task of it is done.

    Raises:
        FinepointError: one of these ways was trained at another.
    """
    begun = {way for way in WAYS if any((folder / way).glob(f"*/{RECORD}"))}
    for way in ways:
        if way in begun and before.get(way) != now.get(way):
            then, today = (rates.get(way, "the usual one") for rates in (before, now))
            raise FinepointError(f"in {folder} tasks were trained the way {way} at the rate {then}, not {today}; "
                                 "choose another --output")  # fmt: skip
    return {way: rate for way, rate in before.items() if way in begun or way not in ways} | dict(now)


def _refuse_other_contents(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    for file in before:
        if before[file] != now.get(file):
            raise FinepointError(f"the sequence in {folder} was begun with another content of {file}; choose another "
                                 "--output")  # fmt: skip


def _tests(config: SequenceConfig) -> dict[str, Sequence[Example]]:
    tests: dict[str, Sequence[Example]] = {
        name: some(read_examples(files["test"], config.train.get("columns")), config.test_limit)
        for name, files in config.tasks.items()
    }
    for name, examples in tests.items():
        if isinstance(examples[0], Text | Labelled):
            raise FinepointError(f"the test set of task {name!r} has no accuracy by choices or generation; give "
                                 '{"prompt", "choices", "answer"} or {"prompt", "completion"}')  # fmt: skip
    return tests
