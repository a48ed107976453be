"""PEFT's two sparse layouts: SHiRA (arXiv:2406.13175) and Super-Tuning (arXiv:2607.09287), written and read.

Both hold float32 changes of linear layers: `<module>.shira_weight` with `<module>.shira_indices` (2, k), rows and
columns; `<module>.supertuning_values` with flat `<module>.supertuning_indices`. Both fix how many entries a layer has
by one number for all layers, r (in + out) or (1 - sparsity) in x out; where an adapter has fewer, entries with a change
of 0 fill the rest.
"""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finepoint.adapters.change import Change
from finepoint.adapters.peft import PEFT_CONFIG, PEFT_TENSORS, PREFIX
from finepoint.adapters.peft_config import SPARSE, check_fields, check_targets
from finepoint.errors import FinepointError
from finepoint.exchange.checkpoint import Checkpoint
from finepoint.exchange.layouts import Source, layout
from finepoint.exchange.overlay import Patch
from finepoint.exchange.reading import change_of
from finepoint.runtime.files import read_json, write_json
from finepoint.runtime.tensor_files import opened

SUFFIXES = {
    "shira": ("shira_weight", "shira_indices"),
    "supertuning": ("supertuning_values", "supertuning_indices"),
}  # fmt: skip


@layout("shira")
def write_shira(source: Source, into: Path) -> dict[str, Any]:
    """See `_write`."""
    return _write("shira", source.patches, source.checkpoint, into)


@layout("supertuning")
def write_supertuning(source: Source, into: Path) -> dict[str, Any]:
    """See `_write`."""
    return _write("supertuning", source.patches, source.checkpoint, into)


