"""Writing without losing anything: whole files or none, and no folder overwritten by accident."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finepoint.errors import FinepointError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a file beside `path`, then moves it there: a killed process leaves the old file or the new.

    Raises:
        FinepointError: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        raise FinepointError(f"cannot write {path}: {error.strerror}") from error
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp keeps files private; results are meant to be shared
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, as UTF-8."""
    write_atomic(path, lambda temporary: _put(temporary, text))


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a JSON Lines file atomically, one object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def claim_folder(path: str | Path, overwrite: bool) -> Path:
    """The folder, made if need be; refused if it holds something and `overwrite` is not given.

    Raises:
        FinepointError: the folder is not empty, is a file, or cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise FinepointError(f"cannot use {folder} as an output folder: {error.strerror}") from error
    if occupied and not overwrite:
        raise FinepointError(f"{folder} is not empty; choose another --output or give --overwrite")
    return folder


def claim_file(path: str | Path, overwrite: bool) -> Path:
    """The path of a file to be written; refused if it exists and `overwrite` is not given.

    Raises:
        FinepointError: the file exists.
    """
    file = Path(path)
    if file.is_dir() or (file.exists() and not overwrite):
        raise FinepointError(f"{file} exists already; choose another --output or give --overwrite")
    return file
