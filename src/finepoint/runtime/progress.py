"""Progress on stderr: bars where a person looks on, elsewhere a line now and then; logs go there as well.

Of several processes that train together the first one speaks.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finepoint.runtime import distributed, interruption

console = Console(stderr=True)
logger = logging.getLogger(__name__)
Step = TypeVar("Step")
# transformers and PEFT import these where they are installed, needed or not, and they report the GPUs and the kernels
# that they find no libraries for.
CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes")
PAUSE = 30.0  # seconds between the lines that stand for a bar in a log file


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for `total` steps; inside, call the yielded function with the number of steps done.

    That is also where a ctrl-C is felt that a library has lost.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    silent = not (console.is_terminal and distributed.is_first())
    with Progress(*columns, console=console, transient=True, disable=silent) as bar:
        task = bar.add_task(what, total=total)
        finished, due = 0, time.monotonic() + PAUSE

        def advance(done: int) -> None:
            nonlocal finished, due
            interruption.check()
            bar.advance(task, done)
            finished += done
            if silent and finished < total and time.monotonic() >= due:
                logger.info("%s: %d of %d", what, finished, total)
                due = time.monotonic() + PAUSE

        yield advance


def tracked(what: str, steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, one by one, under a bar."""
    with progress(what, len(steps)) as advance:
        for step in steps:
            yield step
            advance(1)


def log_to_stderr(quiet: bool = False) -> None:
    """Sends finepoint's log to stderr, in the colours of a terminal where there is one."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("finepoint")
    log.handlers[:] = [handler]
    log.setLevel(logging.ERROR if not distributed.is_first() else logging.WARNING if quiet else logging.INFO)
    log.propagate = False
    quiet_libraries()


def quiet_libraries() -> None:
    """Keeps what some libraries say of themselves, whenever another imports them, from a user who did not ask."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
