"""Flags and YAML from a configuration's fields, by jsonargparse.

What we add to it is spelling: dashes for underscores, lists given one after the other or by repeating the flag
(`--id a=x --id b=y`), bare switches (`--overwrite`), `name=value` pairs for mappings, folders without their flag.
"""

import argparse
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass
from difflib import get_close_matches
from itertools import pairwise
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser

from finepoint.errors import FinepointError
from finepoint.runtime.files import as_yaml
from finepoint.runtime.settings import default_of, did_you_mean, refuse_out_of_range, sections, values_of

Config = TypeVar("Config")

# What other libraries call a flag of ours.
ELSEWHERE = {
    "learning_rate": "lr", "max_steps": "steps", "num_train_epochs": "epochs", "r": "density", "rank": "density",
    "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "accumulation", "output_dir": "output",
    "model_name_or_path": "model", "base_model": "model", "dataset": "data", "train_file": "data",
    "target_modules": "targets", "max_seq_length": "max_length", "warmup_ratio": "warmup", "max_grad_norm": "clip",
    "lr_scheduler_type": "schedule", "torch_dtype": "dtype", "load_in_8bit": "quantise", "load_in_4bit": "quantise",
    "resume_from_checkpoint": "resume", "save_steps": "save_every", "eval_steps": "eval_every", "force": "overwrite",
}  # fmt: skip
# What has no flag, and why.
NEEDLESS = dict.fromkeys(
    ("device", "gpu", "cuda"), "; a GPU that torch finds is used (CUDA_VISIBLE_DEVICES says which)"
)
SWITCH = {"on": "true", "off": "false", "true": "true", "false": "false"}  # on and off are what help shows


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
    printed = "--print-config" in arguments
    parser.add_class_arguments(_form(config) if printed else config)
    if any(word in ("-h", "--help") for word in arguments):
        print(help_text(config, command))
        if after_help:
            print(f"\n{after_help()}")
        raise SystemExit(0)
    known = {field.name: field for field in fields(config)}  # type: ignore[arg-type]
    lines: dict[str, tuple[str, str]] = {}
    for file in _files(arguments):
        lines |= check_keys(file, known)
    spelled = spell([word for word in arguments if word != "--print-config"], known)
    written = _written(arguments)
    _refuse_unknown(spelled, known, command, written)
    try:
        values = parser.parse_args(spelled).as_dict()
    except (argparse.ArgumentError, ValueError, TypeError, OSError) as error:
        raise FinepointError(_where(_plain(str(error)), lines, written)) from error
    values.pop("config", None)
    if printed:
        for name in (each.name for _, members in sections(config) for each in members):
            absent = values[name] is None and default_of(known[name]) is MISSING
            print(f"{name}:  # required\n" if absent else as_yaml({name: values[name]}), end="")
        raise SystemExit(0)
    found = config(**values)
    try:
        refuse_out_of_range(found)
    except FinepointError as error:
        raise FinepointError(_where(str(error), lines, written)) from error
    return found


def _form(config: type) -> type:
    """The settings, with none that is required: a form to fill in."""
    known = [(each.name, each.type, each.default, each.default_factory) for each in fields(config)]
    return make_dataclass(config.__name__, [
        (name, kind, field(default=None)) if default is MISSING and make is MISSING
        else (name, kind, field(default=default, default_factory=make)) for name, kind, default, make in known
    ])  # fmt: skip


def _written(arguments: Sequence[str]) -> dict[str, str]:
    """The flags by their settings, as the user has spelt them."""
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    return {flag[2:].replace("-", "_"): flag for flag in flags}


