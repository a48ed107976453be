"""Writing without losing anything: whole files or none, no folder overwritten by accident, one process at a time."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, TypeVar

from safetensors import SafetensorError

from finepoint.errors import FinepointError

Result = TypeVar("Result")
LOCK = ".lock"
PARTIAL = ".finepoint-partial"  # how the names of files and folders under way end, by which leftovers are known
LONGEST_JSON = 256 << 20  # bytes: no configuration and no result comes near


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a file beside `path`, then moves it there: a killed process leaves the old file or the new.

    Raises:
        FinepointError: the folder cannot be written to.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own: safetensors and others write beside the file that they are told, and move it there.
        with partial_folder(path.parent, path) as made:
            temporary = made / path.name
            write(temporary)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o644)  # safetensors keeps files private; results are meant to be shared
            temporary.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, what a disk refuses (it is full, it is read-only) is told by the name of what was to be written.

    Raises:
        FinepointError: in the place of OSError and SafetensorError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FinepointError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def read_whole(path: Path, read: Callable[[], Result]) -> Result:
    """What `read` makes of a file that other processes may replace meanwhile, which it may open more than once.

    It is called again where it has seen two versions of the file.
    """
    while True:
        before = path.stat()
        try:
            found = read()
        except Exception:
            if _is_same(before, path):
                raise
        else:
            if _is_same(before, path):
                return found


def _is_same(before: os.stat_result, path: Path) -> bool:
    now = path.stat()
    return os.path.samestat(before, now) and before.st_mtime_ns == now.st_mtime_ns


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, as UTF-8."""
    write_atomic(path, lambda temporary: _put(temporary, text))


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def as_yaml(value: Any) -> str:
    """A value as YAML, its keys in the order that they have: tasks are trained in theirs."""
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FinepointError: the file cannot be read, or holds something else.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no ordinary file")  # a pipe would never end
        if path.stat().st_size > LONGEST_JSON:
            raise OSError(f"it is longer than {LONGEST_JSON:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FinepointError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise FinepointError(f"{path} holds no JSON object")
    return found


VERSION = "format_version"


def write_record(path: Path, value: dict[str, Any], version: int = 1) -> None:
    """Writes a JSON object that other runs read, atomically, with the version of its format."""
    write_json(path, {VERSION: version} | value)


def read_record(path: Path, known: int = 1) -> dict[str, Any]:
    """What `write_record` wrote; a record without a version is of version 1.

    Raises:
        FinepointError: the file cannot be read, or has a version that a later finepoint wrote.
    """
    found = read_json(path)
    refuse_version(path, found.pop(VERSION, 1), known)
    return found


def refuse_version(path: Path, version: Any, known: int = 1) -> None:
    """Refuses a file of another version than those this finepoint reads, 1 to `known`.

    Raises:
        FinepointError: the version is named.
    """
    if type(version) is not int or version not in range(1, known + 1):  # True would be 1
        reads = ", ".join(map(str, range(1, known + 1)))
        raise FinepointError(f"{path} has format version {version!r}; this finepoint reads {reads}; update finepoint")


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a JSON Lines file atomically, one object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def claim_folder(path: str | Path, overwrite: bool) -> Iterator[Path]:
    """The folder, made if need be, which no other process writes to meanwhile; one that stays empty is gone afterwards.

    Raises:
        FinepointError: the folder is not empty and `overwrite` is not given, is a file, or cannot be made; another
            process writes to it.
    """
    folder = Path(path)
    existed = folder.exists()
    try:
        with alone(folder, busy=f"another finepoint is writing to {folder}; wait for it, or choose another --output"):
            refuse_occupied(folder, overwrite)
            yield folder
    finally:
        if not existed:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def refuse_model_folder(config: Any) -> None:
    """Refuses settings whose `output` is the folder of a model that they name: its files would be another's.

    Raises:
        FinepointError: it is.
    """
    output = getattr(config, "output", None)
    for name, what in (("model", "base"), ("base", "base"), ("tuned", "tuned")):
        model = getattr(config, name, None)
        if output and model and Path(model).is_dir() and Path(model).resolve() == Path(output).resolve():
            raise FinepointError(f"{output} is the {what} model itself; choose another --output")


def refuse_inputs_among(config: Any, names: Iterable[str]) -> None:
    """Refuses settings that name a file among those in `output` that a new run takes away.

    Args:
        names: of files and folders in `output`.

    Raises:
        FinepointError: they do.
    """
    gone = {Path(config.output).resolve() / name for name in names}
    for known in fields(config):
        given = getattr(config, known.name)
        for place in given if isinstance(given, list) else [given]:
            named = known.metadata.get("file") and isinstance(place, str)
            if named and not gone.isdisjoint(((path := Path(place).resolve()), *path.parents)):
                raise FinepointError(f"--{known.name.replace('_', '-')} {place} is of an earlier run, and a new one in "
                                     f"{config.output} takes it away; copy it elsewhere, or give another "
                                     "--output")  # fmt: skip


def check_output(path: str | Path, overwrite: bool) -> None:
    """Refuses, before work that takes time, a folder that could not be claimed after it; leaves nothing behind.

    Raises:
        FinepointError: as for `claim_folder`.
    """
    with claim_folder(path, overwrite):
        pass


def refuse_occupied(path: str | Path, overwrite: bool) -> None:
    """Refuses a folder that holds something, where `overwrite` is not given; makes nothing.

    Raises:
        FinepointError: the folder is not empty, is a file, or cannot be read.
    """
    folder = Path(path)
    try:
        occupied = contents(folder)
    except OSError as error:
        raise FinepointError(f"cannot use {folder} as an output folder: {error.strerror}") from error
    if occupied and not overwrite:
        raise FinepointError(f"{folder} is not empty; choose another --output or give --overwrite")


def contents(folder: Path) -> set[str]:
    """The names in a folder, but for the lock and what killed processes left half written; none where there is none."""
    found = folder.iterdir() if folder.exists() else ()
    return {path.name for path in found if path.name != LOCK and not _is_partial(path)}


@contextmanager
def fill_folder(path: str | Path, overwrite: bool, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder to write into, whose files move to `path` at the end; nothing does after an exception.

    Args:
        overwrite: allow a folder that holds something; files of the same names are replaced, others stay.
        replaces: patterns of files that may not stay, since they would be taken for part of what is written.

    Raises:
        FinepointError: the folder is not empty, is a file, or cannot be written; another process writes to it.
    """
    with claim_folder(path, overwrite) as folder, partial_folder(folder) as made, writing(folder):
        yield made
        move_files(made, folder, replaces)


@contextmanager
def partial_folder(parent: Path, what: Path | None = None) -> Iterator[Path]:
    """A temporary folder; where its process is killed, the next one that is `alone` in `parent` takes it away.

    Args:
        what: is to be written there, and is named where it cannot be; the parent where not given.

    Raises:
        FinepointError: it cannot be made.
    """
    with writing(what or parent):
        made = tempfile.TemporaryDirectory(dir=parent, prefix=".", suffix=PARTIAL)
    with made as name:
        yield Path(name)


def move_files(source: Path, folder: Path, replaces: Sequence[str] = ()) -> None:
    """Moves all files of one folder to another, over those of the same names; for `replaces` see `fill_folder`.

    JSON files say what the others are. They go first and come last, so that nobody takes old files and new ones for
    one result, whenever the process is killed.
    """
    made = sorted((path.suffix == ".json", path.name) for path in source.iterdir())
    for is_json, name in made:
        if is_json:
            (folder / name).unlink(missing_ok=True)
    stale = {path for pattern in replaces for path in folder.glob(pattern)} - {folder / name for _, name in made}
    for path in stale:
        path.unlink()
    for _, name in made:
        (source / name).chmod(0o644)  # safetensors keeps files private; results are meant to be shared
        (source / name).replace(folder / name)


def claim_file(path: str | Path, overwrite: bool) -> Path:
    """The path of a file to be written; refused if it exists and `overwrite` is not given.

    Raises:
        FinepointError: the file exists.
    """
    file = Path(path)
    if file.is_dir() or (file.exists() and not overwrite):
        raise FinepointError(f"{file} exists already; choose another --output or give --overwrite")
    return file


@contextmanager
def alone(place: Path, busy: str | None = None) -> Iterator[None]:
    """Inside, no other process on this machine is working on the same folder; the lock goes with its process.

    What killed processes left half written in there is taken away first.

    Args:
        busy: what to say where another one is, instead of waiting for it.

    Raises:
        FinepointError: another process works there and `busy` is given; the folder cannot be written to.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = _locked(place / LOCK, wait=busy is None)
    except BlockingIOError as error:
        raise FinepointError(busy) from error
    except OSError as error:
        raise FinepointError(f"cannot use {place} as an output folder: {error.strerror}") from error
    with lock:
        _take_leftovers_away(place)
        try:
            yield
        finally:
            (place / LOCK).unlink(missing_ok=True)


def _locked(path: Path, wait: bool) -> IO[str]:
    """A lock file, made if need be, that no other process has locked.

    Raises:
        BlockingIOError: another process has, and `wait` is not given.
    """
    try:
        import fcntl
    except ImportError:  # Windows, which knows no such locks
        return path.open("w")
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass  # whoever had the lock has taken the file away, and this one has no name any more
        except BaseException:
            file.close()
            raise
        file.close()


def is_claimed(folder: Path) -> bool:
    """Whether a process is writing to a folder just now; nothing is changed there."""
    try:
        import fcntl

        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # Windows knows no such locks
        return (folder / LOCK).exists() and os.name == "nt"
    return False


def _take_leftovers_away(folder: Path) -> None:
    for path in [path for path in folder.rglob(f".*{PARTIAL}") if _is_partial(path)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(PARTIAL)
