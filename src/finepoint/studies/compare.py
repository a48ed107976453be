"""`finepoint compare`: runs the cells of a study that are still to be run, and keeps every result as it comes."""

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

from finepoint.data.examples import read_examples
from finepoint.data.leaks import warn_of_leaks
from finepoint.errors import FinepointError
from finepoint.models.packages import digest
from finepoint.runtime.files import alone, contents, read_json, read_record, refuse_version, write_json, write_record
from finepoint.runtime.progress import progress
from finepoint.runtime.settings import names
from finepoint.studies.cells import Failure, Outcome, check_sets, leaks_in
from finepoint.studies.estimate import estimate
from finepoint.studies.executors import LOST, Executor, InProcess, LocalProcesses, Ray
from finepoint.studies.settings import CompareConfig
from finepoint.studies.study import Cell, Study, described, make_study, planned
from finepoint.training.checkpoints import digest_of
from finepoint.training.run import versions
from finepoint.training.texts import names_own, protected_files

logger = logging.getLogger(__name__)
FORMAT = 1
# What may be added to a study that has begun; everything else would change what its cells mean.


@dataclass
class StudyState:
    """The folder of a study, and what is known of its cells."""

    folder: Path
    base: dict[str, Any] | None = None
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """of this run of the command; those of earlier ones are tried again"""

    @staticmethod
    def of(folder: Path) -> "StudyState":
        base = folder / "base.json"
        found = StudyState(folder, read_record(base) if base.is_file() else None)
        for path in sorted((folder / "cells").glob("*.json")):
            if not path.name.endswith(".error.json"):
                cell = read_record(path)
                found.cells[cell["id"]] = cell
        return found

    def keep(self, cell: Cell | None, outcome: Outcome) -> None:
        """Writes the outcome of a cell (None: of the base).

        Raises:
            FinepointError: the base could not be measured: without it there is nothing to compare with.
        """
        if isinstance(outcome, str):
            outcome = Failure("its process was killed, twice; is there enough memory?", "")
        if cell is None:
            if isinstance(outcome, Failure):
                raise FinepointError(f"the base model cannot be measured: {outcome.error}")
            self.base = outcome
            write_record(self.folder / "base.json", outcome)
            return
        path, mishap = (self.folder / "cells" / f"{cell.id}{end}.json" for end in ("", ".error"))
        if isinstance(outcome, Failure):
            self.failures[cell.id] = {"id": cell.id, **vars(cell), **vars(outcome)}
            write_json(mishap, self.failures[cell.id])
        else:
            self.cells[cell.id] = outcome
            write_record(path, outcome)
            mishap.unlink(missing_ok=True)


