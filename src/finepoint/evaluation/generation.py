"""What a model writes when nobody lists the answers: exact match, answers by generation, and how they go wrong."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from finepoint.data.examples import Chat, Choices, Completion, Example
from finepoint.data.tokens import as_written, encode_answers, encode_prompts, refuse_beyond, without_special
from finepoint.training.writing import read, written

logger = logging.getLogger(__name__)
LABELS = 20  # a task with at most so many different answers has labels; of others the most frequent answers are kept


def learnt_texts(tokenizer: Any, answers: Sequence[Sequence[int]]) -> list[str]:
    """What the learned tokens of answers read as; empty where one of them stands for anything unknown."""
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None
    return ["" if unknown in ids else text for ids, text in zip(answers, read(tokenizer, answers), strict=True)]


def prompt_ids(tokenizer: Any, example: Example) -> list[int]:
    """The tokens after which the model is to write its answer."""
    return encode_prompts(tokenizer, [example])[0]


def reference(example: Example) -> str:
    """The right answer, as it would be written."""
    match example:
        case Chat():
            return example.messages[-1][1]
        case Completion():
            return example.completion
        case Choices():
            return example.choices[example.answer]
    raise AssertionError("texts and classes are not written")


def warn_of_long_references(tokenizer: Any, answers: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Says once how many right answers, in tokens, are longer than what is written: none can be right there."""
    special = set(tokenizer.all_special_ids)
    sizes = [len(ids) - sum(token in special for token in ids) for ids in answers]
    if long := sum(size > new_tokens for size in sizes):
        logger.warning("%d of %d references are longer than the %d tokens that are written, up to %d, and cannot be "
                       "matched; give more --new-tokens", long, len(sizes), new_tokens, max(sizes))  # fmt: skip


def generation_hits(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    limit: int,
    new_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[bool]:
    """Whether what the model writes, greedily, equals the reference.

    The reference is the answer of the file or, where a tokenizer or a chat template makes another text of it, what its
    learned tokens read as. Surrounding spaces do not count, and neither do special tokens, such as an end token.
    """
    prompts, learnt = encode_prompts(tokenizer, examples), encode_answers(tokenizer, examples)
    refuse_beyond(model, tokenizer, prompts, examples)
    warn_of_long_references(tokenizer, learnt, new_tokens)
    answers = written(model, tokenizer, prompts, limit, new_tokens, advance, [len(ids) for ids in learnt])
    texts = learnt_texts(tokenizer, learnt)
    return [a.text.strip() in right_answers(as_written(tokenizer, e), text)
            for a, e, text in zip(answers, examples, texts, strict=True)]  # fmt: skip


def right_answers(example: Example, learnt: str) -> set[str | None]:
    """The texts that are right: the reference, but for one that only calls tools, and what its learned tokens read as.

    Surrounding spaces aside.
    """
    text = reference(example).strip()
    return {None if isinstance(example, Chat) and not text else text, learnt.strip() or None}


def generated(
    model: Any, tokenizer: Any, examples: Sequence[Example], trained_answers: Sequence[str], limit: int, new_tokens: int
) -> dict[str, Any]:
    """The answers that a model writes by itself, and how they go wrong.

    Args:
        examples: choices or completions.
        trained_answers: labels (or frequent answers) of the task trained on; see `frequent_answers`.

    Returns:
        `accuracy`: share that begins with the right choice, or that is the completion, case aside;
        `format_failures`: share that begins with none of the choices (None for completions, which have no format);
        `empty`: share that is empty or ended at once; `memorised`: share that gives an answer of the task trained on
        which is no answer here (None where every such answer is one of the choices here too); `n`.
    """
    prompts, learnt = encode_prompts(tokenizer, examples), encode_answers(tokenizer, examples)
    warn_of_long_references(tokenizer, learnt, new_tokens)
    answers = written(model, tokenizer, prompts, limit, new_tokens, lambda done: None, [len(ids) for ids in learnt])
    examples = [as_written(tokenizer, example) for example in examples]
    readings = learnt_texts(tokenizer, learnt)
    trained_answers = [without_special(tokenizer, text).strip() for text in trained_answers]
    pairs = list(zip(examples, answers, strict=True))
    foreign = [foreign_answers(example, trained_answers) for example in examples]
    choices = [(e, a) for e, a in pairs if isinstance(e, Choices)]
    return {
        "accuracy": share([answers_right(example, answer.text, reading)
                           for (example, answer), reading in zip(pairs, readings, strict=True)]),
        "format_failures": share([not any(begins_with(a.text, c) for c in e.choices) for e, a in choices]),
        "empty": share([answer.empty for answer in answers]),
        "memorised": share(
            [any(begins_with(a.text, f) for f in others) for a, others in zip(answers, foreign, strict=True)]
            if any(foreign) else []
        ),
        "n": len(examples),
    }  # fmt: skip


def answers_right(example: Example, text: str, learnt: str = "") -> bool:
    """Whether a text begins with the right choice and with no longer one, or is the completion; case aside.

    Args:
        learnt: what the learned tokens of the completion read as, where that is another text.
    """
    if isinstance(example, Choices):
        given = [choice for choice in example.choices if begins_with(text, choice)]
        return bool(given) and max(given, key=len) == example.choices[example.answer]
    return text.strip().casefold() in {right and right.casefold() for right in right_answers(example, learnt)}


def begins_with(text: str, answer: str) -> bool:
    """Whether a text begins with an answer as whole words, case and surrounding spaces aside."""
    return re.match(re.escape(answer.strip().casefold()) + r"(?!\w)", text.strip().casefold()) is not None


def frequent_answers(examples: Sequence[Example]) -> list[str]:
    """The answers a model could learn by heart: all labels of a task that has few, else its most frequent answers."""
    texts = [choice for e in examples if isinstance(e, Choices) for choice in e.choices]
    if not texts or len(set(texts)) > LABELS:
        texts = [reference(e) for e in examples if isinstance(e, Choices | Completion)]
    return [text.strip() for text, _ in Counter(texts).most_common(LABELS)]


def foreign_answers(example: Example, trained_answers: Sequence[str]) -> list[str]:
    """The answers of the task trained on that are none here."""
    own = example.choices if isinstance(example, Choices) else (reference(example),)
    known = {text.strip().casefold() for text in own}
    return [text for text in trained_answers if text.strip().casefold() not in known]


def share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None
