"""The learning rate where none is given: by what the rule looks at, how many entries it chooses, and in which groups.

Rates at which SmolLM2-135M (float32, AdamW, 30 steps of 16) learned sentiment, words and sums, from the figures of
docs/methods.md, section learning rates. Between them a rate goes with a power of the density, up to every weight.
"""

from bisect import bisect
from math import exp, log

from finepoint.selection.rules import Rule

DENSITY = 1e-3  # where it is not known before the model is
EVERY_WEIGHT = 3e-5
MEASURED = {
    "nothing": {1e-4: 0.1, 1e-3: 0.03, 1e-2: 3e-3, 0.03: 2e-3},
    "gradients": {1e-4: 3e-3, 1e-3: 3e-4, 1e-2: 3e-4},
    "text to keep": {1e-3: 3e-3, 1e-2: 1e-3},
}
"""By what a rule looks at: density to rate."""
HELD = {"nothing": {1e-4: 0.1, 1e-3: 0.03, 1e-2: 0.01, 0.05: 3e-3}}
"""the same where training is held to its base, which takes from a step what a larger rate gives it"""
ON_GRID = {"nothing": {1e-3: 0.03, 1e-2: 3e-3}, "gradients": {1e-2: 3e-3}}
"""the same where entries are trained on the codes of a quantised file, and have to reach another one"""
GROUPED = 3.0  # of rules that look at text to keep: what whole columns want, times what entries do
SLOW = 10.0  # a rate that is so many times smaller moves next to nothing in the steps of a usual run


def usual_rate(
    rule: Rule, density: float | None, structure: str = "entry", on_grid: bool = False, held: bool = False
) -> float:
    """The learning rate that a rule's entries usually want, to one digit.

    Args:
        density: None where it is not known.
        on_grid: the entries are trained on the codes of a quantised file.
        held: a protection holds them back.
    """
    looks = "text to keep" if rule.needs_kept else "gradients" if rule.needs_data else "nothing"
    measured = (ON_GRID if on_grid else HELD if held else MEASURED).get(looks, MEASURED[looks])
    rate = _between(measured | {1.0: EVERY_WEIGHT}, density or DENSITY)
    return float(f"{rate * (GROUPED if rule.needs_kept and structure != 'entry' else 1):.1g}")


def _between(known: dict[float, float], density: float) -> float:
    densities = sorted(known)
    at = min(max(bisect(densities, density), 1), len(densities) - 1)
    low, high = densities[at - 1], densities[at]
    share = min(max(log(density / low) / log(high / low), 0), 1)
    return exp(log(known[low]) * (1 - share) + log(known[high]) * share)


def slow(rate: float, usual: float, what: str) -> str:
    """A warning where a rate is one for whole weights; empty where it is not."""
    if rate * SLOW >= usual:
        return ""
    return (f"the learning rate is {rate:g}, as for whole weights, at which chosen entries hardly move; {what} "
            f"usually want about {usual:g}")  # fmt: skip
