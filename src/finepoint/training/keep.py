"""What is to be kept: how much the model's predictions on other text depend on each chosen entry.

For k entries the Fisher information has k numbers: EWC (arXiv:1612.00796), which holds back what other text needs,
costs 4 bytes an entry here, and nothing in a step.
"""

import logging
import time
from typing import Any

import torch
from torch import Tensor

from finepoint.data.batches import Row
from finepoint.models.probing import evaluating
from finepoint.runtime.progress import tracked
from finepoint.selection.passes import drawing, on_device
from finepoint.training.context import TrainingContext
from finepoint.training.loss import drawn_loss
from finepoint.training.settings import TrainConfig
from finepoint.tuner.anchor import Anchor
from finepoint.tuner.tuner import SparseTuner

logger = logging.getLogger(__name__)


def anchor_for(config: TrainConfig, place: TrainingContext, tuner: SparseTuner, rows: list[Row]) -> Anchor:
    """What pulls the deltas of a tuner that has not moved yet back to 0, by what these rows need of the base."""
    started = time.perf_counter()
    fisher = fisher_at(tuner, place.model, [place.collator.batches([row], 1)[0] for row in rows], config.seed)
    mean = sum(float(part.sum()) for part in fisher.values()) / tuner.count
    logger.info("%d texts are to be kept: mean Fisher information %.2g, in %.1f s", len(rows), mean,
                time.perf_counter() - started)  # fmt: skip
    return Anchor(tuner.trained, fisher, config.protect_strength)


def fisher_at(tuner: SparseTuner, model: Any, batches: list[dict[str, Any]], seed: int) -> dict[str, Tensor]:
    """The Fisher information of the trained entries, a token: the mean squared gradient of what the model itself says.

    Labels are drawn from the model's predictions, so that it is the true one and not the empirical. The gradients of
    different tokens are independent then, with mean 0: the square of their sum has the sum of their squares as its
    expectation, and one backward pass a batch will do.

    Returns:
        By the names of `tuner.trained()`, (k,) each, in the deltas' dtype.
    """
    found = {name: torch.zeros_like(delta) for name, delta in tuner.trained().items()}
    draw, tokens = drawing(torch.Generator().manual_seed(seed)), 0
    with evaluating(model):
        for batch in tracked("reading what is to be kept", batches):
            batch = on_device(batch, next(model.parameters()).device)
            loss, count = drawn_loss(model, batch, draw)
            loss.backward()
            for name, delta in tuner.trained().items():
                if delta.grad is not None:
                    found[name].add_(delta.grad.square())
                    delta.grad = None
            tokens += count
    return {name: total / tokens for name, total in found.items()}
