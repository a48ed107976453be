"""Examples in tokens on disk: of large files, which are read twice and never held in memory.

A store lies in finepoint's cache folder under a digest of all that decides its rows: the bytes of the files, how their
columns are named, the tokenizer and its template, the most tokens of a row, versions. The rows are those that
`encode_all` makes of `read_examples`, in their order; a second run maps them into memory and reads neither files nor
text. Stores that were not used for longest give way once all of them take more than `MOST` bytes.
"""

import json
import logging
import os
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
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
from finepoint.data.sources import ending_of, files_of, parts_of, rows_of
from finepoint.data.tokens import (
    IGNORED,
    PART,
    JsonDigest,
    Row,
    Tally,
    around,
    encode_part,
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
FORMAT = 3
FACTS = "facts.json"  # written last


class StoredRows(Sequence[Row]):
    """Rows of tokens in files that are mapped into memory; a row is made when it is asked for."""

    def __init__(self, folder: Path, places: np.ndarray | None = None) -> None:
        self.folder = folder
        self.ends = np.load(folder / "ends.npy")
        self.counts = np.load(folder / "learned.npy")
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

    @cached_property
    def digest(self) -> str | None:
        """`digest_of` all rows that have something to learn, where these are they."""
        whole = self.places is not None or bool(self.counts.all())
        return str(read_json(self.folder / FACTS)["digest"]) if whole else None


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
    """in the cache"""
    sources: Sequence[Any]
    columns: Mapping[str, str]
    need: bool
    facts: Mapping[str, Any]
    seen: Seen

    @property
    def labels(self) -> list[str]:
        """The classes, as by `label_names`."""
        return list(self.facts["labels"])

    @property
    def form(self) -> str:
        """The examples' type, e.g. `chat`."""
        return str(self.facts["form"])

    def examples(self) -> Iterator[Example]:
        """All of them, read anew."""
        return chain.from_iterable(Reading(str(source), FORMS, self.columns, self.need).examples(rows_of(source))
                                   for source in self.sources)  # fmt: skip

    def told(self) -> list[dict[str, Any]]:
        """What a record says of each source."""
        return [{"source": str(source), "form": part["keys"], "rows": part["rows"], "taken": part["rows"]}
                | LeftOut(**part["left_out"]).told()
                for source, part in zip(self.sources, self.facts["parts"], strict=True)]  # fmt: skip

    def encoded(
        self, tokenizer: Any, limit: int, labels: Sequence[str], what: str, model: Any, turns: ChatTurns
    ) -> StoredRows:
        """`encode_all` of the examples, made once.

        Raises:
            FinepointError: as there; the cache is full.
        """
        key = key_of(identity_of(tokenizer), limit, list(labels), turns)
        folder = self.folder.with_name(f"{self.folder.name}-{key}")
        with alone(folder):
            if not is_whole(folder):
                with partial_folder(folder) as made:
                    self._write(made, tokenizer, limit, labels, what, model, turns)
                    move_files(made, folder)
                tidy(folder.parent)
            os.utime(folder / FACTS)
        facts, rows = read_json(folder / FACTS), StoredRows(folder)
        Tally(**facts["tally"]).tell(limit, what)
        refuse_beyond(model, tokenizer, [[facts["largest"]]])
        logger.info("%d rows of tokens are in %s", len(rows), folder)
        return rows

    def _write(
        self, folder: Path, tokenizer: Any, limit: int, labels: Sequence[str], what: str, model: Any, turns: ChatTurns
    ) -> None:
        count, examples, tally = sum(part["rows"] for part in self.facts["parts"]), self.examples(), Tally()
        quick = nullcontext() if self.form == "chat" else uncollected()
        with _Writer.into(folder) as written, progress("tokens", count) as advance, quick:
            while part := list(islice(examples, PART)):
                written.add(encode_part(tokenizer, learned_turns(part, turns), limit, labels, tally, model))
                advance(len(part))
        if not any(written.learned):
            raise nothing_learned(what)
        facts = {"digest": written.digest.text(), "largest": written.largest}
        _seal(folder, facts | {"tally": asdict(tally)})


@dataclass
class _Writer:
    """The files of a store under way."""

    ids: IO[bytes]
    mask: IO[bytes]
    ends: "array[int]" = field(default_factory=lambda: array("q"))
    learned: "array[int]" = field(default_factory=lambda: array("q"))
    classes: "array[int]" = field(default_factory=lambda: array("q"))
    digest: JsonDigest = field(default_factory=JsonDigest)
    largest: int = 0

    @staticmethod
    @contextmanager
    def into(folder: Path) -> "Iterator[_Writer]":
        with writing(folder):
            with (folder / "ids.bin").open("wb") as ids, (folder / "mask.bin").open("wb") as mask:
                yield (made := _Writer(ids, mask))
            for name in ("ends", "learned", "classes"):
                np.save(folder / f"{name}.npy", np.frombuffer(getattr(made, name), np.int64))

    def add(self, rows: Sequence[Row]) -> None:
        ids = np.fromiter(chain.from_iterable(row.ids for row in rows), np.int32)
        mask = np.ones(len(ids), np.bool_)
        for row in rows:
            self.ends.append((self.ends[-1] if self.ends else 0) + len(row.ids))
            self.learned.append(learned(row))
            if isinstance(row.labels, int):
                self.classes.append(row.labels)
            if self.learned[-1]:
                self.digest.add(row)
        if not self.classes:
            labels = np.fromiter(chain.from_iterable(row.labels for row in rows), np.int32)  # type: ignore[misc]
            mask = labels != IGNORED
            assert (labels[mask] == ids[mask]).all()
        self.largest = max(self.largest, int(ids.max(initial=0)))
        self.ids.write(ids.tobytes())
        self.mask.write(mask.tobytes())


def large_data(data: Any, columns: Mapping[str, str], need: bool) -> LargeData | None:
    """Data as they are kept on disk; None where they are small, drawn from by shares, not in files, or the cache
    cannot be written to.

    Raises:
        FinepointError: a row cannot be read; its file and line are named.
    """
    named = parts_of(data)
    files = [files_of(source) for source, share in named if share is None]
    if len(files) < len(named) or not all(files):
        return None
    if sum(path.stat().st_size for each in files for path in each) < LARGE:
        return None
    sources = [source for source, _ in named]
    contents = [[(ending_of(path), path.suffix, digest(path)) for path in each] for each in files]
    folder = cache_folder() / "tokens" / key_of(contents, dict(columns), need)
    try:
        with alone(folder):
            if not is_whole(folder):
                with partial_folder(folder) as made:
                    _survey(made, sources, columns, need)
                    move_files(made, folder)
            os.utime(folder / FACTS)
    except FinepointError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        logger.info("tokens are not kept on disk: %s", error)
        return None
    facts = read_json(folder / FACTS)
    for source, part in zip(sources, facts["parts"], strict=True):
        left_out = LeftOut(**part["left_out"])
        tell_left_out(str(source), part["rows"] + left_out.blank, left_out)
        if part["ignored"]:
            tell_ignored(str(source), tuple(part["keys"]), tuple(part["ignored"]))
    seen = Seen(np.load(folder / "exact.npy"), np.load(folder / "normalised.npy"))
    return LargeData(folder, sources, columns, need and len(sources) == 1, facts, seen)


def _survey(folder: Path, sources: Sequence[Any], columns: Mapping[str, str], need: bool) -> None:
    """Reads all examples once, and writes what must be known of them before any is in tokens."""
    names: set[str] = set()
    parts = []

    def digests() -> Iterator[tuple[int, int]]:
        for source in sources:
            logger.info("reading %s", source)
            reading, first, count = Reading(str(source), FORMS, columns, need and len(sources) == 1), None, 0
            for example in reading.examples(rows_of(source)):
                first, count = first or example, count + 1
                if isinstance(example, Labelled):
                    names.add(example.label)
                yield digests_of(example)
            parts.append(Part(str(source), [first], count, reading.taken, reading.left_out))

    seen = Seen.of_digests(digests())
    refuse_unlike(parts, columns, need)
    with writing(folder):
        for name, kept in (("exact", seen.exact), ("normalised", seen.normalised)):
            np.save(folder / f"{name}.npy", kept)
    told = [{"rows": part.rows, "keys": list(part.taken.keys) if part.taken else [],
             "ignored": list(part.taken.ignored) if part.taken else [], "left_out": asdict(part.left_out)}
            for part in parts]  # fmt: skip
    form = type(parts[0].examples[0]).__name__.lower()
    _seal(folder, {"parts": told, "form": form, "labels": in_order(names)})


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
        if files and all(digest(folder / name) == known for name, known in files.items()):
            return True
    logger.warning("the tokens kept in %s are damaged, and are made anew", folder)
    return False


def key_of(*what: Any) -> str:
    """What decides the content of a store, in 32 characters; versions among it."""
    versions = [FORMAT, __version__, *map(version, ("transformers", "tokenizers"))]
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
