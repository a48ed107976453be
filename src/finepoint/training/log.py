"""The log of a run: a JSON object a line, each with its step; a resumed run goes on where its checkpoint stands."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finepoint.runtime.files import write_text, writing

LOG = "log.jsonl"


def append(log: Path, record: Mapping[str, Any]) -> None:
    """Adds a line."""
    with writing(log), log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_log(log: Path) -> list[dict[str, Any]]:
    """All lines but a last one that was torn by the end of its process."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cut_log_(log: Path, step: int) -> list[dict[str, Any]]:
    """Takes away what a run wrote after the checkpoint it is resumed from; returns what stays."""
    records = [record for record in read_log(log) if record["step"] <= step]
    if log.is_file():
        write_text(log, "".join(json.dumps(record) + "\n" for record in records))
    return records
