"""A base with an adapter written into its files: a Hugging Face folder that needs no finepoint."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.entries import scatter_
from finepoint.adapters.peft import Update, base_of, info_of, is_peft, read_peft, sparse_beside
from finepoint.errors import FinepointError
from finepoint.exchange.checkpoint import INDEX, WHOLE, Checkpoint, OtherLayoutError
from finepoint.exchange.folded_in_memory import write_in_memory
from finepoint.exchange.layouts import Source, layout
from finepoint.exchange.overlay import (
    Patch,
    classifier_config,
    classifier_outline,
    lay_over,
    narrowed,
    refuse_other_base,
)
from finepoint.models.loading import COMPANIONS
from finepoint.runtime.files import read_json
from finepoint.runtime.progress import tracked
from finepoint.runtime.tensor_files import opened

Rewrite = Callable[[Tensor], Tensor]
"""A stored weight to what it becomes; may write into it."""


@layout("merged", dtype=True, peft=True, replaces=("*.safetensors", INDEX))  # old shards would be loaded with the new
def write_merged(source: Source, into: Path) -> dict[str, Any]:
    """Copies a model's folder with an adapter written into the weights it changes; the rest keeps its bytes.

    Everything is checked before the first byte is written. Memory holds the adapter and one shard, and only of shards
    that change; or the whole model, where it has another layout in its files and a weight that changes is stored
    otherwise.

    Raises:
        FinepointError: the adapter does not belong to the model; the weight is named.
    """
    try:
        return _write_weight_by_weight(source, into)
    except OtherLayoutError:
        return write_in_memory(source.adapter, source.checkpoint, into, source.dtype)


def _write_weight_by_weight(source: Source, into: Path) -> dict[str, Any]:
    folder, checkpoint, dtype = source.adapter, source.checkpoint, source.dtype
    if is_peft(folder):
        info: Mapping[str, Any] = info_of(folder)
        rewrites, added = _low_rank(folder, checkpoint, info)
        found: dict[str, int] = {}
        if beside := sparse_beside(folder):
            entries, whole, _ = _sparse(lay_over(beside, checkpoint), checkpoint, None)
            rewrites = {name: _in_turn(entries.get(name), rewrites.get(name)) for name in {**entries, **rewrites}}
            added = whole | added
    else:
        adapter = source.sparse
        info = adapter.info
        rewrites, added, found = _sparse(lay_over(adapter, checkpoint), checkpoint, dtype)
        found["entries"] = adapter.count
    if added:
        _check_head(added, checkpoint, info)
    places = _write_shards(checkpoint, into, dtype, rewrites, added)
    _write_companions(checkpoint, into, dtype, places, info, bool(added))
    return {"changed_weights": len(rewrites) + len(added), "dtype": dtype or checkpoint.dtype, **found}


def _sparse(
    patches: Mapping[str, Patch], checkpoint: Checkpoint, dtype: str | None
) -> tuple[dict[str, Rewrite], dict[str, Tensor], dict[str, int]]:
    """How each stored tensor is rewritten, the tensors that are new, and what rounding cost."""
    rewrites: dict[str, Rewrite] = {}
    added: dict[str, Tensor] = {}
    lost = {"rounded": 0, "vanished": 0}
    for name, patch in patches.items():
        if patch.base is None:
            values, _ = narrowed(name, patch, dtype or checkpoint.dtype)
            added[name] = values.reshape(patch.shape)
            continue
        stored = checkpoint.stored(name)
        values, cost = narrowed(name, patch, dtype or checkpoint.tensors[stored[0]].dtype)
        lost = {key: lost[key] + cost[key] for key in lost}
        for tensor in stored:
            rewrites[tensor] = _writer(patch.indices, values)
    return rewrites, added, lost


def _in_turn(*rewrites: Rewrite | None) -> Rewrite:
    def write(weight: Tensor) -> Tensor:
        for rewrite in rewrites:
            weight = rewrite(weight) if rewrite else weight
        return weight

    return write


def _writer(indices: Tensor, values: Tensor) -> Rewrite:
    def write(weight: Tensor) -> Tensor:
        weight = weight.to(values.dtype).contiguous()
        scatter_(weight, indices, values)
        return weight

    return write


def _low_rank(
    folder: str, checkpoint: Checkpoint, info: Mapping[str, Any]
) -> tuple[dict[str, Rewrite], dict[str, Tensor]]:
    """LoRA and DoRA, added to a weight when its turn comes, and the tensors that are new."""
    rewrites: dict[str, Rewrite] = {}
    added: dict[str, Tensor] = {}
    updates = read_peft(folder, checkpoint.outline)
    base = base_of(folder)
    refuse_other_base(SparseAdapter({}, dict(info), base), checkpoint, None, {base["dtype"]} if base else ())
    for name, update in updates.items():
        if name not in checkpoint.ties and update.whole is not None and info.get("task") == "classification":
            added[name] = update.whole.to(getattr(torch, checkpoint.dtype))
            continue
        for stored in checkpoint.stored(name):
            # Tried on the shape alone, so that what does not fit is refused before anything is written.
            update.of(torch.zeros(checkpoint.tensors[stored].shape, device="meta"))
            rewrites[stored] = _updater(update)
    return rewrites, added


def _updater(update: Update) -> Rewrite:
    return lambda weight: update.of(weight)[1]


def _write_shards(
    checkpoint: Checkpoint, into: Path, dtype: str | None, rewrites: Mapping[str, Rewrite], added: dict[str, Tensor]
) -> dict[str, str]:
    """Writes the shards; returns where each tensor lies. New tensors go into the last shard."""
    shards: dict[str, list[str]] = defaultdict(list)
    for tensor, stored in checkpoint.tensors.items():
        shards[stored.file].append(tensor)
    last = next(reversed(shards))
    places = {tensor: shard for shard, tensors in shards.items() for tensor in tensors} | dict.fromkeys(added, last)
    for shard in tracked("writing", list(shards)):
        extra = added if shard == last else {}
        if dtype is None and not extra and not rewrites.keys() & set(shards[shard]):
            shutil.copyfile(checkpoint.folder / shard, into / shard)
            continue
        with opened(checkpoint.folder / shard) as file:
            tensors = {name: file.get_tensor(name) for name in shards[shard]}
            metadata = file.metadata() or {"format": "pt"}
        for name in tensors:
            if name in rewrites:
                tensors[name] = rewrites[name](tensors[name].clone())
            if dtype is not None and tensors[name].is_floating_point():
                tensors[name] = tensors[name].to(getattr(torch, dtype))
        save_file(tensors | extra, into / shard, metadata)
    return places


def _write_companions(
    checkpoint: Checkpoint, into: Path, dtype: str | None, places: dict[str, str], info: Mapping[str, Any], head: bool
) -> None:
    """Configuration, tokenizer and generation files, and the index of the shards."""
    for pattern in COMPANIONS:
        for file in sorted(checkpoint.folder.glob(pattern)):
            if file.is_file() and file.name != INDEX:
                shutil.copyfile(file, into / file.name)
    if set(places.values()) != {WHOLE}:
        size = sum(_bytes(into / shard) for shard in set(places.values()))
        _put_json(into / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    config = read_json(into / "config.json")
    if head:
        config = classifier_config(checkpoint, info)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if head or dtype is not None:
        _put_json(into / "config.json", config)


def _check_head(added: Mapping[str, Tensor], checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    """Refuses tensors that the checkpoint lacks and its classifier would not have either: a head, a pooler."""
    head = {name: tuple(weight.shape) for name, weight in classifier_outline(checkpoint, info).named_parameters()}
    for name, tensor in added.items():
        if head.get(name) != tuple(tensor.shape):
            raise FinepointError(f"the adapter does not fit {checkpoint.name}, which has no weight {name!r} of shape "
                                 f"{tuple(tensor.shape)}, nor would its classifier have")  # fmt: skip


def _bytes(shard: Path) -> int:
    with shard.open("rb") as file:
        return shard.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _put_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
