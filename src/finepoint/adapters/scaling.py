"""Between the base and the trained model: antidotes to forgetting that need no training, for adapters of any kind."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from finepoint.adapters.adapter import SparseAdapter, check_base
from finepoint.adapters.change import Change
from finepoint.adapters.entries import checksum, gather, moved
from finepoint.errors import FinepointError
from finepoint.models.loading import block_of, new_head

MEASURED = ("disturbed", "disturb_at_most", "scaled", "results")
"""What an adapter says was measured with it, and holds for no other scale."""


def scaled(adapter: SparseAdapter, model: nn.Module, factor: float | Callable[[str], float]) -> SparseAdapter:
    """An adapter that holds base + factor x (trained - base) at the same entries, computed in float64, rounded once.

    A factor of 1 gives the adapter's own bits, 0 the base's. A new classification head, which has no base, stays as
    it was trained.

    Args:
        model: the base model, which tells the base's values; it stays as it is.
        factor: one for all weights, or by the weight's name.

    Returns:
        Changes of kind `value` (in the weights' dtype), or `full` where they were.

    Raises:
        FinepointError: the adapter does not fit the model, or one is applied to it now.
    """
    adapter.check(model, in_place=False)
    check_base(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    kept = unscaled(adapter, model)
    changes = {
        name: change if name in kept else _scaled(change, weights[name], factor(name) if callable(factor) else factor)
        for name, change in adapter.changes.items()
    }
    info = {key: value for key, value in adapter.info.items() if key not in MEASURED}
    return SparseAdapter(changes, info, adapter.base)


def wise_ft(adapter: SparseAdapter, model: nn.Module, alpha: float) -> SparseAdapter:
    """WiSE-FT, arXiv:2109.01903: (1 - alpha) base + alpha trained, alike in all weights.

    Raises:
        FinepointError: as for `scaled`.
    """
    return scaled(adapter, model, alpha)


def scale_by_depth(adapter: SparseAdapter, model: nn.Module, alpha: float) -> SparseAdapter:
    """LiNeS, arXiv:2410.17146: block l of L (from 0) is scaled by alpha + (1 - alpha) l / (L - 1).

    What comes before the blocks (the embedding, with a head that is tied to it) counts as the first block, what comes
    after them (norm, head) as the last.

    Raises:
        FinepointError: as for `scaled`; a model without blocks.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    owners = {name: block_of(model, name) for name in names}
    blocks = list(dict.fromkeys(block for block in owners.values() if block is not None))
    if not blocks:
        raise FinepointError(f"{type(model).__name__} has no blocks to tell its depth by; use wise_ft")
    first = next(place for place, name in enumerate(names) if owners[name])
    rises = {block: depth / max(1, len(blocks) - 1) for depth, block in enumerate(blocks)}

    def factor(name: str) -> float:
        block = owners[name]
        rise = rises[block] if block else float(names.index(name) > first)
        return alpha + (1 - alpha) * rise

    return scaled(adapter, model, factor)


def unscaled(adapter: SparseAdapter, model: nn.Module) -> list[str]:
    """The weights of a classifier's new head, whose base was drawn at random and is nothing to go back to."""
    return new_head(model) if adapter.info.get("task") == "classification" else []


def between(change: Change, base: Tensor, factor: float) -> Tensor:
    """base + factor x (trained - base) at a change's entries, in float64, rounded once: (k,), the base's dtype."""
    if factor == 1:
        return change.new_values(base)
    if change.kind == "delta":
        return moved(base, factor * change.numbers.to(base.device, torch.float64))
    return moved(base, factor * (change.new_values(base).double() - base.double()))


def _scaled(change: Change, weight: nn.Parameter, factor: float) -> Change:
    base = gather(weight, change.positions())
    values = between(change, base, factor).to("cpu", base.dtype)
    if change.kind == "full":
        return Change(change.shape, change.dtype, "full", change.indices, values.reshape(change.shape))
    return Change(change.shape, change.dtype, "value", change.indices, values, checksum(base))
