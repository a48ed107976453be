"""`finepoint train --density auto`: the density that learns most at the least cost, by successive halving.

Every pair of a density and a learning rate is tried for a quarter of the steps; the better third goes on with half of
them, the best of these with all (Jamieson and Talwalkar, arXiv:1502.07943, for the halving). Each trial starts afresh,
so that its learning rate falls to zero as it would alone. The judge is the lowest validation loss of a run; among
trials that the examples cannot tell from the lowest, it is what they did to the predictions on the prompts, which
nobody asked them to change.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.fingerprint import contents_of, fingerprint
from finepoint.adapters.format import TENSORS
from finepoint.data.batches import Row
from finepoint.data.examples import read_examples, some
from finepoint.data.leaks import leaks, warn_of_leaks
from finepoint.data.store import learnable
from finepoint.errors import FinepointError
from finepoint.evaluation.divergence import learned_and_disturbed
from finepoint.models.packages import digest
from finepoint.runtime.files import claim_folder, read_json, read_record, write_json, write_record
from finepoint.runtime.interruption import BrokenOff
from finepoint.runtime.settings import deciding
from finepoint.selection.rules import rule_named
from finepoint.studies.sharing import shared_selection
from finepoint.studies.study import BLIND_RATES, GRADIENT_RATES
from finepoint.training.checkpoints import decisive, digest_of, refuse_others
from finepoint.training.context import TrainingContext, prepare, rows_of, scoring_rows
from finepoint.training.resolve import steps_of
from finepoint.training.run import RECORD, fit
from finepoint.training.settings import TrainConfig
from finepoint.tuner.finite import TrainingFailedError

logger = logging.getLogger(__name__)
DENSITIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SHARES = (0.25, 0.5, 1.0)  # of the steps, rung by rung
KEPT = 3  # one in so many goes on to the next rung
JUDGED, WINDOW = 64, 512  # validation examples, and tokens at the end of each: on these, trials are told apart
SETTINGS = "settings.json"
KEPT_FACTS = ("trained", "validation_loss", "last_validation_loss", "last_loss", "best_step", "update_norm")


@dataclass(frozen=True)
class Trial:
    """One short run of the search."""

    density: float
    lr: float
    steps: int

    @property
    def id(self) -> str:
        return f"d{self.density:g}-lr{self.lr:g}-{self.steps}"


def train_auto(config: TrainConfig) -> dict[str, Any]:
    """Searches density and, where none is given, learning rate; trains at the best and leaves that run in the output.

    Returns:
        The record of the best run with `search`: every trial's losses, also in `search/` of the output. With
        `resume` finished trials are not run again.

    Raises:
        FinepointError: no validation examples, or whatever `finepoint train` refuses.
    """
    if config.validation is None:
        raise FinepointError("--density auto judges by validation; give --validation FILE.jsonl")
    if config.baseline or config.indices or config.count:
        raise FinepointError("--density auto chooses by a rule; give no --baseline, --indices or --count with it")
    with claim_folder(config.output, config.overwrite or config.resume) as folder:
        try:
            return _search(config, folder)
        except KeyboardInterrupt as error:
            done = len(list((folder / "search").glob("d*.json")))
            raise BrokenOff(f"after {done} trials of the search, which are in {folder}", True) from error


def _search(config: TrainConfig, folder: Path) -> dict[str, Any]:
    if not config.resume:
        shutil.rmtree(folder / "search", ignore_errors=True)
        (folder / RECORD).unlink(missing_ok=True)
    elif (folder / RECORD).is_file():
        raise FinepointError(f"the search in {folder} is done; its losses are in {folder / RECORD}")
    context = prepare(config)
    judged = _judged_rows(config, context)
    _refuse_other_search(config, context, folder / "search")
    steps = steps_of(config, len(learnable(context.rows)))
    lrs = (config.lr,) if config.lr else GRADIENT_RATES if rule_named(config.rule).needs_data else BLIND_RATES
    pairs = [(density, lr) for density in DENSITIES for lr in lrs]
    found: list[dict[str, Any]] = []
    rung: list[dict[str, Any]] = []
    for share in SHARES:
        length = max(1, round(share * steps))
        # Halfway and at the end: enough to see over-fitting. The longest are the runs that one would get alone.
        looks = config.eval_every if share == 1 else max(1, length // 2)
        trials = [Trial(density, lr, length) for density, lr in pairs]
        settings = replace(config, eval_every=looks)
        rung = [_run(settings, context, judged, trial, folder / "search") for trial in trials]
        found += rung
        if share < 1:
            _forget_adapters(folder / "search")
        pairs = [(trial["density"], trial["lr"]) for trial in best(rung, max(1, len(rung) // KEPT))]
    winner = best(rung, 1)[0]
    logger.info("density %g at learning rate %g is taken", winner["density"], winner["lr"])
    best_run = folder / "search" / Trial(winner["density"], winner["lr"], winner["steps"]).id
    search = [{name: trial[name] for name in trial if name != "losses"} for trial in found]
    record = read_record(best_run / RECORD) | {"search": search}
    _move_up(best_run, folder)
    if context.seen:
        context.seen.save(folder)
    write_record(folder / RECORD, record)  # says that the search is done
    _tidy(folder / "search")
    return record


def _refuse_other_search(config: TrainConfig, context: TrainingContext, search: Path) -> None:
    """Records the settings of a search; resuming it needs the same ones, otherwise its trials are not comparable.

    Raises:
        FinepointError: another setting, or other examples, than those it was begun with.
    """
    validation = some(read_examples(config.validation, config.columns), config.validation_limit)
    files = [Path(folder) / TENSORS for folder in config.exclude]
    settings = decisive(config, context.rows, fingerprint(contents_of(context.model))) | {
        **deciding(config, "length", files=False), "validation examples": digest_of(validation),
        "entries excluded": [digest(file) if file.is_file() else str(file) for file in files],  # or a hub's
    }  # fmt: skip
    file = search / SETTINGS
    if file.is_file():
        refuse_others(f"the search in {search}", read_record(file), settings)
    elif any(search.glob("d*.json")):
        logger.warning("the search in %s was begun by an earlier finepoint, which did not write down its settings: "
                       "give the same ones", search)  # fmt: skip
    write_record(file, settings)
    if context.seen:
        warn_of_leaks(leaks(context.seen, {"validation": validation}))


def _move_up(source: Path, folder: Path) -> None:
    """Moves the winner's files to the output; the record is written last, so an interrupted search resumes."""
    for path in source.iterdir():
        if path.name != RECORD:
            path.replace(folder / path.name)


