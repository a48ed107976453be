"""Checkpoints that `--resume` can rely on: sealed when all of their files are written, and of the same run."""

import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finepoint.adapters.fingerprint import Fingerprint, is_fingerprint, unlike
from finepoint.data.store import StoredRows
from finepoint.data.tokens import JsonDigest
from finepoint.errors import FinepointError
from finepoint.models.packages import digest
from finepoint.runtime import distributed
from finepoint.runtime.files import VERSION, read_json, read_record, refuse_version, write_record
from finepoint.runtime.settings import deciding
from finepoint.training.callbacks import out_of_patience, validation_losses
from finepoint.training.logfile import RECORD as RECORD  # its former place
from finepoint.training.resolve import no_checkpoint
from finepoint.training.texts import texts_kept, texts_read
from finepoint.tuner.kernels import choice

logger = logging.getLogger(__name__)
SEAL = "sealed.json"
TIME = "time"  # of its settings, where the chat template writes it
BASE = "base"  # of the settings: the fingerprint
STATE = "trainer_state.json"  # the last file that transformers writes
STATES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
"""What transformers writes with torch.save; without one of them a run goes on, but not as if it had never stopped."""


def step_of(checkpoint: str | Path) -> int:
    """The step after which a checkpoint was written."""
    return int(str(checkpoint).rpartition("-")[2])


