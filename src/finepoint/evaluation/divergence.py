"""How far an adapted model's predictions lie from the base model's, where nothing was to be learned."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from finepoint.adapters.adapter import SparseAdapter, Switch
from finepoint.data.batches import Collator, padded, token_labels
from finepoint.data.examples import Example, Labelled, some
from finepoint.data.tokens import IGNORED, Row, encode_each, learned, refuse_beyond
from finepoint.selection.passes import evaluating, on_device
from finepoint.training.divergence import TOKENS, BasePredictions, divergences, summed
from finepoint.training.texts import rows_to_keep

__all__ = ["divergences", "kl_of_prompts", "kl_of_protected", "learned_and_disturbed", "mean_kl"]
PROMPTS = 64  # examples whose prompts are looked at


@torch.no_grad()
def mean_kl(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    adapter: SparseAdapter | Switch,
    *,
    window: int = 128,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """KL(base || adapted) of the next token, in nats, averaged over the first `window` tokens of each example.

    It is 0 where the adapted model predicts what the base did, and unlike a change of likelihood it cannot cancel out.

    Args:
        model: the base model; the adapter goes in and out for every batch.
        adapter: or what puts one in and takes it out (`SparseAdapter.alternating`), where that is at hand.

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


def kl_of_protected(model: Any, tokenizer: Any, examples: Sequence[Example], adapter: SparseAdapter) -> dict[str, Any]:
    """`kl`: KL(base || adapted) where examples whose predictions are to be kept have labels, up to 256 tokens of each;
    and how many `texts` and `tokens` it is a mean over.

    Raises:
        FinepointError: they have classes, or nothing in them has a label.
    """
    rows = rows_to_keep(examples, model, tokenizer)
    collator = Collator.of(model, tokenizer, [row.ids for row in rows])
    base = BasePredictions.of(model, collator, rows, changing=adapter)
    with adapter.applied(model):
        return {"kl": base.kl(model), "texts": base.texts, "tokens": base.tokens}


def kl_of_prompts(
    model: Any, tokenizer: Any, examples: Sequence[Example], adapter: SparseAdapter | Switch, window: int = 256
) -> float | None:
    """KL(base || adapted) over the prompts of up to `PROMPTS` examples, the last tokens of each with its answer.

    On the task's own inputs it is what predicts forgetting, after RL's Razor (arXiv:2509.04259).

    Returns:
        Nats a token; None where the examples have no prompt, or classes for answers.
    """
    if isinstance(examples[0], Labelled):
        return None
    found = encode_each(tokenizer, some(list(examples), PROMPTS))
    rows = [Row(row.ids[-window:], row.labels[-window:]) for row in found if isinstance(row.labels, list)]
    rows = [row for row in rows if learned(row)]
    collator = Collator.of(model, tokenizer, [row.ids for row in rows])
    return learned_and_disturbed(model, collator, rows, adapter)[1] if rows else None


@torch.no_grad()
def learned_and_disturbed(
    model: Any, collator: Collator, rows: Sequence[Row], adapter: SparseAdapter | Switch
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
    model: Any, collator: Collator, rows: Sequence[list[int]], adapter: SparseAdapter | Switch
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Batch by batch: which rows, where their tokens are (rows, tokens), and the logits of base and adapted model."""
    with adapter.alternating(model) if isinstance(adapter, SparseAdapter) else nullcontext(adapter) as switch:
        for places in collator.by_length([len(row) for row in rows], TOKENS):
            own = [rows[place] for place in places]
            batch = on_device(collator.inputs(own), model.device)
            found = []
            with evaluating(model):
                for on in (False, True):
                    switch(on)
                    found.append(model(**batch).logits)
                switch(False)
            real = padded([[1] * len(row) for row in own], 0, collator.side).bool().to(found[0].device)
            yield places, real, *found
