"""Progress: bars in a terminal (on stderr) or a notebook, elsewhere a line of the log now and then.

Of several processes that train together the first one speaks.
"""

import html
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from finepoint.runtime import distributed, interruption

console = Console(stderr=True)
logger = logging.getLogger(__name__)
Step = TypeVar("Step")
PAUSE = 30.0  # seconds between the lines that stand for a bar in a log file
REDRAWN = 0.3  # seconds between two pictures of a bar in a notebook


class Bar:
    """How far a long piece of work is: call it with the number of steps done.

    That is also where a ctrl-C is felt that a library has lost.
    """

    def __init__(self, what: str, total: int, show: "Show") -> None:
        self.what, self.total, self.show = what, total, show
        self.done = self.begun = 0
        self.said = ""
        self.points: list[float] = []
        self.rows: list[Mapping[str, Any]] = []
        self.started = time.monotonic()

    def __call__(self, done: int) -> None:
        interruption.check()
        self.done += done
        self.show(self)

    def start(self, at: int) -> None:
        """Work begins, and goes on from a step that was done before."""
        self.done = self.begun = at
        self.started = time.monotonic()
        self.show(self)

    def tell(self, said: str, point: float | None = None) -> None:
        """What is to stand beside the bar, and a point of the curve that a notebook draws."""
        self.said = said
        self.points += [] if point is None else [point]
        self.show(self)

    def note(self, row: Mapping[str, Any]) -> None:
        """A row of the table that a notebook shows."""
        self.rows.append(row)
        self.show(self)

    def left(self) -> str:
        """The time that is left at this pace, as `0:42`; empty where that cannot be told."""
        if self.done <= self.begun:
            return ""
        return clock((time.monotonic() - self.started) * (self.total - self.done) / (self.done - self.begun))


Show = Callable[[Bar], None]


@contextmanager
def progress(what: str, total: int, stays: bool = False) -> Iterator[Bar]:
    """A bar for `total` steps, in a terminal or a notebook; elsewhere now and then a line of the log.

    Args:
        stays: it is left standing at its end, where nobody has asked for the log, which tells the same.
    """
    shown = _in_log if silenced() else _in_notebook if console.is_jupyter else _in_terminal
    with shown(what, total, stays and logging.getLogger("finepoint").level == logging.NOTSET) as show:
        yield Bar(what, total, show)


def silenced() -> bool:
    """Whether nobody looks on, or does not want to: no terminal or notebook, logging told to keep quiet.

    That is where finepoint's log is set above INFO, where transformers' bars or tqdm's are switched off.
    """
    told = sys.modules.get("transformers.utils.logging")
    return (
        not (console.is_jupyter or console.is_terminal)
        or not distributed.is_first()
        or logging.getLogger("finepoint").level > logging.INFO
        or os.environ.get("TQDM_DISABLE", "") not in ("", "0")
        or (told is not None and not told.is_progress_bar_enabled())
    )


@contextmanager
def _in_log(what: str, total: int, stays: bool) -> Iterator[Show]:
    due = time.monotonic() + PAUSE

    def show(bar: Bar) -> None:
        nonlocal due
        if bar.begun < bar.done < total and time.monotonic() >= due:
            logger.info("%s: %d of %d", what, bar.done, total)
            due = time.monotonic() + PAUSE

    yield show


@contextmanager
def _in_terminal(what: str, total: int, stays: bool) -> Iterator[Show]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=console, transient=not stays) as bars:
        task = bars.add_task(what, total=total, said="")
        yield lambda bar: bars.update(task, completed=bar.done, said=_beside(bar))


@contextmanager
def _in_notebook(what: str, total: int, stays: bool) -> Iterator[Show]:
    """By IPython's own display, which needs no widgets."""
    from IPython.display import HTML, display

    shown: Any = display(HTML(_drawn(Bar(what, total, lambda bar: None))), display_id=True)
    last: list[Bar] = []
    due = time.monotonic() + REDRAWN

    def show(bar: Bar) -> None:
        nonlocal due
        last[:] = [bar]
        if time.monotonic() >= due:
            shown.update(HTML(_drawn(bar)))
            due = time.monotonic() + REDRAWN

    try:
        yield show
    finally:
        shown.update(HTML(_drawn(last[0]) if stays and last else ""))


def _beside(bar: Bar) -> str:
    left = bar.left() if bar.done < bar.total else clock(time.monotonic() - bar.started)
    told = f"{left} {'left' if bar.done < bar.total else 'in all'}" if left else ""
    return ", ".join(part for part in (bar.said, told) if part)


def _drawn(bar: Bar) -> str:
    """A bar as HTML: how far, what is told beside it, the curve, the table."""
    parts = [f'<progress max="{bar.total}" value="{bar.done}"></progress> {html.escape(bar.what)}: {bar.done} of '
             f"{bar.total}{', ' if _beside(bar) else ''}{html.escape(_beside(bar))}"]  # fmt: skip
    if len(bar.points) > 1:
        parts.append(_curve(bar.points))
    if bar.rows:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in bar.rows[-1])
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row.values())}</tr>"
                       for row in bar.rows)  # fmt: skip
        parts.append(f"<table><tr>{head}</tr>{body}</table>")
    return "<div>" + "</div><div>".join(parts) + "</div>"


def _curve(points: Sequence[float]) -> str:
    """A small drawing of a curve, in the page's colour."""
    low, high = min(points), max(points)
    places = [(i / (len(points) - 1) * 300, 48 - 44 * (y - low) / ((high - low) or 1)) for i, y in enumerate(points)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places[:: max(1, len(places) // 600)])
    return ('<svg width="302" height="52" role="img" aria-label="loss"><polyline fill="none" stroke="currentColor" '
            f'points="{line}"/></svg> {high:.3g} to {low:.3g}')  # fmt: skip


def clock(seconds: float) -> str:
    """A duration as `0:42` or `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


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
