"""Any two checkpoints to an adapter: the entries that differ, or the k that differ most."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.change import Change
from finepoint.adapters.entries import checksum, gather
from finepoint.errors import FinepointError
from finepoint.exchange.checkpoint import Checkpoint, open_checkpoint
from finepoint.runtime.progress import tracked
from finepoint.selection.select import TopK


@dataclass(frozen=True)
class Difference:
    """How one weight differs between two checkpoints."""

    name: str
    base: Tensor
    tuned: Tensor
    change: Tensor
    """tuned - base, float32 (float64 of float64), the weight's shape"""
    changed: Tensor
    """bool, the weight's shape: whose bits differ (-0.0 and 0.0 do)"""


def extract(base: str, tuned: str, density: float | None = None) -> tuple[SparseAdapter, list[dict[str, Any]]]:
    """The change from one checkpoint to another as an adapter of exact values.

    Both are read weight by weight; memory holds one weight of each and the candidates, about 2k entries.

    Args:
        base: model, as `--model` takes it.
        tuned: a model of the same shape.
        density: share of all entries to keep, in (0, 1], those with the largest |tuned - base| over the whole model
            (ties to the earlier weight and lower position); None keeps every entry whose bits differ, so that
            applying the adapter gives the tuned checkpoint bit for bit.

    Returns:
        The adapter, and for each weight its `weight`, `shape`, `size`, `changed`, `kept`, `energy` (the sum of its
        squared changes) and `kept_energy`. Fewer than density x entries are kept where fewer differ.

    Raises:
        FinepointError: weights that are missing, extra, of other shapes or dtypes, not finite or not floating-point;
            checkpoints that are equal; a density that keeps nothing. The weight is named.
    """
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    names = comparable(before, after)
    rows: dict[str, dict[str, Any]] = {}
    if density is None:
        changes = {}
        for difference in _differences(before, after, names):
            rows[difference.name] = row = _row(difference)
            if row["changed"]:
                indices = difference.changed.view(-1).nonzero().view(-1)
                changes[difference.name] = _change(difference, indices)
                row |= {"kept": len(indices), "kept_energy": row["energy"]}
    else:
        chosen = _largest(before, after, names, density, rows)
        changes = {}
        for difference in _differences(before, after, list(chosen)):
            indices = chosen[difference.name]
            changes[difference.name] = _change(difference, indices)
            kept = difference.change.view(-1)[indices].double().square().sum().item()
            rows[difference.name] |= {"kept": len(indices), "kept_energy": kept}
    if not changes:
        raise FinepointError(f"{tuned} equals {base} bit for bit: there is no change to extract")
    info = _info(before, after, density, rows)
    return SparseAdapter(changes, info, before.base()), list(rows.values())


def comparable(before: Checkpoint, after: Checkpoint) -> list[str]:
    """The weights of two checkpoints, each once under its first tied name, in the files' order.

    Raises:
        FinepointError: they do not hold the same weights in the same shapes and dtypes.
    """
    first, second = _weights(before), _weights(after)
    for one, other, has, lacks in ((first, second, before, after), (second, first, after, before)):
        if lonely := [name for name in one if name not in other]:
            raise FinepointError(f"{has.name} has {lonely[0]!r}, which {lacks.name} lacks "
                                 f"({len(lonely)} such): they are not checkpoints of one model")  # fmt: skip
    for name, stored in first.items():
        here, there = before.tensors[stored], after.tensors[second[name]]
        if here.shape != there.shape:
            raise FinepointError(f"{name}: shape {here.shape} in {before.name}, {there.shape} in {after.name}")
        if here.dtype != there.dtype:
            raise FinepointError(f"{name}: {here.dtype} in {before.name}, {there.dtype} in {after.name}; "
                                 "save both in one dtype first")  # fmt: skip
    return list(first)


