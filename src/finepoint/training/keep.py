"""What holds a model to its base while it learns: protections, one decorated function each.

`anchor` is EWC at whatever is trained. For k entries the Fisher information has k numbers: holding back what other text
needs costs 4 bytes an entry here, and nothing in a step.

Torch is imported by what holds, so that names and what goes with what are known without it.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finepoint.baselines.registry import Baseline
from finepoint.errors import FinepointError
from finepoint.runtime import distributed
from finepoint.runtime.settings import REGISTRIES, Cited, named, refuse_without
from finepoint.selection.rules import FLOOR, TINIEST, rule_named
from finepoint.training.settings import READ, Training

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finepoint.data.batches import Row
    from finepoint.training.context import TrainingContext
    from finepoint.tuner.anchor import Anchor
    from finepoint.tuner.interface import Penalty, Tuner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protected:
    """What a protection is made of; the tuner has not moved yet."""

    context: TrainingContext
    tuner: Tuner
    head: Sequence[str]
    """weights of a new classification head, which has no base"""
    rows: Sequence[Row]
    """the texts to keep"""
    strength: float
    a_step: int
    """texts that take part in a step, of those that do so"""
    seed: int
    texts_read: int = READ
    """so many of the texts at most are read for the information of `anchor`"""
    moving: bool = False
    """whether other entries may be chosen on the way"""
    reads: bool = True
    """whether the protection itself looks at the texts"""

    def batches(self, rows: Sequence[Row], size: int) -> list[dict[str, Any]]:
        """Rows as batches, on the model's device."""
        from finepoint.selection.passes import on_device

        device = next(self.context.model.parameters()).device
        return [on_device(batch, device) for batch in self.context.collator.batches(rows, size)]


Make = Callable[[Protected], "Penalty"]


@dataclass(frozen=True, repr=False)
class Protection(Cited):
    """A protection, by name, with its formula and where it comes from."""

    name: str
    make: Make
    formula: str
    source: str
    strength: float
    """where none is given"""
    reads: bool = True
    """whether it needs text"""
    weights: bool = False
    """whether it is of the weights' own numbers, which low-rank factors are not"""
    beside: bool = False
    """whether some of the texts take part in each step"""
    few: bool = False
    """whether it reads `texts_read` of the texts alone, and not all"""


PROTECTIONS: dict[str, Protection] = {}


def protection(formula: str, source: str, strength: float, **more: Any) -> Callable[[Make], Make]:
    """Makes a function what `--protect-by` knows by its name; see `Protection`."""

    def register(make: Make) -> Make:
        PROTECTIONS[make.__name__] = Protection(make.__name__, make, formula, source, strength, **more)
        return make

    return register


@protection("(strength/2) sum F (w - w0)^2, F a token, of labels that the model draws", "EWC, arXiv:1612.00796", 1000.0,
            weights=True, few=True)  # fmt: skip
def anchor(given: Protected) -> Penalty:
    from finepoint.training.texts import rows_to_read

    return _anchored(given, given.seed, rows_to_read(given.rows, given.context.tokenizer, given.texts_read))


@protection("(strength/2) sum F (w - w0)^2, F a text, of its own labels, as baseline ewc", "EWC, arXiv:1612.00796",
            1000.0, weights=True)  # fmt: skip
def empirical(given: Protected) -> Penalty:
    return _anchored(given, None, given.rows)


def _anchored(given: Protected, seed: int | None, rows: Sequence[Row]) -> Anchor:
    from finepoint.tuner.anchor import Anchor

    def measure() -> dict[str, Tensor]:
        return information(given, seed, rows)

    return Anchor(given.tuner.trained, {} if given.moving else measure(), given.strength, _start(given.tuner), measure)


def information(given: Protected, seed: int | None, rows: Sequence[Row]) -> dict[str, Tensor]:
    """What rows need of all that is trained and has a base, see `fisher_at`."""
    with at_base(given.tuner):
        fisher = fisher_at(given.tuner, given.context.model, given.context.collator.batches(rows, 1), seed)
    return {name: found for name, found in fisher.items() if name not in given.head}


def step_sizes(given: Protected, penalty: Penalty) -> dict[str, Tensor]:
    """By what a step is multiplied where `--protect-steps` is: c / sqrt(F + mean F / 10), 1 on average.

    Returns:
        By the names of `tuner.trained()`, of their shapes and dtypes.
    """
    from finepoint.training.texts import rows_to_read
    from finepoint.tuner.anchor import Anchor

    if isinstance(penalty, Anchor) and given.reads:
        fisher = penalty.fisher  # is read already
    else:
        fisher = information(given, given.seed, rows_to_read(given.rows, given.context.tokenizer, given.texts_read))
    count = sum(part.numel() for part in fisher.values())
    floor = FLOOR * sum(float(part.sum()) for part in fisher.values()) / count
    sizes = {name: (part + max(floor, TINIEST)).rsqrt() for name, part in fisher.items()}
    average = sum(float(part.sum()) for part in sizes.values()) / count
    return {name: part / average for name, part in sizes.items()}


