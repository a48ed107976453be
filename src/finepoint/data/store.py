"""Examples in tokens on disk: of large files, of which a run reads the rows that it trains on and holds none.

A store lies in finepoint's cache folder under a digest of all that decides its rows: the bytes of the files, how their
columns are named, the tokenizer and its template, the most tokens of a row, versions, and which rows of the files are
read. The rows are those that `encode_all` makes of `read_examples`, in their order; a second run maps them into memory
and reads no text. Stores that were not used for longest give way once all of them take more than `MOST` bytes.

Which rows a run reads is known beforehand: its order is drawn over the numbers of the files' rows, and goes on where
there is nothing to learn of one. So its beginning is the same however many of them are read.
"""

import json
import logging
import os
import random
import shutil
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from finepoint.data.chats import clock, learned_turns, tells_time
from finepoint.data.examples import (
    FORMS,
    Example,
    Labelled,
    LeftOut,
    Part,
    Reading,
    in_order,
    refuse_unlike,
    tell_ignored,
    tell_left_out,
)
from finepoint.data.leaks import Seen, digests_of
from finepoint.data.picked import Numbered, count_of, picked
from finepoint.data.sources import ending_of, files_of, parts_of, rows_of
from finepoint.data.tokens import (
    IGNORED,
    PART,
    Row,
    Tally,
    around,
    encode_part_each,
    learned,
    nothing_learned,
    refuse_beyond,
    uncollected,
)
from finepoint.errors import FinepointError
from finepoint.models.packages import cache_folder, digest
from finepoint.runtime.files import alone, move_files, partial_folder, read_json, write_json, writing
from finepoint.runtime.progress import progress
from finepoint.runtime.settings import ChatTurns
from finepoint.version import __version__

logger = logging.getLogger(__name__)
LARGE = 8 << 20  # bytes of data files: what is smaller is read in a moment
MOST = 16 << 30  # bytes of all stores
FORMAT = 4
BATCHES_SORTED = 50  # batches made from one sorted stretch of the random order
SPARE = 50  # one row in so many is read besides, for those that hold nothing to learn
FACTS = "facts.json"  # written last


def shuffled(count: int, draw: random.Random) -> Iterator[int]:
    """The numbers below `count` in a random order; its beginning costs no more than itself."""
    moved: dict[int, int] = {}
    for at in range(count):
        other = draw.randrange(at, count)
        here = moved.pop(at, at)
        if other == at:
            yield here
        else:
            chosen, moved[other] = moved.get(other, other), here
            yield chosen


class StoredRows(Sequence[Row]):
    """Rows of tokens in files that are mapped into memory; a row is made when it is asked for."""

    def __init__(self, folder: Path, places: np.ndarray | None = None) -> None:
        self.folder = folder
        self.facts: Mapping[str, Any] = read_json(folder / FACTS)
        self.ends, self.counts, self.lines, self.read = (
            np.load(folder / f"{name}.npy") for name in ("ends", "learned", "lines", "read")
        )
        self.ids = np.asarray(np.memmap(folder / "ids.bin", np.int32, "r"))
        self.mask = np.asarray(np.memmap(folder / "mask.bin", np.bool_, "r"))
        classes = np.load(folder / "classes.npy")
        self.classes = classes if len(classes) else None
        self.places = places

    def __len__(self) -> int:
        return len(self.ends if self.places is None else self.places)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        at = place % len(self) if self.places is None else self.places[place]
        start, end = (self.ends[at - 1] if at else 0), self.ends[at]
        ids = self.ids[start:end]
        if self.classes is not None:
            return Row(ids.tolist(), int(self.classes[at]))
        return Row(ids.tolist(), np.where(self.mask[start:end], ids, IGNORED).tolist())

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        every = np.diff(self.ends, prepend=0)
        return (every if self.places is None else every[self.places]).tolist()

    def learnable(self) -> "StoredRows":
        """The rows with something to learn."""
        return self if self.counts.all() else StoredRows(self.folder, np.flatnonzero(self.counts))

    @property
    def digest(self) -> str:
        """Of all that decides what a run over these files reads, however many of their rows it is."""
        return str(self.facts["digest"])

    @property
    def an_epoch(self) -> int:
        """How many rows an epoch has, or about so many where not all are read."""
        return int(self.facts["lines"]) if len(self.read) else len(self)

    def drawn(self, seed: int, epoch: int = 0) -> Iterator[int]:
        """Places of rows in a random order, a function of these numbers and the files alone."""
        lines = self.lines if self.places is None else self.lines[self.places]
        count = int(self.facts["lines"])
        begins, known = np.searchsorted(lines, np.arange(count + 1)), set(self.read.tolist())
        for line in shuffled(count, random.Random(f"{seed}:{epoch}")):
            assert not known or line in known, "a run wants rows that it was not said to read"
            yield from range(begins[line], begins[line + 1])

    @property
    def seen(self) -> Seen:
        """Digests of the examples."""
        return Seen(np.load(self.folder / "exact.npy"), np.load(self.folder / "normalised.npy"))

    def told(self, sources: Sequence[Any]) -> list[dict[str, Any]]:
        """What a record says of each source."""
        return [{"source": str(source), "form": part["keys"], "rows": part["rows"], "taken": part["taken"]}
                | LeftOut(**part["left_out"]).told()
                for source, part in zip(sources, self.facts["parts"], strict=True)]  # fmt: skip


