"""A base with an adapter written into its files: a Hugging Face folder, or a GGUF file, that needs no finepoint."""

import hashlib
import logging
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.entries import scatter_
from finepoint.adapters.peft import Update, base_of, info_of, is_peft, read_peft, sparse_beside
from finepoint.errors import FinepointError, reason_of
from finepoint.exchange.checkpoint import INDEX, WHOLE, Checkpoint, OtherLayoutError
from finepoint.exchange.layouts import Source, layout
from finepoint.exchange.overlay import (
    Patch,
    classifier_config,
    classifier_outline,
    lay_over,
    narrowed,
    refuse_other_base,
)
from finepoint.models.loading import COMPANIONS, load_as_saved, quietly
from finepoint.runtime.files import read_json, write_json
from finepoint.runtime.progress import tracked
from finepoint.runtime.tensor_files import header_bytes, opened

logger = logging.getLogger(__name__)
SHARD = "5GB"  # at most, of the files that a model in memory is saved to
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
        return _write_in_memory(source, into)


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
    _copy_companions(checkpoint, into, but=(INDEX,))
    if set(places.values()) != {WHOLE}:
        size = sum(
            shard.stat().st_size - 8 - header_bytes(shard) for shard in {into / shard for shard in places.values()}
        )
        write_json(into / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    config = read_json(into / "config.json")
    if head:
        config = classifier_config(checkpoint, info)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if head or dtype is not None:
        write_json(into / "config.json", config)


def _copy_companions(checkpoint: Checkpoint, into: Path, but: Collection[str]) -> None:
    """The base's configuration, tokenizer and other files."""
    for file in sorted(file for pattern in COMPANIONS for file in checkpoint.folder.glob(pattern)):
        if file.is_file() and file.name not in but:
            shutil.copyfile(file, into / file.name)


def _check_head(added: Mapping[str, Tensor], checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    """Refuses tensors that the checkpoint lacks and its classifier would not have either: a head, a pooler."""
    head = {name: tuple(weight.shape) for name, weight in classifier_outline(checkpoint, info).named_parameters()}
    for name, tensor in added.items():
        if head.get(name) != tuple(tensor.shape):
            raise FinepointError(f"the adapter does not fit {checkpoint.name}, which has no weight {name!r} of shape "
                                 f"{tuple(tensor.shape)}, nor would its classifier have")  # fmt: skip


# By way of the model in memory, for checkpoints whose files have another layout than their model.


def _write_in_memory(source: Source, into: Path) -> dict[str, Any]:
    """Loads the model, writes the adapter into it, saves it in its files' layout, and reads it back to compare.

    Memory holds the whole model once, and while transformers translates its layout up to a second copy of the weights
    that are stored otherwise.

    Raises:
        FinepointError: the adapter does not belong to the model, it does not fit into memory, or its files cannot hold
            what was changed.
    """
    checkpoint, dtype = source.checkpoint, source.dtype
    _announce(checkpoint)
    info = info_of(source.adapter) if is_peft(source.adapter) else source.sparse.info
    labels = info.get("labels", ()) if info.get("task") == "classification" else ()
    model = load_as_saved(checkpoint.folder, labels)
    found = _write_into_(model, source)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    expected = {name: _digest(weight) for name, weight in model.named_parameters()}
    own = str(model.dtype).removeprefix("torch.")
    try:
        with quietly():
            model.save_pretrained(into, max_shard_size=SHARD)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise FinepointError(f"transformers cannot save {checkpoint.name}: {reason_of(error)}") from error
    del model
    _copy_companions(checkpoint, into, but=(INDEX, "config.json"))  # the configuration is the saved model's
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


def _write_into_(model: nn.Module, source: Source) -> dict[str, Any]:
    """Writes the adapter into the loaded model as `write_merged` writes it into files; returns what rounding cost."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    folder, checkpoint = source.adapter, source.checkpoint
    if not is_peft(folder):
        cost = _write_sparse_(source.sparse, model, checkpoint, source.dtype)
        return {"changed_weights": len(source.sparse), **cost, "entries": source.sparse.count}
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


# GGUF through llama.cpp's own converter, which knows every architecture's layout; we only find it and run it.

COMMANDS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
"""The converter as llama.cpp's checkout has it, and as a package of that name installs it."""
FILE = "model.gguf"
TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def converter() -> str:
    """The converter's path.

    Raises:
        FinepointError: there is none on the PATH.
    """
    if found := next(filter(None, map(shutil.which, COMMANDS)), None):
        return found
    raise FinepointError(
        "gguf needs llama.cpp's converter, and neither convert_hf_to_gguf.py nor convert-hf-to-gguf is on the PATH; "
        "or export with --format merged and run it on that folder (docs/exchange.md)"
    )


@layout("gguf", dtype=True, peft=True, check=converter)
def write_gguf(source: Source, into: Path) -> dict[str, Any]:
    """Writes `model.gguf`, not quantised, by way of a folded model that is thrown away.

    Raises:
        FinepointError: as for `write_merged`; no converter, or one that fails (with its last line).
    """
    command = converter()
    with tempfile.TemporaryDirectory(dir=into) as temporary:
        # The converter names the model after its folder.
        folder = Path(temporary) / f"{Path(source.checkpoint.name).stem}-{Path(source.adapter).resolve().name}"
        folder.mkdir()
        found = write_merged(source, folder)
        if found["dtype"] not in TYPES:
            raise FinepointError(f"gguf holds no {found['dtype']}; give --dtype, one of {', '.join(TYPES)}")
        arguments = [command, str(folder), "--outfile", str(into / FILE), "--outtype", TYPES[found["dtype"]]]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode or not (into / FILE).is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it says nothing"]
        raise FinepointError(f"{Path(command).name} failed: {last[0]}")
    return found
