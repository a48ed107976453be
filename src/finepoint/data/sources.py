"""Where rows come from: files by their type, folders of them, data sets of the hub, whatever Python holds.

A type of file is a function decorated by `source`. JSON Lines, JSON, CSV and TSV need no other package; columns with
types of their own (parquet, arrow, what `datasets` saved, the hub) are read by that one.
"""

import bz2
import csv
import gzip
import json
import logging
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import IO, Any

from finepoint.errors import FinepointError, needing, reason_of
from finepoint.runtime.settings import did_you_mean

logger = logging.getLogger(__name__)
Row = dict[str, Any]
Source = Callable[[Path], Iterator[tuple[str, Any]]]
SOURCES: dict[str, Source] = {}
"""by the end of a file's name"""
PACKED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
EXTRA = "data"  # of pyproject: the package `datasets`
LISTS = {"choices", "messages", "conversations"}  # written as JSON where a cell is a text
ON_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/([\w.-]+))?(?::(\w[\w.:%+\[\]-]*))?")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation",
          "valid": "validation", "val": "validation", "dev": "validation", "eval": "test",
          "evaluation": "test"}  # fmt: skip
"""What a file's name says of its split, as `datasets` has it."""
AT_ONCE = 1000  # rows of a table


def source(ending: str) -> Callable[[Source], Source]:
    """Makes a function the reader of files whose names end so: from a path to rows, each with where it stands."""

    def register(read: Source) -> Source:
        SOURCES[ending] = read
        return read

    return register


def rows_of(origin: Any) -> Iterator[tuple[str, Any]]:
    """The rows of a file, a folder or a data set of the hub, each with where it stands. What lies here comes first.

    Raises:
        FinepointError: there is nothing of that name, or it cannot be read.
    """
    path = Path(origin)
    if folder := _folder_of(origin):
        return _of_folder(*folder)
    if not path.exists() and ending_of(path) not in SOURCES and (found := ON_HUB.fullmatch(str(origin))):
        return _of_hub(str(origin), *found.groups())
    return reader_of(path)(path)


def _folder_of(origin: Any) -> tuple[Path, str | None] | None:
    """The folder that is named, and which split of it: FOLDER or FOLDER:SPLIT. None where it is something else."""
    path = Path(origin)
    if path.is_dir():
        return path, None
    folder, colon, split = str(origin).rpartition(":")
    return (Path(folder), split) if colon and not path.exists() and Path(folder).is_dir() else None


def refuse_absent(data: Any) -> None:
    """Refuses data whose names can only be files' or folders', and are not.

    Raises:
        FinepointError: it is so; or as for `parts_of`.
    """
    for origin, _ in parts_of(data):
        path = Path(origin)
        on_hub = ending_of(path) not in SOURCES and ON_HUB.fullmatch(str(origin))
        if not (isinstance(origin, Given) or path.exists() or _folder_of(origin) or on_hub):
            with opened(path):
                pass


def ending_of(path: Path) -> str:
    """What tells a file's type, without that of its compression."""
    name = Path(path.stem) if path.suffix.lower() in PACKED else path
    return name.suffix.lower()


def reader_of(path: Path) -> Source:
    """A file's reader by its type; one whose name tells none is taken for JSON Lines."""
    return SOURCES.get(ending_of(path), json_lines)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked where it is compressed.

    Raises:
        FinepointError: it cannot be read.
    """
    try:
        with PACKED.get(path.suffix.lower(), open)(path, "rb") as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise FinepointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text in UTF-8, with what ends them. Only line feeds do: strings may hold U+2028 unescaped."""
    with opened(path) as file:
        before = 0
        for number, line in enumerate(file):
            try:
                yield line.decode("utf-8" if number else "utf-8-sig")
            except UnicodeDecodeError as error:
                at = before + error.start
                raise FinepointError(f"{path} is not UTF-8 text (byte {at}){_looks_like(path)}") from error
            before += len(line)


BEGIN: Mapping[bytes, str] = {
    b"\x1f\x8b": "gzip has packed it, so its name is to end in .gz",
    b"PK": "it is a zip archive or a spreadsheet; give what is in it, a table saved as .csv",
    b"PAR1": "it is parquet, and its name is to end in .parquet",
    b"ARROW1": "it is arrow, and its name is to end in .arrow",
    b"\xff\xfe": "it is UTF-16; save it as UTF-8",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8",
    b"\x28\xb5\x2f\xfd": "zstandard has packed it; unpack it, or pack it with gzip",
}
"""how files begin that go by the name of another type, and the way out"""


