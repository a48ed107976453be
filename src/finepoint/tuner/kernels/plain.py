"""The sampled weight gradient in plain PyTorch: dL/dW of a linear layer at k entries only, on any device.

For y = x W^T, dL/dW[i, j] = sum over tokens t of dy[t, i] x[t, j]. All kernels take

    dy       (.., out)  gradient of the layer's output, any float dtype
    x        (.., in)   the layer's input, same leading shape
    indices  (k,)       ascending flat positions i * in + j, int32 or int64

and return (k,), in float32 (float64 where an operand is float64).
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from finepoint.runtime.devices import capturing

GATHERED = 1 << 18  # products in flight while gathering: 1 MB of float32 for each operand stays in the cache
BLOCK = 1 << 22  # entries of the dense gradient held at a time
WIDE_BLOCK = 1 << 24  # the same where a product is spread over thousands of cores: 64 MB


def reference(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """The definition: the dense product, then the entries."""
    dtype = accumulator(dy, x)
    dense = dy.reshape(-1, dy.shape[-1]).to(dtype).T @ x.reshape(-1, x.shape[-1]).to(dtype)
    return dense.reshape(-1)[indices]


def by_gather(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """A dot product over the tokens for each entry; work k x tokens."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    tokens, width = x.shape
    dtype = accumulator(dy, x)
    # Token-last, so that every gathered operand is one contiguous row.
    dy_rows, x_rows = dy.T.to(dtype).contiguous(), x.T.to(dtype).contiguous()
    out = torch.empty(len(indices), dtype=dtype, device=dy.device)
    step = max(1, GATHERED // max(1, tokens))
    for start in range(0, len(indices), step):
        part = indices[start : start + step]
        rows = dy_rows.index_select(0, part // width)
        columns = x_rows.index_select(0, part % width)
        out[start : start + step] = torch.linalg.vecdot(rows, columns)
    return out


def by_blocks(
    dy: Tensor, x: Tensor, indices: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """The dense product in blocks of rows, gathered and freed; memory one block.

    Args:
        multiply: one of `PRODUCTS`; the plain one where not given.
    """
    multiply = multiply or product
    dy, x, indices = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), indices.long()
    width, height = x.shape[1], dy.shape[1]
    out = torch.empty(len(indices), dtype=accumulator(dy, x), device=dy.device)
    if multiply not in HALF.values():
        x = x.to(out.dtype)  # once, not for each block
    rows = max(1, BLOCK // width)
    edges = torch.arange(0, height + rows, rows, device=indices.device) * width
    bounds = torch.searchsorted(indices, edges).tolist()
    for block, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        first = block * rows
        dense = multiply(dy[:, first : first + rows].T, x)
        out[start:end] = dense.reshape(-1)[indices[start:end] - first * width]
    return out


def by_product(
    dy: Tensor, x: Tensor, indices: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """The dense product in the layer's own dtype, summed in float32, in blocks of rows; memory one block.

    For devices on which a dense product costs less than gathering. Nothing waits for the device: which entries lie in
    which block is not asked, entries of other blocks are read anywhere and left out.
    """
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    width, height = x.shape[1], dy.shape[1]
    rows = max(1, WIDE_BLOCK // width)
    out = torch.zeros(len(indices), dtype=accumulator(dy, x), device=dy.device)
    for first in range(0, height, rows):
        dense = (multiply or product)(dy[:, first : first + rows].T, x).reshape(-1)
        if rows >= height:
            return dense[indices]
        place = indices - first * width
        inside = (place >= 0) & (place < len(dense))
        out = torch.where(inside, dense[place.clamp(0, len(dense) - 1)], out)
    return out


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices (m, t) and (t, n), or batches of them: float32, summed in it (float64 where an operand is).

    A device that multiplies half precision into float32 gets the operands as they are. Off the CPU, of operands of two
    dtypes, as under autocast, the wider is rounded to the other's, in which the layer itself has multiplied.
    """
    dtype = accumulator(a, b)
    if a.device.type not in ("cpu", "meta") and dtype == torch.float32:
        if a.itemsize != b.itemsize:
            narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
            a, b = a.to(narrow), b.to(narrow)
        if a.dtype == b.dtype != dtype and sums_in_float32(a.device.type, a.dtype):
            return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def turned(a: Tensor, b: Tensor) -> Tensor:
    """The same by the other of its two sides, (b^T a^T)^T: of a tall and a narrow matrix one may take 25 times as long
    as the other."""
    return product(b.mT, a.mT).mT


def rounded(a: Tensor, b: Tensor) -> Tensor:
    """The same in the operands' own dtype: each sum is rounded to it once, as that of the layer's own weight would be.

    Both of one dtype, for which `rounds_once` holds.
    """
    return (a @ b).to(accumulator(a))


def rounded_turned(a: Tensor, b: Tensor) -> Tensor:
    """That by the other side."""
    return (b.mT @ a.mT).mT.to(accumulator(a))


HALF: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"half": rounded, "half turned": rounded_turned}
"""Those whose results are rounded."""
PRODUCTS = {"dense": product, "turned": turned, **HALF}
"""All ways to a @ b, for matrices (m, t) and (t, n) or batches of them."""


@lru_cache
def rounds_once(dtype: torch.dtype) -> bool:
    """Whether the CPU sums products of this dtype in float32 and rounds at the end: tried, small and large."""
    draw = torch.Generator().manual_seed(0)
    for size in (1, 64):
        # All positive, so that what is summed in the dtype itself soon loses every summand.
        a, b = (torch.rand(*shape, generator=draw).to(dtype) for shape in ((size, 4096), (4096, size)))
        exact = a.double() @ b.double()
        if not ((a @ b).double() - exact).abs().le(exact * torch.finfo(dtype).eps / 2 * 1.01).all():
            return False
    return True


def sums_in_float32(device: str, dtype: torch.dtype) -> bool:
    """Whether a device multiplies matrices of half precision into float32 without rounding: tried on it.

    Not while a CUDA graph is captured, when nothing can be tried: a step before it will have done so.
    """
    return _tried(device, dtype) if not capturing() else device == "cuda"


@lru_cache
def _tried(device: str, dtype: torch.dtype) -> bool:
    ones = torch.ones(1, 16, 16, dtype=dtype, device=device)
    parts = torch.zeros_like(ones)
    parts[:, 0], parts[:, 1] = 2048, 1  # half precision has no 2049
    try:
        batched = torch.bmm(ones, parts, out_dtype=torch.float32)
        single = torch.mm(ones[0], parts[0], out_dtype=torch.float32)
        return bool((batched == 2049).all() and (single == 2049).all())
    except (RuntimeError, TypeError):  # an older torch, or not on this device
        return False


def by_shape(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """The result without its numbers, for tensors on the meta device, which have none."""
    return torch.empty(len(indices), dtype=accumulator(dy, x), device=dy.device)


def sampled_embedding_gradient(dy: Tensor, tokens: Tensor, indices: Tensor, padding: int | None) -> Tensor:
    """The same for an embedding, whose input are token ids: dL/dE[i, j] = sum of dy[t, j] over all t with token i.

    dy: (.., width), tokens: (..) integers, indices: flat positions i * width + j; `padding` never gets a gradient.
    Memory: one row for each distinct token of the batch.
    """
    dtype = torch.promote_types(dy.dtype, torch.float32)
    width = dy.shape[-1]
    flat = tokens.reshape(-1)
    dy = dy.reshape(-1, width).to(dtype)
    if padding is not None:
        dy = dy.masked_fill((flat == padding)[:, None], 0)
    distinct, row = flat.unique(return_inverse=True)
    sums = torch.zeros(len(distinct), width, dtype=dtype, device=dy.device)
    if dy.device.type == "cpu":
        sums.index_add_(0, row, dy)
    else:  # in a fixed order: on a GPU `index_add_` adds in any, and no run would repeat another's bits
        sums.index_put_((row,), dy, accumulate=True)
    wanted = (indices // width).long()
    place = torch.searchsorted(distinct, wanted).clamp(max=len(distinct) - 1)
    return torch.where(distinct[place] == wanted, sums[place, indices % width], 0)


def accumulator(*operands: Tensor) -> torch.dtype:
    """The dtype products are summed in."""
    dtype = torch.float32
    for operand in operands:
        dtype = torch.promote_types(dtype, operand.dtype)
    return dtype
