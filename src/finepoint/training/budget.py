"""A budget of disturbance: how far a trained change may move what the base predicts on other text.

The measure is KL(base || adapted) on that text, in nats a token. It is 0 where nothing of the change is left, and for
small changes it grows with the square of their scale. A budget is kept by scaling a change (`scale_to_budget`), or
while it is trained, by how strongly it is held back (`Holding`).
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, log, sqrt
from typing import Any, Literal

from transformers.trainer_callback import TrainerCallback, TrainerState

from finepoint.adapters.adapter import SparseAdapter, check_base
from finepoint.adapters.entries import gather, same_bits
from finepoint.adapters.scaling import scale_by_depth, wise_ft
from finepoint.data.batches import Collator, Row
from finepoint.data.examples import Example, as_examples
from finepoint.errors import FinepointError
from finepoint.runtime import distributed
from finepoint.runtime.settings import fits, spelled
from finepoint.training.divergence import BasePredictions
from finepoint.training.texts import rows_to_keep
from finepoint.tuner.interface import Method

logger = logging.getLogger(__name__)
By = Literal["wise-ft", "depth"]
NEAR = 0.95  # of the budget: what is used of it at least, where the search is not ended by
WIDTH = 0.01  # of the scale: how far off the result is at most, if KL only ever grows with it
SMALLEST = 1e-6  # a hundred times what float32 makes of no KL
LEAST = 1e-4  # a smaller scale is none
SCALED = "scaled"  # what an adapter's `info` calls it
LOOKS, FEW = 8, 4  # measurements over a run, each on so many texts
WATCHED = 2  # the first of them: what is moved early is often taken back, so that they tell little of the end
AHEAD = 4.0  # by what factor the KL is expected to change until the end, at most
GAIN = 0.7  # of the answer: what holds back acts some steps later
STEPWISE = 1 / 3, 10.0  # by what a measurement multiplies the strength: at least, at most
STRONGEST = 1e4  # times what it began with: text that has not responded then will not
DISTURBED, STRENGTH = "disturbed", "protect_strength"  # in the log


@dataclass(frozen=True)
class Scaled:
    """An adapter within a budget, and how it came there."""

    adapter: SparseAdapter
    scale: float
    """1: it is the adapter that was given"""
    kl: float
    """of the model with it, on the texts"""
    kl_before: float
    """with the adapter that was given"""
    tries: list[tuple[float, float]]
    """every scale measured, and the KL there"""
    texts: int
    tokens: int
    """over whose predictions the KL is a mean"""
    seconds: float

    def __repr__(self) -> str:
        return f"Scaled({self.scale:.4g}; KL {self.kl_before:.3g} -> {self.kl:.3g} on {self.texts} texts)"


def scale_to_budget(
    adapter: SparseAdapter,
    model: Any,
    tokenizer: Any,
    texts: Sequence[Any],
    disturb_at_most: float,
    by: By = "wise-ft",
) -> Scaled:
    """Finds the largest scale of an adapter's change, in [0, 1], that disturbs other text by no more than a budget.

    The KL of the adapter that is returned has been measured, not predicted; that no larger scale keeps the budget holds
    as far as KL only grows with the scale. The base's predictions are computed once, and each try is one pass over the
    texts.

    Args:
        model: the causal base model; it is so again afterwards.
        texts: whose predictions are to be kept: `{"text": ..}` or another form of example, up to 256 tokens of each.
        disturb_at_most: the budget: KL(base || adapted) of the next token, in nats, averaged over the texts.
        by: "wise-ft" scales the whole change alike (`finepoint.wise_ft`), "depth" the early blocks more than the late
            ones (`finepoint.scale_by_depth`).

    Returns:
        The scaled adapter and its KL. Where the adapter keeps the budget as it is, it is returned itself.

    Raises:
        FinepointError: a budget that is not positive or that cannot be met; an adapter that does not fit the model; a
            classifier's adapter; no texts.
    """
    started = time.perf_counter()
    refuse_budget(disturb_at_most)
    if not fits(by, By):
        raise FinepointError(f"by is {by!r}; it is {' or '.join(spelled(By))}")
    if adapter.info.get("task") == "classification":
        raise FinepointError("the adapter is a classifier's, and a budget is for what a model writes next")
    check_base(model)
    # Those that are examples already may be of several files, each of a form of its own.
    examples = texts if all(isinstance(text, Example) for text in texts) else as_examples(texts)
    rows = rows_to_keep(examples, model, tokenizer)
    collator = Collator.of(model, tokenizer, [row.ids for row in rows])
    base = BasePredictions.of(model, collator, rows, changing=list(adapter))

    def at(scale: float) -> SparseAdapter:
        if scale == 1:
            return adapter
        return wise_ft(adapter, model, scale) if by == "wise-ft" else scale_by_depth(adapter, model, scale)

    def measure(scale: float) -> float:
        with at(scale).applied(model):
            kl = base.kl(model)
        logger.info("at scale %.4g KL is %.4g", scale, kl)
        return kl

    tries = search(measure, disturb_at_most, from_base=by == "wise-ft")
    scale, kl = best(tries, disturb_at_most)
    found = at(scale)
    if scale < 1 and _is_base(found, model):
        raise _cannot(disturb_at_most, tries)
    if scale < 1:
        told = {"scale": scale, "by": by, "kl": kl, "disturb_at_most": disturb_at_most}
        found = replace(found, info=found.info | {SCALED: told})
    return Scaled(found, scale, kl, tries[0][1], tries, base.texts, base.tokens, time.perf_counter() - started)


def _is_base(adapter: SparseAdapter, model: Any) -> bool:
    """Whether an adapter writes the base's own bits."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    values = {name: gather(weights[name], adapter[name]) for name in adapter}
    return all(same_bits(change.new_values(values[name]), values[name]) for name, change in adapter.changes.items())


