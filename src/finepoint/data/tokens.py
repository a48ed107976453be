"""Text to tokens, once for all: what is trained, what is scored and what generation is asked are the same tokens.

A row is what the tokenizer puts in front of a text, then the prompt, the answer, and the end token where one belongs.

- The prompt's tokens are those of `tokenizer(prompt)`, for a user's `generate` starts from them. What the tokenizer
  puts *behind* a text (an end token, `[SEP]`) is left out there: it would stand between the prompt and its answer.
- The answer's tokens are those of `tokenizer(prompt + answer)` behind the prompt's. Where a token of that text spans
  the end of the prompt, no model that was asked the prompt could write it, and the answer is encoded by itself, as its
  continuation, checked by decoding. Spaces that end a prompt stay there.
- Where a tokenizer cannot even do that, the spanning token belongs to the answer, and a warning counts such examples.
"""

import gc
import json
import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from itertools import chain, groupby, pairwise
from typing import Any

from finepoint.data.chats import ODD, Told, learned_turns, told
from finepoint.data.examples import (
    Chat,
    Choices,
    Completion,
    Example,
    Labelled,
    Placed,
    Preference,
    Text,
    answers_of,
)
from finepoint.errors import FinepointError
from finepoint.runtime.progress import progress

logger = logging.getLogger(__name__)
IGNORED = -100
CHUNK = 1000  # texts a call: an encoding holds much more than its token ids
MUCH = 0.02  # of all tokens: to lose so many is worth a warning
PART = 10_000  # examples at a time: on the way to a row there are several more lists of its tokens
_NUMBERS: list[int] = []
CHATS = 100  # conversations, of which every beginning is a text
# What a continuation is encoded behind, to learn its tokens in the middle of a text: nothing, then what seldom melts
# into it. Tokenizers that begin a text with a space (or a word unlike its rest) need one of the latter.
ANCHORS = ("", "\n", ".", "a", "0", "q", "z")


@dataclass(frozen=True, slots=True)
class Row:
    """One example in tokens: labels as long as the ids (-100: not learned), or one class."""

    ids: list[int]
    labels: list[int] | int


class JsonDigest:
    """The digest of rows as one JSON list, in 16 characters. One is added at a time: a million are a gigabyte."""

    def __init__(self) -> None:
        self.found, self.before = sha256(b"["), ""

    def add(self, row: Any) -> None:
        """A row of tokens, or an example."""
        if isinstance(row, Row):  # as json has it, three times as fast
            text = f'{{"ids": {row.ids}, "labels": {row.labels}}}'
        else:
            text = json.dumps(row, default=_content)
        self.found.update(f"{self.before}{text}".encode())
        self.before = ", "

    def text(self) -> str:
        found = self.found.copy()
        found.update(b"]")
        return found.hexdigest()[:16]


def _content(row: Any) -> dict[str, Any]:
    """What an example is, wherever it came from."""
    return {each.name: getattr(row, each.name) for each in fields(row) if each.name not in ("where", "trimmed")}


@dataclass(frozen=True, slots=True)
class Split:
    """A prompt and its answer in tokens."""

    context: list[int]
    answer: list[int]
    given: list[int]
    """what `tokenizer(prompt)` gives, which may differ from `context`"""


def encode_all(
    tokenizer: Any,
    examples: Sequence[Example],
    limit: int,
    labels: Sequence[str] = (),
    what: str = "example",
    model: Any = None,
    whole: bool = True,
) -> list[Row]:
    """Tokenises the examples for training, in rows of at most `limit` tokens; see `fitted`.

    Args:
        labels: the model's classes, in its order.
        what: an example's name in messages.
        model: where given, its embeddings must have every token.
        whole: long texts become several rows; else all examples lose their beginning, and there is a row of each.

    Raises:
        FinepointError: an unknown label, a chat without a chat template or refused by it, an answer without tokens, a
            token beyond the model's embeddings, nothing to learn in any example.
    """
    tally = Tally()
    rows = encode_part(tokenizer, examples, limit, labels, tally, model, whole)
    tally.tell(limit, what)
    if not any(learned(row) for row in rows):
        raise nothing_learned(what)
    return rows


