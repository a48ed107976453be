"""All trained weights at once: written from their deltas in one call, and the deltas compared with those written last.

A call costs as much as hundreds of entries, and a model has hundreds of weights: one by one they took longer than
their numbers do. On the CPU compiled code goes through a table of addresses; elsewhere the deltas are put in a row, so
that only the last write is weight by weight.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from finepoint.adapters import entries
from finepoint.adapters.entries import moved, scatter_
from finepoint.tuner.kernels import numba_kernels, or_plain

Given = TypeVar("Given")


class Row(NamedTuple):
    """The trained entries of one weight, (k,) each but for the weight, on one device."""

    weight: Tensor
    indices: Tensor
    """int32 or int64"""
    base: Tensor
    """the weight's dtype"""
    delta: Tensor
    written: Tensor
    """the deltas that the weight was given last: same dtype as these"""


def write_(rows: Sequence[Row]) -> None:
    """weight[indices] = base + delta and written = delta, row by row as `kernels.follow_` does it, to the bit."""
    compiled, others = _parted(rows, _fits)
    if compiled:
        _write_(compiled)
        torch.autograd.graph.increment_version([row.weight for row in compiled if not row.weight.is_inference()])
    by_kind: dict[tuple[torch.device, torch.dtype], list[Row]] = defaultdict(list)
    for row in others:
        by_kind[row.weight.device, row.weight.dtype].append(row)
    for group in by_kind.values():
        in_a_row_(group)


def same_bits(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether both tensors of each pair, of one dtype, shape and device, have the same bits.

    Of an accelerator one answer is waited for.
    """
    compiled, others = _parted(pairs, lambda pair: numba is not None and pair[0].itemsize >= 4 and _plain(pair))
    if compiled and not _same(compiled):
        return False
    by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for pair in others:
        by_device[pair[0].device].append(pair)
    return all(map(_same_in_a_row, by_device.values()))


def in_a_row_(rows: Sequence[Row]) -> None:
    """Plain PyTorch: the sums of all weights of one device and dtype are made together."""
    lengths = [len(row.indices) for row in rows]
    deltas = torch.cat([row.delta for row in rows])
    values = moved(torch.cat([row.base for row in rows]), deltas).split(lengths)
    positions = torch.cat([row.indices for row in rows]).long().split(lengths)
    for row, indices, value, delta in zip(rows, positions, values, deltas.split(lengths), strict=True):
        scatter_(row.weight, indices, value)
        row.written.copy_(delta)


def _same_in_a_row(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return entries.same_bits(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))


def _parted(given: Sequence[Given], fits: Callable[[Given], bool]) -> tuple[list[Given], list[Given]]:
    """Those that compiled code can take, and the others."""
    parts: tuple[list[Given], list[Given]] = ([], [])
    for one in given:
        parts[not fits(one)].append(one)
    return parts


def _fits(row: Row) -> bool:
    return numba is not None and row.weight.dtype in numba.KINDS and _plain(row)


def _plain(parts: Iterable[Tensor]) -> bool:
    """Whether addresses alone will do: compiled code asks nothing."""
    return all(part.is_cpu and part.is_contiguous() for part in parts)


def _in_one_call_(rows: Sequence[Row]) -> None:
    sizes = []
    for weight, indices, *_ in rows:
        sizes += [indices.numel(), weight.numel(), numba.KINDS[weight.dtype], indices.itemsize]
    numba.write_together([part.data_ptr() for row in rows for part in row], sizes)


def _in_steps_(rows: Sequence[Row]) -> None:
    for row in rows:
        in_a_row_([row])


def _compare_in_one_call(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    words = [one.numel() * one.itemsize // 4 for one, _ in pairs]
    return bool(numba.same_bits([part.data_ptr() for pair in pairs for part in pair], words))


numba = numba_kernels()
_write_ = or_plain(_in_one_call_, _in_steps_)
_same = or_plain(_compare_in_one_call, _same_in_a_row)