def seal(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Writes last of all what the files are, the settings that decide what the run makes of them, and its kernels."""
    files = {path.name: digest(path) for path in sorted(checkpoint.iterdir()) if path.is_file() and path.name != SEAL}
    write_record(checkpoint / SEAL, {"settings": settings, "kernels": choice.told(), "files": files})


def take_kernels_(checkpoint: str | Path) -> None:
    """From now on takes the kernels that the run took, so that sums are added in the same order."""
    sealed = Path(checkpoint) / SEAL
    found = read_json(sealed).get("kernels") if sealed.is_file() else None
    choice.take_(found if isinstance(found, dict) else {})


def checkpoints(folder: Path) -> list[str]:
    """The checkpoints of a run that are whole, latest first; a warning names those that are not.

    Raises:
        FinepointError: there is none, or one was written by a later finepoint.
    """
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()]
    whole: list[str] = []
    for path in sorted(found, key=step_of, reverse=True):
        if flaw := _flaw(path):
            logger.warning("%s is passed over: %s", path, flaw)
            continue
        if not whole:
            check_states(path)
        whole.append(str(path))
    if not whole:
        raise no_checkpoint(folder.parent)
    return whole


def decisive(config: Any, rows: Sequence[Any], base: Fingerprint, kept: Sequence[Any] = ()) -> dict[str, Any]:
    """What decides a run's bits, of which a resumed run has the same: settings, a digest of the examples, the base.

    Of files the contents count, not the names they go by; and a run may be carried on further.

    Args:
        kept: rows of text that is to be kept.
    """
    settings = deciding(config, "statistics", "selection", "bits", files=False)
    # What is not given stands for a number.
    settings |= {"protect_examples": texts_kept(config.protect, config.protect_examples),
                 "protect_read": texts_read(config.protect, config.protect_read)}  # fmt: skip
    return settings | {"examples": digest_of(rows, kept), "processes": distributed.count(), BASE: base.as_json()}


def digest_of(rows: Sequence[Any], more: Sequence[Any] = ()) -> str:
    """Examples, in tokens or as they are, in 16 characters: the digest of all of them as one JSON list.

    Of rows on disk it is that of the files and of how they are read.
    """
    found = JsonDigest()
    for row in chain([rows.digest] if isinstance(rows, StoredRows) else rows, more):
        found.add(row)
    return found.text()


def to_go_on_from(
    folder: Path, saved: Sequence[str], steps: int, settings: Mapping[str, Any], patience: int | None = None
) -> str:
    """The last checkpoint of a run with steps to do after it.

    A run that was killed when all steps were done, but before all was written, does the last ones again.

    Args:
        saved: the run's checkpoints, latest first.
        steps: how many the run is to do.
        settings: `decisive` of them.
        patience: of the run: what it stops by before all steps are done.

    Raises:
        FinepointError: all is done and written; the settings are not those of the run; all checkpoints lie at the end.
    """
    refuse_other_run(saved[0], settings)
    record = folder / RECORD
    done: dict[str, Any] = read_record(record) if record.is_file() else {"steps": 0}
    if done["steps"] >= steps:
        raise FinepointError(f"the run in {folder} has done its {done['steps']} steps; give more --steps to go on")
    if done.get("stopped_early") and patience and patience <= (done["config"].get("patience") or 0):
        raise FinepointError(f"the run in {folder} has stopped early, after {done['steps']} steps; give a larger "
                             f"--patience than {done['config']['patience']} to go on, or none")  # fmt: skip
    for checkpoint in saved:
        losses = [loss for _, loss in evaluated(checkpoint)]
        if step_of(checkpoint) < steps and not out_of_patience(losses, patience):
            return checkpoint
    raise FinepointError(f"the checkpoints in {folder} are of step {step_of(saved[-1])} and later; give more --steps "
                         "to go on, or start afresh with --overwrite")  # fmt: skip


def evaluated(checkpoint: str | Path) -> list[tuple[int, float]]:
    """The step and the loss of every evaluation before a checkpoint, and at it."""
    return validation_losses(TrainerState.load_from_json(str(Path(checkpoint) / STATE)))


def refuse_other_run(checkpoint: str, settings: Mapping[str, Any]) -> None:
    """Refuses to go on under settings that give other bits than those the checkpoint was trained with.

    Raises:
        FinepointError: the setting is named.
    """
    if not (Path(checkpoint) / SEAL).is_file():
        return  # of the first version, which kept none
    refuse_others(checkpoint, read_json(Path(checkpoint) / SEAL)["settings"], settings)


def told_time(checkpoint: str) -> datetime | None:
    """The time that the chat template of a run was told, where it writes one."""
    sealed = Path(checkpoint) / SEAL
    told = read_json(sealed)["settings"].get(TIME) if sealed.is_file() else None
    return datetime.fromisoformat(told) if told else None


def refuse_others(what: str | Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuses settings other than those before; what was no setting then does not count.

    Raises:
        FinepointError: the setting is named.
    """
    if is_fingerprint(before.get(BASE)):
        _refuse_unlike(what, before[BASE], settings[BASE])
    for name, now in json.loads(json.dumps(settings)).items():
        if name not in (BASE, TIME) and name in before and before[name] != now:
            if name == "examples":
                raise FinepointError(f"{what} was trained with other examples: a data file has changed, or what a chat "
                                     "template writes (a date?); give the same again, or start afresh with "
                                     "--overwrite")  # fmt: skip
            then, today = ("(none given)" if value is None else value for value in (before[name], now))
            raise FinepointError(f"{what} was trained with {name} {then}, not {today}; give the same "
                                 "settings again, or start afresh with --overwrite")  # fmt: skip


def refuse_other_base(checkpoint: str, base: Fingerprint) -> None:
    """Refuses to go on with another base model than the checkpoint was trained on.

    Raises:
        FinepointError: a weight that is not the same is named.
    """
    sealed = Path(checkpoint) / SEAL
    before = read_json(sealed)["settings"].get(BASE) if sealed.is_file() else None
    if is_fingerprint(before):
        _refuse_unlike(checkpoint, before, base.as_json())
    else:
        logger.warning("%s does not know its base as a whole (an earlier finepoint wrote it): another one would not be "
                       "noticed", checkpoint)  # fmt: skip


def _refuse_unlike(what: str | Path, before: Any, now: Any) -> None:
    if others := unlike(Fingerprint.of_json(before), Fingerprint.of_json(now)):
        raise FinepointError(f"{what} was trained on another base model: {others[0][0]} is not the same; give that "
                             "--model again, or start afresh with --overwrite")  # fmt: skip


def _flaw(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be gone on from."""
    try:
        if not (checkpoint / SEAL).is_file():
            read_json(checkpoint / STATE)  # all that tells of a checkpoint of the first version
            return None
        sealed = read_json(checkpoint / SEAL)
    except FinepointError:
        return "it was not written to its end"
    refuse_version(checkpoint / SEAL, sealed.get(VERSION))
    for name, known in sealed["files"].items():
        if not (checkpoint / name).is_file() or digest(checkpoint / name) != known:
            return f"its {name} is damaged"
    return None


def check_states(checkpoint: Path) -> None:
    """Reads what transformers keeps of a run, without letting it run any code.

    Raises:
        FinepointError: a file is missing or damaged, or holds what is no state; it is named.
    """
    read_json(checkpoint / STATE)
    for pattern in STATES:
        files = sorted(checkpoint.glob(pattern))
        if not files:
            raise FinepointError(f"{checkpoint} lacks {pattern.replace('*', '')}; {_way_out(checkpoint)}")
        for file in files:
            try:
                with zipfile.ZipFile(file) as archive:
                    if damaged := archive.testzip():
                        raise ValueError(f"{damaged} has another checksum")
                with safe_globals():
                    torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # whatever zipfile and torch make of a stranger's bytes
                raise FinepointError(f"cannot read {file}: {str(error)[:300]}; {_way_out(checkpoint)}") from error


def _way_out(checkpoint: Path) -> str:
    return f"remove {checkpoint.name} to go on from the checkpoint before it, or train afresh"
