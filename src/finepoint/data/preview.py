"""What data are taken for, before anything is trained: form, lengths, what is learned, what comes twice."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from finepoint.data.examples import (
    FORMS,
    PAIRS,
    Chat,
    ChatPair,
    Choices,
    Completion,
    Example,
    Labelled,
    Pair,
    Part,
    Text,
    answers_of,
    label_names,
    read_parts,
    some,
)
from finepoint.data.leaks import Seen, leaks, text_of
from finepoint.data.tokens import IGNORED, Row, around, encode_each, windows
from finepoint.errors import FinepointError

Piece = tuple[str, bool]
"""a text, and whether it is learned"""
ENCODED = 2000  # examples of a file whose tokens are counted: all over it, always the same


@dataclass(frozen=True)
class Lengths:
    """How long examples are: quantiles of what was counted."""

    median: int
    most: int
    """nine in ten are no longer"""
    longest: int
    total: int

    @staticmethod
    def of(lengths: Sequence[int]) -> "Lengths":
        ordered = sorted(lengths)
        last = len(ordered) - 1
        return Lengths(ordered[last // 2], ordered[last * 9 // 10], ordered[-1], sum(ordered))


def preview(
    files: Sequence[Any], columns: dict[str, str] | None = None, tokenizer: Any = None, limit: int | None = None,
    shown: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """What each of the files is read as, and which examples of one are in another.

    Args:
        tokenizer: of the model that is to be trained; without one lengths are in characters.
        limit: the most tokens of an example.
        shown: so many examples are shown, in pieces that are learned or not.

    Returns:
        `files`: of each `source`, `form`, `kind`, `rows`, `skipped` (where some are), `ignored`, `characters`,
        `duplicates`, `classes`, `tokens` and `longer` (with a tokenizer; of long texts in how many `rows` they are
        taken), `examples`; `leaks`: {file: {other file: counts}}.

    Raises:
        FinepointError: a file cannot be read, or the tokenizer cannot make tokens of it.
    """
    if not files:
        raise FinepointError("there is nothing to look at; give files, e.g. finepoint data preview train.jsonl")
    parts = [part for file in files for part in read_parts(file, columns, forms=FORMS | PAIRS)]
    seen = {part.source: Seen.of(part.examples) for part in parts}
    found = {source: leaks(digests, {other.source: other.examples for other in parts if other.source != source})
             for source, digests in seen.items()}  # fmt: skip
    return {
        "files": [_of(part, tokenizer, limit, shown) for part in parts],
        "leaks": {source: leaked for source, leaked in found.items() if leaked},
    }


def _of(part: Part, tokenizer: Any, limit: int | None, shown: int) -> dict[str, Any]:
    texts = [text_of(example) for example in part.examples]
    classes = Counter(example.label for example in part.examples if isinstance(example, Labelled))
    digests = Seen.of(part.examples)
    found = part.told() | {
        "kind": type(part.examples[0]).__name__.lower(),
        "ignored": list(part.taken.ignored) if part.taken else [],
        "characters": vars(Lengths.of([len(text) for text in texts])),
        "duplicates": {"exact": len(texts) - len(digests.exact), "normalised": len(texts) - len(digests.normalised)},
        "classes": {name: classes[name] for name in label_names(part.examples)},
    }
    chosen = some(part.examples, shown)
    if tokenizer is None:
        return found | {"examples": [_pieces(example) for example in chosen]}
    rows = _rows(tokenizer, some(part.examples, ENCODED))
    lengths = [len(row.ids) for row in rows]
    learned = sum(sum(label != IGNORED for label in row.labels) for row in rows if not isinstance(row.labels, int))
    return found | {
        "tokens": vars(Lengths.of(lengths)) | {"counted": len(rows), "learned": learned},
        "longer": _longer(tokenizer, part, rows, limit),
        "examples": [[piece for row in _rows(tokenizer, [example]) for piece in _in_tokens(tokenizer, row)]
                     for example in chosen],
    }  # fmt: skip


def _longer(tokenizer: Any, part: Part, rows: Sequence[Row], limit: int | None) -> dict[str, Any]:
    """How many rows are longer than the limit, and what they lose by it; or in how many rows long texts are taken."""
    long = [row for row in rows if limit and len(row.ids) > limit]
    if limit and isinstance(part.examples[0], Text):
        front, _ = around(tokenizer)
        pieces = sum(len(windows(row, limit, front)) for row in long)
        return {"limit": limit, "examples": len(long), "tokens": 0, "share": 0.0, "rows": pieces}
    lost = sum(len(row.ids) - (limit or 0) for row in long)
    return {"limit": limit, "examples": len(long), "tokens": lost, "share": lost / sum(len(row.ids) for row in rows)}


def _rows(tokenizer: Any, examples: Sequence[Any]) -> list[Row]:
    """The examples in tokens; of pairs the chosen answers."""
    plain: list[Example] = [answers_of(e)[0] if isinstance(e, Pair | ChatPair) else e for e in examples]
    return encode_each(tokenizer, plain, label_names(plain))


def _in_tokens(tokenizer: Any, row: Row) -> list[Piece]:
    """A row as the model reads it; the first token of a text is never learned."""
    if isinstance(row.labels, int):
        return [(_text(tokenizer, row.ids), False)]
    parts = groupby(zip(row.ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [(_text(tokenizer, [token for token, _ in pairs]), learned) for learned, pairs in parts]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _pieces(example: Any) -> list[Piece]:
    """An example in pieces that are learned or not, before any tokenizer."""
    match example:
        case Completion(prompt, completion):
            return [(prompt, False), (completion, True)]
        case Choices(prompt, choices, answer):
            others = " | ".join(choice for at, choice in enumerate(choices) if at != answer)
            return [(prompt, False), (choices[answer], True), (f" (not: {others})", False)]
        case Chat(messages):
            read_alone = [at for at, more in enumerate(example.more) if '"weight": 0' in more]
            return [piece for at, (role, content) in enumerate(messages)
                    for piece in ((f"{role}: ", False), (content, role == "assistant" and at not in read_alone),
                                  ("\n", False))]  # fmt: skip
        case Labelled(text, label):
            return [(f"{text} -> ", False), (label, True)]
        case Pair(prompt, chosen, rejected):
            return [(prompt, False), (chosen, True), (f" (not: {rejected})", False)]
        case ChatPair(chosen, rejected):
            return [*_pieces(chosen), (f"(not: {rejected.messages[-1][1]})", False)]
        case _:
            return [(text_of(example), True)]
