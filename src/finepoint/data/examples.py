"""Files to examples: the rows of a file, each in one of the forms that are known.

A type of file is a function decorated by `source`, a form of its rows one decorated by `form`.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finepoint.errors import FinepointError


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What came from a file."""

    where: str = field(default="", compare=False, repr=False)
    """the file and line, for messages"""

    @property
    def place(self) -> str:
        """How a message about it begins: with its file and line, where they are known."""
        return f"{self.where}: " if self.where else ""


@dataclass(frozen=True)
class Completion(Placed):
    """A prompt and what should follow it; evaluated by exact match of greedy generation."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Choices(Placed):
    """A prompt and its possible continuations, `answer` the right one; evaluated by likelihood."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Chat(Placed):
    """A conversation of (role, content) pairs; the assistant's turns are learned."""

    messages: tuple[tuple[str, str], ...]
    more: tuple[str, ...] = ()
    """what each turn holds beside these (reasoning, calls of tools), as JSON: by turn, or nothing at all"""
    given: str = ""
    """what the template is given beside the turns (tools), as JSON"""
    last: bool = False
    """of the assistant's turns only the last is learned"""


@dataclass(frozen=True)
class Text(Placed):
    """Plain text; evaluated by its mean negative log-likelihood."""

    text: str


@dataclass(frozen=True)
class Labelled(Placed):
    """A text and its class, for models with a classification head."""

    text: str
    label: str


@dataclass(frozen=True)
class Pair(Placed):
    """A prompt, an answer that is preferred, and one that is not: what alignment by preferences learns from."""

    prompt: str
    chosen: str
    rejected: str


Example = Completion | Choices | Chat | Text | Labelled

Row = dict[str, Any]
Form = Callable[[str, Row], Any]
Source = Callable[[Path], Iterator[tuple[str, Any]]]
FORMS: dict[tuple[str, ...], Form] = {}
"""of examples, by a row's keys"""
PAIRS: dict[tuple[str, ...], Form] = {}
"""of pairs for alignment"""
OPTIONAL: dict[tuple[str, ...], set[str]] = {}
"""keys that a row may have beside those of its form"""
SOURCES: dict[str, Source] = {}
"""by the end of a file's name"""
EXTRAS = {"id", "group"}
# Keys of other tools' files, and what they are here.
ELSEWHERE = {
    "conversations": '{"messages": [{"role": "user", "content"}, {"role": "assistant", "content"}, ..]}',
    "instruction": '{"prompt", "completion"}, the instruction and its input as one prompt',
    "question": '{"prompt", "completion"}',
    "sentence": '{"text", "label"}',
}


def form(*keys: str, pairs: bool = False, optional: Iterable[str] = ()) -> Callable[[Form], Form]:
    """Makes a function the reader of rows that have these keys: from where a row stands, and the row, to an example."""

    def register(make: Form) -> Form:
        (PAIRS if pairs else FORMS)[keys] = make
        OPTIONAL[keys] = set(optional)
        return make

    return register


def source(ending: str) -> Callable[[Source], Source]:
    """Makes a function the reader of files whose names end so: from a path to rows, each with where it stands."""

    def register(read: Source) -> Source:
        SOURCES[ending] = read
        return read

    return register


def read_examples(path: str | Path) -> list[Example]:
    """The examples of a file, all of one form; empty lines are skipped.

    Raises:
        FinepointError: the file is missing, empty or mixed, or a row is malformed; file and line are named.
    """
    return _alike(str(path), [(where, _example(where, row, FORMS)) for where, row in _rows(Path(path))])


def read_pairs(path: str | Path) -> list[Pair]:
    """The preference pairs of a file; empty lines are skipped.

    Raises:
        FinepointError: the file is missing or empty, or a row is malformed; file and line are named.
    """
    found = [_example(where, row, PAIRS) for where, row in _rows(Path(path))]
    if not found:
        raise FinepointError(f"{path} holds no pair; expected one {_spelled(PAIRS)} a line")
    return found


def as_examples(rows: Iterable[Any]) -> list[Example]:
    """Examples of rows in memory: dictionaries in one of the forms of a line, or examples already.

    Raises:
        FinepointError: there is none, they are mixed, or one is malformed; its number is named.
    """
    numbered = [(f"data, row {number}", row) for number, row in enumerate(rows)]
    return _alike("data", [(at, row if isinstance(row, Example) else _example(at, row, FORMS)) for at, row in numbered])