def refuse_budget(budget: float) -> None:
    """Refuses what is no budget.

    Raises:
        FinepointError: it is not positive, or smaller than what can be measured.
    """
    if not SMALLEST <= budget < inf:
        raise FinepointError(f"disturb_at_most is {budget}; give a KL in nats a token, such as 0.01, that can be told "
                             f"from 0 in float32: at least {SMALLEST:g}")  # fmt: skip


def best(tries: Sequence[tuple[float, float]], budget: float) -> tuple[float, float]:
    """The largest scale that was found to keep the budget, and its KL."""
    return max((scale, kl) for scale, kl in tries if kl <= budget)


def search(measure: Callable[[float], float], budget: float, from_base: bool = True) -> list[tuple[float, float]]:
    """Looks for the largest scale in [0, 1] that keeps the budget: bisection, guided by KL's root being about linear.

    It ends where the budget is used to `NEAR`, or the scale is known to `WIDTH` of itself.

    Args:
        measure: the KL at a scale.
        from_base: a scale of 0 is the base, whose KL is 0.

    Returns:
        Every scale tried and its KL, 1 first; one of them keeps the budget.

    Raises:
        FinepointError: none keeps the budget but 0, if that does.
    """
    tries = [(1.0, measure(1.0))]
    if tries[0][1] <= budget:
        return tries
    low, high = (0.0, 0.0), tries[0]
    if not from_base:
        tries.append((0.0, measure(0.0)))
        if (low := tries[-1])[1] > budget:
            raise _cannot(budget, tries)
    while low[1] < NEAR * budget and high[0] - low[0] > WIDTH * high[0] and high[0] > LEAST:
        width = high[0] - low[0]
        middle = low[0] + width / 2
        if len(tries) % 3:
            share = (sqrt((1 + NEAR) / 2 * budget) - sqrt(max(0, low[1]))) / (sqrt(high[1]) - sqrt(max(0, low[1])))
            middle = low[0] + width * min(max(share, 0.02), 0.98)
        tries.append((middle, measure(middle)))
        low, high = (tries[-1], high) if tries[-1][1] <= budget else (low, tries[-1])
    if from_base and low[0] == 0:
        raise _cannot(budget, tries)
    return tries


def _cannot(budget: float, tries: Sequence[tuple[float, float]]) -> FinepointError:
    scale, kl = min((scale, kl) for scale, kl in tries if kl > budget)
    if scale == 0:
        return FinepointError(f"by depth the last blocks keep their change, and with all else at the base KL is "
                              f"{kl:.3g}; give --by wise-ft, or a larger --disturb-at-most")  # fmt: skip
    return FinepointError(f"no part of the change keeps KL at {budget:g}: at scale {scale:.2g} it is {kl:.3g}, and "
                          "what is smaller is the base itself; give a larger --disturb-at-most")  # fmt: skip


