"""Passes over examples: what a batch is, its loss and what this is a mean over, its single examples, drawn labels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from finepoint.errors import FinepointError, reason_of
from finepoint.models.probing import evaluating, undisturbed
from finepoint.runtime import distributed

__all__ = ["Batch", "counts_every_label", "drawing", "drawn", "evaluating", "label_count", "loss_of", "on_device",
           "row_count", "split", "undisturbed"]  # fmt: skip

Batch = Mapping[str, Any]
"""What a model's forward takes and returns a loss for: `labels` among it (ignored positions are labelled -100), or
`start_positions` and `end_positions`, or `return_loss=True`."""
# Of the first of these that a batch holds, the first dimension counts examples.
ROWS = ("labels", "input_ids", "start_positions", "decoder_input_ids", "inputs_embeds", "input_features",
        "input_values", "attention_mask")  # fmt: skip
# Pieces of all images in one long row, with what tells how many belong to each image.
PACKED = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
SHARED = ("cache_position",)  # one for all examples


def label_count(batch: Batch, every: bool = False) -> int:
    """How many labels the loss of this batch is a mean over; without labels it is one over the examples.

    Args:
        every: the first label of a row counts too; see `counts_every_label`.
    """
    if "labels" not in batch:
        return row_count(batch)
    labels = batch["labels"]
    if labels.ndim == 1:  # one label a sequence
        return len(labels)
    # A causal model predicts each token from those before it, so the first label is never scored.
    return int((labels[:, 0 if every else 1 :] != -100).sum())


TRIED = 64  # labels by which is tried how a model counts them
_EVERY: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def counts_every_label(model: nn.Module, batches: Sequence[Batch]) -> bool:
    """Whether the model's own loss compares every position with its own label, as encoder-decoders' does.

    Tried on the first example: the loss is recomputed from the logits both ways.
    """
    if model not in _EVERY:
        usual = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        first = next((batch for batch in batches if _has_token_labels(batch)), None)
        if first is None or any(distributed.is_sharded(weight) for weight in model.parameters()):
            return usual
        with suppress(FinepointError):  # what cannot be told apart is tried together
            first = next(split(first))
        _EVERY[model] = _tried(model, _shortened(first), usual)
    return _EVERY[model]


def _shortened(example: Batch) -> Batch:
    """Its places up to the last label, a few of them: the way to count is the same, and all logits of a long text would
    take more memory than the scoring itself."""
    labels = example["labels"]
    end = int((labels[0] != -100).nonzero()[-1]) + 1
    start = max(0, end - TRIED)
    kept = example.get("logits_to_keep")
    others = any(isinstance(value, Tensor) and value.ndim > 2 for value in example.values())  # masks, pictures
    if len(labels) > 1 or others or (kept is not None and end < labels.shape[1]):
        return example
    cut = {key: value[:, start:end] if isinstance(value, Tensor) and value.shape[:2] == labels.shape else value
           for key, value in example.items()}  # fmt: skip
    return cut if kept is None else cut | {"logits_to_keep": min(int(kept), TRIED)}


def _has_token_labels(batch: Batch) -> bool:
    return (
        isinstance(batch.get("labels"), Tensor) and batch["labels"].ndim == 2 and bool((batch["labels"] != -100).any())
    )


def _tried(model: nn.Module, example: Batch, usual: bool) -> bool:
    """Which of the two ways gives the loss of an example; `usual` where neither does, or both."""
    with undisturbed(model), torch.no_grad():
        try:
            output = model(**on_device(example, next(model.parameters()).device))
        except (TypeError, ValueError):  # which the scoring will tell of
            return usual
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


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss of a batch, whatever form its output has: (), on the device of the model.

    Raises:
        FinepointError: the model refuses the batch, or returns no loss for it.
    """
    held = ", ".join(map(str, batch))
    try:
        output = model(**batch)
    except (TypeError, ValueError) as error:
        raise FinepointError(f"the model does not take a scoring batch of {held}: {reason_of(error)}") from error
    if isinstance(output, tuple):
        loss = output[0]
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise FinepointError(f"the model returns no loss for a scoring batch of {held}; add labels, or what else makes "
                             "it return one (return_loss=True, start_positions and end_positions)")  # fmt: skip
    return loss.reshape(())


