"""The kernels of the sampled weight gradient beside each other, and beside the dense product: milliseconds, median.

python benchmarks/sampled_gradient.py
"""

import statistics
import time

import torch

from common import options, report
from finepoint.tuner.kernels import plain
from finepoint.tuner.kernels.numba import by_tiles

KERNELS = (by_tiles, plain.by_gather, plain.by_blocks)
SHAPES = ((192, 576), (576, 576), (1536, 576))
DENSITIES = (0.0001, 0.001, 0.01, 0.03, 0.1)
TOKENS = 512


def main() -> None:
    given = options(__doc__, repeats=21)
    torch.manual_seed(0)
    other = torch.randn(300, 300)  # a product before each run, as in a backward pass: caches and threads as there
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for height, width in SHAPES:
            dy, x = torch.randn(TOKENS, height).to(dtype), torch.randn(TOKENS, width).to(dtype)
            for density in DENSITIES:
                indices = torch.randperm(height * width)[: int(density * height * width)].sort().values.int()
                row = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "out x in": f"{height} x {width}",
                    "density": density,
                }
                for kernel in KERNELS:
                    row[kernel.__name__] = milliseconds(
                        lambda k=kernel, i=indices, a=dy, b=x: k(a, b, i), other, 5 if given.quick else given.repeats
                    )
                if dtype == torch.float32:
                    row["dense product"] = milliseconds(lambda a=dy, b=x: a.T @ b, other, 7)
                rows.append(row)
    columns = ["dtype", "out x in", "density", *(kernel.__name__ for kernel in KERNELS), "dense product"]
    report("sampled_gradient", given.output, columns, rows, tokens=TOKENS)


def milliseconds(work, other: torch.Tensor, repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        torch.mm(other, other)
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