def encode_part(
    tokenizer: Any, examples: Sequence[Example], limit: int, labels: Sequence[str], tally: "Tally", model: Any = None,
    whole: bool = True,
) -> list[Row]:  # fmt: skip
    """`encode_all` of some of the examples; what there is to say of them is added to the tally.

    Raises:
        FinepointError: as there, but where nothing is learned.
    """
    return list(chain(*encode_part_each(tokenizer, examples, limit, labels, tally, model, whole)))


def encode_part_each(
    tokenizer: Any, examples: Sequence[Example], limit: int, labels: Sequence[str], tally: "Tally", model: Any = None,
    whole: bool = True,
) -> list[list[Row]]:  # fmt: skip
    """`encode_part`, with the rows of each example by themselves."""
    encoded = _encoded(tokenizer, examples, labels, tally)
    rows = [row for row, _ in encoded]
    if model is not None:
        refuse_beyond(model, tokenizer, [row.ids for row in rows], examples)
    tally.count_contexts(tokenizer, [split for _, split in encoded if split])
    if whole:
        return fitted(tokenizer, examples, encoded, limit, tally)
    tally.count_lost([max(0, len(row.ids) - limit) for row in rows], "begin")
    front, _ = around(tokenizer) if any(len(row.ids) > limit for row in rows) else ([], [])
    return [[cut(row, limit, front)] for row in rows]


def nothing_learned(what: str) -> FinepointError:
    return FinepointError(f"no {what} has a token to learn: every label is ignored; are the texts only one token long?")


def encode_fitting(tokenizer: Any, examples: Sequence[Example], limit: int, what: str = "example") -> list[list[Row]]:
    """The rows of each example, of at most `limit` tokens, as they are trained; see `fitted`.

    Raises:
        FinepointError: as for `encode_each`.
    """
    tally = Tally()
    rows = fitted(tokenizer, examples, _encoded(tokenizer, examples, (), tally), limit, tally)
    tally.tell(limit, what)
    return rows


def encode_each(tokenizer: Any, examples: Sequence[Example], labels: Sequence[str] = ()) -> list[Row]:
    """Tokens and labels of the examples: completions, right choices, assistant turns, whole texts or the class.

    Raises:
        FinepointError: as for `encode_all`, but for tokens beyond the embeddings and where nothing is to be learned.
    """
    tally = Tally()
    rows = [row for row, _ in _encoded(tokenizer, examples, labels, tally)]
    tally.tell_odd()
    return rows


def encode(tokenizer: Any, example: Example, labels: Sequence[str] = ()) -> Row:
    """`encode_each` of one."""
    return encode_each(tokenizer, [example], labels)[0]


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], where: Sequence[str] = ()
) -> list[tuple[list[int], list[int]]]:
    """Tokens of each prompt and of the answer that follows it.

    Args:
        pairs: prompts and answers, in text.
        where: the file and line of each, for messages.

    Raises:
        FinepointError: an answer has no token.
    """
    return [(split.context, split.answer) for split in _splits(tokenizer, pairs, where)]


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """`encode_pairs` of one."""
    return encode_pairs(tokenizer, [(prompt, completion)])[0]


