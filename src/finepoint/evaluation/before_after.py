"""A few validation examples answered before training and after, kept with a run for its page."""

import logging
from pathlib import Path
from typing import Any

from finepoint.adapters.adapter import SparseAdapter
from finepoint.data.batches import context_length
from finepoint.data.examples import Chat, Choices, Completion, Example, read_examples, some
from finepoint.data.tokens import encode_prompts
from finepoint.errors import FinepointError, one_line
from finepoint.runtime.files import write_json
from finepoint.training.context import TrainingContext
from finepoint.training.run import ANSWERS
from finepoint.training.settings import TrainConfig
from finepoint.training.writing import written

logger = logging.getLogger(__name__)
WRITTEN = 32  # tokens of an answer
SHOWN = 300  # characters of a prompt, from its end


def keep_answers(config: TrainConfig, context: TrainingContext, adapter: SparseAdapter, folder: Path) -> None:
    """Writes what the model answers to a few validation examples without the adapter, and with it, beside the wanted.

    Of texts and classes there is nothing to write. What cannot be asked is left out, and a line says so.
    """
    if not config.validation or not config.answers or context.labels:
        return
    try:
        examples = some(read_examples(config.validation, config.columns), config.answers, config.seed)
        asked = [_asked(example) for example in examples]
        if None in asked:
            return
        prompts, limit = encode_prompts(context.tokenizer, examples), context_length(context.model, config.max_length)
        base = written(context.model, context.tokenizer, prompts, limit, WRITTEN)
        with adapter.applied(context.model):
            trained = written(context.model, context.tokenizer, prompts, limit, WRITTEN)
    except (FinepointError, RuntimeError) as error:  # such as memory that does not do: the training is not lost by it
        logger.info("no examples are kept for the report: %s", one_line(str(error)))
        return
    rows: list[dict[str, Any]] = [
        {"prompt": each[0], "wanted": each[1], "base": one.text, "trained": other.text}
        for each, one, other in zip(asked, base, trained, strict=True) if each
    ]  # fmt: skip
    write_json(folder / ANSWERS, {"examples": rows})


def _asked(example: Example) -> tuple[str, str] | None:
    """The end of what is asked, and what is wanted."""
    match example:
        case Completion(prompt, answer):
            return prompt[-SHOWN:], answer
        case Choices(prompt, choices, right):
            return prompt[-SHOWN:], choices[right]
        case Chat(messages):
            return "\n".join(f"{role}: {content}" for role, content in messages[:-1])[-SHOWN:], messages[-1][1]
    return None
