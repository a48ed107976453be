"""How far a model has come from its base: KL at chosen positions, with what the base predicts there computed once.

What is kept is not the base's logits, which outweigh everything else, but the states that its head is given.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from finepoint.data.batches import IGNORED, Collator
from finepoint.data.tokens import Row, learned
from finepoint.errors import FinepointError
from finepoint.models.probing import evaluating
from finepoint.models.quantised import is_quantised
from finepoint.runtime.devices import in_float64
from finepoint.selection.passes import on_device
from finepoint.training.loss import leaves_of, plain_head, states_of, summed_loss
from finepoint.tuner.finite import refuse_not_numbers

logger = logging.getLogger(__name__)
TOKENS = 1024  # of a pass
CHUNK = 128  # positions whose probabilities are held
LIMIT = 2 << 30  # bytes of logits that may be kept, where a model's predictions are more than its head's output


@dataclass(frozen=True)
class BasePredictions:
    """What a model predicts, as it is now, at the labels of some rows; it can be asked later how far it has moved."""

    batches: list[dict[str, Any]]
    states: list[Tensor]
    """of each batch, (labels, width) on the CPU: what the head was given, or the logits where `head` is None"""
    head: nn.Module | None
    weights: dict[str, Tensor]
    """the head's, as they were, if they may change"""
    texts: int
    tokens: int

    @staticmethod
    @torch.no_grad()
    def of(model: Any, collator: Collator, rows: Sequence[Row], changing: Iterable[str] = ()) -> "BasePredictions":
        """Those of a causal model at the labels of the rows, of which each has one at least.

        Args:
            changing: the names of the weights that may change before `kl` is asked.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        moving = {id(parameters[name]) for name in changing if name in parameters}
        head = plain_head(model)
        moved = {} if head is None else {n: w for n, w in head.named_parameters() if id(w) in moving}
        plain = isinstance(head, nn.Linear)
        if moved and (not plain or any(is_quantised(weight) for weight in moved.values())):
            head = None
        if head is None:
            moved, rows = {}, _affordable(model, rows)
        batches = [collator([rows[at] for at in places])
                   for places in collator.by_length([len(row.ids) for row in rows], TOKENS)]  # fmt: skip
        with evaluating(model):
            states = [states_at_labels(model, head, batch).cpu() for batch in batches]
        weights = {
            name: weight.detach().clone() for name, weight in (head.named_parameters() if moved and head else ())
        }
        return BasePredictions(batches, states, head, weights, len(rows), sum(map(len, states)))

    @torch.no_grad()
    def kl(self, model: Any) -> float:
        """KL(base || model as it is now), in nats, averaged over the labels; one pass over the rows.

        Raises:
            FinepointError: logits are no numbers, or the model rules out what the base does not.
        """
        total, device = 0.0, next(model.parameters()).device
        with evaluating(model):
            for batch, before in zip(self.batches, self.states, strict=True):
                after = states_at_labels(model, self.head, batch)
                for was, now in zip(before.split(CHUNK), after.split(CHUNK), strict=True):
                    total += summed(self._logits(was.to(device), self.weights), self._logits(now, {}))
        return total / self.tokens

    def _logits(self, states: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        if self.head is None:
            return states
        if weights:  # by the product itself: whatever hangs on the module would have its weights follow
            return linear(states, weights["weight"], weights.get("bias", self.head.bias))  # type: ignore[arg-type]
        logits: Tensor = self.head(states)
        return logits


def states_at_labels(model: Any, head: nn.Module | None, batch: Mapping[str, Any]) -> Tensor:
    """What the head is given where a label is predicted, (labels, width); without a head the logits there."""
    batch = on_device(batch, next(model.parameters()).device)
    return states_of(model, head, batch)[batch["labels"][:, 1:] != IGNORED]


def head_as_it_is(head: nn.Module, states: Tensor, moving: bool = False) -> Callable[[Tensor], Tensor]:
    """What makes logits of states also when the head has been trained: itself, or a copy where it is to be trained.

    Args:
        states: any that the head takes, (positions, width).
        moving: it may come to be trained later.

    Raises:
        FinepointError: it is to be trained, and is more than a matrix or quantised.
    """
    if not moving and not leaves_of(head, states[None]):
        return head
    layer: Any = getattr(head, "base_layer", head)  # PEFT's wrap
    if not isinstance(layer, nn.Linear) or is_quantised(layer.weight):
        raise FinepointError(f"the output layer is trained, and {type(layer).__name__} cannot be kept as it is now; "
                             "leave it out of --targets, or give --protect-by replay")  # fmt: skip
    weight, bias = (part if part is None else part.detach().clone() for part in (layer.weight, layer.bias))
    return lambda states: linear(states, weight, bias)


def divergence(
    model: Any, batch: Mapping[str, Any], before: Tensor, head: Callable[[Tensor], Tensor], items: int
) -> Tensor:
    """KL(base || model), in nats, summed over the labels of a batch and divided by `items`; it has a gradient.

    Args:
        before: from `states_at_labels` of the base, for the same batch.
        head: from `head_as_it_is`, of the base.
    """
    now = plain_head(model)
    states, wanted = states_of(model, now, batch), batch["labels"][:, 1:] != IGNORED

    def measure(logits: Tensor, before: Tensor) -> Tensor:
        with torch.no_grad():
            base = head(before)
        return divergences(base, logits)

    return summed_loss(now, states, wanted, before, measure) / items


def _affordable(model: Any, rows: Sequence[Row]) -> Sequence[Row]:
    """So many of the rows as whole logits may be kept of, one at least."""
    bytes_each = model.config.get_text_config().vocab_size * next(model.parameters()).itemsize
    count, room = 0, LIMIT
    while count < len(rows) and (room := room - learned(rows[count]) * bytes_each) >= 0:
        count += 1
    if count < len(rows):
        logger.warning("the KL is measured on the first %d of %d texts: this model's predictions are more than its "
                       "head's output, so that all of its logits must be kept", max(1, count), len(rows))  # fmt: skip
    return rows[: max(1, count)]


def summed(base: Tensor, adapted: Tensor) -> float:
    """The summed divergence of two sets of logits, (positions, vocabulary) each.

    Raises:
        FinepointError: logits are no numbers, or the adapted model rules out what the base does not.
    """
    total = 0.0
    for before, after in zip(base.split(CHUNK), adapted.split(CHUNK), strict=True):
        refuse_not_numbers(before)
        refuse_not_numbers(after, "with the adapter the model's logits are")
        total += float(in_float64(divergences(before, after)).sum())
    if total == float("inf"):
        raise FinepointError("the adapter rules out tokens that the base does not: the KL between them is infinite")
    return total


def divergences(base: Tensor, adapted: Tensor) -> Tensor:
    """KL between the distributions of two sets of logits, (positions, vocabulary) each: (positions,), at least float32.

    A token of probability 0, whose logit is -inf, adds nothing; one that only the base allows makes it infinite.
    """
    p, q = (logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1) for logits in (base, adapted))
    return (p.exp() * (p - q)).masked_fill(p.isneginf(), 0.0).sum(-1)
