"""Rows to examples: each in one of the forms that are known, a function decorated by `form`; `sources` has the rows."""

import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from functools import lru_cache
from shlex import quote
from typing import Any

from finepoint.data.sources import SOURCES as SOURCES  # their former place
from finepoint.data.sources import Given, Row, of_memory, parts_of, rows_of, stands_for_nothing
from finepoint.data.sources import source as source
from finepoint.errors import FinepointError, one_line
from finepoint.runtime.settings import did_you_mean

logger = logging.getLogger(__name__)


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
    trimmed: bool = field(default=False, compare=False, repr=False, kw_only=True)
    """the row has turns before or behind these, which nothing could be learned of"""


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


@dataclass(frozen=True)
class ChatPair(Placed):
    """Two conversations that differ in the last turn alone: the assistant's answer that is preferred, and another."""

    chosen: Chat
    rejected: Chat


Example = Completion | Choices | Chat | Text | Labelled
Preference = Pair | ChatPair


class BlankError(FinepointError):
    """A row holds nothing to learn, and nothing that is wrong: it is skipped beside others that do."""


Form = Callable[[str, Row], Any]
FORMS: dict[tuple[str, ...], Form] = {}
"""of examples, by the keys that a row must have"""
PAIRS: dict[tuple[str, ...], Form] = {}
"""of pairs for alignment"""
OPTIONAL: dict[tuple[str, ...], set[str]] = {}
"""keys that a form looks at where a row has them"""
EXTRAS = {"id", "group"}
TEMPLATE = ("tools", "chat_template_kwargs")  # what a chat template may be given beside the turns
NEAR = 0.85  # of two names, one of which is probably the other misspelt
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool",
         "function": "tool"}  # fmt: skip
STANDARD = ("user", "assistant", "system", "developer", "tool")


def form(*keys: str, pairs: bool = False, optional: Iterable[str] = ()) -> Callable[[Form], Form]:
    """Makes a function the reader of rows that have these keys: from where a row stands, and the row, to an example.

    Args:
        optional: keys that it looks at where a row has them; all others are ignored, and a line says so.
    """

    def register(make: Form) -> Form:
        (PAIRS if pairs else FORMS)[keys] = make
        OPTIONAL[keys] = set(optional)
        return make

    return register


def read_examples(
    data: Any, columns: Mapping[str, str] | None = None, seed: int = 0, need: bool = False
) -> list[Example]:
    """The examples of a file, a folder, a data set of the hub, several of these, or rows in memory; all of one form.

    Empty lines are skipped, and rows that hold nothing to learn, which a line says; columns that the form lacks are
    ignored.

    Args:
        data: what `rows_of` takes; a list of such, each perhaps with its share (`a.jsonl=0.7`).
        columns: by a form's key, what it is called in the file, e.g. {"prompt": "question"}. A file that has none of
            these columns is read as it is.
        seed: of which examples are taken, where there are shares.
        need: one without these columns is refused, unless it has the form's keys already.

    Raises:
        FinepointError: the file is missing, mixed or without anything to learn, or a row is malformed; file and line
            are named.
    """
    return [example for part in read_parts(data, columns, seed, need) for example in part.examples]


def read_pairs(data: Any, columns: Mapping[str, str] | None = None, seed: int = 0, need: bool = False) -> list[Any]:
    """The preference pairs of a file and so on, as for `read_examples`.

    Raises:
        FinepointError: the file is missing or empty, or a row is malformed; file and line are named.
    """
    return [pair for part in read_parts(data, columns, seed, need, PAIRS) for pair in part.examples]


def as_examples(rows: Iterable[Any], columns: Mapping[str, str] | None = None) -> list[Example]:
    """Examples of rows in memory: dictionaries in one of the forms of a line, or examples already.

    Raises:
        FinepointError: there is none, they are mixed, or one is malformed; its number is named.
    """
    return list(Reading("data", FORMS, columns or {}).examples(_numbered(rows)))


