"""Sampled weight gradient on the CPU, compiled by Numba (the extra `finepoint[cpu]`).

An entry's gradient is a dot product over the tokens of one column of dy and one of x. Both kernels bring the tokens
together in memory first, since gathered loads are slow: `by_dots` transposes the operands once, which pays where many
entries share them; `by_tiles` transposes eight tokens at a time into a buffer that stays in the second cache, which
pays where there are few entries.
"""

import numba
import numpy as np
import torch
from torch import Tensor

TILE = 8  # tokens; the vector width of AVX2 in float32. 16, 32 and 64 were slower at a density of 0.001.


def by_dots(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """dy: (tokens, out), x: (tokens, in), any float dtype, on the CPU; indices: (k,); returns (k,)."""
    rows, columns, out = _places(dy, x, indices)
    operands = [operand.detach().T.to(out.dtype).contiguous().numpy() for operand in (dy, x)]
    _dots(operands[0], operands[1], rows, columns, out.numpy())
    return out


def by_tiles(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """The same; faster below a density of about 0.003."""
    rows, columns, out = _places(dy, x, indices)
    operands = [operand.detach().to(out.dtype).contiguous().numpy() for operand in (dy, x)]
    tiles = [np.empty(operand.shape[1] * TILE, dtype=operand.dtype) for operand in operands]
    _tiled_dots(operands[0], operands[1], rows, columns, out.numpy(), tiles[0], tiles[1])
    return out


def _places(dy: Tensor, x: Tensor, indices: Tensor) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Row and column of each entry, int32, and the zeros to add to."""
    width = x.shape[1]
    wide = torch.promote_types(torch.promote_types(dy.dtype, x.dtype), torch.float32)
    rows, columns = (indices // width).to(torch.int32), (indices % width).to(torch.int32)
    return rows.numpy(), columns.numpy(), torch.zeros(len(indices), dtype=wide)


@numba.njit(nogil=True, fastmath=True, cache=True)
def _dots(dy: np.ndarray, x: np.ndarray, rows: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    """dy: (out, tokens), x: (in, tokens)"""
    for entry in range(rows.shape[0]):
        dy_row = dy[rows[entry]]
        x_row = x[columns[entry]]
        total = out[entry]
        for token in range(dy_row.shape[0]):
            total += dy_row[token] * x_row[token]
        out[entry] = total


@numba.njit(nogil=True, fastmath=True, cache=True)
def _tiled_dots(
    dy: np.ndarray,
    x: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    out: np.ndarray,
    dy_tile: np.ndarray,
    x_tile: np.ndarray,
) -> None:
    """dy: (tokens, out), x: (tokens, in); the tiles are flat buffers of `TILE` tokens a column."""
    dy_needed, x_needed = _distinct(rows, dy.shape[1]), _distinct(columns, x.shape[1])
    for start in range(0, dy.shape[0], TILE):
        _fill_tile(dy, start, dy_needed, dy_tile)
        _fill_tile(x, start, x_needed, x_tile)
        for entry in range(rows.shape[0]):
            dy_at = rows[entry] * TILE
            x_at = columns[entry] * TILE
            total = out[entry]
            for token in range(TILE):
                total += dy_tile[dy_at + token] * x_tile[x_at + token]
            out[entry] = total


@numba.njit(nogil=True, fastmath=True, cache=True)
def _distinct(places: np.ndarray, size: int) -> np.ndarray:
    """The distinct values among `places`, ascending; all below `size`. At low density many columns hold no entry."""
    seen = np.zeros(size, dtype=np.bool_)
    for place in places:
        seen[place] = True
    return np.flatnonzero(seen)


@numba.njit(nogil=True, fastmath=True, cache=True)
def _fill_tile(operand: np.ndarray, start: int, needed: np.ndarray, tile: np.ndarray) -> None:
    """The tokens from `start` of the needed columns, token last; beyond the end zeros."""
    left = operand.shape[0] - start
    for column in needed:
        for token in range(TILE):
            tile[column * TILE + token] = operand[start + token, column] if token < left else 0