class Holding(TrainerCallback):
    """Keeps a budget while a model is trained: measures now and then, and holds it back more or less strongly.

    From the last two measurements is told what the KL comes to at the end, and the strength is multiplied by a power
    of that over the budget, up to `STRONGEST` times what it was: text may not respond, and the task would be learned no
    more. What is still above the budget then is taken back by scaling the change. A checkpoint
    knows the strength, and what was measured, by the trainer's log.

    Args:
        method: has not moved yet, with a penalty, whose strength is changed.
        rows: on which KL is measured, none of which the penalty knows.
        falling: the learning rate falls over the run, so that most of the way is made early.
    """

    def __init__(
        self, budget: float, method: Method, collator: Collator, rows: Sequence[Row], falling: bool = True
    ) -> None:
        assert method.penalty
        tuner = method.tuner
        self.budget, self.tuner, self.penalty, self.falling = budget, tuner, method.penalty, falling
        self.most = STRONGEST * method.penalty.strength
        self.few, self.all = (BasePredictions.of(tuner.model, collator, part, changing=tuner.trained())
                              for part in (rows[:: max(1, len(rows) // FEW)][:FEW], rows))  # fmt: skip
        self.tell: Callable[[dict[str, float]], None] = lambda told: None  # the trainer gives its own

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        known = self._measured(state)
        self.penalty.strength = known[-1][STRENGTH] if known else self.penalty.strength

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        step, steps = state.global_step, state.max_steps
        if step * LOOKS // steps == (step - 1) * LOOKS // steps or step == steps:
            return
        kl = self._kl(self.few)
        known = self._measured(state)
        if len(known) >= WATCHED:
            before = moved_by(known[-1]["step"] / steps, self.falling), known[-1][DISTURBED]
            ratio = at_the_end(before, (moved_by(step / steps, self.falling), kl)) / self.budget
            self._strengthen_(ratio**GAIN, kl)
        logger.info("step %d: KL to the base %.4g, held back with strength %.4g", step, kl, self.penalty.strength)
        self.tell({DISTURBED: kl, STRENGTH: self.penalty.strength})

    def _kl(self, base: BasePredictions) -> float:
        """How far the model is from its base: of several processes all go by what the first one finds."""
        kl = base.kl(self.tuner.model)
        return distributed.on_first(lambda: kl)

    def _strengthen_(self, factor: float, kl: float) -> None:
        before, wanted = self.penalty.strength, self.penalty.strength * min(max(factor, STEPWISE[0]), STEPWISE[1])
        self.penalty.strength = min(wanted, self.most)
        if before < self.most <= wanted:
            logger.warning("the text does not respond: at %g times its strength what holds back leaves KL at %.3g; it "
                           "is made no stronger, and what is above the budget at the end is scaled away",
                           STRONGEST, kl)  # fmt: skip

    def _measured(self, state: TrainerState) -> list[dict[str, float]]:
        return [record for record in state.log_history if STRENGTH in record]

    def settle_(self) -> dict[str, Any]:
        """Scales the change down to the budget, if it is above it; what a record says of it.

        Raises:
            FinepointError: no part of the change keeps the budget.
        """
        scale_ = self.tuner.scaler()

        def measure(scale: float) -> float:
            scale_(scale)
            return self._kl(self.all)

        tries = search(measure, self.budget)
        scale, kl = best(tries, self.budget)
        scale_(scale)
        if scale < 1:
            logger.warning("the change is scaled by %.4g: KL to the base on texts held out was %.4g, and is %.4g now",
                           scale, tries[0][1], kl)  # fmt: skip
        return {"kl": kl, "kl_before": tries[0][1], "scale": scale, "texts": self.all.texts, "tokens": self.all.tokens,
                "strength": self.penalty.strength}  # fmt: skip


def at_the_end(before: tuple[float, float], now: tuple[float, float]) -> float:
    """What the KL comes to at the end of a run if it goes on as between two measurements, in the logarithm.

    Args:
        before, now: the share of the way made, see `moved_by`, and the KL there.
    """
    (earlier, then), (later, kl) = ((share, max(found, SMALLEST)) for share, found in (before, now))
    ahead = log(kl / then) * (1 - later) / (later - earlier)
    return kl * exp(min(max(ahead, -log(AHEAD)), log(AHEAD)))


def moved_by(progress: float, falling: bool) -> float:
    """The share of a run's learning rates that a share of its steps has, where they fall to 0 or stay."""
    return 1 - (1 - progress) ** 2 if falling else progress
