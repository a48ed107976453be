"""The results of a study: what a grid of runs left in its folder, and which learning rate each arm would have kept.

Only JSON is read here, so that results can be looked at without the libraries that made them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from finepoint.errors import FinepointError
from finepoint.runtime.files import VERSION, read_json, refuse_version
from finepoint.training.logfile import RECORD

FORMAT = 1
STUDY, SEQUENCE, SEQUENCE_RESULT = "study.json", "sequence.json", "result.json"


@dataclass(frozen=True)
class Way:
    """A way of training the tasks of a sequence one after the other."""

    title: str
    exclude: bool = False
    """each task on entries that no earlier one owns"""
    anchored: bool = False
    """earlier tasks are held to"""
    baseline: str = ""
    """trained instead of chosen entries"""

    apart: bool = False
    """factors look elsewhere than those of earlier tasks"""

    goes_on: bool = False
    """one adapter is trained on and on, instead of one a task"""

    @property
    def first(self) -> str:
        """The folder of the first task, which has no earlier ones: it is trained, and measured, once for all ways of
        training the same."""
        return f"first-{self.baseline}" if self.baseline else "first"


WAYS = {
    "exclude": Way("each task on entries of its own", exclude=True),
    "allow": Way("overlap allowed"),
    "anchored": Way("overlap allowed, earlier tasks anchored", anchored=True),
    "exclude-anchored": Way("each task on entries of its own, earlier tasks anchored", exclude=True, anchored=True),
    "lora": Way("LoRA for each task", baseline="lora"),
    "lora-on": Way("one LoRA, trained on from task to task", baseline="lora", goes_on=True),
    "lora-apart": Way("LoRA for each task, apart from earlier ones (O-LoRA)", baseline="lora", apart=True),
    "full": Way("every weight", baseline="full"),
    "full-anchored": Way("every weight, earlier tasks anchored (EWC)", anchored=True, baseline="full"),
}
"""The ways by name."""
OVERLAPS = {"exclude": ("exclude",), "allow": ("allow",), "both": ("exclude", "allow")}
"""The ways by the setting that asks for them where they are not named."""

Cell = dict[str, Any]
"""One run of the grid: a task, an arm, a learning rate and a seed, with everything measured on it."""


@dataclass(frozen=True)
class Results:
    """A study as read from its folder.

    Args:
        study: the resolved configuration, the arms, the data's checksums, versions and machine.
        base: the scores of the base model; empty where they were not measured yet.
        cells: the finished runs, in the order of their tasks, arms, learning rates and seeds.
        failures: the runs that raised, with their error.
    """

    folder: Path
    study: dict[str, Any]
    base: dict[str, Any]
    cells: list[Cell]
    failures: list[dict[str, Any]]

    @property
    def seeds(self) -> list[int]:
        """The seeds asked for; learning rates are chosen at the first."""
        return list(self.study["config"]["seeds"])

    @property
    def tuning(self) -> str:
        """How the learning rates are chosen."""
        return str(self.study["config"].get("tuning", "best"))

    @property
    def arms(self) -> list[str]:
        """The names of the arms, in the study's order."""
        return [arm["name"] for arm in self.study["arms"]]

    @property
    def arms_run(self) -> list[str]:
        """Those of them that have a finished run."""
        run = {cell["arm"] for cell in self.cells}
        return [arm for arm in self.arms if arm in run]

    @property
    def tasks(self) -> list[str]:
        """The tasks trained on, in the study's order."""
        return list(self.study["tasks"])

    def arm(self, name: str) -> dict[str, Any]:
        """What the study says about an arm."""
        return next(arm for arm in self.study["arms"] if arm["name"] == name)

    def of(self, task: str, arm: str) -> list[Cell]:
        """The finished runs of an arm on a task."""
        return [cell for cell in self.cells if cell["task"] == task and cell["arm"] == arm]

    def chosen(self, cell: Cell) -> Path | None:
        """The file of the entries that a run chose, where the folder still has it: an archive may have left it out."""
        path = self.folder / cell["indices"] if cell.get("indices") else None
        return path if path and path.is_file() else None


