"""Flags and YAML from a configuration's fields, by jsonargparse.

What we add to it is spelling: dashes for underscores, lists given one after the other or by repeating the flag
(`--id a=x --id b=y`), bare switches (`--overwrite`), `name=value` pairs for mappings, folders without their flag.
"""

import argparse
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from jsonargparse import ArgumentParser

from finepoint.config import refuse_out_of_range
from finepoint.errors import FinepointError

Config = TypeVar("Config")
# What `--help` of train, align and select is divided into.
SECTIONS = {
    "files": "model data validation validation_limit fisher_data output overwrite resume",
    "which entries": "rule rule_options density count structure pooling scope targets exclude indices refresh dropped",
    "scoring": "scoring_examples scoring_memory threshold",
    "instead of entries": "baseline baseline_options",
    "alignment": "method reward beta generations new_tokens temperature",
    "training": "lr steps epochs batch_size accumulation packing max_length warmup schedule weight_decay clip round_to",
    "memory": "dtype quantise gradient_checkpointing",
    "while it runs": "no_audit eval_every keep patience save_every report_to",
    "the adapter": "store compact",
    "everything else": "seed json",
}

# What other libraries call a flag of ours.
ELSEWHERE = {
    "learning_rate": "lr", "max_steps": "steps", "num_train_epochs": "epochs", "r": "density", "rank": "density",
    "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "accumulation", "output_dir": "output",
    "model_name_or_path": "model", "base_model": "model", "dataset": "data", "train_file": "data",
    "target_modules": "targets", "max_seq_length": "max_length", "warmup_ratio": "warmup", "max_grad_norm": "clip",
    "lr_scheduler_type": "schedule", "torch_dtype": "dtype", "load_in_8bit": "quantise", "load_in_4bit": "quantise",
    "resume_from_checkpoint": "resume", "save_steps": "save_every", "eval_steps": "eval_every", "force": "overwrite",
}  # fmt: skip


def parse(
    config: type[Config], command: str, arguments: Sequence[str], after_help: Callable[[], str] | None = None
) -> Config:
    """The configuration that the arguments, and the file after `--config`, describe; a flag overrides the file.

    Args:
        config: dataclass of the command.
        command: its name.
        arguments: what stands after it.
        after_help: makes what `--help` shows beyond the flags.

    Raises:
        FinepointError: unknown flag or key, a value of the wrong type, a missing flag.
        SystemExit: after `--help`.
    """
    parser = ArgumentParser(prog=f"finepoint {command}", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the flags below; a flag overrides it")
    parser.add_class_arguments(config)
    known: dict[str, Field[Any]] = {field.name: field for field in fields(config)}  # type: ignore[arg-type]
    spelled = spell(arguments, known)
    if any(word in ("-h", "--help") for word in arguments):
        print(help_text(config, command))
        if after_help:
            print(f"\n{after_help()}")
        raise SystemExit(0)
    _refuse_unknown(spelled, known, command)
    try:
        values = parser.parse_args(spelled).as_dict()
    except (argparse.ArgumentError, ValueError, TypeError, OSError) as error:
        if unknown := re.search(r"Option '(\w+)' is not accepted", str(error)):
            raise FinepointError(f"there is no key {unknown[1]!r}{_meant(unknown[1], known, command)}") from error
        raise FinepointError(_plain(str(error))) from error
    values.pop("config", None)
    found = config(**values)
    refuse_out_of_range(found)
    return found


def spell(arguments: Sequence[str], known: dict[str, Field[Any]]) -> list[str]:
    """The arguments as jsonargparse wants them: one `--name=value` each, lists and mappings as JSON."""
    given: dict[str, list[str]] = {}
    # A field may have a second name, which only flags know: that of a Python keyword can be no field's.
    also = {field.metadata["also"]: name for name, field in known.items() if "also" in field.metadata}
    name = None
    for word in arguments:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            name = also.get(flag, flag.replace("-", "_"))
            if given.get(name) and name in known and not _kinds(known[name]) & {list, dict, bool}:
                raise FinepointError(f"{_flag(name)} is given twice")
            given.setdefault(name, [])
            if equals:
                given[name].append(value)
        elif name is None or _is_full(given[name], word, known.get(name)):
            name = _positional(word, known)
            given.setdefault(name, []).append(word)
        else:
            given[name].append(word)
    return [f"--{name}={_value(name, values, known.get(name))}" for name, values in given.items()]


def _refuse_unknown(spelled: Sequence[str], known: Mapping[str, Field[Any]], command: str) -> None:
    """Refuses a flag that the command does not have, with the one that may be meant."""
    for word in spelled:
        name = word[2:].partition("=")[0]
        if name not in known and name != "config":
            raise FinepointError(f"there is no flag {_flag(name)}{_meant(name, known, command)}")


def _meant(name: str, known: Mapping[str, Field[Any]], command: str) -> str:
    """What follows the name of a flag or key that there is not."""
    other = ELSEWHERE.get(name, "")
    close = [other] if other in known else get_close_matches(name, known, n=1)
    hint = f"; did you mean {_flag(close[0])}?" if close else ";"
    return f"{hint} `finepoint {command} --help` lists the flags"


def _is_full(values: list[str], word: str, field: Field[Any] | None) -> bool:
    """Whether a flag can take no further word, so that this one must be the folder or name that needs no flag."""
    if field is None:
        return bool(values)
    if field.type is bool:
        return bool(values) or word not in ("true", "false")
    return bool(values) and not _kinds(field) & {list, dict}


def _positional(word: str, known: dict[str, Field[Any]]) -> str:
    for name, field in known.items():
        if name in ("folder", "name") or field.metadata.get("positional"):
            return name
    raise FinepointError(f"{word!r} belongs to no flag; `--help` lists the flags and what they take")


def _value(name: str, values: list[str], field: Field[Any] | None) -> str:
    if field is None:  # unknown, or --config: the parser will say
        return " ".join(values)
    if field.type is bool:
        return values[-1] if values else "true"
    if not values:
        raise FinepointError(f"{_flag(name)} needs a value")
    kinds = _kinds(field)
    if dict in kinds and all("=" in value for value in values):
        pairs = [pair.rpartition("=") for value in values for pair in value.split(",")]
        return json.dumps({key: _number(value) for key, _, value in pairs})
    if list in kinds and not (len(values) == 1 and values[0].startswith(("[", "{"))):
        return json.dumps(values) if str not in kinds or len(values) > 1 else values[0]
    if len(values) > 1:
        raise FinepointError(f"{_flag(name)} takes one value, got {' '.join(values)}")
    return values[0]


def _kinds(field: Field[Any]) -> set[Any]:
    """The types a field may have, without their parameters: {str, list, dict} for `str | list[str] | dict[..]`."""
    members = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
    return {get_origin(member) or member for member in members}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plain(message: str) -> str:
    """jsonargparse's message in our words: the flag as the user wrote it, no Python types."""
    text = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.replace("NoneType", "nothing").split()))
    if missing := re.search(r"arguments are required: (.*)", text):
        return f"{' and '.join(_flag(name) for name in missing[1].split(', '))} must be given; `--help` lists the flags"
    if choice := re.search(r'"(\w+)": Expected a (?:typing\.)?Literal\[(.*?)\]\. Got value: (.*)', text):
        return f"option {_flag(choice[1])}: expected one of {choice[2]}, got {choice[3]}"
    if "Union subtypes" in text:
        kinds = re.search(r"Subtypes: \[(.*?)\] Errors", text)
        given = text.rpartition("Given value: ")[2]
        option = re.search(r'"(\w+)"', text)
        if kinds and option:
            expected = (
                re.sub(r"typing\.Literal\[(.*?)\]", r"\1", kinds[1]).replace(", nothing", "").replace("nothing, ", "")
            )
            return f"option {_flag(option[1])}: expected {expected.replace(', ', ' or ')}, got {given}"
    if wrong := re.search(r'"(\w+)": Expected an? (\w+)\. Got value: (.*)', text):
        kind = "name=value pairs" if wrong[2] == "dict" else wrong[2]
        return f"option {_flag(wrong[1])}: expected {kind}, got {wrong[3]}"
    for before, after in (
        ('Parser key "', 'option "'), ("typing.", ""),
        ("Unexpected config:", "the file of --config must hold `flag: value` lines; it holds"),
        ("Key ", "option "), ("is required but not included in config object or its value is None", "is required"),
    ):  # fmt: skip
        text = text.replace(before, after)
    return text