@protection("(strength/2) sum (w - w0)^2", "L2-SP, arXiv:1802.01483", 0.03, reads=False, weights=True)
def l2(given: Protected) -> Penalty:
    import torch

    from finepoint.tuner.anchor import Anchor

    alike = {name: torch.ones((), device=value.device) for name, value in given.tuner.trained().items()
             if name not in given.head}  # fmt: skip
    return Anchor(given.tuner.trained, alike, given.strength, _start(given.tuner))


@protection("strength x KL(base || model) on some of the texts at each step", "distillation, arXiv:1606.09282", 1.0,
            beside=True)  # fmt: skip
def kl(given: Protected) -> Penalty:
    import torch

    from finepoint.models.probing import evaluating
    from finepoint.training.divergence import divergence, head_as_it_is, states_at_labels
    from finepoint.training.loss import plain_head

    model = given.context.model
    if (head := plain_head(model)) is None:
        raise FinepointError(f"{type(model).__name__} changes its head's logits, which would have to be kept for every "
                             "token; give --protect-by replay")  # fmt: skip
    with evaluating(model), torch.no_grad():
        known = [states_at_labels(model, head, batch) for batch in given.batches(given.rows, 1)]
    before = head_as_it_is(head, known[0], given.moving)

    def loss(batch: dict[str, Any], places: Sequence[int], labels: int) -> Tensor:
        return divergence(model, batch, torch.cat([known[place] for place in places]), before, labels)

    return Beside(given, loss, known)


@protection("strength x the loss of some of the texts at each step", "experience replay, arXiv:1811.11682", 1.0,
            beside=True)  # fmt: skip
def replay(given: Protected) -> Penalty:
    from finepoint.training.loss import completion_loss

    return Beside(given, lambda batch, places, labels: completion_loss(given.context.model, batch, labels))


def protection_named(name: str) -> Protection:
    """The protection called `name`.

    Raises:
        FinepointError: there is none; the known ones are listed.
    """
    return named(PROTECTIONS, name, *REGISTRIES["protection"])


def protection_of(config: Training, baseline: Baseline | None) -> Protection | None:
    """What a run is told to be held to its base by, if by anything.

    Raises:
        FinepointError: it lacks text, has text that it does not read, or does not go with the baseline.
    """
    found = protection_named(config.protect_by)
    refuse_without(config, "protect", ["protect_examples", "protect_read", "protect_share", "protect_steps"])
    if config.protect is None and found.reads:
        if config.protect_by != "anchor" or config.protect_strength is not None:
            raise FinepointError(f"--protect-by {found.name} reads what is to be kept; give --protect FILE")
        return None
    _refuse_unread(config, found, (not baseline or baseline.chooses) and rule_named(config.rule).needs_kept)
    if not found.beside and config.protect_share != Training.protect_share:
        raise FinepointError(f"--protect-by {found.name} has no text beside a step's examples; leave out "
                             "--protect-share, or give --protect-by kl or replay")  # fmt: skip
    if config.protect_steps:
        _check_steps(config, baseline)
    if baseline and baseline.fisher:
        raise FinepointError(f"{baseline.name} has its own pull to the base; give --baseline full with --protect")
    if baseline and baseline.low_rank and found.weights:
        others = " or ".join(each.name for each in PROTECTIONS.values() if not each.weights)
        raise FinepointError(f"--protect-by {found.name} holds weights, and baseline {baseline.name} trains factors of "
                             f"them; give --protect-by {others}")  # fmt: skip
    return found


def _check_steps(config: Training, baseline: Baseline | None) -> None:
    """Refuses step sizes of their own for what has no information, or another one from time to time."""
    if baseline and baseline.low_rank:
        raise FinepointError(f"--protect-steps is for weights' own numbers, and baseline {baseline.name} trains "
                             "factors of them; leave it out")  # fmt: skip
    if getattr(config, "refresh", None):
        raise FinepointError("--protect-steps is for entries that are chosen once; leave out --refresh")


def _refuse_unread(config: Training, found: Protection, by_rule: bool) -> None:
    """Refuses text that nothing looks at, and how many texts are read where it is not asked.

    Args:
        by_rule: the rule that chooses entries looks at it; step sizes of their own do as well.
    """
    measured = getattr(config, "disturb_at_most", None) is not None
    by_rule = by_rule or config.protect_steps
    if config.protect is not None and not (found.reads or by_rule or measured):
        raise FinepointError(f"--protect-by {found.name} reads no text; leave out --protect, or take anchor")
    if config.protect_read != Training.protect_read and not (found.few or by_rule):
        raise FinepointError(f"--protect-by {found.name} reads {'all' if found.reads else 'none'} of the texts; leave "
                             "out --protect-read")  # fmt: skip


def texts_a_step(config: Training) -> int:
    return max(1, round(config.protect_share * config.batch_size * config.accumulation))