def learnable(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows with something to learn, in their order."""
    return rows.learnable() if isinstance(rows, StoredRows) else [row for row in rows if learned(row)]


def lengths(rows: Sequence[Row]) -> list[int]:
    """How many tokens each row has."""
    return rows.lengths if isinstance(rows, StoredRows) else [len(row.ids) for row in rows]


@dataclass(frozen=True)
class LargeData:
    """Examples of large files: known, and not in memory."""

    folder: Path
    """in the cache; the stores lie beside it"""
    sources: Sequence[Any]
    columns: Mapping[str, str]
    need: bool
    size: int
    """bytes of the files"""
    facts: Mapping[str, Any]

    @property
    def labels(self) -> list[str]:
        """The classes, as by `label_names`."""
        return list(self.facts["labels"])

    @property
    def form(self) -> str:
        """The examples' type, e.g. `chat`."""
        return str(self.facts["form"])

    @property
    def count(self) -> int:
        """How many rows the files have, those that hold nothing to learn among them."""
        return sum(self.facts["counts"])

    def encoded(
        self, tokenizer: Any, limit: int, labels: Sequence[str], what: str, model: Any, turns: ChatTurns,
        reads: tuple[int, int] | None = None,
    ) -> StoredRows:  # fmt: skip
        """`encode_all` of the examples, made once.

        Args:
            reads: the seed of a run, and how many rows it takes in the order drawn by it: where that is less than half
                of them, the others stay unread. None: all are read.

        Raises:
            FinepointError: as there; the cache is full.
        """
        # Texts longer than the context are several rows each, and these are drawn one by one.
        apart = self.form == "text" and self.size > limit * self.count
        made = _Encoding(self, tokenizer, limit, list(labels), what, model, turns, apart)
        seed, most = reads or (0, 0)
        lines = most + most // SPARE
        while reads and not apart and 2 * lines < self.count:
            some = sorted(islice(shuffled(self.count, random.Random(f"{seed}:0")), lines))
            if len((rows := made.rows(some, [seed, lines])).learnable()) >= most:
                return rows
            lines *= 2  # much of it is not to be learned
        return made.rows()


@dataclass(frozen=True)
class _Encoding:
    """How rows of large files come to be tokens."""

    data: LargeData
    tokenizer: Any
    limit: int
    labels: Sequence[str]
    what: str
    model: Any
    turns: ChatTurns
    apart: bool

    def rows(self, some: Sequence[int] = (), key: Sequence[int] = ()) -> StoredRows:
        """The rows as they are kept.

        Args:
            some: numbers of the files' rows that are read, ascending; all where none are given.
            key: what tells which they are.
        """
        if some:
            logger.info("%s of %s rows are read, those that this run draws; what is said of rows is said of these",
                        f"{len(some):,}", f"{self.data.count:,}")  # fmt: skip
        decides = [identity_of(self.tokenizer), self.limit, self.labels, self.turns, self.apart]
        folder = self.data.folder.with_name(f"{self.data.folder.name}-{key_of(decides, key)}")
        with alone(folder):
            if not is_whole(folder):
                with partial_folder(folder) as made:
                    self._write(made, some, key_of(self.data.facts["contents"], decides, versioned=False))
                    move_files(made, folder)
                tidy(folder.parent)
            os.utime(folder / FACTS)
        self._tell(rows := StoredRows(folder))
        return rows

    def _tell(self, rows: StoredRows) -> None:
        for source, part in zip(self.data.sources, rows.facts["parts"], strict=True):
            left_out = LeftOut(**part["left_out"])
            tell_left_out(str(source), part["taken"] + left_out.blank, left_out)
            if part["ignored"]:
                tell_ignored(str(source), tuple(part["keys"]), tuple(part["ignored"]))
        Tally(**rows.facts["tally"]).tell(self.limit, self.what)
        refuse_beyond(self.model, self.tokenizer, [[rows.facts["largest"]]])
        logger.info("%d rows of tokens are in %s", len(rows), rows.folder)

    def _write(self, folder: Path, some: Sequence[int], digest: str) -> None:
        data, tally, count = self.data, Tally(), len(some) or self.data.count
        readings = [Reading(str(source), FORMS, data.columns, data.need, some=bool(some)) for source in data.sources]
        examples = _numbered(readings, data, some)
        quick = nullcontext() if data.form == "chat" else uncollected()
        with _Writer.into(folder) as written, progress("tokens", count) as advance, quick:
            while part := list(islice(examples, PART)):
                turns = [(at, turn) for at, each in part for turn in learned_turns([each], self.turns)]
                rows = encode_part_each(self.tokenizer, [turn for _, turn in turns], self.limit, self.labels, tally,
                                        self.model)  # fmt: skip
                written.add(list(chain(*rows)), [at for (at, _), own in zip(turns, rows, strict=True) for _ in own])
                written.see(example for _, example in part)
                advance(len(part))
            if not any(written.learned):
                raise nothing_learned(self.what)
            if self.apart:
                written.lines = array("q", range(len(written.lines)))
            written.read.extend(some)
        parts = [_part_told(reading, rows if some else reading.given)
                 for reading, rows in zip(readings, data.facts["counts"], strict=True)]  # fmt: skip
        _seal(folder, {"digest": digest, "largest": written.largest, "tally": asdict(tally), "parts": parts,
                       "lines": len(written.lines) if self.apart else data.count})  # fmt: skip


def _part_told(reading: Reading, rows: int) -> dict[str, Any]:
    """What is kept of a source: how many rows it has, and what was found in those that were read."""
    taken = reading.taken
    return {"rows": rows, "taken": reading.given, "keys": list(taken.keys) if taken else [],
            "ignored": list(taken.ignored) if taken else [], "left_out": asdict(reading.left_out)}  # fmt: skip


def _numbered(readings: Sequence[Reading], data: LargeData, some: Sequence[int]) -> Iterator[tuple[int, Example]]:
    """The examples of all sources, each with the number of its row among those of all."""
    begin = 0
    for source, reading, count in zip(data.sources, readings, data.facts["counts"], strict=True):
        own = [number - begin for number in some[bisect_left(some, begin) : bisect_left(some, begin + count)]]
        rows = picked(source, own) if some else ((at, *row) for at, row in enumerate(rows_of(source)))
        at = begin

        def placed(rows: Iterable[Numbered] = rows, begin: int = begin) -> Iterator[tuple[str, Any]]:
            nonlocal at
            for number, where, row in rows:
                at = begin + number
                yield where, row

        for example in reading.examples(placed()):
            yield at, example
        begin += count


@dataclass
class _Writer:
    """The files of a store under way."""

    ids: IO[bytes]
    mask: IO[bytes]
    ends: "array[int]" = field(default_factory=lambda: array("q"))
    learned: "array[int]" = field(default_factory=lambda: array("q"))
    classes: "array[int]" = field(default_factory=lambda: array("q"))
    lines: "array[int]" = field(default_factory=lambda: array("q"))
    """of each row, the number of the file's row that it is of"""
    read: "array[int]" = field(default_factory=lambda: array("q"))
    """numbers of the files' rows that were read; none where all were"""
    exact: "array[int]" = field(default_factory=lambda: array("q"))
    normalised: "array[int]" = field(default_factory=lambda: array("q"))
    """digests of the examples"""
    largest: int = 0

    @staticmethod
    @contextmanager
    def into(folder: Path) -> "Iterator[_Writer]":
        with writing(folder):
            with (folder / "ids.bin").open("wb") as ids, (folder / "mask.bin").open("wb") as mask:
                yield (made := _Writer(ids, mask))
            for name in ("ends", "learned", "classes", "lines", "read", "exact", "normalised"):
                kept = np.frombuffer(getattr(made, name), np.int64)
                np.save(folder / f"{name}.npy", np.unique(kept) if name in ("exact", "normalised") else kept)

    def see(self, examples: Iterable[Example]) -> None:
        for exact, normalised in map(digests_of, examples):
            self.exact.append(exact)
            self.normalised.append(normalised)

    def add(self, rows: Sequence[Row], lines: Sequence[int]) -> None:
        ids = np.fromiter(chain.from_iterable(row.ids for row in rows), np.int32)
        mask = np.ones(len(ids), np.bool_)
        sizes = np.fromiter((len(row.ids) for row in rows), np.int64)
        ends = np.cumsum(sizes)
        if rows and isinstance(rows[0].labels, int):
            self.classes.extend(row.labels for row in rows)  # type: ignore[misc]
            self.learned.extend([1] * len(rows))
        else:
            labels = np.fromiter(chain.from_iterable(row.labels for row in rows), np.int32)  # type: ignore[misc]
            mask = labels != IGNORED
            assert (labels[mask] == ids[mask]).all()
            counted = mask.copy()
            counted[(ends - sizes)[sizes > 0]] = False  # nothing predicts a row's first token
            before = np.concatenate([[0], np.cumsum(counted)])
            self.learned.extend((before[ends] - before[ends - sizes]).tolist())
        self.ends.extend((ends + (self.ends[-1] if self.ends else 0)).tolist())
        self.lines.extend(lines)
        self.largest = max(self.largest, int(ids.max(initial=0)))
        self.ids.write(ids.tobytes())
        self.mask.write(mask.tobytes())


def large_data(data: Any, columns: Mapping[str, str], need: bool) -> LargeData | None:
    """Data as they are kept on disk; None where they are small, drawn from by shares, not in files, or the cache
    cannot be written to.

    Raises:
        FinepointError: a row that is looked at cannot be read; its file and line are named.
    """
    named = parts_of(data)
    files = [files_of(source) for source, share in named if share is None]
    if len(files) < len(named) or not all(files):
        return None
    size = sum(path.stat().st_size for each in files for path in each)
    if size < LARGE:
        return None
    sources = [source for source, _ in named]
    contents = [[(ending_of(path), path.suffix, digest(path)) for path in each] for each in files]
    folder = cache_folder() / "tokens" / key_of(contents, dict(columns), need)
    try:
        with alone(folder):
            if not is_whole(folder):
                with partial_folder(folder) as made:
                    facts = _survey(sources, columns, need)
                    with writing(made):
                        _seal(made, facts | {"contents": key_of(contents, dict(columns), need, versioned=False)})
                    move_files(made, folder)
            os.utime(folder / FACTS)
    except FinepointError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        logger.info("tokens are not kept on disk: %s", error)
        return None
    return LargeData(folder, sources, columns, need and len(sources) == 1, size, read_json(folder / FACTS))


def _survey(sources: Sequence[Any], columns: Mapping[str, str], need: bool) -> dict[str, Any]:
    """What must be known before any row is in tokens: how many there are, their form, of texts with classes these."""
    names: set[str] = set()
    parts = []
    for source in sources:
        logger.info("reading %s", source)
        reading = Reading(str(source), FORMS, columns, need and len(sources) == 1)
        examples = reading.examples(rows_of(source))
        parts.append(Part(str(source), [first := next(examples)], 1, reading.taken))
        if isinstance(first, Labelled):
            names |= {first.label, *(example.label for example in examples)}
    refuse_unlike(parts, columns, need)
    form = type(parts[0].examples[0]).__name__.lower()
    return {"counts": [count_of(source) for source in sources], "form": form, "labels": in_order(names)}


def _seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes what is known of a store, last of all, and with it the contents of its files."""
    files = {path.name: digest(path) for path in sorted(folder.iterdir())}
    with writing(folder):
        write_json(folder / FACTS, {**facts, "files": files})


def is_whole(folder: Path) -> bool:
    """Whether a store is there, and holds to the byte what was written; a line says where it does not."""
    if not (folder / FACTS).is_file():
        return False
    with suppress(FinepointError, OSError, LookupError, AttributeError):
        files = read_json(folder / FACTS)["files"]
        if all(digest(folder / name) == known for name, known in files.items()):
            return True
    logger.warning("the tokens kept in %s are damaged, and are made anew", folder)
    return False


def key_of(*what: Any, versioned: bool = True) -> str:
    """What decides the content of a store, in 32 characters; versions among it."""
    versions = [FORMAT, __version__, *map(version, ("transformers", "tokenizers"))] if versioned else []
    return sha256(json.dumps([versions, *what]).encode()).hexdigest()[:32]


def identity_of(tokenizer: Any) -> str:
    """All that decides what a tokenizer makes of a text; empty where that cannot be told."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return ""
    template = json.dumps(tokenizer.chat_template)
    today = clock.now().strftime("%Y-%m-%d") if tells_time(tokenizer) else ""  # which such a template writes
    decides = [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), template, today, around(tokenizer),
               tokenizer.special_tokens_map, tokenizer.eos_token_id]  # fmt: skip
    return sha256(json.dumps(decides, default=str).encode()).hexdigest()


def tidy(place: Path, most: int = 0) -> None:
    """Takes away the stores that were not used for longest, until all take at most so many bytes (`MOST`)."""
    used = {}
    for folder in place.iterdir():
        if (folder / FACTS).is_file():
            used[folder] = (folder / FACTS).stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir())
    latest, total = sorted(used, key=lambda folder: -used[folder][0]), 0
    for folder in latest:
        total += used[folder][1]
        if total > (most or MOST) and folder != latest[0]:
            shutil.rmtree(folder, ignore_errors=True)
