"""Whole rows or columns of a weight: their gradient is a small dense product, with nothing to gather.

Shapes as in `plain.py`: dy (.., out), x (.., in). Results are (k,), row by row, in float32 (float64 for float64).
"""

import torch
from torch import Tensor

from finepoint.training.kernels.plain import accumulator

ROWS, COLUMNS = 0, 1


def whole_lines(indices: Tensor, shape: tuple[int, ...]) -> tuple[int, Tensor] | None:
    """`(ROWS, rows)` or `(COLUMNS, columns)` where the entries are just that, of a matrix; else None.

    indices: (k,) flat, ascending, unique.
    """
    if len(shape) != 2:
        return None
    out, features = shape
    if len(indices) % features == 0:
        rows = indices[::features] // features
        if torch.equal(indices, every(rows, torch.arange(features, device=indices.device), features)):
            return ROWS, rows
    if len(indices) % out == 0:
        columns = indices[: len(indices) // out]
        if torch.equal(indices, every(torch.arange(out, device=indices.device), columns, features)):
            return COLUMNS, columns
    return None


def every(rows: Tensor, columns: Tensor, features: int) -> Tensor:
    """The flat positions where these rows and columns cross."""
    return (rows.long()[:, None] * features + columns).reshape(-1)


def column_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dL/dW at whole columns, from the columns' inputs alone: x (.., columns)."""
    dtype = accumulator(dy, x)
    return (dy.reshape(-1, dy.shape[-1]).to(dtype).T @ x.reshape(-1, x.shape[-1]).to(dtype)).reshape(-1)


def row_gradient(dy: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """dL/dW at whole rows, of whose output gradients nothing else is needed."""
    return column_gradient(dy.index_select(-1, rows), x)
