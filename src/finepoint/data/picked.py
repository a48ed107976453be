"""Some rows of a source, by their numbers, and how many it has: of the others nothing is made where that can be."""

from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any

from finepoint.data.sources import (
    BATCHES,
    ending_of,
    files_of,
    json_lines,
    object_in,
    of_table,
    reader_of,
    saved_table,
    text_lines,
    without_gaps,
)

Numbered = tuple[int, str, Any]
"""a row's number, from 0, where it stands, and the row"""


def count_of(origin: Any) -> int:
    """How many rows `rows_of` gives for what lies in files.

    Raises:
        FinepointError: it cannot be read.
    """
    if (table := saved_table(origin)) is not None:
        return len(table)
    return sum(map(_count_in, files_of(origin)))


def _count_in(path: Path) -> int:
    if reader_of(path) is json_lines:
        return sum(1 for line in text_lines(path) if line.strip())
    if read := BATCHES.get(ending_of(path)):
        return sum(batch.num_rows for batch in read(path))
    return sum(1 for _ in reader_of(path)(path))


def picked(origin: Any, wanted: Collection[int]) -> Iterator[Numbered]:
    """The rows of these numbers, ascending, as `rows_of` gives them.

    Raises:
        FinepointError: one of them cannot be read, or, where they must be looked at, one before them.
    """
    if (table := saved_table(origin)) is not None:
        numbers = sorted(wanted)
        rows = of_table(str(origin), table.select(numbers))
        for number, (_, row) in zip(numbers, rows, strict=True):
            yield number, f"{origin}, row {number + 1}", row
        return
    begin, chosen = 0, frozenset(wanted)
    for path in files_of(origin):
        begin += yield from _picked_in(path, chosen, begin)


def _picked_in(path: Path, wanted: Collection[int], begin: int) -> Generator[Numbered, None, int]:
    """Those of one file, whose first row has the number `begin`; returns how many it has."""
    at = begin
    if reader_of(path) is json_lines:
        for number, line in enumerate(text_lines(path), 1):
            if not line.strip():
                continue
            if at in wanted:
                yield at, f"{path}, line {number}", object_in(path, number, line)
            at += 1
    elif read := BATCHES.get(ending_of(path)):
        for batch in read(path):
            own = [number for number in range(at, at + batch.num_rows) if number in wanted]
            rows = batch.take([number - at for number in own]).to_pylist() if own else []
            for number, row in zip(own, rows, strict=True):
                yield number, f"{path}, row {number - begin + 1}", without_gaps(row)
            at += batch.num_rows
    else:
        for where, row in reader_of(path)(path):
            if at in wanted:
                yield at, where, row
            at += 1
    return at - begin
