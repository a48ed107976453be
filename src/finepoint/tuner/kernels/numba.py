"""Sampled weight gradient on the CPU, compiled by Numba (the extra `finepoint[cpu]`).

An entry's gradient is a dot product over the tokens of one column of dy and one of x. Gathered loads are slow, so the
tokens are first brought together in memory: 64 at a time, of the runs of eight columns that hold an entry, into tiles
that stay in the second cache. The tokens are shared among torch's threads, each with tiles and sums of its own.

These are torch's own OpenMP threads: after an operation they spin for a while, waiting for the next, and threads of
another pool would share the cores with the spinning ones and gain nothing.
"""

import ctypes
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit
from numba.core import cgutils
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic
from torch import Tensor

from finepoint.tuner.kernels.transpose import LINE, fetch, transpose_

TILE = 64  # tokens; measured among 8, 16, 32, 64 and 128. Shorter ones LLVM unrolls instead of vectorising.
CACHE_LINE = 64  # bytes, or twice as many
FETCHED = 16  # tokens read one after the other first: from memory, eight rows side by side take twice as long
SIZES, POINTERS = ctypes.c_int64 * 8, ctypes.c_void_p * 5
SIGNATURE = numba.types.void(numba.types.CPointer(numba.types.voidptr))


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


def compiled_here() -> bool:
    """Whether this process has compiled something of this module, rather than read it from the cache on disk."""
    compiled = [one for one in globals().values() if isinstance(one, Dispatcher)]
    return any(one.stats.cache_misses for one in compiled)


@intrinsic
def next_ticket(typing: Any, counter: Any) -> Any:
    """Adds one to the first of an int64 array and returns what it was; each call gets a number of its own."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = cgutils.create_struct_proxy(counter)(context, builder, value=arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return numba.types.int64(counter), code


def by_tiles(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """dy: (.., out), x: (.., in), any float dtype, on the CPU; indices: (k,) int32 or int64; returns (k,)."""
    height, width, count = dy.size(-1), x.size(-1), indices.numel()
    tokens = dy.numel() // height
    dtype, wide, worker = _kind(dy.dtype, x.dtype)
    # From here on there are addresses alone, which know neither shape nor stride.
    dy, x = _dense(dy, dtype), _dense(x, dtype)
    indices = _dense(indices, indices.dtype if indices.dtype == torch.int32 else torch.int64)
    assert dy.device.type == x.device.type == indices.device.type == "cpu"
    assert (dy.numel(), x.numel()) == (tokens * height, tokens * width)
    threads = max(1, min(thread_count(), tokens // TILE))
    share = -(-tokens // (threads * TILE)) * TILE
    sums = torch.empty(threads, count, dtype=wide)
    sizes = SIZES(0, threads, share, tokens, height, width, count, indices.element_size())
    pointers = POINTERS(ctypes.addressof(sizes), dy.data_ptr(), x.data_ptr(), indices.data_ptr(), sums.data_ptr())
    in_torch_threads(worker(), pointers, threads)
    return sums[0] if threads == 1 else sums.sum(0)


@lru_cache
def _kind(dy: torch.dtype, x: torch.dtype) -> tuple[torch.dtype, torch.dtype, Any]:
    """The dtype to read both operands in, the dtype to sum in, and the worker for that."""
    wide = torch.promote_types(torch.promote_types(dy, x), torch.float32)
    if dy == x == torch.bfloat16:
        return torch.bfloat16, wide, _half_share
    return wide, wide, _double_share if wide == torch.float64 else _single_share


def _dense(operand: Tensor, dtype: torch.dtype) -> Tensor:
    # Asked first, since a call that changes nothing costs as much as many entries do.
    return operand if operand.dtype == dtype and operand.is_contiguous() else operand.to(dtype).contiguous()


@njit(cache=True)
def _share(pointers: Any, operand: Any, wide: Any, shift: Any) -> None:
    """Shares of the tokens, until none is left: there may be fewer threads than were asked for."""
    sizes = carray(pointers[0], (8,), np.int64)
    ticket: int = next_ticket(sizes)  # type: ignore[call-arg]  # Numba passes the first argument
    threads, share, tokens, height, width, count, index_bytes = sizes[1:]
    dy = carray(pointers[1], (tokens, height), operand)
    x = carray(pointers[2], (tokens, width), operand)
    if index_bytes == 4:
        rows, columns = _places(carray(pointers[3], (count,), np.int32), width)
    else:
        rows, columns = _places(carray(pointers[3], (count,), np.int64), width)
    out = carray(pointers[4], (threads, count), wide)
    while ticket < threads:
        start = ticket * share
        _tiled_dots(dy, x, start, min(start + share, tokens), rows, columns, out[ticket], shift)
        ticket = next_ticket(sizes)


@njit(cache=True)
def _places(indices: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each of the ascending flat indices, int32; walking along them is faster than dividing."""
    rows = np.empty(indices.shape[0], dtype=np.int32)
    columns = np.empty(indices.shape[0], dtype=np.int32)
    row, start = 0, 0
    for entry in range(indices.shape[0]):
        while indices[entry] - start >= width:
            row += 1
            start += width
        rows[entry] = row
        columns[entry] = indices[entry] - start
    return rows, columns


