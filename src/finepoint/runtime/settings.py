"""Settings, described once: a field's default, what it means, what it decides. All else is derived from that.

Help, reference, the JSON schema; what a resumed run may be told otherwise; what the runs of a study can share. Nothing
heavy is imported, so that help is instant.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from finepoint.errors import FinepointError

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Quantise = Literal["int8", "int4", "nf4"]
ImportFormat = Literal["auto", "shira", "supertuning", "sparta"]
ChatTurns = Literal["all", "last", "each"]
# What many commands say of the same setting.
MODEL = "a folder, a hub id, a .gguf file, smollm2, or gemma3-270m"
DATA = (
    "training examples: a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, .md), a folder of them, or a data "
    "set of the hub (org/name, org/name/config:split); several are mixed, a.jsonl=0.7 b.csv=0.3 by shares"
)
JSON = "print one JSON object on stdout"
OVERWRITE = "allow an output folder that holds something"
COMPACT = "write positions as gaps, in one or two bytes each instead of four; as exact"
CHAT_TURNS = (
    "which of the assistant's turns count in a conversation: all, the last, or each in a conversation of its own that "
    "ends there, as the model is asked for it"
)
DTYPE = "of the weights; auto keeps the checkpoint's, float32 on a CPU without bfloat16"
ADAPTERS_DTYPE = "of the weights; that of the adapter where not given"
ANY_DTYPE = "take adapters trained in a narrower dtype too, where the wider weights hold the same base values"
AS_TRAINED = "hold the linear layers in int8, int4 or nf4, as the adapter's training did"
ANY_BASE = "take a model that is another than the adapter's base beside the entries it changes"
Known = TypeVar("Known")
LARGEST_SEED = 2**32 - 1  # numpy's
TargetsOption = str | list[str] | dict[str, float]

Decides = Literal["statistics", "selection", "bits", "length", "nothing"]
"""What a setting decides, and with it all that follows from that: the gradients that rules score by; which entries are
chosen; what comes out bit by bit; how far it is carried on; or nothing of these (where to write, what to tell)."""
SECTIONS = ("", "files", "which entries", "scoring", "what is kept", "instead of entries", "alignment", "training",
            "memory", "while it runs", "the adapter", "everything else")  # fmt: skip
"""The headings of `--help`, in this order."""


SHARE: dict[str, Any] = {"above": 0, "most": 1, "within": "it is a share of the target entries, in (0, 1]"}
"""the bounds of a density"""
HELD = SHARE | {"within": "it is a share of the weights, in (0, 1]"}
"""and those of what scoring holds at a time"""


def setting(
    meaning: str, default: Any = MISSING, decides: Decides = "nothing", section: str = "", *,
    file: bool = False, positional: bool = False, also: str = "",
    least: float | None = None, above: float | None = None, most: float | None = None, within: str = "",
    keys: Mapping[str, Any] | None = None, registry: str = "",
) -> Any:  # fmt: skip
    """A field of a command's settings: a flag, and a key of its YAML.

    Args:
        meaning: what `--help` says of it.
        default: its default; required where not given.
        decides: see `Decides`.
        section: its heading in `--help`.
        file: it names a file or folder, whose contents decide and not the name.
        positional: on the command line it needs no flag.
        also: another name, which only flags know.
        least, above, most: bounds of a number that any run could have; `above` is not one of them.
        within: what is said of these bounds, where "give at most 1" would not be clear.
        keys: the names that a mapping may have, or each mapping of a list, and below each name the keys of its own
            (None: any); the name "*" stands for all names.
        registry: files of ours and the decorator there that makes a function one of its values; see `values_of`.
    """
    assert section in SECTIONS, section
    metadata = {"meaning": meaning, "decides": decides, "section": section, "file": file, "positional": positional,
                "also": also, "least": least, "above": above, "most": most, "within": within,
                "keys": keys, "registry": registry}  # fmt: skip
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


LIMITS = (
    ("least", operator.ge, "give at least {}"),
    ("above", operator.gt, "give a number above {}"),
    ("most", operator.le, "give at most {}"),
)


class Cited:
    """What is known by name, with its formula and where it comes from: printed so."""

    name: str
    formula: str
    source: str

    def __repr__(self) -> str:
        return f"{self.name}: {self.formula} ({self.source})"


class Printed:
    """Settings that print only what is not at its default."""

    def __repr__(self) -> str:
        given = [(known.name, getattr(self, known.name), default_of(known)) for known in fields(self)]  # type: ignore[arg-type]
        told = [f"{name}={value!r}" for name, value, default in given if default is MISSING or value != default]
        return f"{type(self).__name__}({', '.join(told)})"


def refuse_out_of_range(config: Any) -> None:
    """Refuses numbers that no run could have, or that would silently mean something else.

    Raises:
        FinepointError: there is one; it is named.
    """
    for known in fields(config):
        name, value, told = known.name, getattr(config, known.name), known.metadata
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        for key, holds, words in LIMITS:
            if told[key] is not None and not holds(value, told[key]):
                raise FinepointError(f"{name} is {value}; {told['within'] or words.format(told[key])}")


def refuse_without(config: Any, needed: str, others: Iterable[str], what: str = "FILE") -> None:
    """Refuses settings that mean nothing where another one, a file, is not given.

    Raises:
        FinepointError: one of them is not at its default; it is named.
    """
    if getattr(config, needed) is not None:
        return
    defaults = {known.name: default_of(known) for known in fields(config)}
    for name in others:
        if getattr(config, name) != defaults[name]:
            raise FinepointError(f"{name} says something of --{needed}, which is not given; give --{needed} {what}, or "
                                 f"leave out --{name.replace('_', '-')}")  # fmt: skip


def default_of(known: Field[Any]) -> Any:
    """A field's default, `MISSING` where it is required."""
    return known.default if known.default_factory is MISSING else known.default_factory()


