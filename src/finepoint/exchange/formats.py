"""Export an adapter to a layout, import one from it: one function each for all layouts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.peft import PEFT_CONFIG, is_peft
from finepoint.errors import FinepointError
from finepoint.exchange.checkpoint import Checkpoint, open_checkpoint
from finepoint.exchange.layouts import Source, layout_named
from finepoint.exchange.peft_sparse import read_peft_sparse
from finepoint.exchange.sparta import TENSORS as SPARTA_TENSORS
from finepoint.exchange.sparta import read_sparta
from finepoint.runtime.files import fill_folder
from finepoint.runtime.settings import DType, ImportFormat


def export(
    model: str,
    adapter: str,
    layout: str,
    output: str,
    dtype: DType = "auto",
    overwrite: bool = False,
    any_base: bool = False,
) -> dict[str, Any]:
    """Writes an adapter in another layout; all files appear at the end, none after an error.

    Args:
        model: the base, as `--model` takes it.
        adapter: adapter folder; for `merged` and `gguf` also LoRA or DoRA as PEFT writes them.
        layout: see docs/exchange.md.
        output: folder to write.
        dtype: of the written weights (`merged`, `gguf`, `vllm-patch`); `auto` keeps the base's.
        any_base: take a model that differs from the adapter's base beside the entries that it changes.

    Returns:
        What was written, JSON-ready: entries, and what the layout could not keep.

    Raises:
        FinepointError: the adapter does not belong to the model or does not fit the layout; the folder is not empty.
    """
    chosen = layout_named(layout)
    chosen.check()
    kept = None if dtype == "auto" else dtype
    if kept and not chosen.dtype:
        raise FinepointError(f"{layout} holds changes, which have no dtype of the model's; leave out --dtype")
    if is_peft(adapter) and not chosen.peft:
        raise FinepointError(f"{adapter} is PEFT's already; only merged and gguf can be made of it")
    checkpoint = replace(open_checkpoint(model), any_base=any_base)
    _refuse_own_folder(output, checkpoint)
    source = Source(adapter, checkpoint, kept)
    with fill_folder(output, overwrite, chosen.replaces) as into:
        found = chosen.write(source, into)
    size = sum(file.stat().st_size for file in Path(output).iterdir() if file.is_file())
    idle = not is_peft(adapter) and source.sparse.changes_nothing()
    found = {"format": layout, "output": output, "bytes": size} | found
    return found | ({"idle": source.sparse.count} if idle else {})


def import_adapter(folder: str, model: str, layout: ImportFormat = "auto", dtype: DType = "auto") -> SparseAdapter:
    """An adapter out of somebody else's folder.

    Args:
        folder: as PEFT (SHiRA, Super-Tuning) or peft-sparta saved it.
        model: the base it was trained on, as `--model` takes it. Their files hold no checksum, so nothing can tell
            whether it is: the shapes alone are checked.
        layout: `auto` tells it by the files.
        dtype: of the weights the adapter will be applied to; `auto` for the base's.

    Raises:
        FinepointError: no such adapter, a damaged file, one that does not fit the model or changes nothing.
    """
    kept = None if dtype == "auto" else dtype
    place = Path(folder)
    has = {"sparta": (place / SPARTA_TENSORS).is_file(), "peft": is_peft(folder)}
    if layout == "auto" and not any(has.values()):
        raise FinepointError(f"{folder} holds neither {PEFT_CONFIG} with its tensors nor {SPARTA_TENSORS}"
                             f"{_pickled(place)}")  # fmt: skip
    is_sparta = layout == "sparta" or (layout == "auto" and has["sparta"])
    if not has["sparta" if is_sparta else "peft"]:
        raise FinepointError(f"{folder} holds no adapter of format {layout}{_pickled(place)}")
    checkpoint = open_checkpoint(model)
    changes = read_sparta(place, checkpoint, kept) if is_sparta else read_peft_sparse(place, checkpoint, kept, layout)
    if not changes:
        raise FinepointError(f"{folder} changes nothing: all of its entries are 0")
    return SparseAdapter(changes, {"base_model": model, "imported_from": folder}, checkpoint.base(kept))


def _pickled(folder: Path) -> str:
    """What to do about the older, pickled form."""
    pickled = next((file.name for file in folder.glob("*") if file.suffix in (".pt", ".bin")), None)
    return f"; {pickled} is a pickle, which finepoint does not open: save it as safetensors" if pickled else ""


def _refuse_own_folder(output: str, checkpoint: Checkpoint) -> None:
    if Path(output).resolve() == checkpoint.folder.resolve():
        raise FinepointError(f"{output} is the base model itself; choose another --output")