DRAWN = 256  # positions whose probabilities are held


@torch.no_grad()
def drawn(model: nn.Module, batches: Sequence[Batch], seed: int) -> list[dict[str, Any]]:
    """The examples of these batches, one by one, with labels that the model itself would give, wherever they had one.

    Raises:
        FinepointError: a batch without labels of tokens, or a model whose logits are not those of its labels.
    """
    draw, every, found = drawing(torch.Generator().manual_seed(seed)), counts_every_label(model, batches), []
    with evaluating(model):
        for example in (example for batch in batches for example in split(batch)):
            if not _has_token_labels(example):
                raise FinepointError("what a model writes next is to be kept, and this batch has no labels of tokens")
            inputs = on_device(example, next(model.parameters()).device)
            labels = example["labels"][:, 0 if every else 1 :].clone()
            # Encoder-decoders make from the labels what they read; of all others the logits know nothing of them.
            given = inputs if every else {key: value for key, value in inputs.items() if key != "labels"}
            logits = model(**given).logits[:, -example["labels"].shape[1] :][:, : labels.shape[1]]
            wanted = labels != -100
            parts = logits[wanted.to(logits.device)].split(DRAWN)
            labels[wanted] = torch.cat([draw(part).cpu() for part in parts]).to(labels.device)
            found.append({**example, "labels": torch.cat([example["labels"][:, : 0 if every else 1], labels], 1)})
    return found


def drawing(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Draws labels, (n,) int64, from logits, (n, vocabulary), by the inverse of the distribution function.

    The numbers are drawn on the CPU, so that they are the same on every device.
    """

    def draw(logits: Tensor) -> Tensor:
        reached = torch.softmax(logits.float(), -1).cumsum(-1)
        chance = torch.rand(len(logits), 1, generator=generator).to(reached.device)
        return torch.searchsorted(reached, chance * reached[:, -1:])[:, 0].clamp(max=logits.shape[-1] - 1)

    return draw


def row_count(batch: Batch) -> int:
    """How many examples a batch has.

    Raises:
        FinepointError: it holds no tensor.
    """
    named = (batch[key] for key in ROWS if isinstance(batch.get(key), Tensor))
    for value in (*named, *batch.values()):
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise FinepointError(f"a scoring batch holds no tensor, only {', '.join(map(str, batch)) or 'nothing'}")


def split(batch: Batch) -> Iterator[dict[str, Any]]:
    """The batch as batches of one example.

    Raises:
        FinepointError: nothing tells which part of a tensor belongs to which example.
    """
    size = row_count(batch)
    parts = {key: _parts(key, value, batch, size) for key, value in batch.items()}
    for row in range(size):
        yield {key: of[row] for key, of in parts.items()}


def _parts(key: str, value: Any, batch: Batch, size: int) -> list[Any]:
    """What each example has of one thing in a batch."""
    if size == 1 or not isinstance(value, Tensor) or not value.ndim or key in SHARED:
        return [value] * size
    grid = batch.get(PACKED.get(key, ""))
    if isinstance(grid, Tensor):
        pieces = grid.prod(-1).tolist()
        if len(grid) == size and sum(pieces) == len(value):
            return list(value.split(pieces))
    elif key == "position_ids" and value.ndim == 3:  # (kinds, examples, tokens) of models of pictures
        return list(value.split(1, dim=1))
    elif len(value) == size:
        return list(value.split(1))
    elif len(value) == 1:
        return [value] * size
    raise FinepointError(f"a scoring batch of {size} examples holds {key} of shape {tuple(value.shape)}, and nothing "
                         "tells which part is whose; give batches of one example")  # fmt: skip


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
