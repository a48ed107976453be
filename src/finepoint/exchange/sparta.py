"""peft-sparta's saved form of SpaRTA: float32 changes with a row of positions for each, for every weight of the model.

`sparse_deltas.safetensors` holds `indices.<weight>` (k, dimensions) int32 and `deltas.<weight>` (k,) float32, empty
where nothing changes; `config.json` is the base's, with the base's place under `sparta_pretrained_model`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finepoint.adapters.change import Change
from finepoint.errors import FinepointError
from finepoint.exchange.checkpoint import Checkpoint
from finepoint.exchange.layouts import Source, layout
from finepoint.exchange.reading import change_of
from finepoint.runtime.files import read_json, write_json
from finepoint.runtime.tensor_files import opened

TENSORS = "sparse_deltas.safetensors"


@layout("sparta")
def write_sparta(source: Source, into: Path) -> dict[str, Any]:
    """Writes a folder for `peft_sparta.SpaRTAforCausalLM`, which adds in float32 to a base loaded in bfloat16.

    `inexact` counts the values that this loader will not hit, among them all that bfloat16 cannot hold.

    Raises:
        FinepointError: a new classification head, for which peft-sparta has another form.
    """
    patches, checkpoint = source.patches, source.checkpoint
    tensors = {}
    inexact = 0
    for name, weight in checkpoint.outline.named_parameters():
        tensors[f"indices.{name}"] = torch.empty(0, weight.ndim, dtype=torch.int32)
        tensors[f"deltas.{name}"] = torch.empty(0)
    for name, patch in patches.items():
        if patch.base is None:
            raise FinepointError(f"sparta holds no new classification head, and {name} is one; export as merged")
        name = checkpoint.ties[name][0]
        delta = patch.delta.float()
        places = torch.unravel_index(patch.indices, patch.shape)
        tensors[f"indices.{name}"] = torch.stack(places, dim=1).int().contiguous()
        tensors[f"deltas.{name}"] = delta
        loaded = (patch.base.bfloat16().float() + delta).bfloat16()
        inexact += int((loaded.double() != patch.values.double()).sum())
    save_file(tensors, into / TENSORS)
    is_folder = Path(checkpoint.name).exists() or checkpoint.name.count("/") != 1
    place = str(checkpoint.folder.resolve()) if is_folder else checkpoint.name
    config = read_json(checkpoint.folder / "config.json") | {"sparta_pretrained_model": place}
    write_json(into / "config.json", config)
    return {"entries": sum(len(patch.indices) for patch in patches.values()), "inexact": inexact}


def read_sparta(folder: Path, checkpoint: Checkpoint, dtype: str | None) -> dict[str, Change]:
    """The changes peft-sparta would make; entries whose change is 0 are left out.

    Args:
        dtype: of the weights they are added to; None for the base's.

    Raises:
        FinepointError: a damaged file, a weight the base lacks, a classification adapter.
    """
    with opened(folder / TENSORS) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    if "deltas.score.weight" in tensors and "score.weight" not in checkpoint.ties:
        raise FinepointError(f"{folder} is a classifier of peft-sparta, whose head is stored elsewhere; "
                             "save it merged there and use extract")  # fmt: skip
    changes = {}
    for key in [key for key in tensors if key.startswith("deltas.")]:
        name = key.removeprefix("deltas.")
        if f"indices.{name}" not in tensors:
            raise FinepointError(f"{folder / TENSORS} has no indices.{name}")
        delta, places = tensors.pop(key), tensors.pop(f"indices.{name}")
        if delta.numel():
            if places.ndim != 2:
                raise FinepointError(f"{folder / TENSORS}: {name}: positions of shape {tuple(places.shape)}")
            found = change_of(name, places.T, delta, checkpoint, dtype, round_first=False)
            if checkpoint.ties[name][0] in changes:
                raise FinepointError(f"{folder / TENSORS} holds two changes of {name}, which is tied")
            if len(found):
                changes[checkpoint.ties[name][0]] = found
    if tensors:
        raise FinepointError(f"{folder / TENSORS} holds {min(tensors)!r}, which belongs to no weight")
    return changes