def _weights(checkpoint: Checkpoint) -> dict[str, str]:
    """Weight name to tensor name. Copies of a tied weight must agree, else the files contradict the configuration."""
    found: dict[str, str] = {}
    for tensor in checkpoint.tensors:
        name = checkpoint.weight_of(tensor) or tensor
        if name in found and not torch.equal(checkpoint.read(tensor), checkpoint.read(found[name])):
            raise FinepointError(
                f"{checkpoint.name} ties {tensor!r} to {found[name]!r}, but stores other values for it"
            )
        found.setdefault(name, tensor)
    return found


def _differences(before: Checkpoint, after: Checkpoint, names: list[str]) -> Iterator[Difference]:
    places = _weights(before), _weights(after)
    for name in tracked("comparing", names):
        base, tuned = before.read(places[0][name]), after.read(places[1][name])
        if not base.is_floating_point() or name not in before.ties:
            if not torch.equal(base, tuned):
                raise FinepointError(f"{name} differs, and is no weight of {type(before.outline).__name__}")
            continue
        changed = _bits(base) != _bits(tuned)
        wide = torch.promote_types(base.dtype, torch.float32)
        # Where the bits agree the difference is 0, also of two infinities.
        change = torch.where(changed, tuned.to(wide) - base.to(wide), 0.0)
        if not torch.isfinite(change).all():
            raise FinepointError(f"{name}: a number is not finite in {before.name} or {after.name}")
        yield Difference(name, base, tuned, change, changed)


def _largest(
    before: Checkpoint, after: Checkpoint, names: list[str], density: float, rows: dict[str, dict[str, Any]]
) -> dict[str, Tensor]:
    """Indices by weight of the largest changes; fills `rows`."""
    if not 0 < density <= 1:
        raise FinepointError(f"density is {density}; it is a share of all entries, in (0, 1]; or give --all")
    weights = [before.stored(name)[0] for name in names if name in before.ties]
    total = sum(torch.Size(before.tensors[tensor].shape).numel() for tensor in weights)
    k = int(density * total + 0.5)
    if not k:
        raise FinepointError(f"density {density} keeps none of {total} entries; use at least {1 / total:.2g}")
    pool = TopK(k)
    sources: list[str] = []
    for difference in _differences(before, after, names):
        rows[difference.name] = _row(difference)
        pool.add(len(sources), difference.change.abs().masked_fill_(~difference.changed, -torch.inf), None)
        sources.append(difference.name)
    owners, positions, _ = pool.result()
    found = {name: positions[owners == source] for source, name in enumerate(sources)}
    return {name: indices for name, indices in found.items() if len(indices)}


def _row(difference: Difference) -> dict[str, Any]:
    return {
        "weight": difference.name,
        "shape": list(difference.base.shape),
        "size": difference.base.numel(),
        "changed": int(difference.changed.sum()),
        "kept": 0,
        "energy": difference.change.double().square().sum().item(),
        "kept_energy": 0.0,
    }


def _change(difference: Difference, indices: Tensor) -> Change:
    values, base = gather(difference.tuned, indices), gather(difference.base, indices)
    dtype = str(base.dtype).removeprefix("torch.")
    return Change(tuple(difference.base.shape), dtype, "value", indices, values, checksum(base))


def _info(
    before: Checkpoint, after: Checkpoint, density: float | None, rows: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    sums = {key: sum(row[key] for row in rows.values()) for key in ("size", "changed", "kept", "energy", "kept_energy")}
    info: dict[str, Any] = {
        "base_model": before.name,
        "extracted_from": after.name,
        "lossless": density is None,
        "density": sums["kept"] / sums["size"],
        "changed": sums["changed"],
        "kept_energy": sums["kept_energy"] / sums["energy"] if sums["energy"] else 1.0,
    }
    model: Any = after.outline
    if type(model).__name__.endswith("ForSequenceClassification"):
        info |= {"task": "classification", "labels": list(model.config.id2label.values())}
    return info


def _bits(tensor: Tensor) -> Tensor:
    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(widths[tensor.itemsize])