def compare(config: CompareConfig) -> dict[str, Any]:
    """Runs what is left of a study.

    Returns:
        `cells` (in all), `done`, `failed` (errors by cell), `seconds`; with `dry_run`, `todo` and `estimated_seconds`.

    Raises:
        FinepointError: whatever the user can mend, before any cell is run.
    """
    study = make_study(config)
    check_sets(config)
    leaked = leaks_in(config)
    folder = Path(config.output)
    manifest = manifest_of(study)
    manifest["arms"] += _arms_before(folder, manifest)
    if config.dry_run:
        _warn_of(leaked)
        return _outlook(study, StudyState.of(folder))
    with _alone(folder):
        _warn_of(leaked)
        facts = {"leaks": leaked, "versions": versions(), "machine": machine(), "date": str(date.today())}
        write_json(folder / "study.json", manifest | facts)
        state = StudyState.of(folder)
        logger.info("%d of %d cells are done; results go to %s", len(_done(study, state)), study.size, folder)
        started = time.perf_counter()
        executor = _executor(study)
        # In this process the runs show their own bars, and a terminal has room for one.
        bar = progress("cells", study.size) if executor.size > 1 else nullcontext(lambda done: None)
        try:
            with bar as advance:
                advance(len(_done(study, state)))
                _run(study, state, executor, advance)
        except KeyboardInterrupt:
            done = len(_done(study, state))
            logger.warning("interrupted: %d of %d cells are done; the same command goes on", done, study.size)
            raise
        finally:
            executor.close()
    return {
        "output": str(folder),
        "cells": study.size,
        "done": len(_done(study, state)),
        "failed": {name: failure["error"] for name, failure in state.failures.items()},
        "leaks": leaked,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _warn_of(leaked: Mapping[str, Mapping[str, dict[str, int]]]) -> None:
    for task, found in leaked.items():
        warn_of_leaks(found, f"task {task!r}")


def _run(
    study: Study, state: StudyState, executor: Executor, advance: Callable[[int], None] = lambda done: None
) -> None:
    """Gives out cells until none is left. A cell whose process was lost is given out once more."""
    running: set[Cell | None] = set()
    lost: set[Cell | None] = set()
    clock = Clock(executor.size)
    while True:
        todo: list[Cell | None] = [None] if state.base is None else list(_todo(study, state))
        todo = [cell for cell in todo if cell not in running]
        for cell in todo[: executor.size - len(running)]:
            running.add(cell)
            executor.start((cell, state.base))
        if not running:
            return
        (cell, _), outcome = executor.wait()
        running.discard(cell)
        if outcome == LOST and cell not in lost:
            lost.add(cell)
            logger.warning("the process that ran %s was killed; it is run once more", cell.id if cell else "the base")
            continue
        state.keep(cell, outcome)
        if cell is not None:
            logger.info("%s", _line(study, state, cell, clock))
            advance(1)


def _todo(study: Study, state: StudyState) -> list[Cell]:
    cells = planned(study, list(state.cells.values()), list(state.failures.values()))
    return [cell for cell in cells if cell.id not in state.cells and cell.id not in state.failures]


def _done(study: Study, state: StudyState) -> list[str]:
    """The finished cells that belong to the study as it is configured now."""
    cells = planned(study, list(state.cells.values()), list(state.failures.values()))
    return [cell.id for cell in cells if cell.id in state.cells]


@dataclass
class Clock:
    """When the rest will be done, judging by the cells of this run."""

    size: int
    started: float = field(default_factory=time.perf_counter)
    finished: int = 0

    def left(self, cells: int) -> str:
        self.finished += 1
        return duration((time.perf_counter() - self.started) / self.finished * cells)


def _line(study: Study, state: StudyState, cell: Cell, clock: Clock) -> str:
    """What is said when a cell is finished: its result and how far the study has come."""
    over = len(_done(study, state)) + len(state.failures)
    left = clock.left(max(0, study.size - over))
    head = f"[{over}/{study.size}, {left} left] {cell.task} {cell.arm} lr {cell.lr:g} seed {cell.seed}:"
    if cell.id in state.failures:
        return f"{head} failed: {state.failures[cell.id]['error']}"
    found = state.cells[cell.id]
    ood = found["changes"].get("ood_mean")
    carried = f", mean OOD {ood['change']:+.3f}" if ood else ""
    probes = "".join(f", {name} {change:+.3f}" for name, change in found["changes"]["probe_change"].items())
    learned = found["scores"]["id"][cell.task]["accuracy"]
    change = found["changes"]["id_change"][cell.task]
    return (f"{head} validation {found['validation']['accuracy']:.3f}, test {learned:.3f} ({change:+.3f}){carried}"
            f"{probes}, {found['cost']['seconds']:.0f} s")  # fmt: skip


def _outlook(study: Study, state: StudyState) -> dict[str, Any]:
    """What a run would do, and how long it might take: by the cells that are done, or else by arithmetic."""
    known = [cell.id for cell in _todo(study, state)]
    left = study.size - len(_done(study, state))
    seconds = [cell["cost"]["seconds"] for cell in state.cells.values()]
    each = mean(seconds) if seconds else estimate(study)
    return {
        "output": study.config.output,
        "cells": study.size,
        "done": study.size - left,
        "todo": known,
        "later": left - len(known),
        "seconds_a_cell": round(each, 1),
        "estimated_from": "finished cells" if seconds else "arithmetic",
        "estimated_seconds": round(each * left / max(1, study.config.workers)),
    }


def duration(seconds: float) -> str:
    """Rounded to what a person would say."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def manifest_of(study: Study) -> dict[str, Any]:
    """What decides the results of a study: its configuration and the contents of its files."""
    config = study.config
    files = [path for task in config.tasks.values() for path in task.values()] + list(config.probes.values())
    settings = (config.train, *(arm.train for arm in study.arms))
    named = [told[name] for told in settings for name in ("protect", "fisher_data") if told.get(name)]
    # What the base writes itself follows from the base.
    files += [file for sources in named for file in protected_files(sources) if not names_own(file)]
    return {
        "format": FORMAT,
        **described(study),
        "data": {path: contents_at(path, config.train.get("columns")) for path in sorted(set(files))},
    }


def contents_at(path: str, columns: Mapping[str, str] | None = None) -> str:
    """What is known of data: a file's bytes; of anything else, which may be a folder or on the hub, the examples."""
    return digest(Path(path)) if Path(path).is_file() else digest_of(read_examples(path, columns))


def _arms_before(folder: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arms of the study in the folder that it has no longer: their cells are still there.

    Refuses to go on under settings that the finished cells were not made with; an arm without any may still change.

    Raises:
        FinepointError: naming what differs; or the folder holds something else.
    """
    path = folder / "study.json"
    if not path.is_file():
        if folder.is_dir() and contents(folder) - {"cells"}:
            raise FinepointError(f"{folder} is not empty and holds no study; choose another --output")
        return []
    before = read_json(path)
    refuse_version(path, before.get("format"), FORMAT)
    manifest = json.loads(json.dumps(manifest))  # as it would be read: tuples are lists there
    arms, known = ({arm["name"]: {**arm, "lrs": None} for arm in found["arms"]} for found in (manifest, before))
    finished = {cell["arm"] for cell in StudyState.of(folder).cells.values()}
    pairs = [(f"arm {name}", known[name], arm) for name, arm in arms.items() if name in known and name in finished]
    fixed = names(CompareConfig, "bits")  # the rest may grow from one call to the next
    pairs += [(name, before["config"].get(name), value) for name, value in manifest["config"].items() if name in fixed]
    pairs += [(name, before["data"][name], value) for name, value in manifest["data"].items() if name in before["data"]]
    for what, was, now in pairs:
        if was != now:
            raise FinepointError(f"the study in {folder} was begun with another {what}: {was} then, {now} now; "
                                 "choose another --output, or go back to the old setting")  # fmt: skip
    return [arm for arm in before["arms"] if arm["name"] not in arms]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other `finepoint compare` works on the folder; the lock goes with its process.

    Raises:
        FinepointError: another one does.
    """
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    with alone(folder, busy=f"another finepoint compare is at work in {folder}"):
        yield


def _executor(study: Study) -> Executor:
    config = study.config
    if config.workers < 1:
        raise FinepointError(f"workers is {config.workers}; give at least 1")
    if config.executor == "ray":
        return Ray(study, config.workers, config.address)
    if config.address:
        raise FinepointError("address is of a Ray cluster; give --executor ray with it")
    return InProcess(study) if config.workers == 1 else LocalProcesses(study, config.workers)


def machine() -> str:
    """The processor, in a few words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
