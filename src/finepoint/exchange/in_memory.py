"""A merged folder by way of the model in memory, for checkpoints whose files have another layout than their model."""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.entries import scatter_
from finepoint.adapters.lowrank import base_of, info_of, is_peft, read_peft, sparse_beside
from finepoint.errors import FinepointError
from finepoint.exchange.checkpoint import INDEX, Checkpoint
from finepoint.exchange.overlay import lay_over, narrowed, refuse_other_base
from finepoint.models import COMPANIONS, load_as_saved

logger = logging.getLogger(__name__)
SHARD = "5GB"  # at most, of the files that are written


def write_in_memory(folder: str, checkpoint: Checkpoint, into: Path, dtype: str | None) -> dict[str, Any]:
    """Loads the model, writes the adapter into it, saves it in its files' layout, and reads it back to compare.

    Memory holds the whole model once, and while transformers translates its layout up to a second copy of the weights
    that are stored otherwise.

    Args:
        folder: an adapter of finepoint's, or LoRA or DoRA as PEFT writes them.
        dtype: of all weights; None keeps the base's.

    Raises:
        FinepointError: the adapter does not belong to the model, it does not fit into memory, or its files cannot hold
            what was changed.
    """
    _announce(checkpoint)
    info = info_of(folder) if is_peft(folder) else SparseAdapter.load(folder).info
    labels = info.get("labels", ()) if info.get("task") == "classification" else ()
    model = load_as_saved(checkpoint.folder, labels)
    found = _write_into_(model, folder, checkpoint, dtype)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    expected = {name: _digest(weight) for name, weight in model.named_parameters()}
    own = str(model.dtype).removeprefix("torch.")
    try:
        model.save_pretrained(into, max_shard_size=SHARD)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FinepointError(f"transformers cannot save {checkpoint.name}: {reason}") from error
    del model
    _copy_companions(checkpoint, into)
    saved = load_as_saved(into)
    for name, weight in saved.named_parameters():
        if expected.get(name) != _digest(weight):
            raise FinepointError(f"{checkpoint.name}: the files of such a model do not hold {name} as it is in memory, "
                                 "so a change of it cannot be kept; leave it out of --targets")  # fmt: skip
    return {**found, "dtype": dtype or own}


def _announce(checkpoint: Checkpoint) -> None:
    """Says what will be done, and whether it fits into memory.

    Raises:
        FinepointError: the model is larger than the memory that is left.
    """
    size = sum((checkpoint.folder / shard).stat().st_size for shard in {s.file for s in checkpoint.tensors.values()})
    if (left := _memory_left()) is not None and left < size:
        raise FinepointError(f"{checkpoint.name} has files in another layout than its model, so that all of it must be "
                             f"in memory: {size / 1e9:.1f} GB, and {left / 1e9:.1f} GB are left")  # fmt: skip
    logger.warning("%s has files in another layout than its model: all of it is loaded (%.2f GB), changed and saved",
                   checkpoint.name, size / 1e9)  # fmt: skip


def _memory_left() -> int | None:
    """Bytes that Linux could give to this process; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _write_into_(model: nn.Module, folder: str, checkpoint: Checkpoint, dtype: str | None) -> dict[str, Any]:
    """Writes the adapter into the loaded model as `write_merged` writes it into files; returns what rounding cost."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    if not is_peft(folder):
        adapter = SparseAdapter.load(folder)
        cost = _write_sparse_(adapter, model, checkpoint, dtype)
        return {"changed_weights": len(adapter), **cost, "entries": adapter.count}
    updates = read_peft(folder, model)
    refuse_other_base(SparseAdapter({}, info_of(folder), base_of(folder)), checkpoint, model, ())
    if strange := set(updates) - set(weights):
        raise FinepointError(f"{folder} does not fit {checkpoint.name}, which has no weight {min(strange)!r}")
    beside = sparse_beside(folder)
    if beside:
        _write_sparse_(beside, model, checkpoint, None)
    with torch.no_grad():
        for name, update in updates.items():
            weights[name].copy_(update.of(weights[name])[1])
    return {"changed_weights": len({*updates, *(beside or ())})}


def _write_sparse_(
    adapter: SparseAdapter, model: nn.Module, checkpoint: Checkpoint, dtype: str | None
) -> dict[str, int]:
    weights = dict(model.named_parameters(remove_duplicate=False))
    lost = {"rounded": 0, "vanished": 0}
    patches = lay_over(adapter, checkpoint, model)
    for name, patch in patches.items():
        weight = weights[name]
        own = str(weight.dtype).removeprefix("torch.")
        values, cost = narrowed(name, patch, dtype or own)
        lost = {key: lost[key] + cost[key] for key in lost}
        if values.dtype != weight.dtype:  # all weights become of --dtype; this one first, so that nothing is lost
            weight.data = weight.data.to(values.dtype)
        scatter_(weight, patch.indices, values)
    return lost


def _digest(weight: Tensor) -> bytes:
    """Of a tensor's form and bytes."""
    known = hashlib.blake2b(f"{weight.dtype}{tuple(weight.shape)}".encode(), digest_size=16)
    known.update(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return known.digest()


def _copy_companions(checkpoint: Checkpoint, into: Path) -> None:
    """The base's tokenizer and other files; the configuration is the saved model's."""
    for pattern in COMPANIONS:
        for file in sorted(checkpoint.folder.glob(pattern)):
            if file.is_file() and file.name not in (INDEX, "config.json"):
                shutil.copyfile(file, into / file.name)