ICONV = ", e.g. what Windows wrote by iconv -f CP1252 -t UTF-8 %s > %s"


def _looks_like(path: Path) -> str:
    """What a file that cannot be read seems to be, for the end of a message; nothing where that is not known."""
    with opened(path) as file:
        begin = file.read(8)
    if found := next((told for magic, told in BEGIN.items() if begin.startswith(magic)), None):
        return f"; {found}"
    if (ending := ending_of(path)) and ending not in SOURCES:
        return f"; {ending} is no type of data that is known, {', '.join(SOURCES)} are"
    return f"; save it as UTF-8{ICONV % (path, path.with_stem(path.stem + '-utf8'))}"


@source(".jsonl")
def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """One JSON object a line."""
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            yield f"{path}, line {number}", object_in(path, number, line)


def object_in(path: Path, number: int, line: str) -> Any:
    """What a line of JSON Lines holds.

    Raises:
        FinepointError: no JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        whole = "; a file that is one list is to be called .json" if number == 1 and line[0] == "[" else ""
        whole = whole or (_looks_like(path) if number == 1 else "")
        raise FinepointError(f"{path}, line {number}: not JSON ({error}); expected one object a line{whole}") from error


@source(".json")
def json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of objects, an object that holds one list, or columns; JSON Lines under this name are read as such."""
    text = "".join(text_lines(path))
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            return json_lines(path)
        raise FinepointError(f"{path}: not JSON ({error})") from error
    if isinstance(found, dict) and (columns := _columns_of(found)):
        found = [dict(zip(found, cells, strict=True)) for cells in zip(*columns, strict=True)]
    elif isinstance(found, dict):
        found = _rows_in(str(path), found)
    if not isinstance(found, list):
        raise FinepointError(f"{path} holds a {type(found).__name__}; expected a list of objects")
    return ((f"{path}, row {number}", row) for number, row in enumerate(found, 1))


def _rows_in(what: str, found: Row) -> list[Any]:
    """The rows of an object: of its one list, of the one that holds objects, or those of a split; or it is a row."""
    lists = {name: value for name, value in found.items() if isinstance(value, list)}
    if len(lists) > 1 and lists.keys() <= SPLITS.keys():
        return list(_one_split(what, lists, None))
    if len(lists) > 1:
        lists = {name: value for name, value in lists.items() if value and isinstance(value[0], dict)}
    return next(iter(lists.values())) if len(lists) == 1 and not lists.keys() <= LISTS else [found]


def _columns_of(found: Row) -> list[list[Any]]:
    """The columns of a table that is written so: lists of one length, or what pandas writes, objects of the same keys.

    Empty where it is none: lists of objects are conversations, or rows.
    """
    columns = list(found.values())
    if len(columns) < 2:
        return []
    if all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        columns = [list(column.values()) for column in columns]
    alike = all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
    return columns if alike and not any(isinstance(cell, dict) for column in columns for cell in column) else []


@source(".csv")
def comma_separated(path: Path) -> Iterator[tuple[str, Any]]:
    return _table(path, ",")


@source(".tsv")
def tab_separated(path: Path) -> Iterator[tuple[str, Any]]:
    return _table(path, "\t")


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    """A table under a line of names. Every cell is the text that is written there; lists are written as JSON."""
    csv.field_size_limit(2**31 - 1)
    texts = text_lines(path)
    first = next(texts, "")
    if first.startswith("sep=") and len(first.strip()) == 5:  # a line for Excel alone
        delimiter, first = first[4], next(texts, "")
    if delimiter not in first and delimiter == ",":  # as spreadsheets write where the comma is in numbers
        delimiter = next((other for other in ";\t|" if other in first), delimiter)
    lines = csv.reader(chain([first], texts), delimiter=delimiter, strict=True)
    try:
        names = next(lines, [])
        if len(set(names)) < len(names):
            raise FinepointError(f"{path} has two columns of one name: {', '.join(names)}")
        lists = [at for at, name in enumerate(names) if name in LISTS]
        numbered = [names.index("answer")] if {"choices", "answer"} <= set(names) else []
        for cells in lines:
            where = f"{path}, line {lines.line_num}"
            if not cells:
                continue
            if len(cells) != len(names):
                raise FinepointError(f"{where}: {len(cells)} cells under {len(names)} names ({', '.join(names)})")
            row: Row = dict(zip(names, cells, strict=True))
            for at in lists:
                row[names[at]] = _list_in(where, names[at], cells[at])
            for at in numbered:
                row[names[at]] = int(cells[at]) if cells[at].isdecimal() else cells[at]
            yield where, row
    except csv.Error as error:
        raise FinepointError(f"{path}, line {lines.line_num}: not a table: {error}") from error


