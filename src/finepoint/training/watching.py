"""Where a run stands, told by its folder: while it trains, in another terminal, or afterwards."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finepoint.errors import FinepointError
from finepoint.runtime.files import is_claimed, read_json
from finepoint.runtime.progress import clock
from finepoint.training.logfile import LOG, RECORD, UNDER_WAY, figures, read_log

logger = logging.getLogger(__name__)
RECENT = 20  # steps whose pace tells how long the rest takes
PAUSE = 1.0  # seconds between two looks


def standing(folder: Path) -> dict[str, Any]:
    """Where the run in a folder stands.

    Returns:
        `state` (`training`, `done`, or `left` before its end), `step` of `steps`, what the log has (`loss`, `reward`,
        `learning_rate`, `tokens_per_second`, `validation_loss`, `seconds`), and while it trains `seconds_left`.

    Raises:
        FinepointError: there is no run.
    """
    log = read_log(folder / LOG)
    done = (folder / RECORD).is_file()
    begun = read_json(folder / UNDER_WAY) if (folder / UNDER_WAY).is_file() else {}
    if not (log or done or begun):
        raise FinepointError(f"{folder} holds no run; give the --output of finepoint train or align")
    steps = read_json(folder / RECORD).get("steps") if done and not begun else begun.get("steps")
    state = "done" if done and not begun else "training" if is_claimed(folder) else "left"
    trained = [line for line in log if "loss" in line and "learning_rate" in line]
    last = trained[-1] if trained else {}
    found = {"folder": str(folder), "state": state, "step": last.get("step", begun.get("from", 0)), "steps": steps}
    found |= {key: last[key] for key in KEPT if key in last}
    if losses := [line["eval_loss"] for line in log if "eval_loss" in line]:
        found["validation_loss"] = losses[-1]
    left = _left(trained, steps) if state == "training" else None
    return found | ({} if left is None else {"seconds_left": left})


KEPT = ("loss", "reward", "rewards/margins", "rewards/accuracies", "learning_rate", "tokens_per_second", "seconds")


def _left(trained: list[dict[str, Any]], steps: int | None) -> float | None:
    """Seconds to the end at the pace of the last steps; None where that cannot be told."""
    recent = trained[-RECENT:]
    recent = recent[max((at for at in range(1, len(recent)) if recent[at]["seconds"] < recent[at - 1]["seconds"]),
                        default=0) :]  # fmt: skip
    if steps is None or len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return None
    pace = (recent[-1]["seconds"] - recent[0]["seconds"]) / (recent[-1]["step"] - recent[0]["step"])
    return round(pace * (steps - recent[-1]["step"]), 1)


def told(found: dict[str, Any]) -> str:
    """Where a run stands, in a line."""
    parts = [f"step {found['step']}" + (f" of {found['steps']}" if found["steps"] else "")]
    parts += [figures(found)] if figures(found) else []
    parts += [f"validation loss {found['validation_loss']:.4f}"] if "validation_loss" in found else []
    parts += [f"{clock(found['seconds_left'])} left"] if "seconds_left" in found else []
    return f"{found['state']}: {', '.join(parts)}"


def followed(folder: Path) -> Iterator[dict[str, Any]]:
    """Where the run stands, now and as often as that changes, until it trains no more."""
    before: dict[str, Any] | None = None
    while True:
        found = standing(folder)
        if found != before:
            yield found
        if found["state"] != "training":
            return
        before = found
        time.sleep(PAUSE)
