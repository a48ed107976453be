"""The named exceptions to an adapter's own base: its change for the same values in a wider dtype, and for a base that
is another one beside the entries that the adapter changes.
"""

import logging
from dataclasses import replace

import torch
from torch import nn

from finepoint.adapters.adapter import SparseAdapter, base_beneath
from finepoint.adapters.change import Change
from finepoint.adapters.entries import gather
from finepoint.adapters.fingerprint import FINGERPRINT, unlike
from finepoint.errors import FinepointError

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