def encode_preferences(
    tokenizer: Any, pairs: Sequence[Preference], model: Any = None
) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens of each prompt, its chosen and its rejected answer, both with their end token.

    Raises:
        FinepointError: as for `encode_all`.
    """
    answers = learned_turns([answer for pair in pairs for answer in answers_of(pair)], "last")
    tally = Tally()
    encoded = _encoded(tokenizer, answers, (), tally)
    splits = [split for _, split in encoded if split]
    rows = [_up_to_its_end(row) for row, _ in encoded]
    if model is not None:
        refuse_beyond(model, tokenizer, rows, [pair for pair in pairs for _ in range(2)])
    tally.count_contexts(tokenizer, splits)
    tally.tell_odd()
    tally.tell_contexts("answer")
    found = []
    for i in range(0, len(rows), 2):
        # Another prompt than the other answer's has one whose first token spans the end of it.
        prompt = _shared(splits[i].context, splits[i + 1].context)
        found.append((rows[i][:prompt], rows[i][prompt:], rows[i + 1][prompt:]))
    return found


def _up_to_its_end(row: Row) -> list[int]:
    """The tokens of a row without what a chat template writes after the last one that is learned."""
    assert not isinstance(row.labels, int)
    behind = next(i for i, label in enumerate(reversed(row.labels)) if label != IGNORED)
    return row.ids[: len(row.ids) - behind]


def encode_prompts(tokenizer: Any, examples: Sequence[Example]) -> list[list[int]]:
    """The tokens after which a model is to write its answer: those that stand before it in training.

    Raises:
        FinepointError: a chat without a chat template, or refused by it.
    """
    if examples and isinstance(examples[0], Chat):
        chats = [example for example in examples if isinstance(example, Chat)]
        assert len(chats) == len(examples)
        asked = [told(tokenizer, chat) for chat in chats]
        return plain_ids(tokenizer, [one.text[: one.asked] for one in asked])
    prompts = [example.prompt for example in examples if isinstance(example, Completion | Choices)]
    assert len(prompts) == len(examples)
    front, _ = around(tokenizer)
    return [_in_front(front, ids) + ids for ids in plain_ids(tokenizer, prompts)]


def encode_answers(tokenizer: Any, examples: Sequence[Example]) -> list[list[int]]:
    """The tokens of each answer, of a conversation the last one, that training learns: all that is to be written.

    Raises:
        FinepointError: as for `encode_each`.
    """
    tally = Tally()
    rows = [(row.labels, split) for row, split in _encoded(tokenizer, examples, (), tally)]
    tally.tell_odd()
    return [[label for label in labels[len(split.context) :] if label != IGNORED]
            for labels, split in rows if split and not isinstance(labels, int)]  # fmt: skip


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of whole texts with what the tokenizer puts around one, which none gets twice."""
    front, behind = around(tokenizer)
    return [
        _in_front(front, ids) + ids + ([] if ids[len(ids) - len(behind) :] == behind else behind)
        for ids in plain_ids(tokenizer, texts)
    ]


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts without what the tokenizer puts around one."""
    found: list[list[int]] = []
    for at in range(0, len(texts), CHUNK):
        part = tokenizer(list(texts[at : at + CHUNK]), add_special_tokens=False, return_attention_mask=False)
        found += map(_of_shared_numbers, part["input_ids"])
    return found


def _of_shared_numbers(ids: list[int]) -> list[int]:
    """The same list of the same objects for the same tokens: a tokenizer makes each of 28 bytes, every time anew."""
    while ids and max(ids) >= len(_NUMBERS):
        _NUMBERS.extend(range(len(_NUMBERS), 2 * len(_NUMBERS) + 1024))
    return list(map(_NUMBERS.__getitem__, ids))


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts in front of every text and behind it: looked up in what it makes of one.

    Raises:
        FinepointError: that text is not to be found between its special tokens.
    """
    whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return list(whole[:at]), list(whole[at + len(plain) :])
    raise FinepointError(f"the tokenizer makes {whole} of 'a' and {plain} without special tokens; finepoint needs one "
                         "whose special tokens stand before and behind the text")  # fmt: skip


def without_special(tokenizer: Any, text: str) -> str:
    """A text as it reads when a model has written it: decoded without special tokens, such as the end token."""
    more = (added.content for added in tokenizer.added_tokens_decoder.values() if added.special)
    for token in sorted({*tokenizer.all_special_tokens, *more}, key=len, reverse=True):
        text = text.replace(token, "")
    return text


