"""An adapter laid over a checkpoint's files: what it writes where, checked weight by weight."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from finepoint.adapters.adapter import SparseAdapter, base_beneath
from finepoint.adapters.change import Change
from finepoint.adapters.entries import checksum, gather
from finepoint.adapters.fingerprint import differences, unlike
from finepoint.errors import FinepointError
from finepoint.exchange.checkpoint import Checkpoint
from finepoint.models.loading import is_gguf
from finepoint.runtime.progress import tracked

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patch:
    """What an adapter writes into one weight; numbers in the dtype the adapter was trained in."""

    shape: tuple[int, ...]
    indices: Tensor
    """(k,) int64, ascending"""
    base: Tensor | None
    """(k,) the base's values there; None for a new classification head, which has no base"""
    values: Tensor
    """(k,) what they become"""
    delta: Tensor
    """(k,) the trained change, float32 (float64 of float64); values - base where only the values were kept"""


def lay_over(adapter: SparseAdapter, checkpoint: Checkpoint, loaded: nn.Module | None = None) -> dict[str, Patch]:
    """Patches by weight name; one weight of the checkpoint is in memory at a time.

    Args:
        loaded: the checkpoint's model, to be looked at in place of the files.

    Raises:
        FinepointError: the adapter belongs to another base; the weight is named.
    """
    found = {}
    is_classifier = adapter.info.get("task") == "classification"
    # A classifier lacks its base's head, so that an embedding which is tied there is not tied in training.
    form = loaded or (classifier_outline(checkpoint, adapter.info) if is_classifier else checkpoint.outline)
    if others := differences(adapter.base, form, [name for name in adapter if name in checkpoint.ties]):
        raise FinepointError(f"the adapter does not fit {checkpoint.name}: {others[0]}")
    for name in tracked("checking the base", list(adapter)):
        change = adapter.changes[name]
        if name not in checkpoint.ties and change.kind == "full" and is_classifier:
            values = change.numbers.reshape(-1)
            found[name] = Patch(change.shape, change.positions(), None, values, values)
        else:
            weight = loaded.get_parameter(name) if loaded and name in checkpoint.ties else checkpoint.weight(name)
            found[name] = _patch(name, change, weight, checkpoint)
    refuse_other_base(adapter, checkpoint, loaded, {change.dtype for change in adapter.changes.values()})
    return found


def refuse_other_base(
    adapter: SparseAdapter, checkpoint: Checkpoint, loaded: nn.Module | None, dtypes: Iterable[str]
) -> None:
    """Compares what the adapter knows of its base as a whole.

    Args:
        dtypes: in which the base may have been loaded, rounded, when it was trained.

    Raises:
        FinepointError: it is another one.
    """
    known = adapter.fingerprint
    if known is None or checkpoint.any_base:
        return
    here = base_beneath(loaded, known) if loaded else checkpoint.fingerprint(known.one_in)
    if unread := [name for name in here.unknown if known.weights.get(name)]:
        logger.warning("%d weights of %s are stored in another layout than the model's, the first %s: whether they are "
                       "those of the adapter's base is not known", len(unread), checkpoint.name, unread[0])  # fmt: skip
    # What a classifier's base has beyond it is the head that the classifier did without.
    passed = ("more",) if adapter.info.get("task") == "classification" else ()
    others = unlike(known, here)
    for dtype in dtypes if others and not loaded else ():
        # Of a base that was rounded when it was loaded: `narrowed` tells what follows from that.
        rounded = dict(unlike(known, checkpoint.fingerprint(known.one_in, dtype)))
        others = [(name, how) for name, how in others if name in rounded]
    for name, how in others:
        if how not in passed:
            what = {"values": f"the values of {name} are not those of the base it was trained on, beside the entries "
                              "it changes", "missing": f"it has no weight {name!r}, and the adapter's base has",
                    "more": f"it has a weight {name!r} that the adapter's base has not"}  # fmt: skip
            # A patch knows its file by every byte.
            other = "" if is_gguf(checkpoint.name) else ", or take this one by name (--any-base)"
            raise FinepointError(f"the adapter does not fit {checkpoint.name}: {what[how]}; give that base{other}")


def classifier_outline(checkpoint: Checkpoint, info: Mapping[str, Any]) -> nn.Module:
    """The checkpoint's model with a classification head in place of its own, on the meta device."""
    config = transformers.AutoConfig.for_model(**classifier_config(checkpoint, info))
    with torch.device("meta"):
        return transformers.AutoModelForSequenceClassification.from_config(config)


def classifier_config(checkpoint: Checkpoint, info: Mapping[str, Any]) -> dict[str, Any]:
    """Its configuration.

    Raises:
        FinepointError: the adapter does not name its labels, or there is no such classifier.
    """
    if not info.get("labels"):
        raise FinepointError("the adapter is a classifier's and does not name its labels")
    labels = dict(enumerate(info["labels"]))
    config = transformers.AutoConfig.from_pretrained(
        checkpoint.folder, trust_remote_code=False, id2label=labels, label2id={label: i for i, label in labels.items()}
    )
    try:
        model = transformers.AutoModelForSequenceClassification._model_mapping[type(config)]
    except KeyError as error:
        raise FinepointError(f"transformers has no classifier of type {config.model_type}") from error
    config.architectures = [model.__name__]
    return json.loads(config.to_json_string(use_diff=True))


def _patch(name: str, change: Change, weight: Tensor, checkpoint: Checkpoint) -> Patch:
    if tuple(weight.shape) != change.shape:
        raise FinepointError(f"the adapter does not fit {checkpoint.name}: {name} has shape {tuple(weight.shape)} "
                             f"there, {change.shape} in the adapter")  # fmt: skip
    positions = change.positions()
    dtype: torch.dtype = getattr(torch, change.dtype)
    base = gather(weight, positions).to(dtype)
    if any(checksum(gather(weight, part).to(dtype)) != digest for part, digest in change.checksums()):
        raise FinepointError(f"the adapter does not fit {checkpoint.name}: the values of {name} are not those of the "
                             f"base it was trained on")  # fmt: skip
    values = change.new_values(base)
    if not bool((values.isfinite() | ~base.isfinite()).all()):
        raise FinepointError(f"{name}: base + delta is too large a number for {change.dtype}")
    wide = torch.promote_types(base.dtype, torch.float32)
    delta = change.numbers if change.kind == "delta" else values.to(wide) - base.to(wide)
    return Patch(change.shape, positions, base, values, delta)


def narrowed(name: str, patch: Patch, dtype: str) -> tuple[Tensor, dict[str, int]]:
    """A patch's values in a file's dtype, with how many were rounded and how many of the changes vanished by that.

    Raises:
        FinepointError: the file's dtype is wider than the adapter's, whose base was rounded where it does not say.
    """
    target: torch.dtype = getattr(torch, dtype)
    if torch.promote_types(patch.values.dtype, target) != patch.values.dtype:
        own = str(patch.values.dtype).removeprefix("torch.")
        raise FinepointError(f"{name}: the adapter was trained on weights rounded to {own}, the model stores {dtype}; "
                             f"give --dtype {own} to write the model that was trained")  # fmt: skip
    values = patch.values.to(target)
    changed = patch.values != patch.base if patch.base is not None else torch.ones_like(values, dtype=torch.bool)
    same = values == patch.base.to(target) if patch.base is not None else ~changed
    return values, {
        "rounded": int((values.to(patch.values.dtype) != patch.values).sum()),
        "vanished": int((changed & same).sum()),
    }
