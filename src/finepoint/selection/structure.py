"""Whole rows, columns, blocks or heads instead of single entries: how scores are grouped, and groups become indices.

Every structure is a tiling of a weight by equal rectangles, so there is one way to pool scores and one to come back.
A weight is seen as the matrix (out, in) that it is, one of one dimension (or none) as a column, a stack of matrices
(experts) one under the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finepoint.errors import FinepointError
from finepoint.selection.settings import check_structure
from finepoint.selection.settings import share_within as share_within  # its former place

Pooling = Literal["mean", "sum"]
HEADS_IN_ROWS, HEADS_IN_COLUMNS = ("q_proj", "k_proj", "v_proj"), ("o_proj",)


@dataclass(frozen=True)
class Tiling:
    """A weight cut into rectangles of `height` x `width`, numbered row by row; those at the edges may be smaller."""

    shape: tuple[int, ...]
    height: int
    width: int

    @cached_property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the weight seen as a matrix."""
        rows = prod(self.shape[:-1] if len(self.shape) > 1 else self.shape)
        return rows, prod(self.shape) // rows

    @cached_property
    def grid(self) -> tuple[int, int]:
        """How many rectangles there are from top to bottom and from left to right."""
        rows, columns = self.matrix
        return -(-rows // self.height), -(-columns // self.width)

    @property
    def count(self) -> int:
        return prod(self.grid)

    @property
    def is_entries(self) -> bool:
        return self.height == self.width == 1

    def pooled(self, scores: Tensor, how: Pooling | Literal["first"]) -> Tensor:
        """One score for each rectangle: (count,), of scores of the weight's shape; `first`: its first entry's."""
        if self.is_entries:
            return scores.reshape(-1)
        if how == "first":
            return scores.reshape(self.matrix)[:: self.height, :: self.width].reshape(-1)
        total = _added_up(_added_up(scores.reshape(self.matrix), self.height, self.grid[0]).T, self.width, self.grid[1])
        return (total.T if how == "sum" else total.T / self._sizes(total)).reshape(-1)

    def tiles(self, indices: Tensor) -> Tensor:
        """The rectangles that hold any of the entries at flat `indices`, ascending, each once."""
        row, column = indices // self.matrix[1], indices % self.matrix[1]
        return (row // self.height * self.grid[1] + column // self.width).unique()

    def indices(self, tiles: Tensor) -> Tensor:
        """The flat positions of all entries of these rectangles, ascending. tiles: (n,) int64, each once."""
        if self.is_entries:
            return tiles
        rows, columns = self.matrix
        top, left = tiles // self.grid[1] * self.height, tiles % self.grid[1] * self.width
        row = top[:, None, None] + torch.arange(self.height, device=tiles.device)[:, None]
        column = left[:, None, None] + torch.arange(self.width, device=tiles.device)
        return (row * columns + column)[(row < rows) & (column < columns)].sort().values

    def _sizes(self, like: Tensor) -> Tensor:
        """The entries in each rectangle, as a (rows, columns) grid."""
        down, across = (
            torch.full((n,), step, dtype=like.dtype, device=like.device)
            for n, step in zip(self.grid, (self.height, self.width), strict=True)
        )
        down[-1] = self.matrix[0] - (self.grid[0] - 1) * self.height
        across[-1] = self.matrix[1] - (self.grid[1] - 1) * self.width
        return down[:, None] * across


def _added_up(matrix: Tensor, step: int, groups: int) -> Tensor:
    """Sums of every `step` rows, the last of what is left: (groups, columns)."""
    whole = len(matrix) // step
    sums = matrix[: whole * step].reshape(whole, step, matrix.shape[1]).sum(1)
    return sums if whole == groups else torch.cat([sums, matrix[whole * step :].sum(0, keepdim=True)])


def tilings(model: nn.Module, weights: Mapping[str, Tensor], structure: str) -> dict[str, Tiling]:
    """How each weight is cut by a structure.

    Raises:
        FinepointError: no such structure, or `head` for weights that are no attention projections.
    """
    return {
        name: Tiling(tuple(weight.shape), *_tile(model, name, weight, structure)) for name, weight in weights.items()
    }


def _tile(model: nn.Module, name: str, weight: Tensor, structure: str) -> tuple[int, int]:
    out, features = (weight.numel(), 1) if weight.ndim < 2 else (weight.shape[-2], weight.shape[-1])
    if structure == "head":
        return _head(model, name, out, features)
    if block := check_structure(structure):
        return int(block[1]), int(block[2])
    return {"entry": (1, 1), "row": (1, features), "column": (out, 1)}[structure]


def columns_within(columns: Tiling, share: float) -> int:
    """How many columns of a weight that share is."""
    return max(1, round(share * columns.count))


def room_within(columns: Tiling, share: float) -> int:
    """How many entries they have."""
    return columns_within(columns, share) * columns.height


def confine(scores: Tensor, columns: Tiling, kept: Tensor) -> Tensor:
    """The scores, of the weight's shape or flat, with -inf wherever no kept column is. kept: (n,) their numbers."""
    allowed = torch.zeros(columns.count, dtype=torch.bool, device=scores.device)
    allowed[kept.to(scores.device)] = True
    by_row = allowed.view(columns.grid).repeat_interleave(columns.height, 0)[: columns.matrix[0]]
    return scores.reshape(columns.matrix).masked_fill(~by_row, -torch.inf).reshape(-1)


def entries_within(places: Tensor, columns: Tiling, kept: Tensor) -> Tensor:
    """Flat positions, ascending, of entries numbered column after column of those that are kept. All int64."""
    column, row = kept[places // columns.height], places % columns.height
    features = columns.grid[1]
    return ((column // features * columns.height + row) * features + column % features).sort().values


def places_within(indices: Tensor, columns: Tiling, kept: Tensor) -> Tensor:
    """The way back: the numbers, ascending, of those entries that lie in a kept column. kept: ascending."""
    row, features = indices // columns.matrix[1], columns.grid[1]
    column = row // columns.height * features + indices % features
    at = torch.searchsorted(kept, column).clamp(max=len(kept) - 1)
    return (at * columns.height + row % columns.height)[kept[at] == column].sort().values


def _head(model: nn.Module, name: str, out: int, features: int) -> tuple[int, int]:
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kind = name.split(".")[-2] if "." in name else name
    if kind in HEADS_IN_ROWS and out % size == 0:
        return size, features
    if kind in HEADS_IN_COLUMNS and features % size == 0:
        return out, size
    known = ", ".join([*HEADS_IN_ROWS, *HEADS_IN_COLUMNS])
    raise FinepointError(f"{name} holds no attention heads of size {size}: --structure head knows weights called "
                         f"{known}; give --targets attention where they are called so, else row or column")  # fmt: skip