def as_written(tokenizer: Any, example: Example) -> Example:
    """An example whose answers read as a model can write them; see `without_special`."""
    match example:
        case Completion():
            return replace(example, completion=without_special(tokenizer, example.completion))
        case Choices():
            return replace(example, choices=tuple(without_special(tokenizer, choice) for choice in example.choices))
        case Chat():
            *before, (role, content) = example.messages
            return replace(example, messages=(*before, (role, without_special(tokenizer, content))))
    return example


def _encoded(
    tokenizer: Any, examples: Sequence[Example], labels: Sequence[str], tally: "Tally"
) -> list[tuple[Row, Split | None]]:
    """Each example in tokens, and where it has a prompt, what stands before its (last) answer."""
    found: list[tuple[Row, Split | None]] = []
    with progress("tokens", len(examples)) if len(examples) > PART else nullcontext(lambda done: None) as advance:
        for kind, group in groupby(examples, type):
            alike: Any = list(group)
            for at in range(0, len(alike), PART):
                with nullcontext() if kind is Chat else uncollected():  # rendering a template makes circles
                    found += _encoded_alike(tokenizer, kind, alike[at : at + PART], labels, tally)
                advance(min(PART, len(alike) - at))
    tally.examples += len(found)
    tally.tokens += sum(len(row.ids) for row, _ in found)
    return found


@contextmanager
def uncollected() -> Iterator[None]:
    """Python does not look for circles of objects meanwhile: it would do so every few rows, and lists of tokens hold
    none. That is a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _encoded_alike(
    tokenizer: Any, kind: type, part: Sequence[Any], labels: Sequence[str], tally: "Tally"
) -> list[tuple[Row, Split | None]]:
    """`_encoded` of examples of one form."""
    if kind is Completion:
        end = tokenizer.eos_token_id
        splits = _splits(tokenizer, [(e.prompt, e.completion) for e in part], [e.where for e in part])
        return [(_answered(split, end), split) for split in splits]
    if kind is Choices:
        splits = _splits(tokenizer, [(e.prompt, e.choices[e.answer]) for e in part], [e.where for e in part])
        return [(_answered(split, None), split) for split in splits]
    if kind is Chat:
        return _encoded_chats(tokenizer, part, tally)
    if kind is Text:
        rows = encode_texts(tokenizer, [e.text for e in part])
        return [(Row(ids, [IGNORED, *ids[1:]]), None) for ids in rows]
    known = [_class_of(e, labels) for e in part]
    rows = encode_texts(tokenizer, [e.text for e in part])
    return [(Row(ids, label), None) for ids, label in zip(rows, known, strict=True)]


def _class_of(example: Labelled, labels: Sequence[str]) -> int:
    if example.label not in labels:
        raise FinepointError(
            f"{example.place}label {example.label!r} is not among the model's classes: {', '.join(labels)}"
        )
    return list(labels).index(example.label)


def _answered(split: Split, end: int | None) -> Row:
    """The row of a prompt and its answer, which ends in `end` once, also where its text does."""
    answer = split.answer if end is None or split.answer[-1] == end else [*split.answer, end]
    return Row(split.context + answer, [IGNORED] * len(split.context) + answer)


def _splits(tokenizer: Any, pairs: Sequence[tuple[str, str]], where: Sequence[str] = ()) -> list[Split]:
    front, behind = around(tokenizer)
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))  # choices share theirs
    known = dict(zip(prompts, plain_ids(tokenizer, prompts), strict=True))
    heads = [known[prompt] for prompt, _ in pairs]
    wholes = plain_ids(tokenizer, [prompt + answer for prompt, answer in pairs])
    tails = _continuations(tokenizer, heads, wholes, pairs)
    found = []
    for i, (head, whole, tail) in enumerate(zip(heads, wholes, tails, strict=True)):
        if tail is None:
            cut = _wholly_before(tokenizer, whole, head)
            if cut == len(whole):
                place = f"{where[i]}: " if where and where[i] else ""
                raise FinepointError(f"{place}the answer {pairs[i][1]!r} has no token of its own under this tokenizer, "
                                     "so nothing of it can be learned or scored; leave the example out")  # fmt: skip
            context, tail = whole[:cut], whole[cut:]
        else:
            context = head
        context, given = _in_front(front, context) + context, front + head + behind
        found.append(Split(context, tail, context if context == given else given))
    return found


def _in_front(front: list[int], ids: list[int]) -> list[int]:
    """What is to be put in front of a text's tokens: nothing where they begin with it already."""
    return [] if ids[: len(front)] == front else front