def _where(message: str, lines: Mapping[str, tuple[str, str]], written: Mapping[str, str]) -> str:
    """A message on a setting's value, with where the value stands: its line in a file, or the flag as it was typed."""
    told = re.match(r"option --([\w-]+)|(\w+) is ", message)
    name = (told[1] or told[2]).replace("-", "_") if told else ""
    place, value = lines.get(name, ("", ""))
    if place and (name not in written or message.endswith(f"got {value}")):
        return f"{place}: {message.replace(f'option {_flag(name)}', name)}"
    return message.replace(_flag(name), written.get(name, _flag(name))) if name else message


def check_keys(file: str, known: Mapping[str, Field[Any]]) -> dict[str, tuple[str, str]]:
    """Where each setting stands in a YAML file, as FILE:LINE, and the text of its value.

    Raises:
        FinepointError: the file cannot be read, has a key that is no setting, or one twice; with file and line.
    """
    try:
        with open(file, encoding="utf-8") as text:
            found = yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise FinepointError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise FinepointError(f"{file}{where}: no YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(found, yaml.MappingNode):
        raise FinepointError(f"{file}: the file of --config must hold `flag: value` lines")
    _check_mapping(file, found, {name: field.metadata["keys"] for name, field in known.items()})
    return {key.value: (_line(file, key), str(value.value)) for key, value in found.value}


def _line(file: str, node: yaml.Node) -> str:
    return f"{file}:{node.start_mark.line + 1}"


def _check_mapping(file: str, node: yaml.Node, keys: Mapping[str, Any] | None, inside: str = "") -> None:
    """Refuses keys that a mapping, or one of a list, or one inside of them, cannot have, and keys written twice.

    Args:
        keys: those it can have; see `setting`.
        inside: how a message calls the mapping.
    """
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_mapping(file, item, keys, inside)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name = str(key.value)
        if name == "<<" and inside:  # YAML's own way to take over another mapping
            continue
        if name in lines:
            raise FinepointError(
                f"{_line(file, key)}: {name!r} stands in line {lines[name]} too; leave out one of them"
            )
        lines[name] = key.start_mark.line + 1
        if keys is not None and name not in keys and "*" not in keys:
            hint = did_you_mean(_here(name, keys), keys, spell=str)
            raise FinepointError(f"{_line(file, key)}: there is no key {name!r}{inside}{hint}")
        below = keys.get(name, keys.get("*")) if keys is not None else None
        _check_mapping(file, value, below, inside if keys and "*" in keys else f" in {name}")


def _files(arguments: Sequence[str]) -> Iterator[str]:
    """The files named after --config."""
    for word, following in pairwise([*arguments, ""]):
        if word == "--config" and not following.startswith("--"):
            yield following
        elif word.startswith("--config="):
            yield word.partition("=")[2]


def spell(arguments: Sequence[str], known: dict[str, Field[Any]]) -> list[str]:
    """The arguments as jsonargparse wants them: one `--name=value` each, lists and mappings as JSON."""
    given: dict[str, list[str]] = {}
    # A field may have a second name, which only flags know: that of a Python keyword can be no field's.
    also = {field.metadata["also"]: name for name, field in known.items() if field.metadata["also"]}
    name = None
    for word in arguments:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            name = also.get(flag, flag.replace("-", "_"))
            if given.get(name) and name in known and not _kinds(known[name]) & {list, dict, bool}:
                raise FinepointError(f"--{flag} is given twice")
            given.setdefault(name, [])
            if equals:
                given[name].append(value)
        elif name is None or _is_full(given[name], word, known.get(name)):
            name = _positional(word, known, given)
            given.setdefault(name, []).append(word)
        else:
            given[name].append(word)
    written = _written(arguments)
    return [
        f"--{name}={_value(written.get(name, _flag(name)), values, known.get(name))}" for name, values in given.items()
    ]


def _refuse_unknown(spelled: Sequence[str], known: Collection[str], command: str, written: Mapping[str, str]) -> None:
    """Refuses a flag that the command does not have, with the one that may be meant."""
    for word in spelled:
        name = word[2:].partition("=")[0]
        if name not in known and name != "config":
            lists = f"`finepoint {command} --help` lists the flags"
            hint = NEEDLESS.get(name) or did_you_mean(_here(name, known), known, lists, spell=_flag)
            raise FinepointError(f"there is no flag {written.get(name, _flag(name))}{hint}")


def _here(name: str, known: Collection[str]) -> str:
    """What another library's name for a setting, perhaps misspelt, is here; or the name itself."""
    elsewhere = {theirs: ours for theirs, ours in ELSEWHERE.items() if ours in known}
    near = get_close_matches(name, [*known, *elsewhere], 1)
    return elsewhere[near[0]] if near and near[0] not in known else name


def _is_full(values: list[str], word: str, field: Field[Any] | None) -> bool:
    """Whether a flag can take no further word, so that this one must be the folder or name that needs no flag."""
    if field is None:
        return bool(values)
    if field.type is bool:
        return bool(values) or word not in SWITCH
    return bool(values) and not _kinds(field) & {list, dict}


def _positional(word: str, known: dict[str, Field[Any]], given: Mapping[str, list[str]]) -> str:
    """The setting that a word without a flag is of: the first that can take it, or the last, which will refuse it."""
    names = [name for name, field in known.items() if field.metadata["positional"]]
    for name in names:
        if not _is_full(given.get(name, []), word, known[name]) or name == names[-1]:
            return name
    raise FinepointError(f"{word!r} belongs to no flag; `--help` lists the flags and what they take")


def _value(flag: str, values: list[str], field: Field[Any] | None) -> str:
    if field is None:  # unknown, or --config: the parser will say
        return " ".join(values)
    if field.type is bool:
        return SWITCH.get(values[-1], values[-1]) if values else "true"
    if not values:
        raise FinepointError(f"{flag} needs a value")
    kinds = _kinds(field)
    if dict in kinds and all("=" in value for value in values):
        texts = field.type == dict[str, str]
        pairs = [pair.partition("=") if texts else pair.rpartition("=")
                 for value in values for pair in value.split(",")]  # fmt: skip
        return json.dumps({key: value if texts else _number(value) for key, _, value in pairs})
    if list in kinds and not (len(values) == 1 and _is_json(values[0])):
        return json.dumps(values) if str not in kinds or len(values) > 1 else values[0]
    if len(values) > 1:
        raise FinepointError(f"{flag} takes one value, got {' '.join(values)}; any other one follows its own flag")
    return values[0]


def _is_json(text: str) -> bool:
    """Whether a word is a list or a mapping spelt out; a text may begin with a bracket, too."""
    try:
        return isinstance(json.loads(text), list | dict)
    except ValueError:
        return False


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
        for flag, meaning, default in map(row, members):
            shown = default if default == "required" else f"default: {default}"
            lines.append(f"  {flag:<24} {meaning} ({shown})")
    lines += ["", f"--print-config prints all of them as YAML; `finepoint schema {command}` is their JSON schema"]
    return "\n".join(lines)


def summary(config: type) -> str:
    """What a command does, in the first sentence of its configuration's docstring."""
    return (inspect.getdoc(config) or "").split("\n")[0]


def flags(config: type) -> list[tuple[str, str, str]]:
    """Every flag of a command, its meaning, and its default or `required`."""
    return [row(known) for _, members in sections(config) for known in members]


def row(known: Field[Any]) -> tuple[str, str, str]:
    """A flag, its meaning, and its default or `required`, with the other values where the meaning leaves some out."""
    value, meaning = default_of(known), known.metadata["meaning"]
    if value is MISSING:
        shown = "required"
    elif value is None or value in ([], {}):
        shown = "none"
    else:
        shown = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
    others = [other for other in values_of(known) if other != shown]
    left_out = [other for other in others if not re.search(rf"(?<![\w-]){re.escape(other)}(?![\w-])", meaning)]
    return _flag(known.name), meaning, f"{shown}; or {', '.join(others)}" if left_out else shown