def _tidy(search: Path) -> None:
    """The other finalists' adapters go, their losses stay."""
    _forget_adapters(search)
    shutil.rmtree(search / "statistics", ignore_errors=True)
    shutil.rmtree(search / "selections", ignore_errors=True)


def _forget_adapters(folder: Path) -> None:
    """What short runs trained is of no use; their losses stay."""
    for path in folder.glob("d*"):
        if path.is_dir():
            shutil.rmtree(path)


def best(trials: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The trials that learned as much as any, those that changed least besides first; then those of lower loss.

    A trial has learned as much as that of the lowest validation loss where its loss on the judged examples lies above
    by no more than one standard error of the difference, example by example. Ties: fewer entries, smaller rate.

    Args:
        trials: each with `validation_loss`, the `losses` of the judged examples, and `kl` to the base on their prompts;
            where that is None the validation loss decides alone.

    Raises:
        FinepointError: none has a loss.
    """
    sound = [trial for trial in trials if trial["validation_loss"] is not None]
    if not sound:
        raise FinepointError(f"no trial of the search came to an end: {trials[0]['error']}")
    lowest = min(sound, key=lambda trial: trial["validation_loss"])

    def order(trial: dict[str, Any]) -> tuple[float, ...]:
        alike = trial["kl"] is not None and _as_good(trial["losses"], lowest["losses"])
        judge = trial["kl"] if alike else trial["validation_loss"]
        return not alike, judge, trial["density"], trial["lr"]

    return sorted(sound, key=order)[:count]


def _as_good(losses: Sequence[float], lowest: Sequence[float]) -> bool:
    """Whether the mean difference, example by example, is within its standard error."""
    above = np.subtract(losses, lowest)
    return bool(above.mean() <= (above.std(ddof=1) / len(above) ** 0.5 if len(above) > 1 else 0.0))


def _run(
    config: TrainConfig, context: TrainingContext, judged: list[Row], trial: Trial, folder: Path
) -> dict[str, Any]:
    """One trial: its settings, its losses, and its over-fitting: how far the last validation loss lies above the best.

    A trial that diverges has an error instead.
    """
    path = folder / f"{trial.id}.json"
    if path.is_file() and "kl" in (done := read_json(path)):  # earlier versions did not look
        return done
    settings = replace(config, density=trial.density, lr=trial.lr, steps=trial.steps, keep="best", save_every=None,
                       resume=False, overwrite=True, output=str(folder / trial.id))  # fmt: skip
    indices, _ = shared_selection(settings, context, folder)
    try:
        record, adapter = fit(replace(settings, indices=str(indices)), context)
    except TrainingFailedError as error:  # not a full disk, after which the trial is to be tried again
        found = asdict(trial) | dict.fromkeys((*KEPT_FACTS, "kl")) | {"error": str(error)}
    else:
        overfit = record["last_validation_loss"] - record["validation_loss"]
        found = asdict(trial) | {name: record[name] for name in KEPT_FACTS} | {"overfit": overfit}
        found |= _judged(context, judged, adapter)
    logger.info("density %g, lr %g, %d steps: validation loss %s, KL on prompts %s", trial.density, trial.lr,
                trial.steps, found["validation_loss"], found["kl"])  # fmt: skip
    write_json(path, found)
    return found


def _judged_rows(config: TrainConfig, context: TrainingContext) -> list[Row]:
    """The ends of some validation examples; none of a classifier, which has no prompts whose predictions could stay."""
    given = rows_of(config, context, config.validation, "validation example", config.validation_limit) or []
    ends = [Row(row.ids[-WINDOW:], row.labels[-WINDOW:]) for row in given if isinstance(row.labels, list)]
    return scoring_rows(ends, JUDGED, config.seed)


def _judged(context: TrainingContext, rows: list[Row], adapter: SparseAdapter) -> dict[str, Any]:
    """`losses` of these examples under a trial's adapter, and `kl` to the base on their prompts.

    Without examples, or where texts are learned from their first token, `kl` is None.
    """
    if not rows:
        return {"losses": [], "kl": None}
    losses, kl = learned_and_disturbed(context.model, context.collator, rows, adapter)
    return {"losses": losses.tolist(), "kl": kl}