def _continuations(
    tokenizer: Any, heads: Sequence[list[int]], wholes: Sequence[list[int]], pairs: Sequence[tuple[str, str]]
) -> list[list[int] | None]:
    """The tokens of each answer behind those of its prompt, which stay as they are; None where there are none.

    Args:
        heads: the tokens of the prompts.
        wholes: what the tokenizer makes of prompt and answer in one.
        pairs: both as texts.
    """
    found: list[list[int] | None] = [
        whole[len(head) :] or None if whole[: len(head)] == head else None
        for head, whole in zip(heads, wholes, strict=True)
    ]
    for anchor in ANCHORS:
        missing = [i for i, tail in enumerate(found) if tail is None]
        if not missing:
            break
        (start,) = plain_ids(tokenizer, [anchor])
        behind = plain_ids(tokenizer, [anchor + pairs[i][1] for i in missing])
        tails = {i: ids[len(start) :] for i, ids in zip(missing, behind, strict=True) if ids[: len(start)] == start}
        places = [i for i, tail in tails.items() if tail]
        made = _decoded(tokenizer, [heads[i] + tails[i] for i in places])
        wanted = _decoded(tokenizer, [wholes[i] for i in places])
        for i, text, expected in zip(places, made, wanted, strict=True):
            if text in (expected, "".join(pairs[i])):
                found[i] = tails[i]
    return found


def _decoded(tokenizer: Any, rows: Sequence[list[int]]) -> list[str]:
    """The texts of rows of tokens, nothing left out or beautified."""
    if not rows:
        return []
    return tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _wholly_before(tokenizer: Any, ids: list[int], head: list[int]) -> int:
    """How many of `ids` lie wholly in the text of `head`, with which theirs begins."""
    if ids[: len(head)] == head:
        return len(head)
    (text,) = _decoded(tokenizer, [head])
    found = _shared(ids, head)
    for count in range(found + 1, len(ids) + 1):
        (so_far,) = _decoded(tokenizer, [ids[:count]])
        if text.startswith(so_far):
            found = count
        elif len(so_far) > len(text):
            break
    return found


