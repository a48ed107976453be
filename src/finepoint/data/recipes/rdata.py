"""Text out of R's serialised objects (format described in the manual "R Internals"), without R.

Only what a package's `data/Rdata.rdx` and `Rdata.rdb` with character vectors hold: lists, vectors, attributes.
"""

import gzip
import struct
import zlib
from typing import Any

from finepoint.errors import FinepointError

NULL, GLOBAL, REFERENCE, SYMBOL, PAIRS, CHARS, LOGICAL, INTEGER, REAL, STRINGS, LIST = (
    254, 253, 255, 1, 2, 9, 10, 13, 14, 16, 19,
)  # fmt: skip


def read_database(index: bytes, blocks: bytes) -> dict[str, list[str]]:
    """The character vectors of a package's data, by name.

    Args:
        index: content of `Rdata.rdx`.
        blocks: content of `Rdata.rdb`.

    Raises:
        FinepointError: the files are of another form.
    """
    try:
        variables = Reader(gzip.decompress(index)).value()["variables"]
        found = {}
        for name, (offset, length) in variables.items():
            packed = blocks[offset + 4 : offset + length]  # the first four bytes are the unpacked length
            found[name] = Reader(zlib.decompress(packed)).value()
    except (OSError, EOFError, zlib.error, struct.error, KeyError, TypeError, ValueError) as error:
        raise FinepointError(f"cannot read R data: {error or type(error).__name__}") from error
    return found


class Reader:
    """Reads one object in R's binary (XDR) serialisation, version 2 or 3."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.references: list[Any] = []

    def value(self) -> Any:
        """The object: a dict for a list with names, else a list or a str."""
        if self.take(2) != b"X\n":
            raise ValueError("it is not in R's binary format")
        version = self.integer()
        self.take(8)  # versions of R
        if version == 3:
            self.take(self.integer())  # name of the encoding
        return self.item()

    def take(self, length: int) -> bytes:
        self.at += length
        return self.data[self.at - length : self.at]

    def integer(self) -> int:
        found: int = struct.unpack(">i", self.take(4))[0]
        return found

    def item(self) -> Any:
        flags = self.integer()
        kind = flags & 0xFF
        if kind in (NULL, GLOBAL):
            return None
        if kind == REFERENCE:
            return self.references[(flags >> 8) - 1]
        if kind == SYMBOL:
            self.references.append(self.item())
            return self.references[-1]
        if kind == PAIRS:
            return self.pairs(flags)
        if kind == CHARS:
            length = self.integer()
            text = self.take(max(length, 0))  # -1 for a missing one
            return text.decode("latin-1" if flags & 1 << 14 else "utf-8")
        found = self.vector(kind, self.integer())
        attributes = self.item() if flags & 1 << 9 else {}
        return dict(zip(attributes["names"], found, strict=True)) if "names" in attributes else found

    def vector(self, kind: int, length: int) -> list[Any]:
        if kind in (LOGICAL, INTEGER):
            return list(struct.unpack(f">{length}i", self.take(4 * length)))
        if kind == REAL:
            return list(struct.unpack(f">{length}d", self.take(8 * length)))
        if kind in (STRINGS, LIST):
            return [self.item() for _ in range(length)]
        raise ValueError(f"it holds an object of type {kind}, which nobody here reads")

    def pairs(self, flags: int) -> dict[str, Any]:
        """A pair list, e.g. the attributes of an object: cells of (attributes, tag, value), the next cell last."""
        found = {}
        while flags & 0xFF == PAIRS:
            if flags & 1 << 9:
                self.item()
            tag = self.item() if flags & 1 << 10 else ""
            found[tag] = self.item()
            flags = self.integer()
        return found
