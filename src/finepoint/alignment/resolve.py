"""Checks the settings of an alignment; the rewards by name. Without torch, so that a mistake is told at once."""

import re
from collections.abc import Callable
from importlib import import_module

from finepoint.alignment.settings import AlignConfig
from finepoint.errors import FinepointError
from finepoint.runtime import distributed
from finepoint.runtime.settings import did_you_mean
from finepoint.training.resolve import RunSpec, resolve_common

Reward = Callable[[str, str], float]
"""(answer, reference) to a number; higher is better."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def resolve(config: AlignConfig) -> RunSpec[AlignConfig]:
    """Spells out what `finepoint align` is told.

    Raises:
        FinepointError: whatever can be refused before any work.
    """
    if config.data is None:
        raise FinepointError("alignment needs rows to learn from; give --data FILE.jsonl")
    if distributed.launched():
        raise FinepointError("alignment runs in one process; start it without a launcher")
    if config.chat_turns != "all":
        raise FinepointError("--chat-turns is for conversations, and alignment learns answers; leave it out")
    spec = resolve_common(config)
    if spec.baseline and (spec.baseline.chooses or not spec.baseline.low_rank):
        raise FinepointError(f"align compares chosen entries with lora or dora, not with {spec.baseline.name!r}")
    if config.method == "grpo":
        reward_named(config.reward)
        if config.generations < 2:
            raise FinepointError(f"generations is {config.generations}; answers are compared, so give at least 2")
        answers = config.batch_size * config.accumulation
        if answers % config.generations:
            raise FinepointError(f"batch_size x accumulation is {answers} answers; give a multiple of the "
                                 f"{config.generations} generations")  # fmt: skip
    return spec


def number(answer: str, reference: str) -> float:
    """1 where the first number of the answer is that of the reference, else 0; separators of thousands do not count."""
    found, right = (NUMBER.search(text.replace(",", "")) for text in (answer, reference))
    return float(found is not None and right is not None and float(found[0]) == float(right[0]))


def line(answer: str, reference: str) -> float:
    """1 where the first line of the answer is the reference, surrounding spaces aside."""
    return float((answer.strip().splitlines() or [""])[0].strip() == reference.strip())


def exact(answer: str, reference: str) -> float:
    """1 where the whole answer is the reference, surrounding spaces aside: the model must stop by itself."""
    return float(answer.strip() == reference.strip())


WHOLE = ("line", "exact")  # those that compare with the whole reference
REWARDS: dict[str, Reward] = {"number": number, "line": line, "exact": exact}


def reward_named(name: str) -> Reward:
    """The reward called `name`, or the function at `module:function`.

    Raises:
        FinepointError: there is no such reward; the known ones are listed.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.partition(":")
    if not function:
        listed = f"known rewards: {', '.join(REWARDS)}, or module:function"
        raise FinepointError(f"unknown reward {name!r}{did_you_mean(name, REWARDS, listed)}")
    try:
        found: Reward = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise FinepointError(f"cannot import reward {name!r}: {error}") from error
    return found