def _partly_before(tokenizer: Any, ids: list[int], head: list[int]) -> int:
    """How many of `ids` lie at least in part in the text of `head`, with which theirs begins."""
    if ids[: len(head)] == head:
        return len(head)
    (text,) = _decoded(tokenizer, [head])
    # A character that is not whole yet is decoded as another one, so a text that is reached stays so.
    return bisect_left(range(len(ids)), True, lo=_shared(ids, head),
                       key=lambda count: _decoded(tokenizer, [ids[:count]])[0].startswith(text))  # fmt: skip


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """With how many equal tokens two rows begin, or letters two texts."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _encoded_chats(tokenizer: Any, chats: Sequence[Chat], tally: "Tally") -> list[tuple[Row, Split | None]]:
    """Conversations through the tokenizer's chat template; the assistant's turns are learned."""
    found: list[tuple[Row, Split | None]] = []
    for at in range(0, len(chats), CHATS):
        part = [told(tokenizer, chat) for chat in chats[at : at + CHATS]]
        parts = {one.text[:cut] for one in part for cut in (*chain(*one.spans), one.asked, len(one.text))}
        known = dict(zip(parts, plain_ids(tokenizer, list(parts)), strict=True))
        found += [_encoded_chat(tokenizer, one, known) for one in part]
        for kind in chain(*(one.odd for one in part)):
            tally.odd[kind] = tally.odd.get(kind, 0) + 1
    return found


def _encoded_chat(tokenizer: Any, one: Told, known: Mapping[str, list[int]]) -> tuple[Row, Split]:
    """The row of a conversation.

    Args:
        known: the tokens of the text up to each beginning and end of what is learned, to what is asked for the last
            answer, and of the whole.
    """
    text = one.text
    cuts = sorted({start for start, _ in one.spans} | {one.asked, len(text)})
    ends = dict(one.spans)
    heads = [known[text[:cut]] for cut in cuts]
    tails = _continuations(tokenizer, heads[:-1], heads[1:], [(text[:a], text[a:b]) for a, b in pairwise(cuts)])
    ids, labels, context = list(heads[0]), [IGNORED] * len(heads[0]), heads[0]
    for start, head, tail in zip(cuts, heads, tails, strict=False):
        if tail is None:  # a token spans the beginning of a turn and cannot be parted: it is learned with the turn
            return _encoded_in_one(tokenizer, one, known)
        if start == one.asked:
            context = ids
        end = text[: ends[start]] if start in ends else None
        learnt = 0 if end is None else _partly_before(tokenizer, head + tail, known[end]) - len(head)
        ids = ids + tail
        labels += tail[:learnt] + [IGNORED] * (len(tail) - learnt)
    return Row(ids, labels), Split(context, ids[len(context) :], known[text[: one.asked]])


def _encoded_in_one(tokenizer: Any, one: Told, known: Mapping[str, list[int]]) -> tuple[Row, Split]:
    """The row of a conversation as the tokenizer parts it: every token that overlaps one of the turns is learned."""
    ids = known[one.text]
    labels = [IGNORED] * len(ids)
    for start, end in one.spans:
        first = _wholly_before(tokenizer, ids, known[one.text[:start]])
        last = _partly_before(tokenizer, ids, known[one.text[:end]])
        labels[first:last] = ids[first:last]
    asked = known[one.text[: one.asked]]
    before = _wholly_before(tokenizer, ids, asked)
    return Row(ids, labels), Split(ids[:before], ids[before:], asked)


def learned(row: Row) -> int:
    """How many labels a loss over this row counts."""
    if isinstance(row.labels, int):
        return 1
    return sum(label != IGNORED for label in row.labels[1:])


def cut(row: Row, limit: int, front: Sequence[int] = ()) -> Row:
    """A row's last `limit` tokens; see `last_of`."""
    if len(row.ids) <= limit:
        return row
    ids = last_of(row.ids, limit, front)
    if isinstance(row.labels, int):
        return Row(ids, row.labels)
    labels = row.labels[-limit:]
    return Row(ids, labels if ids == row.ids[-limit:] else [IGNORED] * len(front) + labels[len(front) :])


def last_of(ids: list[int], limit: int, front: Sequence[int] = ()) -> list[int]:
    """The last `limit` tokens of a row, but what the tokenizer puts in front of every text (`[CLS]`, `<s>`) stays:
    models read the class off it, and have not seen a text without."""
    if len(ids) <= limit or not front or limit <= len(front) or ids[: len(front)] != list(front):
        return ids[-limit:]
    return [*front, *ids[len(front) - limit :]]


def fitted(
    tokenizer: Any, examples: Sequence[Example], encoded: Sequence[tuple[Row, Split | None]], limit: int, tally: "Tally"
) -> list[list[Row]]:
    """The rows of each example, of at most `limit` tokens each. What the tokenizer puts in front of every text stays.

    A longer text becomes several rows, one behind the other, of which each but the first begins with the last token of
    the one before: all of its tokens are learned, each once, but for the very first. A prompt (a conversation) loses
    its beginning. Where its answer leaves it less than a quarter of the tokens, it keeps that (all of a shorter one),
    and the answer loses its end. A text with a class loses its beginning. The tally says how many and how much.
    """
    front, _ = around(tokenizer) if any(len(row.ids) > limit for row, _ in encoded) else ([], [])
    rows: list[list[Row]] = []
    lost: list[tuple[int, int]] = []
    for example, (row, split) in zip(examples, encoded, strict=True):
        before, size = len(split.context) if split else len(row.ids), len(row.ids)
        if size > limit and isinstance(example, Text):
            rows.append(windows(row, limit, front))
        elif size > limit and isinstance(row.labels, list):
            room = min(before, room_of_prompt(limit, size - before))
            rows.append([_joined(cut(_part(row, 0, before), room, front), _part(row, before, before + limit - room))])
            lost.append((before - room, size - before - (limit - room)))
        else:
            rows.append([cut(row, limit, front)])
            lost.append((max(0, size - limit), 0))
    tally.longer += sum(len(own) > 1 for own in rows)
    tally.rows_of_longer += sum(len(own) for own in rows if len(own) > 1)
    tally.count_lost([begin for begin, _ in lost], "begin")
    tally.count_lost([end for _, end in lost], "end")
    return rows


