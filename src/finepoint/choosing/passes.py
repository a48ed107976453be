"""Passes over the scoring examples: what a batch is, and how many labels its loss is a mean over."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from finepoint import ranks
from finepoint.errors import FinepointError
from finepoint.probing import evaluating, undisturbed

__all__ = ["Batch", "counts_every_label", "evaluating", "label_count", "on_device", "split", "undisturbed"]

Batch = Mapping[str, Any]
"""What a model's forward takes, `labels` among it; ignored positions are labelled -100."""


def label_count(batch: Batch, every: bool = False) -> int:
    """How many labels the loss of this batch is a mean over.

    Args:
        every: the first label of a row counts too; see `counts_every_label`.
    """
    if "labels" not in batch:
        raise FinepointError(f"a scoring batch has no 'labels', only {', '.join(batch)}; they are needed for the loss")
    labels = batch["labels"]
    if labels.ndim == 1:  # one label a sequence
        return len(labels)
    # A causal model predicts each token from those before it, so the first label is never scored.
    return int((labels[:, 0 if every else 1 :] != -100).sum())


_EVERY: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def counts_every_label(model: nn.Module, batches: Sequence[Batch]) -> bool:
    """Whether the model's own loss compares every position with its own label, as encoder-decoders' does.

    Tried on the first example: the loss is recomputed from the logits both ways.
    """
    if model not in _EVERY:
        usual = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        first = next((batch for batch in batches if _has_token_labels(batch)), None)
        if first is None or any(ranks.is_sharded(weight) for weight in model.parameters()):
            return usual
        _EVERY[model] = _tried(model, next(split(first)), usual)
    return _EVERY[model]


def _has_token_labels(batch: Batch) -> bool:
    return (
        isinstance(batch.get("labels"), Tensor) and batch["labels"].ndim == 2 and bool((batch["labels"] != -100).any())
    )


def _tried(model: nn.Module, example: Batch, usual: bool) -> bool:
    """Which of the two ways gives the loss of an example; `usual` where neither does, or both."""
    with undisturbed(model), torch.no_grad():
        output = model(**on_device(example, next(model.parameters()).device))
    logits, loss = getattr(output, "logits", None), getattr(output, "loss", None)
    labels = example["labels"]
    if logits is None or loss is None or logits.shape[:2] != labels.shape:
        return usual
    labels = labels.to(logits.device)
    ways = {True: (logits, labels), False: (logits[:, :-1], labels[:, 1:])}
    errors = {every: abs(float(cross_entropy(own.flatten(0, 1).float(), wanted.flatten()) - loss))
              for every, (own, wanted) in ways.items()}  # fmt: skip
    right = [every for every, error in errors.items() if error < 1e-3 * max(1.0, float(loss))]
    return right[0] if len(right) == 1 else usual


def split(batch: Batch) -> Iterator[dict[str, Any]]:
    """The batch as batches of one example."""
    size = len(batch["labels"])
    for row in range(size):
        yield {
            key: value[row : row + 1] if isinstance(value, Tensor) and value.ndim and len(value) == size else value
            for key, value in batch.items()
        }


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
