"""All trained weights at once: written from their deltas in one call, and the deltas compared with those written last.

A call costs as much as hundreds of entries, and a model has hundreds of weights: one by one they took longer than
their numbers do. On the CPU compiled code goes through a table of addresses; elsewhere the deltas are put in a row, so
that only the last write is weight by weight.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

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
        _write_(compiled, tabled(compiled))
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
    if compiled and not _same(compiled, tabled_pairs(compiled)):
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


def tabled(rows: Sequence[Row]) -> Any:
    """Where compiled code finds the rows, all of which fit it."""
    sizes = []
    for weight, indices, *_ in rows:
        sizes += [indices.numel(), weight.numel(), numba.KINDS[weight.dtype], indices.itemsize]
    return numba.Table([part.data_ptr() for row in rows for part in row], sizes, 4)


def tabled_pairs(pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """The same for pairs of tensors."""
    words = [one.numel() * one.itemsize // 4 for one, _ in pairs]
    return numba.Table([part.data_ptr() for pair in pairs for part in pair], words, 1)


def _in_one_call_(rows: Sequence[Row], table: Any) -> None:
    numba.write_together(table)


def _in_steps_(rows: Sequence[Row], table: Any) -> None:
    for row in rows:
        in_a_row_([row])


def _compare_in_one_call(pairs: Sequence[tuple[Tensor, Tensor]], table: Any) -> bool:
    return bool(numba.same_bits(table))


class Kept:
    """Rows that are written and compared again and again, their table made once.

    Whoever keeps it sees to it that no tensor of theirs is exchanged.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.weights = [row.weight for row in rows]
        self.pairs = [(row.delta, row.written) for row in rows]
        self._table, self._pairs = tabled(rows), tabled_pairs(self.pairs)

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Kept | None":
        """None where not all rows fit compiled code."""
        fit = rows and all(_fits(row) and not row.weight.is_inference() for row in rows)
        return cls(rows) if fit else None

    def write_(self) -> None:
        _write_(self.rows, self._table)
        torch.autograd.graph.increment_version(self.weights)

    def unchanged(self) -> bool:
        return _same(self.pairs, self._pairs)


numba = numba_kernels()
_write_ = or_plain(_in_one_call_, _in_steps_)
_same = or_plain(_compare_in_one_call, lambda pairs, table: _same_in_a_row(pairs))