def names(config: Any, *decides: Decides, files: bool = True) -> list[str]:
    """Those settings that decide one of these; `files`: also those that name files."""
    chosen = [known for known in fields(config) if known.metadata["decides"] in decides]
    return [known.name for known in chosen if files or not known.metadata["file"]]


def deciding(config: Any, *decides: Decides, files: bool = True) -> dict[str, Any]:
    """The values of the settings that `names` finds."""
    values = asdict(config)
    return {name: values[name] for name in names(config, *decides, files=files)}


def sections(config: type) -> Iterator[tuple[str, list[Field[Any]]]]:
    """A command's settings by their headings."""
    for heading in SECTIONS:
        if found := [known for known in fields(config) if known.metadata["section"] == heading]:
            yield heading, found


def values_of(known: Field[Any]) -> list[str]:
    """The values that a setting can have, where they are listed: by its type, or as functions with a decorator."""
    registry = known.metadata["registry"]
    return _registered(*registry.split()) if registry else choices(known.type)


def choices(kind: Any) -> list[str]:
    """The values that a setting of this type can have, where they are few."""
    if get_origin(kind) is Literal:
        return [str(member) for member in get_args(kind)]
    members = [member for member in get_args(kind) if member is not NoneType]
    return choices(members[0]) if len(members) == 1 and get_origin(kind) is not dict else []


def _registered(files: str, decorator: str) -> list[str]:
    """The names by which functions are known. The files are read, not imported: help needs no torch."""
    pattern = re.compile(rf'^@{decorator}\((?:"([\w-]+)"[,)])?.*?^def (\w+)', re.MULTILINE | re.DOTALL)
    texts = [file.read_text("utf-8") for file in sorted(Path(__file__).parents[1].glob(files))]
    return [given or function.replace("_", "-") for text in texts for given, function in pattern.findall(text)]


def did_you_mean(
    given: str, known: Iterable[str], then: str = "", spell: Callable[[str], str] = repr, most: int = 1
) -> str:
    """The end of a message: `; did you mean 'this'?` where a known name is near, then what else there is to say.

    Args:
        spell: how a name is shown, e.g. as a flag.
        most: so many names at most.
    """
    near = get_close_matches(given, list(known), most)
    hint = f"did you mean {' or '.join(map(spell, near))}? " if near else ""
    return f"; {hint}{then}".rstrip() if hint or then else ""


REGISTRIES = {
    "baseline": ("unknown baseline", "known baselines"),
    "protection": ("no protection", "the protections"),
    "token_loss": ("no loss", "the losses"),
    "method": ("there is no way to merge called", "there are"),
    "layout": ("no format", "the formats"),
}
"""By decorator: how a message begins that there is none of a name, and how its list of all names does."""


def refuse_unregistered(config: Any) -> None:
    """Refuses names that nothing of ours is registered by; nothing is imported for it.

    Raises:
        FinepointError: there is one, in the words of whoever would look for it later.
    """
    for known in fields(config):
        name, registry = getattr(config, known.name), known.metadata["registry"]
        if registry and name is not None:
            named(dict.fromkeys(values_of(known)), name, *REGISTRIES[registry.split()[1]])


def named(known: Mapping[str, Known], name: str, unknown: str, listed: str) -> Known:
    """What is known by this name.

    Args:
        unknown, listed: how a message begins, and how its list of all names does.

    Raises:
        FinepointError: nothing is; what may be meant is said.
    """
    if name not in known:
        raise FinepointError(f"{unknown} {name!r}{did_you_mean(name, known, f'{listed}: ' + ', '.join(known))}")
    return known[name]


def fits(value: Any, kind: Any) -> bool:
    """Whether a value, as YAML gives it, can stand in a field of this type."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in members
    if origin in (Union, UnionType):
        return any(fits(value, member) for member in members)
    if origin is list:
        return isinstance(value, list) and all(fits(item, members[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def spelled(kind: Any) -> list[str]:
    """What may stand in a field of this type, for messages."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        return [str(member) for member in members]
    if origin in (Union, UnionType):
        return [text for member in members if member is not NoneType for text in spelled(member)]
    if origin in (list, dict):
        return [f"a {'list' if origin is list else 'mapping'}"]
    return [{int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]]


def json_schema(config: type, title: str) -> dict[str, Any]:
    """The JSON schema of a command's YAML file, for editors that complete and check it."""
    known = {each.name: each for each in fields(config)}
    properties = {}
    for name, each in known.items():
        default = default_of(each)
        properties[name] = {"description": each.metadata["meaning"], **_schema_of(each.type)}
        bounds = {"minimum": "least", "exclusiveMinimum": "above", "maximum": "most"}
        properties[name] |= {
            word: each.metadata[bound] for word, bound in bounds.items() if each.metadata[bound] is not None
        }
        properties[name] |= {} if default is MISSING else {"default": default}
        properties[name] |= {"examples": values_of(each)} if each.metadata["registry"] else {}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, "type": "object",
            "properties": properties, "additionalProperties": False}  # fmt: skip


def _schema_of(kind: Any) -> dict[str, Any]:
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(members)}
    if origin in (Union, UnionType):
        return {"anyOf": [_schema_of(member) for member in members]}
    if origin is list:
        return {"type": "array", "items": _schema_of(members[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(members[1])}
    names = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}
    return {"type": names[kind]} if kind in names else {}