@dataclass(frozen=True)
class Taken:
    """How rows with certain keys are read."""

    keys: tuple[str, ...]
    """of their form"""
    renamed: Mapping[str, str]
    """the keys of the form whose column has another name"""
    ignored: tuple[str, ...]
    named: bool = False
    """by columns that were named"""


@dataclass(frozen=True)
class LeftOut:
    """What of the rows of a source is not learned, since there is nothing to learn of it."""

    blank: int = 0
    """rows that hold nothing to learn"""
    first: str = ""
    """where the first of them stands"""
    trimmed: int = 0
    """conversations that lose turns before the first question or behind the last answer"""

    def told(self) -> dict[str, int]:
        """What a record says of it: nothing where all is learned."""
        return {name: count for name, count in (("skipped", self.blank), ("trimmed", self.trimmed)) if count}


@dataclass(frozen=True)
class Part:
    """What is taken of one source."""

    source: str
    examples: list[Any]
    rows: int
    """how many it has that hold something to learn"""
    taken: Taken | None
    """how its rows are read; None where they were examples already"""
    left_out: LeftOut = LeftOut()

    def told(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"source": self.source, "form": list(self.taken.keys) if self.taken else None, "rows": self.rows,
                "taken": len(self.examples)} | self.left_out.told()  # fmt: skip


def read_parts(
    data: Any, columns: Mapping[str, str] | None = None, seed: int = 0, need: bool = False,
    forms: Mapping[tuple[str, ...], Form] | None = None,
) -> list[Part]:  # fmt: skip
    """`read_examples`, source by source. With shares so many of each are drawn that none comes twice.

    Raises:
        FinepointError: as there; a share without another source, or with some sources only; sources of other forms.
    """
    forms, columns = FORMS if forms is None else forms, columns or {}
    shares = dict(parts_of(data))
    found = []
    for origin in shares:
        rows = _numbered(origin.rows) if isinstance(origin, Given) else rows_of(origin)
        reading = Reading(str(origin), forms, columns, need and len(shares) == 1)
        examples = list(reading.examples(rows))
        found.append(Part(str(origin), examples, len(examples), reading.taken, reading.left_out))
    refuse_unlike(found, columns, need)
    return found if len(found) == 1 else _mixed(found, [share for share in shares.values() if share is not None], seed)


def refuse_unlike(parts: Sequence[Part], columns: Mapping[str, str], need: bool) -> None:
    """Refuses sources of several forms, and such of which none has the columns that are named.

    Raises:
        FinepointError: naming them.
    """
    first = parts[0]
    for part in parts:
        if type(part.examples[0]) is not type(first.examples[0]):
            raise FinepointError(f"{part.source} holds {_kind(part.examples[0])} examples, and {first.source} "
                                 f"{_kind(first.examples[0])} examples; what is mixed must be of one form")  # fmt: skip
    if need and columns and not any(part.taken and part.taken.named for part in parts) and len(parts) > 1:
        names = ", ".join(part.source for part in parts)
        raise FinepointError(f"none of {names} has the columns {', '.join(columns.values())}")


def _mixed(parts: Sequence[Part], shares: Sequence[float], seed: int) -> list[Part]:
    """As many examples of each part as the shares allow, all where there are none."""
    if shares:
        total = min(part.rows / share for part, share in zip(parts, shares, strict=True))
        sizes = [max(1, min(part.rows, round(total * share))) for part, share in zip(parts, shares, strict=True)]
        parts = [replace(part, examples=some(part.examples, size, seed))
                 for part, size in zip(parts, sizes, strict=True)]  # fmt: skip
    _tell_mixed(tuple(f"{len(part.examples)} of {part.rows} of {part.source}" for part in parts))
    return list(parts)