def help_text(config: type, command: str) -> str:
    """Usage, what the command does, and every flag with its meaning and default."""
    lines = [f"usage: finepoint {command} [--config FILE.yaml] [--flag value ..]", "", summary(config)]
    for heading, members in sections(config):
        lines += ["", *([f"{heading}:"] if heading else [])]
        for flag, meaning, default in members:
            shown = default if default == "required" else f"default: {default}"
            lines.append(f"  {flag:<24} {meaning} ({shown})")
    return "\n".join(lines)


def sections(config: type) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The flags of a command under headings; under none where one of them is in no section."""
    found = flags(config)
    place = {_flag(name): heading for heading, names in SECTIONS.items() for name in names.split()}
    if any(flag not in place for flag, _, _ in found):
        return [("", found)]
    under = {heading: [row for row in found if place[row[0]] == heading] for heading in SECTIONS}
    return [(heading, members) for heading, members in under.items() if members]


def summary(config: type) -> str:
    """What a command does, in the first sentence of its configuration's docstring."""
    return (inspect.getdoc(config) or "").split("\n")[0]


def flags(config: type) -> list[tuple[str, str, str]]:
    """Every flag of a command, its meaning, and its default or `required`."""
    meanings = descriptions(config)
    return [
        (_flag(field.name), meanings.get(field.name, ""), "required" if _is_required(field) else _default(field))
        for field in fields(config)
    ]


def descriptions(config: type) -> dict[str, str]:
    """What each field means, from the `Args:` of the class and of those it extends."""
    found: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        _, _, listed = inspect.cleandoc(owner.__doc__ or "").partition("Args:\n")
        for line in listed.splitlines():
            name, colon, meaning = line.strip().partition(": ")
            if colon:
                found[name] = meaning
    return found


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _default(field: Field[Any]) -> str:
    make = field.default_factory
    value = field.default if make is MISSING else make()
    if value is None or value in ([], {}):
        return "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
