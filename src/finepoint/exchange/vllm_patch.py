"""Sparse patches in checkpoint coordinates, as vLLM takes them (pull requests 50723 and 53751).

`patch.safetensors` holds `<tensor>.indices` (k,) int32, flat, ascending, and `<tensor>.values` (k,), the new values
in the tensor's dtype; `patch.json` lists the tensors with name, shape and dtype, named as the base's files name them,
and holds the fingerprint of the base, by the names of the model's weights.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from finepoint.adapters.fingerprint import FINGERPRINT
from finepoint.errors import FinepointError
from finepoint.exchange.layouts import Source, layout
from finepoint.exchange.overlay import narrowed
from finepoint.runtime.files import write_json

TENSORS = "patch.safetensors"
LIST = "patch.json"
INT32_ENTRIES = 1 << 31


@layout("vllm-patch", dtype=True)
def write_patch(source: Source, into: Path) -> dict[str, Any]:
    """Writes the patch, each tensor in its own dtype unless told, without entries whose stored value stays the same.

    Raises:
        FinepointError: a new classification head; a tensor too large for int32 positions.
    """
    patches, checkpoint, dtype = source.patches, source.checkpoint, source.dtype
    tensors, rows = {}, []
    found = {"entries": 0, "rounded": 0, "vanished": 0}
    for name, patch in patches.items():
        if patch.base is None:
            raise FinepointError(f"a patch replaces values of the base, and {name} is new; export as merged")
        for tensor in checkpoint.stored(name):
            stored = checkpoint.tensors[tensor]
            if patch.indices.numel() and int(patch.indices[-1]) >= INT32_ENTRIES:
                raise FinepointError(f"{tensor} is too large for the int32 positions of a patch; export as merged")
            values, lost = narrowed(name, patch, dtype or stored.dtype)
            moves = values != patch.base.to(values.dtype)
            tensors[f"{tensor}.indices"] = patch.indices[moves].int()
            tensors[f"{tensor}.values"] = values[moves]
            kept = str(values.dtype).removeprefix("torch.")
            rows.append({"name": tensor, "shape": list(stored.shape), "dtype": kept, "count": int(moves.sum())})
            found["entries"] += int(moves.sum())
            found = found | {key: found[key] + lost[key] for key in lost}
    save_file(tensors, into / TENSORS)
    listed = {"base_model": checkpoint.name, "patches": rows, FINGERPRINT: checkpoint.fingerprint().as_json()}
    write_json(into / LIST, listed)
    return found
