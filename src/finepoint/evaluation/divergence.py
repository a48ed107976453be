"""How far an adapted model's predictions lie from the base model's, where nothing was to be learned."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from finepoint.adapters.adapter import SparseAdapter
from finepoint.data.batches import Collator, padded, token_labels
from finepoint.data.examples import Example
from finepoint.data.tokens import IGNORED, Row, encode_each, refuse_beyond
from finepoint.selection.passes import evaluating, on_device
from finepoint.training.divergence import TOKENS, divergences, summed

__all__ = ["divergences", "learned_and_disturbed", "mean_kl"]


@torch.no_grad()
def mean_kl(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    adapter: SparseAdapter,
    *,
    window: int = 128,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """KL(base || adapted) of the next token, in nats, averaged over the first `window` tokens of each example.

    It is 0 where the adapted model predicts what the base did, and unlike a change of likelihood it cannot cancel out.

    Args:
        model: the base model; the adapter goes in and out for every batch.

    Returns:
        `kl`, and `tokens`: how many positions it is a mean over.
    """
    rows = [row.ids[:window] for row in encode_each(tokenizer, examples)]
    refuse_beyond(model, tokenizer, rows, examples)
    total, count = 0.0, 0
    for places, real, base, adapted in _logits(model, Collator.of(model, tokenizer, rows), rows, adapter):
        total += summed(base[real], adapted[real])
        count += int(real.sum())
        advance(len(places))
    return {"kl": total / count, "tokens": count}


@torch.no_grad()
def learned_and_disturbed(
    model: Any, collator: Collator, rows: Sequence[Row], adapter: SparseAdapter
) -> tuple[Tensor, float | None]:
    """What an adapter does where a row is learned, and what it does to the rest of the row.

    Args:
        model: the causal base model; the adapter goes in and out for every batch.
        rows: with labels for their tokens, at least one of them learned in each.

    Returns:
        (rows,) float64: the mean loss over the labels of each row under the adapter; and KL(base || adapted), in nats,
        averaged over the positions that predict no label, which are those of the prompts; None where there are none.
    """
    losses = torch.empty(len(rows), dtype=torch.float64)
    total, count = 0.0, 0
    for places, real, base, adapted in _logits(model, collator, [row.ids for row in rows], adapter):
        labels = padded([token_labels(rows[place]) for place in places], IGNORED, collator.side).to(base.device)[:, 1:]
        real = real[:, :-1] & real[:, 1:]
        wanted = real & (labels != IGNORED)
        sums = torch.zeros(wanted.shape, dtype=torch.float64)
        told = cross_entropy(adapted[:, :-1][wanted].float(), labels[wanted], reduction="none")
        sums[wanted.cpu()] = told.cpu().double()
        losses[places] = sums.sum(1) / wanted.sum(1).cpu()
        rest = real & ~wanted
        total += summed(base[:, :-1][rest], adapted[:, :-1][rest])
        count += int(rest.sum())
    return losses, total / count if count else None


def _logits(
    model: Any, collator: Collator, rows: Sequence[list[int]], adapter: SparseAdapter
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Batch by batch: which rows, where their tokens are (rows, tokens), and the logits of base and adapted model."""
    for places in collator.by_length([len(row) for row in rows], TOKENS):
        own = [rows[place] for place in places]
        batch = on_device(collator.inputs(own), model.device)
        with evaluating(model):
            base = model(**batch).logits
            with adapter.applied(model):
                adapted = model(**batch).logits
        real = padded([[1] * len(row) for row in own], 0, collator.side).bool().to(base.device)
        yield places, real, base, adapted
