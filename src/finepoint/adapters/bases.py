"""Whether an adapter belongs to a model, and the named exceptions to its own base: the same values in a wider dtype, a
base that is another one beside the entries that the adapter changes."""

import logging
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.adapters.adapter import SparseAdapter, base_beneath
from finepoint.adapters.change import Change
from finepoint.adapters.entries import gather
from finepoint.adapters.fingerprint import FINGERPRINT, unlike
from finepoint.errors import FinepointError
from finepoint.models.quantised import Replaced, float_values

logger = logging.getLogger(__name__)


def in_wider_dtype(adapter: SparseAdapter, model: nn.Module) -> SparseAdapter:
    """The adapter for `model`, whose weights have a wider dtype than those it was trained on, and the same values.

    So a model trained in bfloat16 runs, exactly, on a machine that computes in float32. What is written are the values
    of the training, rounded as they were there; no other difference of base is overlooked.

    Args:
        model: the base; it stays as it is. Where it has the adapter's dtype, the change stays as it is too.

    Raises:
        FinepointError: a dtype that does not hold the adapter's numbers; anything else in which the base differs.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    changes = {}
    for name, change in adapter.changes.items():
        weight = weights.get(name)
        fits = weight is not None and tuple(weight.shape) == change.shape and change.lies_on(weight)
        changes[name] = _widened(name, change, weight) if weight is not None and fits else change
    found = replace(adapter, changes=changes)
    found.check(model, in_place=False)  # what did not fit is told as always
    return found


def rebased(adapter: SparseAdapter, model: nn.Module) -> SparseAdapter:
    """The adapter for `model`, which differs from the base it was trained on beside the entries it changes.

    At these entries, in the form of the weights and in everything else the model still has to be the base. What the
    model computes with the adapter is then what nobody has trained or measured; a line says how much differs.

    Args:
        model: the other base; it stays as it is.

    Raises:
        FinepointError: the model is being trained.
    """
    if hasattr(model, "finepoint"):
        raise FinepointError("the model is being trained; close its SparseTuner before taking it for a base")
    known = adapter.fingerprint
    here = base_beneath(model, known)
    if known and (others := unlike(known, here)):
        logger.warning("taken on another base by name: %d of its %d weights are not those the adapter was trained on, "
                       "the first %s", len(others), len(known.weights), others[0][0])  # fmt: skip
    return replace(adapter, base=adapter.base | {FINGERPRINT: here.as_json()})


def _widened(name: str, change: Change, weight: nn.Parameter) -> Change:
    own: torch.dtype = getattr(torch, change.dtype)
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.dtype == own:
        return change
    if torch.promote_types(own, weight.dtype) != weight.dtype:
        raise FinepointError(f"{name}: {dtype} in the model does not hold what was trained in {change.dtype}; "
                             f"load it as {change.dtype} or wider")  # fmt: skip
    values = change.new_values(gather(weight, change.positions()).to(own)).to("cpu", weight.dtype)
    if change.kind == "full":
        return replace(change, dtype=dtype, numbers=values.reshape(change.shape))
    return replace(change, dtype=dtype, kind="value", numbers=values)


def verify(adapter: SparseAdapter, model: nn.Module) -> dict[str, Any]:
    """Applies and reverts the adapter, comparing all bits of the weights it touches; of quantised ones, the values.

    Returns:
        `entries`, `weights`, `changed` (stored values), `reverted`, and in `base` how far the adapter knows its base:
        `whole`, `sampled` (one of several parts of each weight), or `entries` alone.

    Raises:
        FinepointError: it does not fit the model.
    """
    before = _digests(adapter, model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    originals = {name: gather(weights[name], adapter[name]) for name in adapter if name in weights}
    with adapter.applied(model):
        changed = sum(int((_shown(model, name, adapter[name]) != originals[name]).sum()) for name in adapter)
    if _digests(adapter, model) != before:
        raise AssertionError("revert did not restore every bit")
    known = adapter.fingerprint
    base = "entries" if known is None else "whole" if known.one_in == 1 else "sampled"
    return {"entries": adapter.count, "weights": len(adapter), "changed": changed, "reverted": True, "base": base}


def _shown(model: nn.Module, name: str, indices: Tensor) -> Tensor:
    """The entries that the model computes with: over a quantised weight, those of its layer's replaced forward."""
    owner, _, attribute = name.rpartition(".")
    forward = vars(model.get_submodule(owner)).get("forward")
    weight = forward.weight() if isinstance(forward, Replaced) and attribute == "weight" else model.get_parameter(name)
    return gather(weight, indices)


def _digests(adapter: SparseAdapter, model: nn.Module) -> dict[str, str]:
    weights = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name in adapter:
        if name in weights:
            raw = float_values(weights[name]).cpu().contiguous().view(-1).view(torch.uint8)
            found[name] = sha256(raw.numpy().tobytes()).hexdigest()
    return found
