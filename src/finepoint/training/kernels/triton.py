"""Sampled weight gradient for CUDA, in Triton. Compared with the reference in Triton's interpreter.

Not yet run on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finepoint.training.kernels.plain import accumulator

ENTRIES = 128  # of one program
TOKENS = 16  # read at a time: a tile of ENTRIES x TOKENS of each operand in registers


def by_programs(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """dy: (.., out), x: (.., in), any float dtype; indices: (k,) int32 or int64; returns (k,)."""
    dy, x = dy.reshape(-1, dy.shape[-1]).contiguous(), x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(len(indices), dtype=accumulator(dy, x), device=dy.device)
    if len(indices):
        grid = (triton.cdiv(len(indices), ENTRIES),)
        _dots[grid](dy, x, indices, out, len(dy), dy.shape[1], x.shape[1], len(indices), ENTRIES, TOKENS)
    return out


@triton.jit
def _dots(
    dy: Any,
    x: Any,
    indices: Any,
    out: Any,
    tokens: Any,
    height: Any,
    width: Any,
    count: Any,
    ENTRIES: tl.constexpr,  # noqa: N803 - a constant
    TOKENS: tl.constexpr,  # noqa: N803
) -> None:
    """Each program gathers the tokens of its own entries, a few tokens at a time, and sums over them."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < count
    place = tl.load(indices + entry, mask=inside, other=0).to(tl.int64)
    row, column = place // width, place % width
    total = tl.zeros((ENTRIES,), dtype=out.dtype.element_ty)
    for start in range(0, tokens, TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        mask = (token < tokens)[:, None] & inside[None, :]
        dy_part = tl.load(dy + token[:, None] * height + row[None, :], mask=mask, other=0).to(total.dtype)
        x_part = tl.load(x + token[:, None] * width + column[None, :], mask=mask, other=0).to(total.dtype)
        total += tl.sum(dy_part * x_part, axis=0)
    tl.store(out + entry, total, mask=inside)
