"""Scores of one model: multiple choice by likelihood, exact match, likelihood of text, classes."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from math import sqrt
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from finepoint.data.batches import Collator, context_length
from finepoint.data.examples import Chat, Choices, Completion, Example, Labelled
from finepoint.data.tokens import (
    IGNORED,
    around,
    encode_each,
    encode_fitting,
    encode_pairs,
    last_of,
    refuse_beyond,
    warn_of_truncation,
)
from finepoint.errors import FinepointError
from finepoint.evaluation.generation import generation_hits
from finepoint.evaluation.metrics import by_class, confusion, ratio_error
from finepoint.evaluation.shared_prompts import branches_apart, by_request, shared_batch, shared_rows, spots
from finepoint.selection.passes import evaluating, on_device
from finepoint.training.loss import log_likelihoods
from finepoint.tuner.finite import refuse_not_numbers

logger = logging.getLogger(__name__)
EXACT = "exact match"
Advance = Callable[[int], None]
"""Called with the number of examples or rows done, for a progress bar."""

BATCH_TOKENS = 4096


def _ignore(done: int) -> None:
    pass


def accuracy(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_length: int | None = None,
    new_tokens: int = 64,
    advance: Advance = _ignore,
) -> dict[str, Any]:
    """How many examples the model gets right, by the measure that suits their form.

    Choices: the likeliest continuation, by summed log-likelihood (`accuracy`) and by that divided by the choice's
    length in characters without surrounding spaces (`accuracy_normalised`), as lm-evaluation-harness does. Completions
    and chats: greedy generation equals the reference, both stripped, which is hard to meet and says nothing of near
    misses. Labelled texts: the likeliest class. Plain text has no accuracy. But for labelled texts the loss of the
    references is beside it, which tells models apart that get as many right.

    Returns:
        `accuracy`, `accuracy_normalised` (equal where there is nothing to normalise), `stderr`, `n`; but for classes
        `loss`, see `mean_nll` (None where it is infinite); of completions and chats also `measure`, "exact match"; of
        classes what `by_class` finds.
    """
    limit = context_length(model, max_length)
    match examples[0]:
        case Choices():
            return choice_accuracy(model, tokenizer, examples, limit, advance)  # type: ignore[arg-type]
        case Labelled():
            labels = class_names(model)
            answers = class_answers(model, tokenizer, examples, limit, advance)
            classes = [labels.index(example.label) for example in examples if isinstance(example, Labelled)]
            right = [float(answer == known) for answer, known in zip(answers, classes, strict=True)]
            return summary(right, right) | by_class(confusion(classes, answers, len(labels)), labels)
        case Completion() | Chat():
            right = [float(ok) for ok in generation_hits(model, tokenizer, examples, limit, new_tokens, advance)]
            return summary(right, right) | {"measure": EXACT, "loss": _beside(
                lambda: mean_nll(model, tokenizer, examples, max_length=max_length))}  # fmt: skip
        case _:
            raise AssertionError("text has no accuracy")


def _beside(loss: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """A loss beside another measure, which stands where there is no such number."""
    try:
        return loss()
    except FinepointError as error:
        logger.warning("no loss beside the accuracy: %s", error)
        return None


def choice_accuracy(
    model: Any, tokenizer: Any, examples: Sequence[Choices], limit: int, advance: Advance = _ignore
) -> dict[str, Any]:
    """Accuracy of the likeliest choice, raw and normalised by length, and what tells it from shortcuts.

    Returns:
        Besides those of `accuracy`: `most_frequent_answer`, the share of the position answered most; `chance`, what a
        guess gets right; `majority`, what the position that is right most often gets; `loss`, that of the right choices
        (see `mean_nll`; None where one has the probability 0).
    """
    raw, normalised, answers = [], [], []
    values = _of_choices(model, tokenizer, examples, limit, advance)
    for example, own in zip(examples, values, strict=True):
        scores = [float(tokens.sum()) for tokens in own]
        per_character = [s / len(c.strip() or c) for s, c in zip(scores, example.choices, strict=True)]
        answers.append(scores.index(max(scores)))
        raw.append(float(answers[-1] == example.answer))
        normalised.append(float(per_character.index(max(per_character)) == example.answer))
    most_frequent = max(answers.count(answer) for answer in set(answers)) / len(answers)
    return summary(raw, normalised) | {
        "most_frequent_answer": most_frequent,
        "chance": mean(1 / len(example.choices) for example in examples),
        "majority": max(Counter(example.answer for example in examples).values()) / len(examples),
        "loss": _beside(lambda: _nll([own[example.answer] for example, own in zip(examples, values, strict=True)])),
    }


def choice_likelihoods(
    model: Any, tokenizer: Any, examples: Sequence[Choices], limit: int, advance: Advance = _ignore
) -> list[list[float]]:
    """The log-likelihood of each choice of each example.

    All choices of an example are compared after the same text: where the longest leaves no room for the whole prompt,
    all lose the same beginning of it.

    Raises:
        FinepointError: a choice is longer than `limit`, so that part of it would not count.
    """
    values = _of_choices(model, tokenizer, examples, limit, advance)
    return [[float(tokens.sum()) for tokens in own] for own in values]


def _of_choices(
    model: Any, tokenizer: Any, examples: Sequence[Choices], limit: int, advance: Advance
) -> list[list[Tensor]]:
    """The log-likelihoods of the tokens of each choice of each example; see `choice_likelihoods`."""
    texts = [(e.prompt, choice) for e in examples for choice in e.choices]
    owners = [e for e in examples for _ in e.choices]
    found = encode_pairs(tokenizer, texts, [owner.where for owner in owners])
    refuse_beyond(model, tokenizer, [context + answer for context, answer in found], owners)
    encoded, (front, _) = iter(found), around(tokenizer)
    requests, sizes = [], []
    for number, example in enumerate(examples, 1):
        pairs = [next(encoded) for _ in example.choices]
        longest = max(len(continuation) for _, continuation in pairs)
        if longest > limit:
            raise FinepointError(f"example {number} has a choice of {longest} tokens, and the model is given {limit} "
                                 "at most; shorten it, or raise --max-length")  # fmt: skip
        sizes.append(max(len(context) for context, _ in pairs) + longest - 1)
        cut = max(0, sizes[-1] - limit)
        requests += [(last_of(context, len(context) - cut, front) if cut < len(context) else [], continuation)
                     for context, continuation in pairs]  # fmt: skip
    warn_of_truncation(sizes, limit, "prompt")
    values = iter(token_log_likelihoods(model, tokenizer, requests, limit, advance))
    return [[next(values) for _ in example.choices] for example in examples]


def summary(raw: Sequence[float], normalised: Sequence[float]) -> dict[str, Any]:
    """Means of hits with the standard error of the raw one, sqrt(p (1 - p) / n)."""
    share = sum(raw) / len(raw)
    return {
        "accuracy": share,
        "accuracy_normalised": sum(normalised) / len(normalised),
        "stderr": sqrt(share * (1 - share) / len(raw)),
        "n": len(raw),
    }


def token_log_likelihoods(
    model: Any, tokenizer: Any, requests: Sequence[tuple[list[int], list[int]]], limit: int, advance: Advance = _ignore
) -> list[Tensor]:
    """Log-likelihood of every token of each continuation after its context: (tokens of the continuation,) float32.

    Continuations of one prompt share a row where the model can keep them apart, so that no token is computed twice. An
    input longer than `limit` loses its beginning.

    Raises:
        FinepointError: the model's logits are no numbers.
    """
    warn_of_truncation([len(context) + len(continuation) - 1 for context, continuation in requests], limit, "prompt")
    refuse_beyond(model, tokenizer, [context + continuation for context, continuation in requests])
    collator = Collator.of(model, tokenizer, [[*context, *continuation][-limit:] for context, continuation in requests])
    found: dict[int, Tensor] = {}
    with evaluating(model):
        # What depends on the length of its row, as some ways of telling positions do, has one of its own.
        sharing = collator.side != "none"
        rows = shared_rows(requests, limit, collator.positions, sharing)
        if not branches_apart(model, collator, rows):
            rows = shared_rows(requests, limit, False, sharing)
        for places in collator.by_length([len(row) for row in rows], BATCH_TOKENS):
            part = [rows[place] for place in places]
            batch = on_device(shared_batch(part, collator, model.dtype), model.device)
            scored = spots(part, collator.side)
            at = torch.tensor([spot[1:] for spot in scored], device=model.device).unbind(1)
            values = log_likelihoods(model, batch, *at).float().cpu()
            refuse_not_numbers(values)
            found |= by_request(values, [spot[0] for spot in scored])
            advance(len(part))
    return [found.get(i, torch.empty(0)) for i in range(len(requests))]


def last_positions(model: Any, rows: Sequence[Sequence[int]], keep: int, collator: Collator) -> dict[str, Any]:
    """A batch of the rows, to compute at their last `keep` positions only where the model can be told so."""
    batch = on_device(collator.inputs(rows), model.device)
    return batch | ({"logits_to_keep": keep} if collator.trims else {})


@torch.no_grad()
def class_logits(model: Any, rows: Sequence[Sequence[int]], collator: Collator) -> Tensor:
    """A classifier's logits: (rows, classes), the model's dtype."""
    with evaluating(model):
        logits = model(**last_positions(model, rows, 0, collator)).logits
    refuse_not_numbers(logits)
    return logits


def mean_nll(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_length: int | None = None,
    advance: Advance = _ignore,
) -> dict[str, Any]:
    """Mean negative log-likelihood, in nats a token, of texts (or of what is learned), and the tokens counted.

    A text longer than the context is scored in windows, of which each but the first begins with the last token of the
    one before: all of its tokens count but the very first, which has nothing before it. Of completions and chats the
    tokens count that training would learn: of a chat the assistant's turns alone. What does not fit is left out as it
    is there (see `fitted`), and the log says how much.

    Returns:
        `nll`; `stderr`, its standard error over the examples (see `ratio_error`; None of one example); `tokens`.

    Raises:
        FinepointError: there is no such token, or one has the probability 0; the model's logits are no numbers.
    """
    limit = context_length(model, max_length)
    requests, learned = [], []
    owners: list[int] = []
    # The last token of a row is predicted and not read.
    for place, row in ((i, row) for i, own in enumerate(encode_fitting(tokenizer, examples, limit + 1)) for row in own):
        assert isinstance(row.labels, list)
        kept = [label != IGNORED for label in row.labels]
        if any(kept[1:]):  # nothing predicts the first
            first = max(1, kept.index(True))
            requests.append((row.ids[:first], row.ids[first:]))
            learned.append(kept[first:])
            owners.append(place)
    found = token_log_likelihoods(model, tokenizer, requests, limit, advance)
    parts = [values[torch.tensor(kept, dtype=torch.bool)] for values, kept in zip(found, learned, strict=True)]
    by_example: dict[int, list[Tensor]] = defaultdict(list)
    for owner, part in zip(owners, parts, strict=True):
        by_example[owner].append(part)
    return _nll([torch.cat(own) for own in by_example.values()])


def _nll(each: Sequence[Tensor]) -> dict[str, Any]:
    """What `mean_nll` says of the log-likelihoods of each example's tokens."""
    each = [values.double() for values in each if len(values)]
    if not each:
        raise FinepointError("no example has a token whose likelihood could be measured; are the texts one token long?")
    values = torch.cat(each)
    if not bool(values.isfinite().all()):
        raise FinepointError("the model gives a token of the examples the probability 0, so that their mean negative "
                             "log-likelihood is infinite")  # fmt: skip
    error = ratio_error([-own.sum().item() for own in each], [len(own) for own in each])
    return {"nll": -values.mean().item(), "stderr": error, "tokens": len(values)}


def class_names(model: Any) -> list[str]:
    """A classifier's classes, in the order of its logits."""
    return [str(model.config.id2label[i]) for i in range(model.config.num_labels)]


def class_answers(
    model: Any, tokenizer: Any, examples: Sequence[Example], limit: int, advance: Advance = _ignore
) -> list[int]:
    """A classifier's likeliest class of each example."""
    labels = class_names(model)
    rows = encode_each(tokenizer, examples, labels)
    refuse_beyond(model, tokenizer, [row.ids for row in rows], examples)
    warn_of_truncation([len(row.ids) for row in rows], limit, "text")
    front, _ = around(tokenizer)
    texts = [last_of(row.ids, limit, front) for row in rows]
    collator = Collator.of(model, tokenizer, texts)
    found = [0] * len(rows)
    for places in collator.by_length([len(text) for text in texts], BATCH_TOKENS):
        logits = class_logits(model, [texts[place] for place in places], collator)
        for place, answer in zip(places, logits.argmax(-1).tolist(), strict=True):
            found[place] = answer
        advance(len(places))
    return found
