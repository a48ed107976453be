"""What a model writes: token after token behind prompts, the likeliest or drawn, in batches where padding allows."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from finepoint.data.batches import Collator
from finepoint.data.tokens import around, last_of, refuse_beyond, room_of_prompt
from finepoint.models.probing import REFUSED, agrees, evaluating
from finepoint.selection.passes import on_device
from finepoint.tuner.finite import refuse_not_numbers

logger = logging.getLogger(__name__)
GENERATION_TOKENS = 4096


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
    together: bool = False,
) -> list[Written]:
    """What the model writes after each prompt, in at most `new_tokens` tokens.

    Greedily, that is the likeliest token after token, whatever else the checkpoint's own generation settings ask for;
    or drawn, every prompt by itself, so that an answer depends on its own prompt and the seed alone.

    Args:
        needed: how many tokens there must be room for behind each prompt, so many as the answer has: a prompt loses its
            beginning where it would in training, and what is written ends with the context. Where not given,
            `new_tokens`.
        say: called with each piece of text as it is written; for one prompt alone.
        together: short and long prompts share a batch, which pays where much is written behind them.

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
        budget = 1 if sampling.drawn else GENERATION_TOKENS
        for places, most in _batches(collator, rows, limit, new_tokens, budget, new_tokens if together else 0):
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
    collator: Collator, rows: Sequence[list[int]], limit: int, new_tokens: int, budget: int, behind: int
) -> Iterator[tuple[list[int], int]]:
    """The rows of each batch, and how many tokens it generates; rows near the limit go alone, up to the limit.

    Args:
        behind: what counts as a row's length besides its own.
    """
    rooms = [max(1, min(new_tokens, limit - len(row))) for row in rows]
    wide = [place for place, room in enumerate(rooms) if room == new_tokens]
    for batch in collator.by_length([len(rows[place]) + behind for place in wide], budget):
        yield [wide[at] for at in batch], new_tokens
    yield from (([place], room) for place, room in enumerate(rooms) if room < new_tokens)


def read(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Tokens that were written as text: special ones left out, nothing beautified."""
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


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
