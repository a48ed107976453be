"""What a model writes when nobody lists the answers: exact match, answers by generation, and how they go wrong."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from finepoint.data.batches import Collator
from finepoint.data.examples import Chat, Choices, Completion, Example
from finepoint.data.tokens import (
    around,
    as_written,
    encode_answers,
    encode_prompts,
    last_of,
    refuse_beyond,
    room_of_prompt,
    without_special,
)
from finepoint.models.probing import REFUSED, agrees
from finepoint.selection.passes import evaluating, on_device
from finepoint.tuner.finite import refuse_not_numbers

logger = logging.getLogger(__name__)
GENERATION_TOKENS = 4096
LABELS = 20  # a task with at most so many different answers has labels; of others the most frequent answers are kept


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt."""

    text: str
    ended_at_once: bool
    """its first token was an end token"""

    @property
    def empty(self) -> bool:
        return self.ended_at_once or not self.text.strip()


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken: at temperature 0 the likeliest, else drawn from softmax(logits / temperature)."""

    temperature: float = 0.0
    seed: int = 0

    @property
    def drawn(self) -> bool:
        return self.temperature > 0

    def settings(self) -> dict[str, Any]:
        """The part of a `GenerationConfig`; nothing is left to the checkpoint's own, nor to transformers' top 50."""
        drawn = {"temperature": self.temperature, "top_k": 0, "top_p": 1.0} if self.drawn else {}
        return {"do_sample": self.drawn, **drawn}

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Inside, tokens are drawn from the seed; the random state is afterwards what it was."""
        if not self.drawn:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            yield


GREEDY = Sampling()


class Pieces(BaseStreamer):
    """Hands on what is written, piece by piece, as soon as its characters are whole; together they are the text.

    Args:
        say: called with each piece.
    """

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.say = say
        self.tokens: list[int] | None = None
        """None until the prompt has come"""
        self.said = ""

    def put(self, value: Tensor) -> None:
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        (text,) = read(self.tokenizer, [self.tokens])
        if not text.endswith("\ufffd"):  # the beginning of a character
            self._say(text)

    def end(self) -> None:
        if self.tokens:
            self._say(read(self.tokenizer, [self.tokens])[0])

    def _say(self, text: str) -> None:
        if text.startswith(self.said) and text != self.said:
            self.say(text[len(self.said) :])
            self.said = text


def written(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    limit: int,
    new_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
    needed: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    say: Callable[[str], None] | None = None,
) -> list[Written]:
    """What the model writes after each prompt, in at most `new_tokens` tokens.

    Greedily, that is the likeliest token after token, whatever else the checkpoint's own generation settings ask for;
    or drawn, every prompt by itself, so that an answer depends on its own prompt and the seed alone.

    Args:
        needed: how many tokens there must be room for behind each prompt, so many as the answer has: a prompt loses its
            beginning where it would in training, and what is written ends with the context. Where not given,
            `new_tokens`.
        say: called with each piece of text as it is written; for one prompt alone.

    Raises:
        FinepointError: the model's logits are no numbers.
    """
    refuse_beyond(model, tokenizer, prompts)
    rooms = [room_of_prompt(limit, min(new_tokens, size)) for size in needed or [new_tokens] * len(prompts)]
    front, _ = around(tokenizer)
    rows = [last_of(prompt, room, front) for prompt, room in zip(prompts, rooms, strict=True)]
    collator = Collator.of(model, tokenizer, rows)
    warn_of_prompts(prompts, rows, limit)
    found: dict[int, Written] = {}
    ends = end_tokens(model, tokenizer)

    def settings(most: int) -> GenerationConfig:
        return GenerationConfig(max_new_tokens=most, pad_token_id=collator.padding, eos_token_id=sorted(ends) or None,
                                **sampling.settings())  # fmt: skip

    assert say is None or len(prompts) == 1
    with evaluating(model), generating_by(model, settings(new_tokens)) as writer:
        collator = replace(collator, side="left" if _pads(writer, collator, rows) else "none", positions=False)
        for places, most in _batches(collator, rows, limit, new_tokens, 1 if sampling.drawn else GENERATION_TOKENS):
            batch = on_device(collator.inputs([rows[place] for place in places]), model.device)
            with sampling.seeded():
                tokens = writer.generate(
                    **batch, generation_config=settings(most), logits_processor=LogitsProcessorList([_numbers_only]),
                    streamer=Pieces(tokenizer, say) if say else None,
                )[:, batch["input_ids"].shape[1] :]  # fmt: skip
            texts = read(tokenizer, tokens.tolist())
            for place, text, first in zip(places, texts, tokens[:, 0].tolist(), strict=True):
                found[place] = Written(text, first in ends)
            advance(len(places))
    return [found[place] for place in range(len(prompts))]


