"""Work shared among torch's own OpenMP threads.

After an operation torch's threads spin for a while, waiting for the next. Threads of another pool would share the cores
with the spinning ones and gain nothing; inside torch's own pool there is nobody to share with.
"""

import ctypes
from typing import Any

import numba
import torch
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic


def _openmp() -> Any:
    """GNU OpenMP's entry point as torch has loaded it; None where torch is built otherwise (macOS, Windows)."""
    try:
        return ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, TypeError, OSError):
        return None


_PARALLEL = _openmp()


def thread_count() -> int:
    """How many threads `in_torch_threads` can make use of."""
    return torch.get_num_threads() if _PARALLEL else 1


def in_torch_threads(work: Any, pointers: Any, shares: int) -> None:
    """Calls the compiled `work(pointers)` side by side, at most so many times; `work` takes shares until none is left.

    Args:
        work: a Numba cfunc of signature void(voidptr*).
        pointers: an array of the addresses that it takes; what they point to must be alive.
    """
    if shares == 1:
        work.ctypes(pointers)
    else:
        _PARALLEL(ctypes.c_void_p(work.address), pointers, ctypes.c_uint(shares), ctypes.c_uint(0))


@intrinsic
def next_ticket(typing: Any, counter: Any) -> Any:
    """Adds one to the first of an int64 array and returns what it was; each call gets a number of its own."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = cgutils.create_struct_proxy(counter)(context, builder, value=arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return numba.types.int64(counter), code
