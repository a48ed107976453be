"""What a run writes of its steps, read by whoever follows it. Without torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finepoint.runtime.files import write_text, writing

LOG = "log.jsonl"
UNDER_WAY = "under_way.json"  # how many steps a run is to do, while it has no record
RECORD = "run.json"
TOLD = ("loss", "reward", "rewards/margins", "rewards/accuracies")  # of a step, in a line


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


def figures(record: Mapping[str, Any]) -> str:
    """What a step is told by: its loss or reward, the learning rate, the tokens a second."""
    numbers = [f"{name} {record[name]:.4f}" for name in TOLD if name in record]
    numbers += [f"rate {record['learning_rate']:.2g}"] if "learning_rate" in record else []
    numbers += [f"{record['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in record else []
    return ", ".join(numbers)
