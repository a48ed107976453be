"""What a model answers, with adapters and without: `finepoint generate`, and `finepoint.generate` in Python."""

import html
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from finepoint.adapters.adapter import SparseAdapter
from finepoint.data.batches import context_length
from finepoint.data.examples import FORMS, PAIRS, Chat, ChatPair, Choices, Completion, Pair, as_examples, taken_for
from finepoint.data.leaks import text_of as text_of_example
from finepoint.data.sources import SOURCES, ending_of, rows_of, text_lines
from finepoint.data.tokens import encode_prompts
from finepoint.errors import FinepointError, one_line
from finepoint.evaluation.settings import GenerateConfig
from finepoint.evaluation.subjects import Adapters, Given
from finepoint.runtime.progress import progress
from finepoint.runtime.settings import DType, Quantise, refuse_out_of_range
from finepoint.training.writing import Sampling, written

logger = logging.getLogger(__name__)
BASE = "base"
MARK = "\x00"  # stands for a text in a form
SHOWN = 200  # characters of a text in a table
Turn = Mapping[str, Any]
Prompt = str | Sequence[Turn]
"""a text, or a conversation as {"role", "content"} turns that the model is to go on with"""


@dataclass(frozen=True)
class Answers:
    """What was asked, and what each asked model wrote; `answers.texts` where only one was asked."""

    prompts: tuple[Prompt, ...]
    by: dict[str, list[str]]
    """from `base` or an adapter's name to an answer for each prompt"""
    template: bool
    """whether the prompts went through the chat template"""

    @property
    def texts(self) -> list[str]:
        """The answers, one a prompt.

        Raises:
            FinepointError: several were asked.
        """
        if len(self.by) > 1:
            raise FinepointError(f"several have answered: {', '.join(self.by)}; take one's, answers.by[NAME]")
        return next(iter(self.by.values()))

    def as_json(self) -> dict[str, Any]:
        return {"prompts": list(self.prompts), "template": self.template, "answers": self.by}

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Each prompt as text with its answers, by who wrote them."""
        for place, prompt in enumerate(self.prompts):
            yield text_of(prompt), {name: answers[place] for name, answers in self.by.items()}

    def __repr__(self) -> str:
        lines = []
        for prompt, answers in self.rows():
            lines.append(f"> {one_line(prompt, SHOWN)}")
            lines += [f"  {name}: {one_line(text, SHOWN)}" for name, text in answers.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("prompt", *self.by))
        rows = [[prompt, *answers.values()] for prompt, answers in self.rows()]
        cell = '<td style="text-align:left; white-space:pre-wrap; vertical-align:top">{}</td>'
        body = "".join(f"<tr>{''.join(cell.format(html.escape(text)) for text in row)}</tr>" for row in rows)
        return f"<table><tr>{head}</tr>{body}</table>"


def generate(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    adapter: Adapters = None,
    *,
    tokenizer: Any = None,
    base: bool = False,
    raw: bool = False,
    new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    max_length: int | None = None,
    dtype: DType = "auto",
    quantise: Quantise | None = None,
    any_base: bool = False,
    any_dtype: bool = False,
) -> Answers:
    """What a model writes after each prompt: with an adapter on, or as it is.

    Texts go through the chat template where the tokenizer has one, but for adapters that were trained without it, which
    are asked in the form of their rows (Alpaca's, say); conversations always do. The model is afterwards what it was,
    bit for bit.

    Args:
        model: one in memory (also one in training), or what `--model` takes: a folder, a hub id, `smollm2`, ..
        prompts: a text, several, or conversations as {"role", "content"} turns.
        adapter: a folder, a `SparseAdapter`, several of them, or several by name; each is asked on its own.
        tokenizer: where not given, that of the place the model was loaded from.
        base: the model without adapters is asked as well, as it is in any case where there are none.
        raw: texts are given as they are, without the chat template or the form of the training's rows.
        new_tokens: at most so many are written.
        temperature: 0 takes the likeliest token after token, more draws them.
        seed: of what is drawn.
        max_length: of prompt and answer in tokens; the model's context where not given.
        dtype, quantise: of a model that is loaded.
        any_base, any_dtype: take adapters on another base than their own, and on wider weights.

    Returns:
        `Answers`, which print as a table.

    Raises:
        FinepointError: there is no such model, the adapter does not belong to it or is a classifier's, no prompt, a
            prompt that is empty or that the template refuses.
    """
    asked = _listed(prompts)
    given = Given.of(adapter)
    if given.labels():
        raise FinepointError("the adapter is a classifier's, which writes nothing; `finepoint eval` measures it on "
                             'texts with labels, {"text", "label"}')  # fmt: skip
    subjects = given.on(model, tokenizer, dtype, quantise, any_base, any_dtype)
    template = templated(subjects.tokenizer, given.infos, raw)
    keys = () if template or raw else trained_keys(given.infos)
    _say_how(subjects.tokenizer, template, raw, keys)
    rows = [prompt_tokens(subjects.tokenizer, prompt, template, keys) for prompt in asked]
    names = ([BASE] if base or not subjects.adapters else []) + list(subjects.adapters)
    limit, by = context_length(subjects.model, max_length), {}
    for name in names:
        with _with(subjects.adapters.get(name), subjects.model) as writer, progress(name, len(rows)) as advance:
            answers = written(writer, subjects.tokenizer, rows, limit, new_tokens, advance,
                              sampling=Sampling(temperature, seed))  # fmt: skip
        by[name] = [answer.text for answer in answers]
    return Answers(tuple(asked), by, template)


def generate_config(config: GenerateConfig) -> Answers:
    """Runs the whole of `finepoint generate`.

    Raises:
        FinepointError: whatever the user can mend.
    """
    refuse_out_of_range(config)
    return generate(
        config.model, prompts_of(config), config.adapter, base=config.base, raw=config.raw,
        new_tokens=config.new_tokens, temperature=config.temperature, seed=config.seed, max_length=config.max_length,
        dtype=config.dtype, quantise=config.quantise, any_base=config.any_base, any_dtype=config.any_dtype,
    )  # fmt: skip


def prompts_of(config: GenerateConfig) -> list[Prompt]:
    """The prompts of the flags, then those of the file or of stdin.

    Raises:
        FinepointError: there are none; a file that cannot be read.
    """
    found: list[Prompt] = list(config.prompt)
    if config.prompts == "-" or (not found and not config.prompts and not sys.stdin.isatty()):
        found += [line.rstrip("\n") for line in sys.stdin if line.strip()]
    elif config.prompts:
        found += islice(read_prompts(config.prompts, config.columns), config.limit)
    if not found:
        raise FinepointError('there is nothing to answer; give --prompt "..", --prompts FILE, or lines on stdin')
    return found


def read_prompts(source: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[Prompt]:
    """The prompts of whatever `--data` takes: of a row its prompt, or the turns before the last answer, in any of the
    forms, or a text; of a file of another type its lines.

    Raises:
        FinepointError: it cannot be read, or a row is in none of the forms.
    """
    path = Path(source)
    if path.is_file() and ending_of(path) not in SOURCES:
        yield from (line.rstrip("\r\n") for line in text_lines(path) if line.strip())
        return
    for where, row in rows_of(source):
        yield row if isinstance(row, str) else _asked_in(where, row, columns or {})


def _asked_in(where: str, row: Any, columns: Mapping[str, str]) -> Prompt:
    """What a row asks."""
    if not isinstance(row, dict):
        raise FinepointError(f'{where}: a {type(row).__name__}; expected a text, {{"prompt"}} or {{"messages"}}')
    turns, prompt = row.get("messages"), row.get(columns.get("prompt", "prompt"))
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return turns[:-1] if turns and turns[-1].get("role") == "assistant" else turns
    if isinstance(prompt, str | list):
        return prompt
    taken = taken_for(where, tuple(row), FORMS | PAIRS, columns)
    example = (FORMS | PAIRS)[taken.keys](where, row | {key: row[name] for key, name in taken.renamed.items()})
    example = example.chosen if isinstance(example, ChatPair) else example
    match example:
        case Completion(prompt) | Choices(prompt) | Pair(prompt):
            return prompt
        case Chat(messages, more):
            told = [json.loads(rest) if rest else {} for rest in more or [""] * len(messages)]
            return [{"role": role, "content": content, **rest}
                    for (role, content), rest in zip(messages[:-1], told, strict=False)]  # fmt: skip
    return text_of_example(example)


def templated(tokenizer: Any, infos: Mapping[str, Mapping[str, Any]], raw: bool) -> bool:
    """Whether texts go through the chat template: there is one, and the adapters were not trained without it."""
    if raw or not tokenizer.chat_template:
        return False
    return not any(info.get("form", "chat") != "chat" for info in infos.values())


def trained_keys(infos: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The keys of the form in which the adapters' training read its rows; nothing where they differ or are unknown."""
    found = {tuple(info.get("keys") or ()) for info in infos.values()}
    return found.pop() if len(found) == 1 else ()


def in_form(text: str, keys: Sequence[str]) -> str:
    """A text as a form of these keys asks it; one that begins so already stays as it is."""
    make = FORMS.get(tuple(keys))
    if make is None or keys[0] == "prompt":
        return text
    row = dict.fromkeys(keys, ".") | ({"choices": [".", ","], "answer": 0} if "choices" in keys else {})
    made, plain = (make("", row | {keys[0]: asked}) for asked in (text, MARK))
    if not isinstance(made, Completion | Choices) or text.startswith(plain.prompt.partition(MARK)[0] or MARK):
        return text
    return made.prompt


def _say_how(tokenizer: Any, template: bool, raw: bool, keys: Sequence[str]) -> None:
    if template:
        logger.info("prompts go through the model's chat template; --raw gives them as they are")
    elif (form := in_form("..", keys)) != "..":
        logger.info("prompts are asked as the adapter's training had them, %r; --raw gives them as they are", form)
    elif tokenizer.chat_template and not raw:
        logger.info("prompts are given as they are, as the adapter's training had them, without the chat template")


def prompt_tokens(tokenizer: Any, prompt: Prompt, template: bool, keys: Sequence[str] = ()) -> list[int]:
    """The tokens after which the model is to write: exactly those that stand before the answer in training.

    Args:
        keys: of the form that texts are put in.

    Raises:
        FinepointError: it is empty, or the template refuses it.
    """
    if not prompt:
        raise FinepointError("a prompt is empty; give a text, or turns of a conversation")
    if isinstance(prompt, str) and not template:
        return encode_prompts(tokenizer, as_examples([{"prompt": in_form(prompt, keys), "completion": "."}]))[0]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    # A conversation ends with the answer that is to come, of which no token is looked at.
    return encode_prompts(tokenizer, as_examples([{"messages": [*turns, {"role": "assistant", "content": "."}]}]))[0]


def text_of(prompt: Prompt) -> str:
    """A prompt for people: the text, or the turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as several.

    Raises:
        FinepointError: there is none.
    """
    if isinstance(prompts, str):
        return [prompts]
    several: Any = list(prompts)
    if not several:
        raise FinepointError("there is no prompt to answer")
    return [several] if all(isinstance(each, Mapping) for each in several) else several


@contextmanager
def _with(adapter: SparseAdapter | None, model: Any) -> Iterator[Any]:
    """The model with the adapter on, if there is one."""
    if adapter is None:
        yield model
        return
    with adapter.applied(model):
        yield model