def _batches(
    collator: Collator, rows: Sequence[list[int]], limit: int, new_tokens: int, budget: int
) -> Iterator[tuple[list[int], int]]:
    """The rows of each batch, and how many tokens it generates; rows near the limit go alone, up to the limit."""
    rooms = [max(1, min(new_tokens, limit - len(row))) for row in rows]
    wide = [place for place, room in enumerate(rooms) if room == new_tokens]
    for batch in collator.by_length([len(rows[place]) for place in wide], budget):
        yield [wide[at] for at in batch], new_tokens
    yield from (([place], room) for place, room in enumerate(rooms) if room < new_tokens)


def read(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Tokens that were written as text: special ones left out, nothing beautified."""
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def learnt_texts(tokenizer: Any, answers: Sequence[Sequence[int]]) -> list[str]:
    """What the learned tokens of answers read as; empty where one of them stands for anything unknown."""
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None
    return ["" if unknown in ids else text for ids, text in zip(answers, read(tokenizer, answers), strict=True)]


def warn_of_prompts(prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], limit: int) -> None:
    """Says once how many prompts lost their beginning, so that an answer fits behind them."""
    if shorter := sum(len(row) < len(prompt) for prompt, row in zip(prompts, rows, strict=True)):
        logger.warning("%d of %d prompts lost their beginning: with room for an answer they are longer than %d tokens",
                       shorter, len(prompts), limit)  # fmt: skip


def _pads(model: Any, collator: Collator, rows: Sequence[list[int]]) -> bool:
    """Whether what follows a prompt is the same beside a longer one, padded: tried on the longest for two tokens."""
    short, long = min(rows, key=len), max(rows, key=len)
    if collator.side != "left" or len(short) == len(long):
        return False
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=collator.padding,
                                return_dict_in_generate=True, output_logits=True)  # fmt: skip

    def logits(rows: Sequence[list[int]], masked: bool = True) -> Tensor:
        batch = on_device(replace(collator, positions=False).inputs(rows), model.device)
        if not masked:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        found = model.generate(**batch, generation_config=settings).logits
        return torch.stack([step[0] for step in found])

    try:
        return agrees(logits([short, long]), logits([short]), logits([short, long], masked=False))
    except REFUSED:
        return False


@contextmanager
def generating_by(model: Any, settings: GenerationConfig) -> Iterator[Any]:
    """What generates, with settings of ours: transformers fills what they leave open from those on the model.

    PEFT's wrappers, which would put the checkpoint's back, are left out: what they train is inside.
    """
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inside.generation_config
    inside.generation_config = settings
    try:
        yield inside
    finally:
        inside.generation_config = before


@contextmanager
def sampling_plainly(model: Any, tokenizer: Any) -> Iterator[None]:
    """Inside, whoever samples from the model finds where answers end, and no other setting of the checkpoint."""
    ends = sorted(end_tokens(model, tokenizer))
    with generating_by(model, GenerationConfig(eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id)):
        yield


def _numbers_only(input_ids: Tensor, scores: Tensor) -> Tensor:
    """The scores as they are: of logits that are no numbers the first would be taken for the likeliest token."""
    refuse_not_numbers(scores)
    return scores


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens at which generation stops: the tokenizer's end, and all that the model's settings call one."""
    ends: set[Any] = set()
    text = getattr(model.config, "get_text_config", lambda: model.config)()
    for source in (getattr(model, "generation_config", None), model.config, text, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        ends |= set(ids) if isinstance(ids, list | tuple) else {ids}
    return ends - {None}


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