def _numbered(rows: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    return ((f"data, row {number}", row) for number, row in enumerate(of_memory(rows)))


@lru_cache(maxsize=64)
def _tell_mixed(parts: tuple[str, ...]) -> None:
    logger.info("mixing examples: %s", ", ".join(parts))


@dataclass
class Reading:
    """How the rows of one source are read; all of it is known once its examples are through."""

    origin: str
    forms: Mapping[tuple[str, ...], Form]
    columns: Mapping[str, str]
    need: bool = False
    some: bool = False
    """not all of its rows are read, and those that are may all be without anything to learn"""
    taken: Taken | None = None
    left_out: LeftOut = LeftOut()
    given: int = 0
    """examples so far"""

    def examples(self, rows: Iterable[tuple[str, Any]]) -> Iterator[Any]:
        """The examples, one by one, which must be of one form; rows that hold nothing to learn are skipped.

        Raises:
            FinepointError: there is none, or one is malformed.
        """
        known: dict[tuple[str, ...], Taken] = {}
        first, blank, count, trimmed = None, None, 0, 0
        for where, row in rows:
            count += 1
            try:
                taken, example = (self.taken, row) if isinstance(row, Example) else self._made(where, row, known)
            except BlankError as error:
                self._take(where, known[tuple(row)])
                blank = blank or error
                first_blank = self.left_out.first or where.removeprefix(f"{self.origin}, ")
                self.left_out = LeftOut(self.left_out.blank + 1, first_blank)
                continue
            first = example if first is None else first
            if type(example) is not type(first):
                raise FinepointError(f"{where}: a {_kind(example)} example in a file that began with {_kind(first)} "
                                     "examples; give each form its own file")  # fmt: skip
            self._take(where, taken)
            trimmed += isinstance(example, Chat) and example.trimmed
            self.given += 1
            yield example
        if first is None and not self.some:
            raise self._empty(blank)
        self.left_out = replace(self.left_out, trimmed=trimmed)
        tell_left_out(self.origin, count, self.left_out)
        ignored = tuple(dict.fromkeys(column for taken in known.values() for column in taken.ignored))
        if self.taken and ignored:
            tell_ignored(self.origin, self.taken.keys, ignored)
            self.taken = replace(self.taken, ignored=ignored)

    def _empty(self, blank: BlankError | None) -> FinepointError:
        """What is to be said of a source without an example: of its first row, where it has some."""
        if blank and self.left_out.blank > 1:
            return FinepointError(f"{blank}; none of the {self.left_out.blank:,} rows holds anything to learn")
        what = "pair" if self.forms is PAIRS else "example"
        return blank or FinepointError(f"{self.origin} holds no {what}; expected one JSON object a line: "
                                       f"{_spelled(self.forms)}")  # fmt: skip

    def _take(self, where: str, taken: Taken | None) -> None:
        """Refuses a row that is read by other keys than those before it."""
        self.taken = self.taken or taken
        if self.taken and taken and taken.keys != self.taken.keys:
            raise FinepointError(f"{where}: a row of {_keyed(taken.keys)} in a file that began with "
                                 f"{_keyed(self.taken.keys)}; give each form its own file")  # fmt: skip

    def _made(self, where: str, row: Any, known: dict[tuple[str, ...], Taken]) -> tuple[Taken, Any]:
        if not isinstance(row, dict):
            raise FinepointError(f"{where}: a {type(row).__name__}; expected {_spelled(self.forms)}")
        shape = tuple(row)
        if (taken := known.get(shape)) is None:
            taken = known[shape] = taken_for(where, shape, self.forms, self.columns, self.need)
        more = {key: row[column] for key, column in taken.renamed.items()}
        return taken, self.forms[taken.keys](where, row | more if more else row)


def taken_for(
    where: str, shape: Sequence[str], forms: Mapping[tuple[str, ...], Form], columns: Mapping[str, str],
    need: bool = False,
) -> Taken:  # fmt: skip
    """How a row with these keys is read: by the form with the most keys, of several the one that is known first.

    Columns that are named decide before that: all of them must be in the form, and if they are all of it, it is that.

    Raises:
        FinepointError: by none; or by another than is meant, since a key is probably misspelt.
    """
    there = [column for column in columns.values() if column in shape]
    renamed = {key: column for key, column in columns.items() if there and key != column}
    if (there and len(there) < len(columns)) or (need and not there and not set(columns) <= {*shape}):
        lacking = next(column for column in columns.values() if column not in shape)
        raise FinepointError(f"{where}: there is no column {lacking!r}{did_you_mean(lacking, shape)}; "
                             f"there are {', '.join(shape)}")  # fmt: skip
    keys = ({*shape} - set(renamed.values())) | set(columns) if there else {*shape}
    ranked = sorted(forms, key=lambda form: (not (there and set(form) <= set(columns)), -len(form)))
    fitting = [form for form in ranked if keys >= set(form) and (not there or set(columns) <= {*form, *OPTIONAL[form]})]
    wanted = fitting[0] if fitting else None
    extra = [key for key in shape if key in keys and wanted and key not in (*wanted, *OPTIONAL[wanted])]
    if not there and (slip := _misspelt(keys, wanted, extra, forms)):
        given, meant = slip
        other = f"; if not, --columns {' '.join(f'{key}={key}' for key in wanted)}" if wanted else ""
        raise FinepointError(f"{where}: there is {given!r}; did you mean {meant!r}? If so, rename it, or give "
                             f"--columns {quote(f'{meant}={given}')}{other}")  # fmt: skip
    if wanted is None:
        given = "the keys" if forms is PAIRS else "an object with the keys"
        raise FinepointError(f"{where}: {given} {sorted(shape)}; expected {_spelled(forms)}; {_way_out(shape, forms)}")
    looked_at = {*wanted, *OPTIONAL[wanted]}
    return Taken(wanted, {key: column for key, column in renamed.items() if key in looked_at},
                 tuple(key for key in extra if key not in EXTRAS), bool(there))  # fmt: skip


ASKED = ("question", "prompt", "input", "query", "instruction", "source", "document", "article")
SAID = ("response", "completion", "output", "answer", "reply", "target", "summary")
"""what columns are often called that hold a prompt, and its completion"""


def _way_out(shape: Sequence[str], forms: Mapping[tuple[str, ...], Form]) -> str:
    """What may make rows with these keys readable."""
    if forms is FORMS and any(set(pair) <= {*shape} for pair in PAIRS):
        return "preference pairs are what finepoint align trains on"
    bare = {name.strip().lower(): name for name in shape}
    meant = next((form for form in sorted(forms, key=len, reverse=True) if set(form) <= set(bare)), None)
    asked, said = (next((bare[name] for name in names if name in bare), None) for names in (ASKED, SAID))
    if len(shape) == 2 and not (asked and said):
        asked, said = shape
    usual = [f"prompt={asked}", f"completion={said}"] if asked and said and forms is FORMS else None
    told = [f"{key}={bare[key]}" for key in meant] if meant else usual or ["prompt=question", "completion=answer"]
    sure = "" if meant else "e.g. "
    return f"name your columns with --columns, {sure}--columns {' '.join(map(quote, told))}"


def _misspelt(
    keys: set[str], wanted: tuple[str, ...] | None, extra: Sequence[str], forms: Iterable[tuple[str, ...]]
) -> tuple[str, str] | None:
    """A key that a row seems to have for another, and that other one, with which it would be read otherwise."""
    over = [form for form in forms if wanted is None or len(form) > len(wanted)]
    lacking = [(set(form) - keys).pop() for form in over if len(set(form) - keys) == 1]
    lacking += [key for key in OPTIONAL[wanted] if key not in keys] if wanted else []
    spare = sorted(keys) if wanted is None else extra
    return next(((given, meant) for meant in lacking for given in spare if _near(given, meant)), None)


def _near(given: str, meant: str) -> bool:
    """Whether a name is probably another one misspelt, in another case or number."""
    one, other = ("".join(filter(str.isalnum, name.lower())) for name in (given, meant))
    return sorted(one) == sorted(other) or SequenceMatcher(None, one, other).ratio() >= NEAR


@lru_cache(maxsize=256)
def tell_left_out(origin: str, count: int, left_out: LeftOut) -> None:
    """Says once what of so many rows is not learned."""
    if left_out.blank:
        logger.warning("%s of %s rows of %s hold nothing to learn: skipped (first: %s)", f"{left_out.blank:,}",
                       f"{count:,}", origin, left_out.first)  # fmt: skip
    if left_out.trimmed:
        logger.warning("%s of %s conversations of %s begin with the assistant or do not end with it: those turns, of "
                       "which nothing can be learned, are left out", f"{left_out.trimmed:,}",
                       f"{count - left_out.blank:,}", origin)  # fmt: skip


@lru_cache(maxsize=256)
def tell_ignored(origin: str, keys: tuple[str, ...], ignored: tuple[str, ...]) -> None:
    """Says once what of a file is not read."""
    logger.info("ignoring the columns %s of %s, which is read as %s", ", ".join(name or "''" for name in ignored),
                origin, _keyed(keys))  # fmt: skip


def _kind(example: Any) -> str:
    return "pair of conversations" if isinstance(example, ChatPair) else type(example).__name__.lower()


def _keyed(keys: Iterable[str]) -> str:
    return "{" + ", ".join(f'"{key}"' for key in keys) + "}"


def _spelled(forms: Iterable[tuple[str, ...]]) -> str:
    """The forms, as messages name them."""
    *most, last = map(_keyed, forms)
    return f"{', '.join(most)}{' or ' if most else ''}{last}"


def string(where: str, row: Row, key: str) -> str:
    """A row's text, which must not be empty.

    Raises:
        BlankError: it is, or is missing.
        FinepointError: it is something else than a text.
    """
    if not isinstance(row[key], str) or not row[key]:
        kind = BlankError if is_blank(row[key]) else FinepointError
        raise kind(f"{where}: {key!r} must be a string that is not empty, got {row[key]!r}")
    return readable(where, key, row[key])


def is_blank(value: Any) -> bool:
    """Whether a cell is empty: also by one of the values that stand for nothing in tables (NaN)."""
    return stands_for_nothing(value) or value in ("", [], ())


def readable(where: str, key: str, text: str) -> str:
    """A text that a tokenizer can take: JSON may spell half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FinepointError(f"{where}: {key!r} holds half a character, {text[error.start]!a}; write it whole, "
                             "or as \\ufffd") from error  # fmt: skip
    return text


@form("prompt", "completion", optional=TEMPLATE)
def completion(where: str, row: Row) -> Completion | Chat:
    if isinstance(row["prompt"], list) or isinstance(row["completion"], list):
        return answered(where, row)
    return Completion(string(where, row, "prompt"), string(where, row, "completion"), where=where)


@form("instruction", "output", optional=("input",))
def alpaca(where: str, row: Row) -> Completion:
    return _instructed(where, row, "input", "output")


@form("instruction", "response", optional=("context",))
def dolly(where: str, row: Row) -> Completion:
    return _instructed(where, row, "context", "response")


def _instructed(where: str, row: Row, more: str, answer: str) -> Completion:
    """As Alpaca's trainers write it, without a preamble."""
    prompt = f"### Instruction:\n{string(where, row, 'instruction')}\n\n"
    prompt += f"### Input:\n{string(where, row, more)}\n\n" if row.get(more) else ""
    return Completion(f"{prompt}### Response:\n", string(where, row, answer), where=where)


@form("question", "answer")
def question(where: str, row: Row) -> Completion:
    asked, answer = string(where, row, "question"), string(where, row, "answer")
    return Completion(f"Question: {asked}\nAnswer:", _spaced(answer), where=where)


@form("question", "choices", "answer")
def multiple_choice(where: str, row: Row) -> Choices:
    found = choices(where, {"prompt": row["question"], "choices": row["choices"], "answer": row["answer"]})
    return replace(found, prompt=f"Question: {found.prompt}\nAnswer:", choices=tuple(map(_spaced, found.choices)))


def _spaced(answer: str) -> str:
    """An answer as it stands behind a colon."""
    return answer if answer[0].isspace() else f" {answer}"


@form("question", "choices", "answerKey")
def lettered(where: str, row: Row) -> Choices:
    """As ARC has it: choices of `text` and `label`, one of which is the answer."""
    given, key = row["choices"], row["answerKey"]
    if not isinstance(given, dict) or not {"text", "label"} <= given.keys() or key not in given["label"]:
        raise FinepointError(f"{where}: 'choices' must be {{\"text\": [..], \"label\": [..]}} with the label {key!r}, "
                             f"got {given!r}")  # fmt: skip
    return multiple_choice(where, {"question": row["question"], "choices": list(given["text"]),
                                   "answer": list(given["label"]).index(key)})  # fmt: skip


@form("prompt", "choices", "answer")
def choices(where: str, row: Row) -> Choices:
    given, answer = row["choices"], row["answer"]
    if is_blank(given) or is_blank(answer):
        raise BlankError(f"{where}: 'choices' or 'answer' is empty")
    valid = isinstance(given, list) and len(given) >= 2 and all(isinstance(c, str) and c for c in given)
    if not valid or len(set(given)) < len(given):
        raise FinepointError(f"{where}: 'choices' must be two or more different strings, got {given!r}")
    if type(answer) is not int or not 0 <= answer < len(given):
        raise FinepointError(f"{where}: 'answer' must be the index of a choice, 0 to {len(given) - 1}, got {answer!r}")
    texts = tuple(readable(where, "choices", choice) for choice in given)
    return Choices(string(where, row, "prompt"), texts, answer, where=where)


TURNS = 'expected [{"role": "user", "content": ".."}, {"role": "assistant", "content": ".."}, ..]'
SILENT = ("tool", "system", "developer")
"""roles whose turns may be empty: the template is given them so"""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""a turn's keys for what the model thought; templates read one or another"""


@form("messages", optional=(*TEMPLATE, "functions"))
def chat(where: str, row: Row) -> Chat:
    """Turns before the first that the assistant can answer, and behind its last answer, are left out."""
    messages = _object(row["messages"])
    if not isinstance(messages, list) or not messages:
        kind = BlankError if is_blank(messages) else FinepointError
        raise kind(f"{where}: 'messages' is no list of turns; {TURNS}")
    messages = [_by_role(turn) if isinstance(turn, dict) else turn for turn in messages]
    speaks = [isinstance(turn, dict) and turn.get("role") == "assistant" for turn in messages]
    start = next((at for at, own in enumerate(speaks) if not own), len(speaks))
    end = next((at for at in range(len(speaks), start, -1) if speaks[at - 1]), start)
    found = _chat(where, row, messages[start:end] or messages)
    return replace(found, trimmed=True) if end - start < len(messages) else found


def _by_role(turn: Row) -> Row:
    """A turn under the name that templates have for its role, where it is another one for that."""
    if not isinstance(role := turn.get("role"), str):
        return turn
    name = role.strip().lower()
    return turn | {"role": ROLES.get(name, name if name in STANDARD else role)}


def _chat(where: str, row: Row, messages: list[Any]) -> Chat:
    turns = [_turn(where, turn) for turn in messages]
    if turns[0][0] == "assistant" or turns[-1][0] != "assistant":
        roles = ", ".join(role for role, *_ in turns[:1] + turns[1:][-1:])
        kind = BlankError if len({role == "assistant" for role, *_ in turns}) == 1 else FinepointError
        raise kind(f"{where}: a conversation must begin with another role and end with the assistant, and "
                   f"begins and ends here with: {roles}")  # fmt: skip
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
    if "function_call" in rest:  # as OpenAI had it before there were several
        rest["tool_calls"] = [{"type": "function", "function": rest.pop("function_call")}]
    if "tool_calls" in rest:
        rest["tool_calls"] = _object(rest["tool_calls"])
        _refuse_calls(where, rest["tool_calls"])
    if rest.get("weight", 1) not in (0, 1):
        raise FinepointError(f"{where}: 'weight' is {rest['weight']!r}; 1 has a turn learned, 0 has it read alone")
    role, content = string(where, turn, "role"), _content(where, turn.get("content"))
    if not content and role not in SILENT and not (role == "assistant" and "tool_calls" in rest):
        raise BlankError(f"{where}: a turn is {turn!r}, without content; {TURNS}")
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
    if not tools and isinstance(functions := _object(row.get("functions")), list):
        tools = [{"type": "function", "function": function} for function in functions]
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


@form("conversations", optional=("system", *TEMPLATE))
def sharegpt(where: str, row: Row) -> Chat:
    """Turns of `from` and `value`, or of `role` and `content`."""
    turns = _listed(where, row, "conversations")
    if isinstance(row.get("system"), str) and row["system"]:
        turns = [{"from": "system", "value": row["system"]}, *turns]
    messages = []
    for turn in turns:
        if {"from", "value"} <= set(turn):
            told = {key: value for key, value in turn.items() if key not in ("from", "value")}
            turn = told | {"role": turn["from"], "content": turn["value"]}
        turn = _by_role(turn)
        messages.append(_calling(where, turn) if turn["role"] == "function_call" else turn)
    return chat(where, row | {"messages": messages})


def _calling(where: str, turn: Row) -> Row:
    """The assistant's turn that calls the tool which a turn of the role `function_call` holds as JSON."""
    try:
        call = json.loads(turn["content"])
        function = {"name": call["name"], "arguments": call["arguments"]}
    except (ValueError, TypeError, KeyError) as error:
        raise FinepointError(f"{where}: a turn from function_call holds a JSON object with name and arguments, not "
                             f"{one_line(str(turn.get('content')), 80)!r}") from error  # fmt: skip
    rest = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return rest | {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def answered(where: str, row: Row) -> Chat:
    """A prompt and a completion of which one is a list of turns: a conversation of which that is learned."""
    prompt, answer = _turns(where, row, "prompt", "user"), _turns(where, row, "completion", "assistant")
    return _chat(where, row, _read_alone(prompt) + answer)


def _read_alone(turns: list[Row]) -> list[Row]:
    """Turns of which none is learned."""
    return [turn | {"weight": 0} if turn.get("role") == "assistant" else turn for turn in turns]


def _turns(where: str, row: Row, key: str, role: str) -> list[Row]:
    """A list of turns, or a text as one of this role."""
    if isinstance(row[key], str):
        return [{"role": role, "content": string(where, row, key)}]
    return _listed(where, row, key)


def _listed(where: str, row: Row, key: str) -> list[Row]:
    turns = _object(row[key])
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        kind = BlankError if is_blank(turns) else FinepointError
        raise kind(f"{where}: {key!r} is no list of turns; got {turns!r}")
    return turns


@form("text", "label")
def labelled(where: str, row: Row) -> Labelled:
    label = row["label"]
    if isinstance(label, float) and label.is_integer():  # as a column of integers is read that has gaps
        label = int(label)
    if is_blank(label) or not isinstance(label, str | int) or not str(label).strip():
        kind = BlankError if is_blank(label) or isinstance(label, str) else FinepointError
        raise kind(f"{where}: 'label' must be a string or an integer, got {label!r}")
    return Labelled(string(where, row, "text"), readable(where, "label", str(label)), where=where)


@form("text")
def text(where: str, row: Row) -> Text:
    return Text(string(where, row, "text"), where=where)


@form("prompt", "chosen", "rejected", optional=TEMPLATE, pairs=True)
def pair(where: str, row: Row) -> Preference:
    if any(isinstance(row[key], list) for key in ("prompt", "chosen", "rejected")):
        turns = _turns(where, row, "prompt", "user")
        both = [_turns(where, row, key, "assistant") for key in ("chosen", "rejected")]
        # Some files repeat the prompt in both.
        return chat_pair(where, row, *(each if each[: len(turns)] == turns else turns + each for each in both))
    prompt, chosen, rejected = (string(where, row, key) for key in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise BlankError(f"{where}: 'chosen' and 'rejected' are the same text")
    return Pair(prompt, chosen, rejected, where=where)


@form("input", "preferred_output", "non_preferred_output", pairs=True)
def openai_pair(where: str, row: Row) -> Preference:
    """As OpenAI's files for preferences have it."""
    asked = row["input"] if isinstance(row["input"], dict) else {"messages": row["input"]}
    told = {"prompt": asked.get("messages"), "chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return pair(where, told | {"tools": asked.get("tools")})


@form("chosen", "rejected", optional=TEMPLATE, pairs=True)
def whole_pair(where: str, row: Row) -> Preference:
    """Both with their prompt: what they begin with alike, of texts up to the last space before they part."""
    if isinstance(row["chosen"], list) or isinstance(row["rejected"], list):
        return chat_pair(where, row, *(_listed(where, row, key) for key in ("chosen", "rejected")))
    chosen, rejected = (string(where, row, key) for key in ("chosen", "rejected"))
    alike = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if alike is None else alike
    while shared and not (chosen + " ")[shared].isspace():
        shared -= 1
    if not shared:
        raise FinepointError(f"{where}: 'chosen' and 'rejected' begin with nothing in common, which would be the "
                             'prompt; give it as "prompt"')  # fmt: skip
    return pair(where, {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]})


def chat_pair(where: str, row: Row, chosen: list[Row], rejected: list[Row]) -> ChatPair:
    if chosen == rejected:
        raise BlankError(f"{where}: 'chosen' and 'rejected' are the same conversation")
    if chosen[:-1] != rejected[:-1]:
        raise FinepointError(f"{where}: 'chosen' and 'rejected' differ before their last turn; pairs are two answers "
                             "to one conversation")  # fmt: skip
    both = (_read_alone(turns[:-1]) + turns[-1:] for turns in (chosen, rejected))
    return ChatPair(*(_chat(where, row, turns) for turns in both), where=where)


def answers_of(pair: Preference) -> tuple[Completion, Completion] | tuple[Chat, Chat]:
    """The two examples of a pair: the answer that is preferred, and the other one, each behind the prompt."""
    if isinstance(pair, ChatPair):
        return pair.chosen, pair.rejected
    chosen, rejected = (Completion(pair.prompt, answer, where=pair.where) for answer in (pair.chosen, pair.rejected))
    return chosen, rejected


def refuse_other_task(file: str, examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Refuses texts with classes for a model that writes, and others for a classifier."""
    if bool(labels) != isinstance(examples[0], Labelled):
        raise FinepointError(f"{file} holds {type(examples[0]).__name__.lower()} examples, and the model is "
                             f"{'a' if labels else 'no'} classifier; give it what it is trained for")  # fmt: skip


def some(examples: list[Any], limit: int | None, seed: int = 0) -> list[Any]:
    """At most `limit` of the examples, drawn with a fixed seed, in the file's order."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]


def label_names(examples: Sequence[Example]) -> list[str]:
    """The classes of labelled examples, sorted (numbers by value); empty for other forms."""
    return in_order({example.label for example in examples if isinstance(example, Labelled)})


def in_order(names: Iterable[str]) -> list[str]:
    """The names of classes, sorted; numbers by value."""
    return sorted(names, key=lambda name: (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name))