# Compiled at their first use, or read from Numba's cache on disk.


@lru_cache
def _single_share() -> Any:
    return cfunc(SIGNATURE, cache=True)(lambda pointers: _share(pointers, np.float32, np.float32, None))


@lru_cache
def _double_share() -> Any:
    return cfunc(SIGNATURE, cache=True)(lambda pointers: _share(pointers, np.float64, np.float64, None))


@lru_cache
def _half_share() -> Any:
    """bfloat16, which NumPy does not know, is the upper half of the bits of a float32."""
    return cfunc(SIGNATURE, cache=True)(lambda pointers: _share(pointers, np.uint16, np.float32, np.uint32(16)))


@njit(fastmath=True, cache=True)
def _tiled_dots(
    dy: np.ndarray,
    x: np.ndarray,
    start: int,
    stop: int,
    rows: np.ndarray,
    columns: np.ndarray,
    out: np.ndarray,
    shift: Any,
) -> None:
    """out[entry] = sum over the tokens from start to stop; dy: (tokens, out), x: (tokens, in)."""
    dy_blocks, x_blocks = _blocks(rows, dy.shape[1]), _blocks(columns, x.shape[1])
    dy_tile = np.empty((dy.shape[1], TILE), dtype=out.dtype)
    x_tile = np.empty((x.shape[1], TILE), dtype=out.dtype)
    out[:] = 0
    for token in range(start, stop, TILE):
        _fill_tile(dy, token, stop, dy_blocks, dy_tile, shift)
        _fill_tile(x, token, stop, x_blocks, x_tile, shift)
        for entry in range(rows.shape[0]):
            row, column = rows[entry], columns[entry]
            total = out[entry]
            for t in range(TILE):
                total += dy_tile[row, t] * x_tile[column, t]
            out[entry] = total