def _alike(origin: str, found: list[tuple[str, Example]]) -> list[Example]:
    """The examples, which must be of one form."""
    if not found:
        raise FinepointError(f"{origin} holds no example; expected one JSON object a line: {_spelled(FORMS)}")
    kind = type(found[0][1])
    for where, example in found:
        if type(example) is not kind:
            raise FinepointError(
                f"{where}: a {type(example).__name__.lower()} example in a file that began with "
                f"{kind.__name__.lower()} examples; give each form its own file"
            )
    return [example for _, example in found]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """A file's rows by its type; one whose name tells none is taken for JSON Lines."""
    return SOURCES.get(path.suffix.lower(), json_lines)(path)


def _example(where: str, row: Any, forms: Mapping[tuple[str, ...], Form]) -> Any:
    keys = set(row) - EXTRAS if isinstance(row, dict) else set()
    for wanted, make in forms.items():
        if keys - OPTIONAL[wanted] == set(wanted):
            return make(where, row)
    keyed = "the keys" if forms is PAIRS else "an object with the keys"
    found = f"{keyed} {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
    hint = next((f"; write {old} as {new}" for old, new in ELSEWHERE.items() if old in keys), "")
    raise FinepointError(f"{where}: {found}; expected {_spelled(forms)}{hint}")


def _spelled(forms: Iterable[tuple[str, ...]]) -> str:
    """The forms, as messages name them."""
    *most, last = ("{" + ", ".join(f'"{key}"' for key in keys) + "}" for keys in forms)
    return f'{", ".join(most)}{" or " if most else ""}{last}, with "id" and "group" as optional extras'


@source(".jsonl")
def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """One JSON object a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FinepointError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FinepointError(f"{path} is not UTF-8 text (byte {error.start})") from error
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: strings may hold U+2028 unescaped
        where = f"{path}, line {number}"
        if line.strip():
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FinepointError(f"{where}: not JSON ({error}); expected {_spelled(FORMS)}") from error


def string(where: str, row: Row, key: str) -> str:
    """A row's text, which must not be empty."""
    if not isinstance(row[key], str) or not row[key]:
        raise FinepointError(f"{where}: {key!r} must be a string that is not empty, got {row[key]!r}")
    return readable(where, key, row[key])


def readable(where: str, key: str, text: str) -> str:
    """A text that a tokenizer can take: JSON may spell half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FinepointError(f"{where}: {key!r} holds half a character, {text[error.start]!a}; write it whole, "
                             "or as \\ufffd") from error  # fmt: skip
    return text


@form("prompt", "completion")
def completion(where: str, row: Row) -> Completion:
    return Completion(string(where, row, "prompt"), string(where, row, "completion"), where=where)


@form("prompt", "choices", "answer")
def choices(where: str, row: Row) -> Choices:
    given, answer = row["choices"], row["answer"]
    valid = isinstance(given, list) and len(given) >= 2 and all(isinstance(c, str) and c for c in given)
    if not valid or len(set(given)) < len(given):
        raise FinepointError(f"{where}: 'choices' must be two or more different strings, got {given!r}")
    if type(answer) is not int or not 0 <= answer < len(given):
        raise FinepointError(f"{where}: 'answer' must be the index of a choice, 0 to {len(given) - 1}, got {answer!r}")
    texts = tuple(readable(where, "choices", choice) for choice in given)
    return Choices(string(where, row, "prompt"), texts, answer, where=where)


TURNS = 'expected [{"role": "user", "content": ".."}, {"role": "assistant", "content": ".."}, ..]'
REASONING = ("reasoning_content", "reasoning", "thinking")
"""a turn's keys for what the model thought; templates read one or another"""


@form("messages", optional=("tools", "chat_template_kwargs"))
def chat(where: str, row: Row) -> Chat:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise FinepointError(f"{where}: 'messages' is no list of turns; {TURNS}")
    turns = [_turn(where, turn) for turn in messages]
    if turns[0][0] == "assistant" or turns[-1][0] != "assistant":
        raise FinepointError(f"{where}: a conversation must begin with another role and end with the assistant")
    more = tuple(_json(where, "messages", rest) for *_, rest in turns)
    return Chat(tuple((role, content) for role, content, _ in turns), more if any(more) else (),
                _json(where, "tools", _for_template(where, row)), where=where)  # fmt: skip