@dataclass
class Tally:
    """What is to be said of examples in tokens, counted over all of them; it can be kept as JSON."""

    examples: int = 0
    tokens: int = 0
    """before anything is cut"""
    longer: int = 0
    """texts that are taken in several rows"""
    rows_of_longer: int = 0
    lost: dict[str, list[int]] = field(default_factory=dict)
    """of what is cut (the `begin`, the `end` of an answer): how many examples lose it, and how many tokens"""
    others: int = 0
    """answers that are learned behind other tokens than a user's own call gives"""
    shown: list[list[str]] = field(default_factory=list)
    """such tokens, and those of the call"""
    odd: dict[str, int] = field(default_factory=dict)
    """conversations with each of the kinds of `chats.ODD`"""

    def count_lost(self, lost: Sequence[int], part: str) -> None:
        examples, tokens = self.lost.get(part, (0, 0))
        self.lost[part] = [examples + sum(each > 0 for each in lost), tokens + sum(lost)]

    def lost_share(self) -> float:
        """Of all tokens."""
        return sum(tokens for _, tokens in self.lost.values()) / max(1, self.tokens)

    def count_contexts(self, tokenizer: Any, splits: Sequence[Split]) -> None:
        others = [split for split in splits if split.context != split.given]
        self.others += len(others)
        if others and not self.shown:
            context, given = others[0].context, others[0].given
            first = max(0, _shared(context, given) - 2)
            self.shown = [tokenizer.convert_ids_to_tokens(ids[first : first + 5]) for ids in (context, given)]

    def tell(self, limit: int, what: str) -> None:
        """Says it, with the limit of a row and an example's name."""
        self.tell_odd()
        self.tell_contexts(what)
        if self.longer:
            logger.info("%d of %d %ss are longer than %d tokens and are taken in several rows, %d in all", self.longer,
                        self.examples, what, limit, self.rows_of_longer)  # fmt: skip
        for part, name in (("begin", "their beginning"), ("end", "the end of their answer")):
            shorter, lost = self.lost.get(part, (0, 0))
            _tell_of_loss(shorter, lost, self.examples, limit, what, self.tokens, name)

    def tell_odd(self) -> None:
        for kind in ODD:
            if kind in self.odd:
                logger.warning(ODD[kind], self.odd[kind], self.examples)

    def tell_contexts(self, what: str) -> None:
        """Says that answers are learned behind other tokens than a user's own call gives, and shows one."""
        if self.others:
            logger.warning("%d of %d %ss are learned after other tokens than tokenizer(prompt) gives, e.g. after %s "
                           "where it gives %s", self.others, self.examples, what, *self.shown)  # fmt: skip


def windows(row: Row, limit: int, front: Sequence[int]) -> list[Row]:
    """A text's row as several of at most `limit` tokens, in which each of its labels stands once."""
    assert isinstance(row.labels, list)
    found, at = [_part(row, 0, limit)], limit
    ahead = list(front) if row.ids[: len(front)] == list(front) and limit > len(front) + 1 else []
    step = max(1, limit - len(ahead) - 1)
    while at < len(row.ids):
        known = [*ahead, row.ids[at - 1]]
        found.append(_joined(Row(known, [IGNORED] * len(known)), _part(row, at, at + step)))
        at += step
    return found