def fisher_at(tuner: Tuner, model: Any, batches: Sequence[Mapping[str, Any]], seed: int | None) -> dict[str, Tensor]:
    """The Fisher information of what is trained, a token: the mean squared gradient of what the model itself says.

    Labels are drawn from the model's predictions, so that it is the true one and not the empirical. The gradients of
    different tokens are independent then, with mean 0: the square of their sum has the sum of their squares as its
    expectation, and one backward pass a batch will do. Several processes share the batches; all get the same.

    Args:
        seed: of the draws; None for the labels that are there: the empirical Fisher information, a batch.

    Returns:
        By the names of `tuner.trained()`, of their shapes and dtypes.
    """
    import torch

    from finepoint.models.probing import evaluating
    from finepoint.runtime.progress import tracked
    from finepoint.selection.passes import drawing, on_device
    from finepoint.training.loss import completion_loss, drawn_loss

    started = time.perf_counter()
    trained = tuner.trained()
    found = {name: torch.zeros_like(value) for name, value in trained.items()}
    parts = torch.zeros(1, dtype=torch.float64, device=distributed.device())
    count, rank = distributed.count(), distributed.rank()
    with evaluating(model), torch.enable_grad(), tuner.unaveraged():
        # All run equally often, as sharded weights need: a process that has no batch left does the last one again.
        for at in tracked("reading what is to be kept", range(0, len(batches), count)):
            mine = min(at + rank, len(batches) - 1)
            batch = on_device(batches[mine], next(model.parameters()).device)
            if seed is None:
                loss, here = completion_loss(model, batch, 1), 1
            else:
                loss, here = drawn_loss(model, batch, drawing(_generator(seed, mine)))
            loss.backward()
            for name, value in trained.items():
                if value.grad is not None and mine == at + rank:
                    found[name].add_(value.grad.square())
                value.grad = None
            parts += here if mine == at + rank else 0
    for total in (parts, *found.values()):
        distributed.add_up_(total)
    found = {name: total / float(parts) for name, total in found.items()}
    mean = sum(float(part.sum()) for part in found.values()) / tuner.count
    logger.info("%d texts are to be kept: mean Fisher information %.2g, in %.1f s", len(batches), mean,
                time.perf_counter() - started)  # fmt: skip
    return found


def _generator(seed: int, place: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(random.Random(f"{seed}:{place}").getrandbits(31))


@contextmanager
def at_base(tuner: Tuner) -> Iterator[None]:
    """Inside, chosen entries hold the base's values and no gradients; those that have settled stay as they are."""
    if not tuner.deltas:  # whose entries stay the same: it has not moved yet
        yield
        return
    import torch

    trained = tuner.trained()
    with torch.no_grad():
        held = {name: (delta.detach().clone(), delta.grad) for name, delta in trained.items()}
        for delta in trained.values():
            delta.zero_()
            delta.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for name, delta in trained.items():
                delta.copy_(held[name][0])
                delta.grad = held[name][1]
        tuner.follow_()


def _start(tuner: Tuner) -> dict[str, Tensor]:
    """Where what is trained begins; nowhere where it is deltas, which begin at 0."""
    if tuner.deltas:
        return {}
    return {name: value.detach().clone() for name, value in tuner.trained().items()}


class Beside:
    """`strength` x the mean loss over the labels of some of the texts: at each step of others, until all have come.

    Args:
        loss: of a batch of the texts at these places, over so many labels in all.
        known: what is kept of the base for it.
    """

    def __init__(
        self, given: Protected, loss: Callable[[dict[str, Any], Sequence[int], int], Tensor],
        known: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        self.given, self.loss, self.known, self.strength = given, loss, known, given.strength
        self.orders: dict[int, list[int]] = {}  # of the rounds that the last step was in

    def holds(self) -> list[Tensor]:
        """What is kept of the base."""
        return list(self.known)

    def places(self, step: int) -> list[int]:
        """Which texts take part in the step after so many: a resumed run meets those that it would have met."""
        texts, wanted = len(self.given.rows), range(step * self.given.a_step, (step + 1) * self.given.a_step)
        rounds = {place // texts for place in wanted}
        self.orders = {turn: self.orders.get(turn) or self._order(turn) for turn in rounds}
        return [self.orders[place // texts][place % texts] for place in wanted]

    def _order(self, turn: int) -> list[int]:
        """Of all texts, the time after so many."""
        texts = len(self.given.rows)
        return random.Random(f"{self.given.seed}:{turn}").sample(range(texts), texts)

    def add_(self, step: int) -> None:
        import torch

        from finepoint.models.probing import evaluating
        from finepoint.selection.passes import label_count

        model, places = self.given.context.model, self.places(step)
        batches = self.given.batches([self.given.rows[place] for place in places], len(places))
        labels = sum(map(label_count, batches))
        size = len(places) // len(batches)  # all at once, or one by one
        with evaluating(model), torch.enable_grad():
            for at, batch in enumerate(batches):
                (self.loss(batch, places[at * size : (at + 1) * size], labels) * self.strength).backward()