def _list_in(where: str, name: str, cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError as error:
        raise FinepointError(f"{where}: {name!r} must be a list, written as JSON, got {cell!r}") from error


@source(".txt")
def plain_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Every line is a text, as `datasets` reads such files; empty ones are none. JSON Lines may go by this name."""
    with suppress(ValueError, RecursionError):
        if isinstance(json.loads(next(filter(str.strip, text_lines(path)), "")), dict):
            yield from json_lines(path)
            return
    _tell_lines(str(path))
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            yield f"{path}, line {number}", {"text": line.rstrip("\r\n")}


@source(".md")
def document(path: Path) -> Iterator[tuple[str, Any]]:
    """One text, since its lines belong together."""
    if (text := "".join(text_lines(path))).strip():
        yield str(path), {"text": text}


@lru_cache(maxsize=256)
def _tell_lines(path: str) -> None:
    logger.info('every line of %s is a text of its own; one text of several lines is written in JSON, {"text": ".."}',
                path)  # fmt: skip


def parquet_batches(path: Path) -> Iterator[Any]:
    """A table of typed columns in parts, as pyarrow has them."""
    with needing(f"{path}: reading parquet", EXTRA), _refusing(path):
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            yield from file.iter_batches(AT_ONCE)


def arrow_batches(path: Path) -> Iterator[Any]:
    """The same as `datasets` keeps it (a stream), or as Feather does (a file); it is not read into memory."""
    with needing(f"{path}: reading arrow", EXTRA), _refusing(path):
        import pyarrow

        with pyarrow.memory_map(str(path)) as file:
            try:
                batches: Iterable[Any] = pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                whole = pyarrow.ipc.open_file(file)
                batches = (whole.get_batch(at) for at in range(whole.num_record_batches))
            for batch in batches:
                yield from (batch.slice(at, AT_ONCE) for at in range(0, batch.num_rows, AT_ONCE))


BATCHES: Mapping[str, Callable[[Path], Iterator[Any]]] = {".parquet": parquet_batches, ".arrow": arrow_batches}


@source(".parquet")
@source(".arrow")
def typed_columns(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of such a table."""
    batches = BATCHES[ending_of(path)](path)
    with _refusing(path):
        yield from _placed(path, (batch.to_pylist() for batch in batches))


@contextmanager
def _refusing(what: Any) -> Iterator[None]:
    """What pyarrow or `datasets` say of something that they cannot read, in our words."""
    try:
        yield
    except (FinepointError, ImportError, GeneratorExit, KeyboardInterrupt):
        raise
    except Exception as error:  # each of these packages has many of its own
        raise FinepointError(f"cannot read {what}: {reason_of(error) or type(error).__name__}") from error


def _placed(what: Any, parts: Iterable[list[Row]]) -> Iterator[tuple[str, Any]]:
    """The rows of a table, without its gaps."""
    for number, row in enumerate(chain.from_iterable(parts), 1):
        yield f"{what}, row {number}", without_gaps(row)


def without_gaps(row: Row) -> Row:
    """A row of a table without what the table has to hold for keys that only other rows have."""
    return {name: _without_gaps(value) for name, value in row.items()}


def _without_gaps(value: Any) -> Any:
    """What a cell holds without the keys that it lacks, at any depth (as in the arguments of a tool's call).

    An empty `content` of a turn says something.
    """
    if isinstance(value, list):
        return [_without_gaps(each) for each in value]
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if v is not None or (k == "content" and "role" in value)}
        return {k: _without_gaps(v) for k, v in kept.items()}
    return value


