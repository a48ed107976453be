"""Compiled code that a machine may be unable to build or run: the plain way is always at hand."""

import logging
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib import import_module
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@lru_cache
def numba_kernels() -> Any:
    """The module of what Numba compiles; None where the extra finepoint[cpu] is not installed, or is broken."""
    try:
        return import_module("finepoint.tuner.kernels.numba")
    except ModuleNotFoundError:
        return None
    except Exception as error:  # versions that do not fit each other, a library that does not load
        logger.warning("Numba cannot be used (%s); plain PyTorch, slower, takes its place", _in_a_line(error))
        return None


def or_plain(compiled: Callable[..., Result], plain: Callable[..., Result]) -> Callable[..., Result]:
    """`compiled` until it fails for the first time; from then on `plain`, which gives the same. One line says so."""
    works = True

    @wraps(compiled)
    def either(*arguments: object) -> Result:
        nonlocal works
        if works:
            try:
                return compiled(*arguments)
            except Exception as error:  # whatever a compiler, a driver or a cache on disk may raise
                result = plain(*arguments)  # first: if the arguments are at fault, this raises too
                works = False
                logger.warning("the compiled kernel %s does not run on this machine (%s); plain PyTorch, slower, takes "
                               "its place", compiled.__name__, _in_a_line(error))  # fmt: skip
                return result
        return plain(*arguments)

    return either


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
