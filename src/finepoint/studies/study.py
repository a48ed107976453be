"""A study: arms x learning rates x seeds x tasks, as cells; which cells are to be run, given those that are done."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from finepoint.baselines.registry import baseline_named
from finepoint.errors import FinepointError
from finepoint.runtime.settings import deciding, did_you_mean, fits, spelled
from finepoint.selection.rules import rule_named
from finepoint.selection.settings import DEFAULT_RULE
from finepoint.studies.results import best_lr
from finepoint.studies.settings import ARM, TASKS, CompareConfig
from finepoint.training.resolve import resolve, unused_by
from finepoint.training.settings import TrainConfig

# Four rates each, so that every arm gets as many trials: a grid for each kind of method.
GRADIENT_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
BLIND_RATES = (3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Arm:
    """One method with its settings; what it is compared as."""

    name: str
    method: str
    kind: str
    """`rule` or `baseline`"""
    density: float | None
    lrs: tuple[float, ...]
    options: dict[str, float] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    """settings of `finepoint train` for this arm alone"""
    wise_ft: tuple[float, ...] = ()
    lines: tuple[float, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Cell:
    """One run of a study, and its measurement."""

    task: str
    arm: str
    lr: float
    seed: int

    @property
    def id(self) -> str:
        return f"{self.task}.{self.arm}.lr{self.lr:g}.s{self.seed}"


@dataclass(frozen=True)
class Study:
    """A configuration, checked and spelled out."""

    config: CompareConfig
    arms: tuple[Arm, ...]
    tasks: tuple[str, ...]
    """those trained on"""

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def size(self) -> int:
        """How many cells there are in all."""
        more = len(self.config.seeds) - 1
        return len(self.tasks) * sum(len(arm.lrs) + more for arm in self.arms)


def make_study(config: CompareConfig) -> Study:
    """The study that a configuration describes.

    Raises:
        FinepointError: whatever can be wrong with it: unknown method, task or setting, two arms of one name, ..
    """
    if not config.arms:
        raise FinepointError("the study has no arms; give e.g. arms: [{rule: gallop, density: 0.001}]")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise FinepointError(f"seeds are {config.seeds}; give one or more different numbers")
    arms = tuple(arm for entry in config.arms for arm in _arms(entry))
    names = [arm.name for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FinepointError(f"two arms are called {twice[0]!r}; give one of them another name")
    for name in (*names, *config.tasks, *config.probes):
        if not re.fullmatch(r"[\w+=,-][\w.+=,-]*", name):
            raise FinepointError(f"{name!r} cannot name files; use letters, digits and -_.+=,")
    _check_settings(config.train, "train")
    study = Study(config, arms, _trained_tasks(config))
    for cell in planned(study, [], []):
        _check_cell(study, cell)
    return study


def planned(study: Study, cells: Sequence[dict[str, Any]], failures: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The cells that are known so far, in the order of running: every rate of every arm at the first seed, then the
    best rate of each at the other seeds, as soon as all its rates have been tried."""
    first, *others = study.config.seeds
    found = [Cell(task, arm.name, lr, first) for task in study.tasks for arm in study.arms for lr in arm.lrs]
    failed = {failure["id"] for failure in failures}
    done = {cell["id"]: cell for cell in cells}
    for task in study.tasks:
        for arm in study.arms:
            tried = [cell for cell in found if (cell.task, cell.arm, cell.seed) == (task, arm.name, first)]
            finished = [done[cell.id] for cell in tried if cell.id in done]
            if finished and all(cell.id in done or cell.id in failed for cell in tried):
                best = best_lr(finished, study.config.tuning)
                found += [Cell(task, arm.name, best, seed) for seed in others]
    return found


def train_config(study: Study, cell: Cell, output: str) -> TrainConfig:
    """What `finepoint train` would be told for a cell."""
    arm = study.arm(cell.arm)
    unused = unused_by(baseline_named(arm.method)) if arm.kind == "baseline" else {}
    shared = {name: value for name, value in study.config.train.items() if name not in unused}
    return TrainConfig(**{**_own(study.config, arm, cell, output), **shared, **arm.train})


def _own(config: CompareConfig, arm: Arm, cell: Cell, output: str) -> dict[str, Any]:
    """What a study sets for every cell by itself."""
    files = config.tasks.get(cell.task, {})
    baseline = arm.kind == "baseline"
    return {
        "model": config.model, "dtype": config.dtype, "quantise": config.quantise,
        "data": files.get("train"), "validation": files.get("validation"), "validation_limit": config.validation_limit,
        "rule": DEFAULT_RULE if baseline else arm.method, "rule_options": {} if baseline else arm.options,
        "baseline": arm.method if baseline else None, "baseline_options": arm.options if baseline else {},
        "density": arm.density, "indices": None, "lr": cell.lr, "seed": cell.seed, "keep": "best",
        "output": output, "overwrite": True, "save_every": None, "resume": False, "json": False,
    }  # fmt: skip