def _turn(where: str, turn: Any) -> tuple[str, str, Row]:
    """A turn's role, its text, and what else it holds, which templates may read."""
    if not isinstance(turn, dict) or "role" not in turn:
        raise FinepointError(f"{where}: a turn is {turn!r}; {TURNS}")
    rest = {key: value for key, value in turn.items() if key not in ("role", "content") and value not in (None, [])}
    for key in REASONING:
        if key in rest:
            string(where, rest, key)
    if "tool_calls" in rest:
        _refuse_calls(where, rest["tool_calls"])
    if rest.get("weight", 1) not in (0, 1):
        raise FinepointError(f"{where}: 'weight' is {rest['weight']!r}; 1 has a turn learned, 0 has it read alone")
    role, content = string(where, turn, "role"), _content(where, turn.get("content"))
    if not content and role != "tool" and not (role == "assistant" and "tool_calls" in rest):
        raise FinepointError(f"{where}: a turn is {turn!r}, without content; {TURNS}")
    return role, content, rest


def _content(where: str, content: Any) -> str:
    """A turn's text: a string, or parts that are all text; nothing where it is missing."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise FinepointError(f"{where}: a turn's content holds {part!r}; of conversations text alone is learned, "
                                 'a string or [{"type": "text", "text": ".."}, ..]')  # fmt: skip
    return readable(where, "content", "".join(part["text"] for part in parts))


def _refuse_calls(where: str, calls: Any) -> None:
    """Refuses calls of tools that no template could read."""
    given = calls if isinstance(calls, list) else [None]
    functions = [call.get("function", call) if isinstance(call, dict) else None for call in given]
    if not all(isinstance(found, dict) and isinstance(found.get("name"), str) for found in functions):
        raise FinepointError(f"{where}: 'tool_calls' is {calls!r}; expected "
                             '[{"type": "function", "function": {"name": "..", "arguments": {..}}}, ..]')  # fmt: skip


def _for_template(where: str, row: Row) -> Row:
    """What a row gives a chat template beside its turns: the tools that may be called, and further words."""
    tools, words = _object(row.get("tools")), _object(row.get("chat_template_kwargs"))
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise FinepointError(f"{where}: 'tools' must be a list of JSON schemas, got {tools!r}")
    if words and not isinstance(words, dict):
        raise FinepointError(f"{where}: 'chat_template_kwargs' must be an object, got {words!r}")
    return (words or {}) | ({"tools": tools} if tools else {})


def _object(value: Any) -> Any:
    """What a string of JSON says, as tables hold what is nested; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _json(where: str, key: str, value: Row) -> str:
    """What a template is to be given, as it is kept; nothing where there is none."""
    try:
        return readable(where, key, json.dumps(value, ensure_ascii=False)) if value else ""
    except (TypeError, ValueError) as error:
        raise FinepointError(f"{where}: {key!r} holds what is no JSON: {error}") from error


@form("text", "label")
def labelled(where: str, row: Row) -> Labelled:
    label = row["label"]
    if type(label) not in (str, int) or label == "":
        raise FinepointError(f"{where}: 'label' must be a string or an integer, got {label!r}")
    return Labelled(string(where, row, "text"), readable(where, "label", str(label)), where=where)


@form("text")
def text(where: str, row: Row) -> Text:
    return Text(string(where, row, "text"), where=where)


@form("prompt", "chosen", "rejected", pairs=True)
def pair(where: str, row: Row) -> Pair:
    prompt, chosen, rejected = (string(where, row, key) for key in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise FinepointError(f"{where}: 'chosen' and 'rejected' are the same text")
    return Pair(prompt, chosen, rejected, where=where)


def refuse_other_task(file: str, examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Refuses texts with classes for a model that writes, and others for a classifier."""
    if bool(labels) != isinstance(examples[0], Labelled):
        raise FinepointError(f"{file} holds {type(examples[0]).__name__.lower()} examples, and the model is "
                             f"{'a' if labels else 'no'} classifier; give it what it is trained for")  # fmt: skip


def some(examples: list[Example], limit: int | None) -> list[Example]:
    """At most `limit` of the examples, drawn with a fixed seed, in the file's order."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), limit))]


def label_names(examples: Sequence[Example]) -> list[str]:
    """The classes of labelled examples, sorted (numbers by value); empty for other forms."""
    names = {example.label for example in examples if isinstance(example, Labelled)}
    return sorted(names, key=lambda name: (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name))
