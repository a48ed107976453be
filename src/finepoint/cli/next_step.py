"""What to do next: after each command that is done, one line of the log with the next sensible command."""

import logging
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from finepoint.errors import FinepointError
from finepoint.runtime.settings import default_of

logger = logging.getLogger(__name__)
CONFIG = "finepoint_config.json"  # what an adapter says of itself
Words = list[str] | None


def say_next(command: str, config: Any) -> None:
    """The line, where there is a next command; not with `--json`, whose reader is a program."""
    words = None if getattr(config, "json", False) or command not in NEXT else NEXT[command](config)
    if words:
        _say(words)


def _say(words: list[str]) -> None:
    logger.info("next: %s", shlex.join(["finepoint", *words]))


def _train(config: Any) -> Words:
    here = isinstance(config.data, str) and Path(config.data).exists()  # nothing is fetched for a hint
    chosen = here and not config.validation and "choices" in _keys(config.data)  # from which to choose, not to write
    on = f"validation={config.validation}" if isinstance(config.validation, str) else "test=FILE" if chosen else None
    return _try(config.model, config.output, config.dtype, config.quantise, on)


def _select(config: Any) -> Words:
    data = config.data if isinstance(config.data, str) else "FILE"
    return ["train", "--model", config.model, "--data", data, "--indices", config.output,
            "--output", f"{config.output.rstrip('/')}-trained"]  # fmt: skip


def say_planned(config: Any, fits: bool | None) -> None:
    """The run that was planned, with what was said of it; one that does not fit chooses a way that does."""
    from finepoint.training.settings import TrainConfig

    alike = {known.name: default_of(known) for known in fields(TrainConfig)}
    said = {name: getattr(config, name, default) for name, default in alike.items()} | {"max_length": config.tokens}
    said |= {"fit": fits is False, "protect": "own" if config.protect_by or config.protect_steps else None}
    flags: list[str] = []
    for name, value in said.items():
        if value != alike[name] and type(value) in (str, int, float, bool) and name not in ("model", "data", "output"):
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    _say(["train", "--model", config.model, "--data", "FILE", "--output", "DIR", *flags])


def _eval(config: Any) -> Words:
    if len(config.adapter) != 1:
        return None
    if _is_classifier(config.adapter[0]):
        return ["export", "--model", config.model, "--adapter", config.adapter[0], "--format", "merged",
                "--output", "merged"]  # fmt: skip
    return _try(config.model, config.adapter[0], config.dtype, config.quantise)


def _try(model: str, adapter: str, dtype: str | None, quantise: str | None, on: str | None = None) -> Words:
    """Measure it where it is said on what, or where nothing else can be done; else talk."""
    loaded = ["--dtype", dtype] if dtype not in (None, "auto") else []
    loaded += ["--quantise", quantise] if quantise else []
    if on or _is_classifier(adapter):
        return ["eval", "--model", model, "--adapter", adapter, "--id", on or "test=FILE", *loaded]
    if quantise:  # whose entries cannot be switched
        return ["generate", "--model", model, "--adapter", adapter, "--base", "--prompt", "..", *loaded]
    return ["chat", "--model", model, "--adapter", adapter, *loaded]


def _is_classifier(adapter: str) -> bool:
    from finepoint.runtime.files import read_json

    file = Path(adapter) / CONFIG
    return file.is_file() and read_json(file).get("info", {}).get("task") == "classification"


def _data(config: Any) -> Words:
    names = [config.name] if isinstance(config.name, str) else config.name or []
    files = names[1:] if names[:1] == ["preview"] else []
    if config.output and not files:
        files = [str(path) for path in sorted(Path(config.output).glob("*-train.jsonl"))]
    if not files:
        return None
    pairs = {"chosen", "rejected"} <= _keys(files[0])
    command = ["align", "--method", "dpo"] if pairs else ["train"]
    return [*command, "--model", config.model or "MODEL", "--data", files[0], "--output", "adapters/mine"]


def _keys(source: str) -> set[str]:
    """The keys of the first row; none where it cannot be read."""
    from finepoint.data.sources import rows_of

    with suppress(FinepointError):  # the line is a hint: what is wrong with a file its reader says
        for _, row in rows_of(source):
            return set(row) if isinstance(row, dict) else set()
    return set()


NEXT: dict[str, Callable[[Any], Words]] = {
    "train": _train,
    "align": _train,
    "select": _select,
    "eval": _eval,
    "sequence": lambda config: ["report", config.output],
    "merge": lambda config: None if config.dry_run else ["inspect", config.output],
    "scale": lambda config: _try(config.model, config.output, config.dtype, config.quantise),
    "extract": lambda config: ["verify", config.output, "--model", config.base],
    "import": lambda config: ["verify", config.output, "--model", config.model],
    "inspect": lambda config: ["verify", config.folder, "--model", "MODEL"],
    "verify": lambda config: _try(config.model, config.folder, config.dtype, config.quantise),
    "data": _data,
}
"""`plan`, `demo` and `compare` say it beside their results; after the others nothing follows of itself"""
