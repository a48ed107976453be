"""Rewards that can be checked: what an answer is worth, given the right one."""

import re
from collections.abc import Callable
from importlib import import_module

from finepoint.errors import FinepointError

Reward = Callable[[str, str], float]
"""(answer, reference) to a number; higher is better."""

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


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
        raise FinepointError(f"unknown reward {name!r}; known rewards: {', '.join(REWARDS)}, or module:function")
    try:
        found: Reward = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise FinepointError(f"cannot import reward {name!r}: {error}") from error
    return found
