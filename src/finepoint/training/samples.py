"""Texts that a model itself writes: something to keep it by where there is no text of one's own."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from finepoint.data.batches import context_length
from finepoint.data.examples import as_examples
from finepoint.data.tokens import around, encode_prompts
from finepoint.errors import FinepointError, reason_of
from finepoint.models.probing import evaluating
from finepoint.training.writing import Written, end_tokens, generating_by, read, written

logger = logging.getLogger(__name__)
TOKENS = 96  # of each text and each answer
BESIDE = 16  # texts that are written at a time
MARK = "QUESTION"  # stands for a user's words in a template


def samples(
    model: Any, tokenizer: Any, count: int = 64, *, chat: bool | None = None, seed: int = 0, tokens: int = TOKENS
) -> list[dict[str, Any]]:
    """Texts drawn from a causal model as it is: something to `protect` where there is no text of one's own.

    Conversations are a user's words that the model makes up behind the beginning of its chat template (Magpie,
    arXiv:2406.08464), and its likeliest answer to them; else a text begins with nothing but the token that texts begin
    with.

    Args:
        count: at most so many; what is empty is left out.
        chat: conversations; where the tokenizer has a chat template that opens a user's turn, if not given.
        seed: of what is drawn: the same texts on the same machine.
        tokens: most of each text, and of each answer.

    Returns:
        Rows of the form {"messages"} or {"text"}.

    Raises:
        FinepointError: the model writes no text of its own, as a classifier; conversations without a chat template.
    """
    if count < 1:
        raise FinepointError(f"count is {count}; give how many texts the model is to write")
    writes = model.get_output_embeddings() is not None and model.can_generate()
    if model.config.is_encoder_decoder or not writes:
        raise FinepointError(f"samples are what a causal language model writes, and {type(model).__name__} is none")
    opening = [] if chat is False else _opening(tokenizer)
    if not (opening if chat is None else chat):
        return [{"text": text} for text in _drawn(model, tokenizer, _start(model, tokenizer), count, tokens, seed)]
    if not tokenizer.chat_template:
        raise FinepointError("conversations need a chat template, and the tokenizer has none; give chat=False")
    if not opening:
        raise FinepointError("the chat template has no beginning of a user's words for the model to go on from; give "
                             "chat=False")  # fmt: skip
    asked = _drawn(model, tokenizer, opening, count, tokens // 2, seed)
    answers = _answered(model, tokenizer, asked, tokens) if asked else []
    return [_talk(question, answer.text) for question, answer in zip(asked, answers, strict=True) if not answer.empty]


def texts_and_conversations(
    model: Any, tokenizer: Any, count: int, seed: int = 0, tokens: int = TOKENS
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """So many `samples`, at most: `texts`, and as many `conversations` where there is a chat template.

    Raises:
        FinepointError: as for `samples`.
    """
    talks = _talks(tokenizer, count)
    found = {"texts": samples(model, tokenizer, count - talks, chat=False, seed=seed, tokens=tokens)}
    return found | ({"conversations": samples(model, tokenizer, talks, seed=seed, tokens=tokens)} if talks else {})


def _talks(tokenizer: Any, count: int, tell: bool = True) -> int:
    """How many of so many texts are conversations."""
    return count // 2 if _opening(tokenizer, tell) else 0


def _answered(model: Any, tokenizer: Any, questions: Sequence[str], tokens: int) -> list[Written]:
    prompts = encode_prompts(tokenizer, as_examples([_talk(question, "-") for question in questions]))
    return written(model, tokenizer, prompts, context_length(model, None), tokens, together=True)


def _talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _start(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that a text of no content begins with."""
    if front := around(tokenizer)[0]:
        return front
    known = (tokenizer.bos_token_id, *sorted(end_tokens(model, tokenizer)))
    if (first := next((token for token in known if token is not None), None)) is None:
        raise FinepointError("the tokenizer knows no token that a text begins with, or ends with")
    return [first]


def _opening(tokenizer: Any, tell: bool = True) -> list[int]:
    """The tokens before a user's first words; none where the template puts nothing there, or takes no such words.

    Args:
        tell: say so where it takes none.
    """
    if not tokenizer.chat_template:
        return []
    try:
        shown = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    except Exception as error:  # the template is other people's program
        if tell:
            logger.warning("the chat template does not begin with a user's words (%s); no conversations are written",
                           reason_of(error) or type(error).__name__)  # fmt: skip
        return []
    return tokenizer(shown.split(MARK)[0], add_special_tokens=False)["input_ids"]


def passes(tokenizer: Any, count: int, tokens: int) -> int:
    """How many passes through the model `texts_and_conversations` takes, about."""
    talks = _talks(tokenizer, count, tell=False)
    return -(-(count - talks) // BESIDE) * tokens + -(-talks // BESIDE) * (tokens // 2) + (tokens if talks else 0)


def _drawn(model: Any, tokenizer: Any, start: Sequence[int], count: int, tokens: int, seed: int) -> list[str]:
    """So many texts behind a start, at most, each drawn token by token from the model's own probabilities."""
    ends, found = sorted(end_tokens(model, tokenizer)), []
    tokens = max(1, min(tokens, context_length(model, None) - len(start)))
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0)  # fmt: skip
    with torch.random.fork_rng(), evaluating(model), generating_by(model, settings) as writer:
        torch.manual_seed(seed)
        for first in range(0, count, BESIDE):
            ids = torch.tensor([list(start)] * min(BESIDE, count - first), device=model.device)
            drawn = writer.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            found += read(tokenizer, drawn[:, len(start) :].tolist())
    return [text for text in map(str.strip, found) if text]
