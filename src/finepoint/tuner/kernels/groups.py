"""Whole rows, columns or blocks of a weight: their gradient is a small dense product, no gathering of entries; and
entries that all lie in few columns, for which those of the input do.

Shapes as in `plain.py`: dy (.., out), x (.., in). Results are (k,), in the order of the weight, in float32 (float64 for
float64).
"""

import numpy as np
import torch
from torch import Tensor, nn

from finepoint.adapters.entries import every as every
from finepoint.adapters.entries import lines_of
from finepoint.tuner.kernels import sampled_gradient
from finepoint.tuner.kernels.choice import multiplied

FEW = 0.25  # of the columns: layers that read one input (q, k, v) would together keep more than all of it
LEAST = 16  # rows and columns of a block: the products of smaller ones cost more than their entries one by one


class Groups(nn.Module):
    """The groups that a weight's chosen entries are all of. A module, so that its tensors move with the model's."""

    def keep(self, **places: Tensor) -> None:
        for name, tensor in places.items():
            self.register_buffer(name, tensor, persistent=False)

    def saved(self, x: Tensor) -> Tensor:
        """What of a layer's input the backward needs."""
        return x

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """dL/dW at the entries: (k,), from what was `saved`."""
        raise NotImplementedError


class Rows(Groups):
    """Of whole rows: nothing but their outputs' gradients is needed."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.keep(rows=rows)

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return _dense(dy.index_select(-1, self.rows), x)


class Columns(Groups):
    """Of whole columns: nothing but their inputs is needed, so that the layer's whole input may go."""

    columns: Tensor

    def __init__(self, columns: Tensor) -> None:
        super().__init__()
        self.keep(columns=columns)

    def saved(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.columns)

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return _dense(dy, x)


class Confined(Groups):
    """Of few columns: nothing but their inputs is needed, as if the layer had no others.

    Args:
        columns: those that hold an entry, (c,) int64, ascending.
        within: positions in the weight of these columns alone, (k,) int32 or int64, ascending.
    """

    columns: Tensor
    within: Tensor

    def __init__(self, columns: Tensor, within: Tensor) -> None:
        super().__init__()
        self.keep(columns=columns, within=within)

    def saved(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.columns)

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return sampled_gradient(dy, x, self.within)


class Blocks(Groups):
    """Of equal blocks on the grid of their size: one batched product, each of a block's outputs and inputs.

    Args:
        size: rows and columns of a block.
        down, across: which rows and columns of the grid the blocks are in, (n,) int64 each.
        features: columns of the weight.
    """

    down: Tensor
    across: Tensor
    order: Tensor
    """where each entry stands among the entries block by block, (k,)"""

    def __init__(self, size: tuple[int, int], down: Tensor, across: Tensor, features: int) -> None:
        super().__init__()
        self.size = size
        row = (down * size[0])[:, None, None] + torch.arange(size[0], device=down.device)[:, None]
        column = (across * size[1])[:, None, None] + torch.arange(size[1], device=down.device)
        order = (row * features + column).reshape(-1).argsort()
        self.keep(down=down, across=across, order=order.int())

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        height, width = self.size
        dy = dy.reshape(-1, dy.shape[-1] // height, height).index_select(1, self.down)
        x = x.reshape(-1, x.shape[-1] // width, width).index_select(1, self.across)
        return multiplied(dy, x).reshape(-1).index_select(0, self.order)


def _dense(dy: Tensor, x: Tensor) -> Tensor:
    return multiplied(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])).reshape(-1)


def keeps_all(groups: Groups | None) -> bool:
    """Whether the backward pass takes all of a layer's input."""
    return groups is None or type(groups).saved is Groups.saved


def whole_groups(indices: Tensor, shape: tuple[int, ...]) -> Groups | None:
    """The rows, columns or blocks (the largest; at least `LEAST` x `LEAST`) that the entries are all of, or the few
    columns that they all lie in, if any.

    indices: (k,) int64, flat, ascending, unique.
    """
    if len(shape) != 2 or not len(indices):
        return None
    if lines := lines_of(indices, shape):
        return Rows(lines[1]) if lines[0] == "rows" else Columns(lines[1])
    return _whole_blocks(indices, shape) or _few_columns(indices, shape)


def _whole_blocks(indices: Tensor, shape: tuple[int, ...]) -> Blocks | None:
    out, features = shape
    width = _grain(indices, features)
    if width < LEAST:
        return None
    starts = indices[::width]  # of stretches of one row of a block
    upright = (starts % features // width * out + starts // features).sort().values
    height = _grain(upright, out)
    if height < LEAST:
        return None
    return Blocks((height, width), upright[::height] % out // height, upright[::height] // out, features)


def _few_columns(indices: Tensor, shape: tuple[int, ...]) -> Confined | None:
    out, features = shape
    at, seen = indices % features, torch.zeros(features, dtype=torch.bool, device=indices.device)
    seen[at] = True
    columns = seen.nonzero()[:, 0]
    if len(columns) > FEW * features:
        return None
    within = indices // features * len(columns) + (seen.cumsum(0) - 1)[at]
    return Confined(columns, within.int() if out * len(columns) <= 1 << 31 else within)


def _grain(places: Tensor, length: int) -> int:
    """The largest g, a divisor of the length, such that ascending places in lines of that length are stretches of g
    which begin at multiples of g."""
    at = places % length
    begins = torch.ones_like(places, dtype=torch.bool)
    begins[1:] = (places.diff() != 1) | (at[1:] == 0)
    starts = begins.nonzero()[:, 0]
    lengths = torch.cat([starts, starts.new_tensor([len(places)])]).diff()
    return int(np.gcd.reduce(torch.cat([at[starts], lengths, lengths.new_tensor([length])]).cpu().numpy()))
