"""Whether an adapter belongs to a model, and whether it goes in and out of it without a trace."""

from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.entries import gather
from finepoint.models.quantised import Replaced, float_values


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