@njit(cache=True)
def _blocks(places: np.ndarray, size: int) -> np.ndarray:
    """Where the runs of eight columns start that hold any of `places`, ascending; the last ends with the operand."""
    seen = np.zeros(-(-size // LINE), dtype=np.bool_)
    for place in places:
        seen[place // LINE] = True
    return np.minimum(np.flatnonzero(seen) * LINE, max(size - LINE, 0))


@njit(cache=True)
def _fill_tile(operand: np.ndarray, start: int, stop: int, blocks: np.ndarray, tile: np.ndarray, shift: Any) -> None:
    """tile[column, t] = operand[start + t, column], its bits shifted up if there is a shift; zeros from `stop` on."""
    width = operand.shape[1]
    for first in range(0, TILE, LINE):
        left = min(stop - start - first, LINE)
        if first % FETCHED == 0:
            end = min(start + first + FETCHED, stop)
            for place in range((start + first) * width, end * width, CACHE_LINE // operand.itemsize):
                fetch(operand, place)  # type: ignore[call-arg]  # Numba passes the first argument
        whole = left == LINE and width >= LINE
        for block in blocks:
            if whole:
                transpose_(operand, start + first, block, tile, first)  # type: ignore[call-arg]
            else:
                _fill_partly(operand, start + first, left, block, tile, first, shift)


@njit(cache=True)
def _fill_partly(
    operand: np.ndarray, token: int, left: int, block: int, tile: np.ndarray, first: int, shift: Any
) -> None:
    """The same for fewer than eight tokens or columns."""
    bits = tile.view(np.uint32)
    for column in range(block, min(block + LINE, operand.shape[1])):
        tile[column, first : first + LINE] = 0
        for t in range(left):
            _move(operand, token + t, column, tile, bits, first + t, shift)


@njit(cache=True)
def _move(
    operand: np.ndarray, token: int, column: int, tile: np.ndarray, bits: np.ndarray, place: int, shift: Any
) -> None:
    number = operand[np.uint64(token), column]
    if shift is None:
        tile[column, np.uint64(place)] = number
    else:
        bits[column, np.uint64(place)] = np.uint32(number) << shift


@njit(cache=True)
def add_at(weight: np.ndarray, indices: np.ndarray, base: np.ndarray, delta: np.ndarray) -> None:
    """weight[indices] = base + delta; all flat."""
    for entry in range(indices.shape[0]):
        moved = base[entry] + delta[entry] if delta[entry] != 0 else base[entry]
        weight[np.uint64(indices[entry])] = moved


@njit(cache=True)
def add_at_half(weight: np.ndarray, indices: np.ndarray, base: np.ndarray, delta: np.ndarray) -> None:
    """The same over bfloat16 in uint16, rounded to the nearest, ties to even."""
    for entry in range(indices.shape[0]):
        bits = base[entry]
        if delta[entry] != 0:
            exact = np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32) + delta[entry]
            wide = np.float32(exact).view(np.uint32)
            rounded = wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))
            bits = np.uint16(rounded >> np.uint32(16)) if exact == exact else np.uint16(0x7FC0)
        weight[np.uint64(indices[entry])] = bits


# All weights in one call: a table of addresses, and of each weight's sizes. `sizes` is (2 + 4 n,): the next weight, how
# many there are, then of each the entries, the weight's numbers, its kind (`KINDS`) and the bytes of an index.
# Its addresses are of itself, the indices, the base's values, the deltas, and those written last.

KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


@njit(cache=True)
def _write_shares(pointers: Any) -> None:
    """Weight after weight takes base + delta, and the deltas are copied to those written last, until none is left."""
    weights = carray(pointers[0], (2,), np.int64)[1]
    sizes = carray(pointers[0], (2 + 4 * weights,), np.int64)
    number: int = next_ticket(sizes)  # type: ignore[call-arg]  # Numba passes the first argument
    while number < weights:
        kind = sizes[2 + 4 * number + 2]
        if kind == 0:
            _write_one(pointers, sizes, number, np.float32, np.float32, None)
        elif kind == 1:
            _write_one(pointers, sizes, number, np.float64, np.float64, None)
        else:
            _write_one(pointers, sizes, number, np.uint16, np.float32, np.uint32(16))
        number = next_ticket(sizes)


@njit(cache=True)
def _write_one(pointers: Any, sizes: np.ndarray, number: int, operand: Any, wide: Any, shift: Any) -> None:
    count, numbers, _, index_bytes = sizes[2 + 4 * number : 6 + 4 * number]
    at = 1 + 5 * number
    weight = carray(pointers[at], (numbers,), operand)
    base = carray(pointers[at + 2], (count,), operand)
    delta = carray(pointers[at + 3], (count,), wide)
    if index_bytes == 4:
        _add(weight, carray(pointers[at + 1], (count,), np.int32), base, delta, shift)
    else:
        _add(weight, carray(pointers[at + 1], (count,), np.int64), base, delta, shift)
    carray(pointers[at + 4], (count,), wide)[:] = delta


@njit(cache=True)
def _add(weight: np.ndarray, indices: np.ndarray, base: np.ndarray, delta: np.ndarray, shift: Any) -> None:
    if shift is None:
        add_at(weight, indices, base, delta)
    else:
        add_at_half(weight, indices, base, delta)


@njit(cache=True)
def _compare(pointers: Any) -> None:
    """Whether both tensors of every pair have the same bits; of `sizes` the first number is the answer, the second how
    many pairs there are, the others the words of four bytes of each."""
    pairs = carray(pointers[0], (2,), np.int64)[1]
    sizes = carray(pointers[0], (2 + pairs,), np.int64)
    same = True
    for number in range(pairs):
        words = sizes[2 + number]
        one = carray(pointers[1 + 2 * number], (words,), np.uint32)
        other = carray(pointers[2 + 2 * number], (words,), np.uint32)
        differing = np.uint32(0)
        for word in range(words):
            differing |= one[word] ^ other[word]
        same = same and differing == 0
    sizes[0] = 1 if same else 0


@lru_cache
def _writer() -> Any:
    return cfunc(SIGNATURE, cache=True)(lambda pointers: _write_shares(pointers))


@lru_cache
def _comparer() -> Any:
    return cfunc(SIGNATURE, cache=True)(lambda pointers: _compare(pointers))


class Table:
    """Addresses and sizes of many tensors, where compiled code finds them; whoever makes it keeps the tensors alive.

    Args:
        addresses: five of each weight, or two of each pair; all are contiguous and on the CPU.
        sizes: four of each weight, or the words of four bytes of each pair.
    """

    def __init__(self, addresses: list[int], sizes: list[int], each: int) -> None:
        self.count = len(sizes) // each
        self.numbers = (ctypes.c_int64 * (2 + len(sizes)))(0, self.count, *sizes)
        self.pointers = (ctypes.c_void_p * (1 + len(addresses)))(ctypes.addressof(self.numbers), *addresses)


def write_together(table: Table) -> None:
    """Has all weights of a table take base + delta."""
    table.numbers[0] = 0
    in_torch_threads(_writer(), table.pointers, min(thread_count(), table.count))


def same_bits(table: Table) -> bool:
    """Whether both of each pair of a table have the same bits."""
    in_torch_threads(_comparer(), table.pointers, 1)
    return bool(table.numbers[0])