OWN = frozenset(
    _own(CompareConfig(model="", tasks={}, arms=[], output=""), Arm("", "", "", None, ()), Cell("", "", 0, 0), "")
)


def described(study: Study) -> dict[str, Any]:
    """The study as its manifest keeps it."""
    config = deciding(study.config, "bits", "length")
    return {"config": config, "arms": [asdict(arm) for arm in study.arms], "tasks": list(study.tasks)}


def _arms(entry: Mapping[str, Any]) -> Iterator[Arm]:
    """The arms that one entry of the configuration stands for: one for each of its densities."""
    if unknown := sorted(set(entry) - set(ARM)):
        told = did_you_mean(unknown[0], ARM, f"its settings: {', '.join(sorted(ARM))}")
        raise FinepointError(f"an arm has no setting {unknown[0]!r}{told}")
    chooses = "baseline" in entry and baseline_named(entry["baseline"]).chooses
    if ("rule" in entry) == ("baseline" in entry) and not chooses:
        raise FinepointError(f"arm {dict(entry)} must name either a rule or a baseline")
    _check_settings(entry.get("train", {}), "an arm's train")
    if "baseline" in entry and "density" in entry and not chooses:
        raise FinepointError(f"arm {dict(entry)}: a baseline has no density")
    densities = entry.get("density", 1e-3 if "rule" in entry or chooses else None)
    for density in densities if isinstance(densities, list) else [densities]:
        yield _arm(entry, density, isinstance(densities, list))


def _arm(entry: Mapping[str, Any], density: float | None, several: bool) -> Arm:
    options = dict(entry.get("options", {}))
    train = dict(entry.get("train", {}))
    if "baseline" in entry:
        baseline = baseline_named(entry["baseline"])
        method, source, kind = baseline.name, baseline.source, "baseline"
        rates = baseline.rates
        train |= {"rule": entry["rule"]} if "rule" in entry else {}  # of the entries that are trained along
    else:
        rule = rule_named(entry["rule"])
        method, source, kind = rule.name, rule.source, "rule"
        rates = GRADIENT_RATES if rule.needs_data else BLIND_RATES
    tail = [] if density is None else [f"{density:g}"]
    spelled = [f"{key}={value:g}" for key, value in options.items()]
    name = "-".join([entry["name"], *(tail if several else [])] if "name" in entry else [method, *tail, *spelled])
    lrs = tuple(sorted(float(lr) for lr in entry.get("lrs", rates)))
    if not lrs or min(lrs) <= 0 or len(set(lrs)) < len(lrs):
        raise FinepointError(f"arm {name!r} has the learning rates {list(lrs)}; give different ones above 0")
    return Arm(name.replace(":", "+"), method, kind, density, lrs, options, train,
               tuple(entry.get("wise_ft", ())), tuple(entry.get("lines", ())), source)  # fmt: skip


def _check_cell(study: Study, cell: Cell) -> None:
    """Refuses what `finepoint train` would, before hours of other cells."""
    try:
        resolve(train_config(study, cell, study.config.output))
    except FinepointError as error:
        raise FinepointError(f"arm {cell.arm!r}: {error}") from error


def _check_settings(settings: Mapping[str, Any], where: str) -> None:
    kinds = {setting.name: setting.type for setting in fields(TrainConfig)}
    for name, value in settings.items():
        if name in OWN:
            raise FinepointError(f"{where} gives {name!r}, which the study sets for every cell by itself")
        if name not in kinds:
            raise FinepointError(
                f"{where} gives {name!r}, which is no setting of finepoint train{did_you_mean(name, kinds)}"
            )
        if not fits(value, kinds[name]):
            raise FinepointError(f"{where} gives {name} {value!r}; it is {' or '.join(spelled(kinds[name]))}")


def _trained_tasks(config: CompareConfig) -> tuple[str, ...]:
    for name, files in config.tasks.items():
        if unknown := sorted(set(files) - set(TASKS["*"])):
            told = did_you_mean(unknown[0], TASKS["*"], "a task has train, validation and test")
            raise FinepointError(f"task {name!r} has a set {unknown[0]!r}{told}")
        if "test" not in files:
            raise FinepointError(f"task {name!r} has no test set; give test: FILE.jsonl")
    whole = [name for name, files in config.tasks.items() if {"train", "validation"} <= set(files)]
    chosen = config.train_on or whole
    for name in chosen:
        if name not in whole:
            raise FinepointError(f"task {name!r} cannot be trained on; it needs train, validation and test")
    if not chosen:
        raise FinepointError("no task can be trained on; give one of them train, validation and test")
    return tuple(chosen)