def _of_folder(folder: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    """All files of a folder whose type is known, by name; or what `datasets` saved there."""
    if _is_saved(folder):
        return of_table(str(folder), _loaded(folder, split))
    return chain.from_iterable(reader_of(path)(path) for path in _files_in(folder, split))


def _loaded(folder: Path, split: str | None) -> Any:
    with needing(f"{folder}: reading what datasets has saved", EXTRA), _refusing(folder):
        from datasets import load_from_disk

        found = load_from_disk(str(folder))
    return _one_split(str(folder), found, split) if isinstance(found, dict) else found


def saved_table(origin: Any) -> Any:
    """The `datasets.Dataset` that was saved there; None where it is something else."""
    folder = _folder_of(origin)
    return _loaded(*folder) if folder and _is_saved(folder[0]) else None


def files_of(origin: Any) -> list[Path]:
    """The files that `rows_of` reads; none where the name is of something else.

    Raises:
        FinepointError: a folder has none, or not that split.
    """
    if isinstance(origin, Given):
        return []
    path = Path(origin)
    if path.is_file():
        return [path]
    if not (folder := _folder_of(origin)):
        return []
    if _is_saved(folder[0]):
        return sorted(each for each in folder[0].rglob("*") if each.is_file())
    return _files_in(*folder)


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` saved something there."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _files_in(folder: Path, split: str | None) -> list[Path]:
    """The data files of a folder, of a split where several are told apart by their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ending_of(path) in SOURCES
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))  # fmt: skip
    # Beside data a text is a licence, or says what they are.
    files = [path for path in files if ending_of(path) not in (".txt", ".md")] or files
    if not files:
        raise FinepointError(f"{folder} holds no data file; expected {', '.join(SOURCES)}, or a folder that datasets "
                             "has saved")  # fmt: skip
    by_split: dict[str, list[Path]] = {}
    for path in files:
        words = re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())
        by_split.setdefault(next((SPLITS[word] for word in words if word in SPLITS), "train"), []).append(path)
    found: list[Path] = _one_split(str(folder), by_split, split)
    return found


def _one_split(what: str, splits: Mapping[str, Any], wanted: str | None) -> Any:
    """A split by its name; where none is named the only one, or the one to train on, which a line says."""
    if wanted is None:
        wanted = next(iter(splits)) if len(splits) == 1 else "train"
        if len(splits) > 1 and wanted in splits:
            _tell_split(what, wanted, tuple(splits))
    if wanted not in splits:
        raise FinepointError(f"{what} has no split {wanted!r}{did_you_mean(wanted, splits)}; give one of "
                             f"{', '.join(f'{what}:{name}' for name in splits)}")  # fmt: skip
    return splits[wanted]


@lru_cache(maxsize=256)
def _tell_split(what: str, split: str, all_splits: tuple[str, ...]) -> None:
    logger.info("taking the split %s of %s, which has %s", split, what, ", ".join(all_splits))


def _of_hub(what: str, name: str, config: str | None, split: str | None) -> Iterator[tuple[str, Any]]:
    """A data set of the hub, as `datasets` loads and keeps it."""
    with needing(f"{what}: there is no such file, and a data set of the hub", EXTRA):
        from datasets import load_dataset
    try:
        found = load_dataset(name, config, split=split)
    except Exception as error:
        raise FinepointError(f"cannot load {what}: there is no such file or folder here, and of the hub: "
                             f"{reason_of(error) or type(error).__name__}") from error  # fmt: skip
    return of_table(what, _one_split(what, found, None) if isinstance(found, dict) else found)


def of_table(what: str, table: Any) -> Iterator[tuple[str, Any]]:
    """The rows of a `datasets.Dataset`, which need not be in memory."""
    names = table.column_names
    plain = table.with_format(None)
    rows = ([dict(zip(names, cells, strict=True)) for cells in zip(*(part[name] for name in names), strict=True)]
            for part in plain.iter(AT_ONCE))  # fmt: skip
    return _placed(what, rows)


def of_memory(data: Any) -> Iterable[Any]:
    """The rows of whatever Python holds: a data frame, a `datasets.Dataset`, anything that yields rows.

    Raises:
        FinepointError: it has several splits and none of them is `train`, or is no collection.
    """
    data = _split_of(data)
    if isinstance(data, Mapping):
        raise FinepointError(f"data is a {type(data).__name__} with the keys {', '.join(map(str, data))}; give rows, "
                             "e.g. one of its splits")  # fmt: skip
    if hasattr(data, "with_format") and getattr(data, "column_names", None):
        return (row for _, row in of_table("data", data))
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas
        return [without_gaps({name: _filled(value) for name, value in row.items()}) for row in data.to_dict("records")]
    if not isinstance(data, Iterable):
        raise FinepointError(f"data is a {type(data).__name__}; expected a file, a Dataset, a frame, or rows")
    return data


def _split_of(data: Any) -> Any:
    """Of several splits in memory (a `datasets.DatasetDict`) the only one, or the one to train on; else what it is."""
    if isinstance(data, Mapping) and data and all(hasattr(table, "column_names") for table in data.values()):
        return _one_split("data", data, None)
    return data


def _filled(value: Any) -> Any:
    """A cell of a data frame in Python's own types, None where it is one of the things that stand for nothing there."""
    if type(value).__module__ == "numpy":
        value = value.tolist()  # of an array a list, of a number a number
    if isinstance(value, list):
        return [_filled(each) for each in value]
    if isinstance(value, dict):
        return {key: _filled(each) for key, each in value.items()}
    return None if stands_for_nothing(value) else value


def stands_for_nothing(value: Any) -> bool:
    """Whether a cell of a table is empty by one of the values that say so: None, NaN, pandas' own."""
    return value is None or type(value).__name__ in ("NAType", "NaTType") or (
        isinstance(value, float) and value != value)  # fmt: skip


class Given(str):
    """Rows that Python holds, where a setting names a file: its text says what they are, not which."""

    rows: Any

    def __new__(cls, rows: Any) -> "Given":
        rows = _split_of(rows)
        if not hasattr(rows, "__len__"):
            rows = list(of_memory(rows))
        made = super().__new__(cls, f"{type(rows).__name__} of {len(rows)} rows in memory")
        made.rows = rows
        return made

    def __deepcopy__(self, memo: Any) -> "Given":
        return self

    def __reduce__(self) -> Any:
        return Given, (self.rows,)


def place_or_rows(data: Any) -> Any:
    """What a setting may hold: the name of data, or the names of several, or rows as `Given`."""
    if data is None or isinstance(data, str):
        return data
    if isinstance(data, Path):
        return str(data)
    return [str(each) for each in data] if is_place(data) else Given(data)


def is_place(data: Any) -> bool:
    """Whether data are named, by a path or an id, or several are, rather than given."""
    several = isinstance(data, list | tuple) and len(data) > 0 and all(isinstance(each, str | Path) for each in data)
    return several or (isinstance(data, str | Path) and not isinstance(data, Given))


def parts_of(data: Any) -> list[tuple[Any, float | None]]:
    """The sources that are named, each with its share of the whole where one is given.

    Raises:
        FinepointError: one source has a share, or only some of them have.
    """
    if isinstance(data, Given) or not is_place(data):
        return [(place_or_rows(data), None)]
    found = [share_of(str(each)) for each in ([data] if isinstance(data, str | Path) else data)]
    shared = [text for text, share in found if share is not None]
    names = [text for text, _ in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise FinepointError(f"{twice[0]} is given twice; give every source once, with a share if it is to count more")
    if shared and len(found) == 1:
        raise FinepointError(f"{shared[0]} has a share, and there is nothing to mix it with; give another source, too")
    if shared and len(shared) < len(found):
        other = next(text for text, share in found if share is None)
        raise FinepointError(f"{shared[0]} has a share and {other} has none; give every source one, or none")
    return found


def share_of(text: str) -> tuple[str, float | None]:
    """A source that is named, and its share where one is given (`a.jsonl=0.7`).

    Raises:
        FinepointError: the share is none.
    """
    name, equals, share = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, None
    try:
        weight = float(share)
    except ValueError:
        return text, None
    if not 0 < weight < float("inf"):
        raise FinepointError(f"the share of {name} is {share}; give a number above 0")
    return name, weight


def name_of(data: Any) -> str:
    """Data as records and messages name them."""
    return ", ".join(map(str, data)) if isinstance(data, list | tuple) else str(data)
