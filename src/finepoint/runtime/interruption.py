"""Ctrl-C ends a command, whatever becomes of the KeyboardInterrupt that Python raises for it.

It is raised wherever the main thread happens to be. Where that is a function which a library calls from C, it may come
out as another error (of `torch.asarray`, as "could not determine the shape"), and a finaliser only prints it.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.resource_tracker import ensure_running
from types import FrameType

from finepoint.runtime import distributed

_came = False
_held = False


class BrokenOff(KeyboardInterrupt):
    """An interruption of a run that has left something, which the message tells of.

    Args:
        resumable: the same command goes on with `--resume`.
    """

    def __init__(self, message: str, resumable: bool) -> None:
        super().__init__(message)
        self.resumable = resumable


@contextmanager
def noticed() -> Iterator[None]:
    """Inside, ctrl-C is remembered, and an error of any kind that comes after it is a KeyboardInterrupt.

    So is a plain `kill`, by which schedulers and containers end a process; but not where a launcher has started several
    together, which it ends itself. Does nothing in threads other than the main one, and where somebody else handles the
    signal or it is ignored.
    """
    global _came, _held
    handled = signal.getsignal(signal.SIGINT)
    if handled is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    printed = sys.unraisablehook
    sys.unraisablehook = lambda ignored: None if ignored.exc_type is KeyboardInterrupt else printed(ignored)
    ended = signal.getsignal(signal.SIGTERM)
    kill_too = ended is signal.SIG_DFL and not distributed.launched()
    signal.signal(signal.SIGINT, _interrupt)
    if kill_too:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        with as_itself():
            yield
    finally:
        signal.signal(signal.SIGINT, handled)
        if kill_too:
            signal.signal(signal.SIGTERM, ended)
        sys.unraisablehook = printed
        _came = _held = False


def check() -> None:
    """Raises KeyboardInterrupt where ctrl-C came and was lost on the way: long work calls this now and then."""
    if _came and not _held:
        raise KeyboardInterrupt


def forget() -> None:
    """Ctrl-C that came has had its effect, and the command goes on."""
    global _came
    _came = False


def hold() -> None:
    """From now on ctrl-C waits, until `let_go`: what is being written must not be left half done."""
    global _held
    _held = True


def let_go(feel: bool = True) -> None:
    """Ctrl-C waits no more; one that came meanwhile is felt now, unless it is known already.

    Raises:
        KeyboardInterrupt: it came.
    """
    global _held
    _held = False
    if feel:
        check()


@contextmanager
def as_itself() -> Iterator[None]:
    """An error of any kind that comes after ctrl-C is a KeyboardInterrupt already here."""
    try:
        yield
    except Exception:
        check()
        raise


@contextmanager
def deaf() -> Iterator[None]:
    """Inside, ctrl-C waits; a process that is started there never hears it, as its parent does for both."""
    ensure_running()  # of multiprocessing, which would start it with the first process and let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    global _came
    _came = True
    if not _held:
        raise KeyboardInterrupt
