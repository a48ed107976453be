"""What the grid of a quantised base leaves each entry: the step between its numbers there, and the room to move."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finepoint.errors import FinepointError
from finepoint.models.gguf import entry_grid, homes, open_gguf
from finepoint.models.grids import Grid
from finepoint.models.quantised import float_values, grid_at, is_quantised
from finepoint.runtime import distributed

PIECE = 1 << 20  # entries at a time: what says where they lie takes many times their own bytes
NO_GRID = "this rule looks at the grid of a quantised base, and there is none; give --model FILE.gguf, smollm2, " \
          "gemma3-270m or a quantised checkpoint, or --quantise int8, int4 or nf4 (in Python: gguf)"  # fmt: skip
GridOf = Callable[[Tensor, Tensor], Grid]
"""From flat positions in a weight and the base's values there, each (k,), to their grid."""


def grids_of(model: Any, weights: Mapping[str, Tensor], file: Path | None) -> Callable[[str], GridOf]:
    """What gives the grid of entries of a weight, by its name.

    Args:
        file: the GGUF file that the model was loaded from; None where its own layers are quantised.

    Raises:
        FinepointError: there is no grid; when asked, that of a weight is not known, or its values are not the file's.
    """
    if file is not None:
        read = open_gguf(file)
        home = homes(read, model)

        def of(name: str) -> GridOf:
            own = home(name)
            return lambda at, base: entry_grid(read, name, own.place(at), base)

        return of
    if not any(map(is_quantised, weights.values())):
        raise FinepointError(NO_GRID)
    return lambda name: lambda at, base: grid_at(name, weights[name], at, base)


def step_and_room(weight: Tensor, gradient: Tensor | None, grid: GridOf) -> dict[str, Tensor]:
    """Of each entry of a weight `grid_step`, and `grid_room` where its mean gradient is known; both float32.

    Room is the distance to the last number of the block on the side where the loss falls, 0 where the gradient is 0.
    """
    base = float_values(distributed.whole(weight))
    found = {"grid_step": torch.empty(base.shape, dtype=torch.float32, device=base.device)}
    if gradient is not None:
        found["grid_room"] = torch.empty_like(found["grid_step"])
    for at in torch.arange(base.numel(), device=base.device).split(PIECE):
        part = slice(int(at[0]), int(at[-1]) + 1)
        step, down, up = grid(at, base.reshape(-1)[part]).reach()
        found["grid_step"].view(-1)[part] = step
        if gradient is not None:
            asked = gradient.reshape(-1)[part]
            found["grid_room"].view(-1)[part] = torch.where(asked > 0, down, up).masked_fill(asked == 0, 0)
    return found
