"""Which weights to merge by: a search on validation examples."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.combining import merge
from finepoint.data.examples import Example, Labelled, Text
from finepoint.errors import FinepointError
from finepoint.evaluation.scoring import accuracy, mean_nll
from finepoint.runtime.progress import progress

GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
ROUNDS = 3

Measure = Literal["accuracy", "nll"]


def tuned_weights(
    model: Any,
    tokenizer: Any,
    adapters: Sequence[SparseAdapter],
    examples: Sequence[Example],
    how: str = "sum",
    options: Mapping[str, float] | None = None,
    *,
    measure: Measure | None = None,
    start: Sequence[float] | None = None,
    grid: Sequence[float] = GRID,
) -> dict[str, Any]:
    """The merging weights that do best on examples, by a search along one adapter at a time.

    From `start` (all 1), each adapter in turn tries every weight of the grid while the others keep theirs, and takes
    one only where it is better than what it has; this is repeated until a round changes nothing, at most three times.
    No weights are measured twice. What is found is the best along each axis, not always the best of the whole grid.

    Args:
        model: the base model; it is so again afterwards.
        measure: accuracy (default) or the mean negative log-likelihood (default for texts, which have no accuracy).

    Returns:
        `weights`, `measure`, `score`, and `tried`: rows of `weights` with `score`, or with `problem` where these
        weights cannot be merged by; weights that are all 0 are the base.

    Raises:
        FinepointError: examples that cannot tell, or adapters that cannot be merged.
    """
    if isinstance(examples[0], Labelled):
        raise FinepointError("labelled texts need a classifier, whose head cannot be merged; give prompts with choices")
    if isinstance(examples[0], Text) and measure == "accuracy":
        raise FinepointError("plain text has no accuracy; tune by nll")
    measure = measure or ("nll" if isinstance(examples[0], Text) else "accuracy")
    tried: dict[tuple[float, ...], dict[str, Any]] = {}

    def score(weights: tuple[float, ...]) -> float | None:
        """Higher is better; None where these weights cannot be merged by."""
        if weights not in tried:
            tried[weights] = {"weights": list(weights)}
            try:
                merged = merge(adapters, weights, how, model=model, **(options or {})) if any(weights) else None
            except FinepointError as reason:
                tried[weights]["problem"] = str(reason)
            else:
                tried[weights]["score"] = _measured(model, tokenizer, merged, examples, measure)
        found = tried[weights].get("score")
        return found if found is None or measure == "accuracy" else -found

    best = tuple(float(weight) for weight in start) if start else (1.0,) * len(adapters)
    if score(best) is None:
        raise FinepointError(tried[best]["problem"])
    for _ in range(ROUNDS):
        before = best
        for i in range(len(adapters)):
            for weight in grid:
                other = (*best[:i], float(weight), *best[i + 1 :])
                reached, held = score(other), score(best)
                if reached is not None and held is not None and reached > held:
                    best = other
        if best == before:
            break
    return {"weights": list(best), "measure": measure, "score": tried[best]["score"], "tried": list(tried.values())}


def _measured(
    model: Any, tokenizer: Any, merged: SparseAdapter | None, examples: Sequence[Example], measure: Measure
) -> float:
    """Accuracy or likelihood with a merged adapter on; None is the base."""
    with progress("tuning", len(examples)) as advance:
        if merged is None:
            return _score(model, tokenizer, examples, measure, advance)
        with merged.applied(model):
            return _score(model, tokenizer, examples, measure, advance)


def _score(model: Any, tokenizer: Any, examples: Sequence[Example], measure: Measure, advance: Any) -> float:
    taken = accuracy if measure == "accuracy" else mean_nll
    return taken(model, tokenizer, examples, advance=advance)[measure]
