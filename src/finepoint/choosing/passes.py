"""Passes over the scoring examples: what a batch is, and how many labels its loss is a mean over."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from finepoint.errors import FinepointError
from finepoint.probing import evaluating, undisturbed

__all__ = ["Batch", "evaluating", "label_count", "on_device", "split", "undisturbed"]

Batch = Mapping[str, Any]
"""What a model's forward takes, `labels` among it; ignored positions are labelled -100."""


def label_count(batch: Batch) -> int:
    """How many labels the loss of this batch is a mean over."""
    if "labels" not in batch:
        raise FinepointError(f"a scoring batch has no 'labels', only {', '.join(batch)}; they are needed for the loss")
    labels = batch["labels"]
    if labels.ndim == 1:  # one label a sequence
        return len(labels)
    # A causal model predicts each token from those before it, so the first label is never scored.
    return int((labels[:, 1:] != -100).sum())


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
