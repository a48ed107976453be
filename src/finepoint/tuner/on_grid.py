"""Entries that are trained on the grid of their quantised base: a GGUF file's, or that of a layer in few bits."""

from pathlib import Path

from finepoint.errors import FinepointError
from finepoint.models.gguf import entry_grids, open_gguf
from finepoint.models.grids import Grid
from finepoint.models.quantised import grid_at
from finepoint.tuner.tuner import SparseTuner


def snap_to_base_(tuner: SparseTuner, file: Path | None) -> None:
    """Has the entries trained on the grid of their base.

    Args:
        file: the GGUF file that the model was loaded from; None where its own layers are quantised.

    Raises:
        FinepointError: they have none there; the tuner is closed.
    """
    entries = tuner.entries.items()
    try:
        grids: dict[str, Grid] = {}
        if file is not None:
            grids |= entry_grids(open_gguf(file), tuner.model, {name: (one.indices, one.base) for name, one in entries})
        else:
            grids |= {name: grid_at(name, one.weight, one.indices, one.base) for name, one in entries}
        tuner.snap_(grids)
    except FinepointError:
        tuner.close()
        raise