def read_results(folder: str | Path) -> Results:
    """Reads the folder that `finepoint compare` wrote, finished or not.

    Raises:
        FinepointError: there is no study in the folder, none of its runs finished, or a file is damaged.
    """
    place = Path(folder)
    if not (place / STUDY).is_file():
        raise FinepointError(f"{place} holds no study (no study.json); give the --output of `finepoint compare`")
    study = _read(place / STUDY)
    refuse_version(place / STUDY, study.get("format"), FORMAT)
    for key in ("config", "arms", "tasks"):
        if key not in study:
            raise FinepointError(f"{place / 'study.json'} lacks {key!r}; run `finepoint compare` again")
    cells, failures = _read_cells(place / "cells")
    if not cells:
        first = f"; the first of {len(failures)} failures: {failures[0]['error']}" if failures else ""
        raise FinepointError(
            f"no run of the study in {place} has finished yet{first}; `finepoint compare` goes on with it"
        )
    base = _read(place / "base.json") if (place / "base.json").is_file() else {}
    found = Results(place, study, base, cells, failures)
    _check_names(found)
    order = {arm: i for i, arm in enumerate(found.arms)}
    cells.sort(key=lambda cell: (cell["task"], order[cell["arm"]], cell["lr"], cell["seed"]))
    return found


def _read_cells(folder: Path) -> tuple[list[Cell], list[dict[str, Any]]]:
    cells: list[Cell] = []
    failures: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("."):
            continue  # a file being written
        failed = path.name.endswith(".error.json")
        found = _read(path)
        for key in ("task", "arm", "lr", "seed", "error" if failed else "scores"):
            if key not in found:
                raise FinepointError(f"{path} lacks {key!r}; remove it and run `finepoint compare` again")
        (failures if failed else cells).append(found)
    done = {_key(cell) for cell in cells}
    return cells, [failure for failure in failures if _key(failure) not in done]  # a later try may have succeeded


def _key(cell: Cell) -> tuple[Any, ...]:
    return cell["task"], cell["arm"], cell["lr"], cell["seed"]


def _check_names(results: Results) -> None:
    for cell in results.cells:
        if cell["arm"] not in results.arms:
            raise FinepointError(
                f"a run of {results.folder} is of the arm {cell['arm']!r}, which its study.json does not name;"
                " the folder mixes two studies: give each its own --output"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except FinepointError as error:
        raise FinepointError(f"{error}; remove it and run `finepoint compare` again") from error
    refuse_version(path, found.pop(VERSION, 1))
    return found


def best_lr(cells: Sequence[Cell], tuning: str = "best") -> float:
    """The learning rate with the highest validation accuracy; ties: the lower validation loss, then the smaller rate.

    Args:
        cells: runs of one task and arm that differ in their learning rate, usually those at the first seed.
        tuning: `best`, or `one-se`: the smallest rate whose validation accuracy lies within one standard error of the
            best, so that noise does not choose among rates that validation cannot tell apart.
    """

    def worth(cell: Cell) -> tuple[float, float, float]:
        validation = cell["validation"]
        loss = validation.get("loss")
        return validation["accuracy"], -loss if loss is not None and isfinite(loss) else float("-inf"), -cell["lr"]

    best = max(cells, key=worth)
    if tuning == "one-se":
        enough = best["validation"]["accuracy"] - best["validation"]["stderr"]
        return float(min(cell["lr"] for cell in cells if cell["validation"]["accuracy"] >= enough))
    return float(best["lr"])


def first_seed(results: Results, task: str, arm: str) -> list[Cell]:
    """The runs over the grid of learning rates: those of an arm on a task at the first seed."""
    return [cell for cell in results.of(task, arm) if cell["seed"] == results.seeds[0]]


def tuned(results: Results, task: str, arm: str) -> list[Cell]:
    """The runs of an arm on a task at its best learning rate, one a seed; none before its grid has begun."""
    grid = first_seed(results, task, arm)
    if not grid:
        return []
    best = best_lr(grid, results.tuning)
    return [cell for cell in results.of(task, arm) if cell["lr"] == best]


def at_edge(results: Results, task: str, arm: str) -> bool:
    """Whether the best learning rate is the smallest or the largest of several: the true best may lie outside."""
    grid = first_seed(results, task, arm)
    rates = sorted({float(rate) for rate in results.arm(arm).get("lrs") or [cell["lr"] for cell in grid]})
    return bool(grid) and len(rates) > 1 and best_lr(grid, results.tuning) in (rates[0], rates[-1])


def adapter_folder(folder: Path, way: str, task: str, tasks: Sequence[str]) -> Path:
    """Where a task's adapter lies, trained one way or the other."""
    own = folder / way / task
    if task != tasks[0] or (own / RECORD).is_file():  # a first one of its own: at another rate than other ways'
        return own
    return folder / WAYS[way].first / task