def _write(kind: str, patches: Mapping[str, Patch], checkpoint: Checkpoint, into: Path) -> dict[str, Any]:
    """Writes a folder for `PeftModel.from_pretrained`; `inexact` counts the values that PEFT's sum will miss.

    Raises:
        FinepointError: the adapter changes something other than linear layers, or too much for `shira`.
    """
    for name, patch in patches.items():
        _refuse_all_but_linear(name, patch, checkpoint, kind)
    config, counts = (_shira if kind == "shira" else _supertuning)(patches)
    numbers_key, indices_key = SUFFIXES[kind]
    tensors = {}
    padding = inexact = 0
    for name, patch in patches.items():
        change, missed = _peft_change(patch, kind)
        indices, change = _padded(patch.indices, change, counts[name])
        module = PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.{numbers_key}"] = change
        columns = patch.shape[1]
        pairs = torch.stack([indices // columns, indices % columns]) if kind == "shira" else indices
        tensors[f"{module}.{indices_key}"] = pairs.int()
        padding += counts[name] - len(patch.indices)
        inexact += missed
    save_file(tensors, into / PEFT_TENSORS, {"format": "pt"})
    config |= {
        "base_model_name_or_path": checkpoint.name,
        "target_modules": sorted(name.removesuffix(".weight") for name in patches),
        "modules_to_save": None, "init_weights": True, "inference_mode": True, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    write_json(into / PEFT_CONFIG, config)
    return {"entries": sum(counts.values()) - padding, "padding": padding, "inexact": inexact}


def read_peft_sparse(
    folder: Path, checkpoint: Checkpoint, dtype: str | None, expected: str = "auto"
) -> dict[str, Change]:
    """The changes that PEFT would make to this base; entries whose change is 0 are left out.

    Args:
        dtype: of the weights PEFT would add to; None for the base's. In half precision Super-Tuning rounds the
            change first and the sum once more, which the values here repeat.

    Raises:
        FinepointError: another kind of adapter, a damaged file, a module that the base lacks.
    """
    config = read_json(folder / PEFT_CONFIG)
    layout = str(config.get("peft_type")).lower()
    if layout not in SUFFIXES:
        raise FinepointError(f"{folder} holds an adapter of type {config.get('peft_type')!r}; SHIRA and SUPERTUNING "
                             "are read here, and LoRA is applied as it is")  # fmt: skip
    if expected not in ("auto", layout):
        raise FinepointError(f"{folder} holds an adapter of type {config['peft_type']}, not {expected}")
    check_fields(config, SPARSE[layout], str(folder))
    with opened(folder / PEFT_TENSORS) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    numbers_key, indices_key = SUFFIXES[layout]
    changes = {}
    keys = [key for key in tensors if key.endswith(f".{numbers_key}")]
    modules = [key.removeprefix(PREFIX).removesuffix(f".{numbers_key}") for key in keys]
    check_targets(config, modules, str(folder))
    for key in keys:
        module = key.removesuffix(f".{numbers_key}")
        name = f"{module.removeprefix(PREFIX)}.weight"
        if f"{module}.{indices_key}" not in tensors:
            raise FinepointError(f"{folder}: {name} has no {indices_key}; save the adapter with its indices")
        numbers, indices = tensors.pop(key), tensors.pop(f"{module}.{indices_key}")
        if len(checkpoint.ties.get(name, ())) > 1:
            raise FinepointError(f"{name} is tied to {checkpoint.ties[name][0]}; PEFT changes one of the two, "
                                 "finepoint both, so this adapter cannot be imported")  # fmt: skip
        places = indices if layout == "shira" else indices[None]
        found = change_of(name, places, numbers, checkpoint, dtype, round_first=layout == "supertuning")
        if len(found):
            changes[name] = found
    if tensors:
        raise FinepointError(f"{folder} holds {min(tensors)!r}, which is no sparse change of a linear layer")
    return changes


def _refuse_all_but_linear(name: str, patch: Patch, checkpoint: Checkpoint, layout: str) -> None:
    module = None
    if patch.base is not None and name.endswith(".weight"):
        module = checkpoint.outline.get_submodule(name.removesuffix(".weight"))
    if not isinstance(module, nn.Linear):
        raise FinepointError(f"{layout} holds changes of linear layers only, and {name} belongs to none; "
                             "export as merged or vllm-patch")  # fmt: skip


def _shira(patches: Mapping[str, Patch]) -> tuple[dict[str, Any], dict[str, int]]:
    rank = max(1, *(ceil(len(patch.indices) / sum(patch.shape)) for patch in patches.values()), 1)
    counts = {name: rank * sum(patch.shape) for name, patch in patches.items()}
    for name, patch in patches.items():
        if counts[name] > torch.Size(patch.shape).numel():
            raise FinepointError(
                f"shira gives every layer r (in + out) entries; the densest needs r = {rank}, "
                f"which is more than {name} has; export as supertuning, merged or vllm-patch"
            )
    # Any mask type but "random": PEFT then draws no mask of its own, which the file's indices would replace anyway.
    return {
        "peft_type": "SHIRA",
        "r": rank,
        "mask_type": "stored",
        "random_seed": None,
        "fan_in_fan_out": False,
    }, counts


def _supertuning(patches: Mapping[str, Patch]) -> tuple[dict[str, Any], dict[str, int]]:
    sizes = {name: torch.Size(patch.shape).numel() for name, patch in patches.items()}
    sparsity = 1 - max(len(patch.indices) / sizes[name] for name, patch in patches.items())
    # PEFT cuts size x (1 - sparsity) down to a whole number, so that rounding may cost the last entry.
    while any(int(sizes[name] * (1 - sparsity)) < len(patch.indices) for name, patch in patches.items()):
        sparsity = max(0.0, sparsity - 1e-12)
    counts = {name: int(size * (1 - sparsity)) for name, size in sizes.items()}
    if empty := [name for name, count in counts.items() if not count]:
        raise FinepointError(f"supertuning leaves no entry for {empty[0]}; export as merged or vllm-patch")
    return {
        "peft_type": "SUPERTUNING", "sparsity": sparsity, "select_top": True, "r": None, "lora_alpha": None,
        "lora_dropout": 0.0, "save_precomputed_indices": True,
    }, counts  # fmt: skip


def _peft_change(patch: Patch, layout: str) -> tuple[Tensor, int]:
    """The float32 changes with which PEFT's sum gives the values, (k,), and how often none does."""
    assert patch.base is not None
    best = patch.delta.to(added_in(layout, patch.base.dtype))
    for towards in (torch.inf, -torch.inf):  # a neighbour may hit where the nearest does not
        other = torch.nextafter(best, torch.full_like(best, towards))
        misses = peft_sum(patch.base, best) != patch.values
        best = torch.where(misses & (peft_sum(patch.base, other) == patch.values), other, best)
    return best.float(), int((peft_sum(patch.base, best) != patch.values).sum())


def added_in(layout: str, dtype: torch.dtype) -> torch.dtype:
    """What PEFT makes of a change before it adds it to a weight: Super-Tuning rounds it to the weight's dtype first."""
    return dtype if layout == "supertuning" and dtype.itemsize == 2 else torch.float32


def peft_sum(base: Tensor, change: Tensor) -> Tensor:
    """base + change as PEFT adds them: in the wider of their dtypes, rounded to the base's."""
    return (base.to(torch.promote_types(base.dtype, torch.float32)) + change).to(base.dtype)


def _padded(indices: Tensor, change: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ascending positions and changes, filled up to `count` with the lowest free positions and zeros."""
    free = torch.ones(count, dtype=torch.bool)
    free[indices[indices < count]] = False
    filling = free.nonzero().view(-1)[: count - len(indices)]
    positions, order = torch.cat([indices, filling]).sort()
    return positions, torch.cat([change, torch.zeros(len(filling))])[order]
