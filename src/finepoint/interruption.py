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
from typing import NoReturn

_came = False


@contextmanager
def noticed() -> Iterator[None]:
    """Inside, ctrl-C is remembered, and an error of any kind that comes after it is a KeyboardInterrupt.

    Does nothing in threads other than the main one, and where somebody else handles the signal or it is ignored.
    """
    global _came
    handled = signal.getsignal(signal.SIGINT)
    if handled is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    printed = sys.unraisablehook
    sys.unraisablehook = lambda ignored: None if ignored.exc_type is KeyboardInterrupt else printed(ignored)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except Exception:
        check()
        raise
    finally:
        signal.signal(signal.SIGINT, handled)
        sys.unraisablehook = printed
        _came = False


def check() -> None:
    """Raises KeyboardInterrupt where ctrl-C came and was lost on the way: long work calls this now and then."""
    if _came:
        raise KeyboardInterrupt


@contextmanager
def deaf() -> Iterator[None]:
    """Inside, ctrl-C waits; a process that is started there never hears it, as its parent does for both."""
    ensure_running()  # of multiprocessing, which would start it with the first process and let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    global _came
    _came = True
    raise KeyboardInterrupt
