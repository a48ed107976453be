"""Files to examples: JSON Lines, one object a line, in one of five forms."""

import json
import random
from collections.abc import Iterable, Sequence
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

FORMS = (
    '{"prompt", "completion"}, {"prompt", "choices", "answer"}, {"messages"}, {"text", "label"} or {"text"}, '
    'with "id" and "group" as optional extras'
)
EXTRAS = {"id", "group"}
# Keys of other tools' files, and what they are here.
ELSEWHERE = {
    "conversations": '{"messages": [{"role": "user", "content"}, {"role": "assistant", "content"}, ..]}',
    "instruction": '{"prompt", "completion"}, the instruction and its input as one prompt',
    "question": '{"prompt", "completion"}',
    "sentence": '{"text", "label"}',
}


def read_examples(path: str | Path) -> list[Example]:
    """The examples of a JSON Lines file, all of one form; empty lines are skipped.

    Raises:
        FinepointError: the file is missing, empty or mixed, or a line is malformed; file and line are named.
    """
    rows = [(f"{path}, line {number}", _parsed(f"{path}, line {number}", line)) for number, line in _lines(Path(path))]
    return _alike(str(path), [(where, _example(where, row)) for where, row in rows])


def read_pairs(path: str | Path) -> list[Pair]:
    """The preference pairs of a JSON Lines file; empty lines are skipped.

    Raises:
        FinepointError: the file is missing or empty, or a line is malformed; file and line are named.
    """
    found = []
    for number, line in _lines(Path(path)):
        where = f"{path}, line {number}"
        row = _parsed(where, line)
        if not isinstance(row, dict) or set(row) - EXTRAS != {"prompt", "chosen", "rejected"}:
            keys = f"the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise FinepointError(f'{where}: {keys}; expected {{"prompt", "chosen", "rejected"}}')
        pair = Pair(*(_string(where, row, key) for key in ("prompt", "chosen", "rejected")), where=where)
        if pair.chosen == pair.rejected:
            raise FinepointError(f"{where}: 'chosen' and 'rejected' are the same text")
        found.append(pair)
    if not found:
        raise FinepointError(f'{path} holds no pair; expected one {{"prompt", "chosen", "rejected"}} a line')
    return found


def as_examples(rows: Iterable[Any]) -> list[Example]:
    """Examples of rows in memory: dictionaries in one of the forms of a line, or examples already.

    Raises:
        FinepointError: there is none, they are mixed, or one is malformed; its number is named.
    """
    numbered = [(f"data, row {number}", row) for number, row in enumerate(rows)]
    return _alike("data", [(at, row if isinstance(row, Example) else _example(at, row)) for at, row in numbered])


def _alike(source: str, found: list[tuple[str, Example]]) -> list[Example]:
    """The examples, which must be of one form."""
    if not found:
        raise FinepointError(f"{source} holds no example; expected one JSON object a line: {FORMS}")
    form = type(found[0][1])
    for where, example in found:
        if type(example) is not form:
            raise FinepointError(
                f"{where}: a {type(example).__name__.lower()} example in a file that began with "
                f"{form.__name__.lower()} examples; give each form its own file"
            )
    return [example for _, example in found]


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


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FinepointError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FinepointError(f"{path} is not UTF-8 text (byte {error.start})") from error
    # Not splitlines: JSON strings may hold U+2028 and other separators unescaped.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parsed(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FinepointError(f"{where}: not JSON ({error}); expected {FORMS}") from error


def _example(where: str, row: Any) -> Example:
    keys = set(row) - EXTRAS if isinstance(row, dict) else set()
    for wanted, make in _MAKERS:
        if keys == wanted:
            return make(where, row)
    found = f"an object with the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
    hint = next((f"; write {old} as {new}" for old, new in ELSEWHERE.items() if old in keys), "")
    raise FinepointError(f"{where}: {found}; expected {FORMS}{hint}")


def _string(where: str, row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str) or not row[key]:
        raise FinepointError(f"{where}: {key!r} must be a string that is not empty, got {row[key]!r}")
    return _readable(where, key, row[key])


def _readable(where: str, key: str, text: str) -> str:
    """A text that a tokenizer can take: JSON may spell half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FinepointError(f"{where}: {key!r} holds half a character, {text[error.start]!a}; write it whole, "
                             "or as \\ufffd") from error  # fmt: skip
    return text


def _completion(where: str, row: dict[str, Any]) -> Completion:
    return Completion(_string(where, row, "prompt"), _string(where, row, "completion"), where=where)


def _choices(where: str, row: dict[str, Any]) -> Choices:
    choices, answer = row["choices"], row["answer"]
    valid = isinstance(choices, list) and len(choices) >= 2 and all(isinstance(c, str) and c for c in choices)
    if not valid or len(set(choices)) < len(choices):
        raise FinepointError(f"{where}: 'choices' must be two or more different strings, got {choices!r}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise FinepointError(
            f"{where}: 'answer' must be the index of a choice, 0 to {len(choices) - 1}, got {answer!r}"
        )
    for choice in choices:
        _readable(where, "choices", choice)
    return Choices(_string(where, row, "prompt"), tuple(choices), answer, where=where)


def _chat(where: str, row: dict[str, Any]) -> Chat:
    messages = row["messages"]
    expected = 'expected [{"role": "user", "content": ".."}, {"role": "assistant", "content": ".."}, ..]'
    if not isinstance(messages, list) or not messages:
        raise FinepointError(f"{where}: 'messages' is no list of turns; {expected}")
    turns = []
    for turn in messages:
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise FinepointError(f"{where}: a turn is {turn!r}; {expected}")
        turns.append((_string(where, turn, "role"), _string(where, turn, "content")))
    if turns[0][0] == "assistant" or turns[-1][0] != "assistant":
        raise FinepointError(f"{where}: a conversation must begin with another role and end with the assistant")
    return Chat(tuple(turns), where=where)


def _text(where: str, row: dict[str, Any]) -> Text:
    return Text(_string(where, row, "text"), where=where)


def _labelled(where: str, row: dict[str, Any]) -> Labelled:
    label = row["label"]
    if type(label) not in (str, int) or label == "":
        raise FinepointError(f"{where}: 'label' must be a string or an integer, got {label!r}")
    return Labelled(_string(where, row, "text"), _readable(where, "label", str(label)), where=where)


_MAKERS = (
    ({"prompt", "completion"}, _completion),
    ({"prompt", "choices", "answer"}, _choices),
    ({"messages"}, _chat),
    ({"text"}, _text),
    ({"text", "label"}, _labelled),
)


def label_names(examples: Sequence[Example]) -> list[str]:
    """The classes of labelled examples, sorted (numbers by value); empty for other forms."""
    names = {example.label for example in examples if isinstance(example, Labelled)}
    return sorted(names, key=lambda name: (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name))
