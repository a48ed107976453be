"""Passes over the scoring examples: what a batch is, and a model that nothing of a pass is left on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.errors import FinepointError

Batch = Mapping[str, Any]
"""What a model's forward takes, `labels` among it; ignored positions are labelled -100."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model is frozen, in eval mode and without gradients; afterwards it is exactly as before.

    That covers requires_grad, gradients, the train/eval mode of every module and the random state of every device.
    """
    parameters = list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    with _random_state_kept(parameters), torch.enable_grad(), evaluating(model):
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
        finally:
            for parameter, flag, gradient in zip(parameters, flags, gradients, strict=True):
                parameter.requires_grad_(flag)
                parameter.grad = gradient


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; afterwards each has the mode it had, also after an exception."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _random_state_kept(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Afterwards the random state of the CPU, and of every device that holds one of the parameters, is as before."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        elsewhere = {parameter.device for parameter in parameters} - {torch.device("cpu"), torch.device("meta")}
        for kind in {device.type for device in elsewhere}:
            devices = [device for device in elsewhere if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=devices, device_type=kind))
        yield


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