def room_of_prompt(limit: int, answer: int) -> int:
    """How many tokens of a prompt stay before an answer of so many, where a row has `limit`: a quarter at least."""
    return max(1, limit - answer, limit // 4)


def _part(row: Row, start: int, end: int) -> Row:
    assert isinstance(row.labels, list)
    return Row(row.ids[start:end], row.labels[start:end])


def _joined(one: Row, other: Row) -> Row:
    assert isinstance(one.labels, list)
    assert isinstance(other.labels, list)
    return Row(one.ids + other.ids, one.labels + other.labels)


def warn_of_truncation(lengths: Sequence[int], limit: int, what: str) -> None:
    """Says once how many rows will lose their beginning to the limit, and how much of all that is."""
    lost = [max(0, length - limit) for length in lengths]
    shorter = sum(tokens > 0 for tokens in lost)
    _tell_of_loss(shorter, sum(lost), len(lengths), limit, what, sum(lengths), "their beginning")


def _tell_of_loss(shorter: int, lost: int, count: int, limit: int, what: str, total: int, part: str) -> None:
    """A line about rows that lose so many tokens in all; a warning where that is much."""
    if shorter:
        share = lost / total
        logger.log(logging.WARNING if share >= MUCH else logging.INFO,
                   "%d of %d %ss are longer than %d tokens and lost %s: %.2g%% of all tokens", shorter, count, what,
                   limit, part, 100 * share)  # fmt: skip


def embedding_count(model: Any) -> int | None:
    """How many tokens a model can embed; None where it does not tell."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return None


def refuse_beyond(model: Any, tokenizer: Any, rows: Iterable[Sequence[int]], examples: Sequence[Placed] = ()) -> None:
    """Refuses tokens that the model has no embedding for.

    Args:
        tokenizer: tells their names; None where there is none.
        rows: token ids.
        examples: those the rows were made of, for the message.

    Raises:
        FinepointError: there is such a token.
    """
    count = embedding_count(model)
    if count is None:
        return
    for i, ids in enumerate(rows):
        if ids and not 0 <= min(ids) <= max(ids) < count:
            token = next(token for token in ids if not 0 <= token < count)
            name = f" {tokenizer.convert_ids_to_tokens(token)!r}" if tokenizer else ""
            place = examples[i].place if examples else ""
            raise FinepointError(f"{place}token{name} ({token}) is beyond the model's {count} embeddings; "
                                 "model.resize_token_embeddings, save the model, then train that")  # fmt: skip


def padding_id(tokenizer: Any, model: Any = None) -> int:
    """The padding token, or the end token where there is none or the model cannot embed it.

    Padding is masked, so any token would do.
    """
    count = None if model is None else embedding_count(model)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (count is None or token < count):
            return int(token)
    return 0


def asking(tokenizer: Any, model: Any) -> Any:
    """A tokenizer for other people's code that goes on from what it gives: itself, or a copy that ends no prompt.

    Raises:
        FinepointError: it cannot be kept from ending every text.
    """
    front, behind = around(tokenizer)
    padding = padding_id(tokenizer, model)
    if not behind and tokenizer.pad_token_id in (None, padding):
        return tokenizer
    copy = deepcopy(tokenizer)
    if tokenizer.pad_token_id not in (None, padding):
        copy.pad_token = tokenizer.convert_ids_to_tokens(padding)
    if behind and hasattr(copy, "backend_tokenizer"):
        from tokenizers.processors import TemplateProcessing

        names = copy.convert_ids_to_tokens(front)
        copy.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*names, "$A"], special_tokens=list(zip(names, front, strict=True))
        )
    if around(copy) != (front, []):
        ending = tokenizer.convert_ids_to_tokens(behind)
        raise FinepointError(f"the tokenizer ends every text with {ending}, and a prompt that is ended cannot be gone "
                             "on with; use its fast version")  # fmt: skip
    return copy
