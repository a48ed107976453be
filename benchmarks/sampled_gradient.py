"""The kernels of the sampled weight gradient beside each other: milliseconds, median, one thread of Numba.

python benchmarks/kernels.py
"""

import statistics
import time

import torch

from finepoint.training.kernels import plain
from finepoint.training.kernels.numba import by_dots, by_tiles

KERNELS = (by_tiles, by_dots, plain.by_gather, plain.by_blocks)
TOKENS, REPEATS = 512, 15


def main() -> None:
    torch.manual_seed(0)
    print("| weight (out x in) | density | " + " | ".join(kernel.__name__ for kernel in KERNELS) + " |")
    print("| --- " * (2 + len(KERNELS)) + "|")
    for height, width in ((576, 576), (1536, 576)):
        dy, x = torch.randn(TOKENS, height), torch.randn(TOKENS, width)
        for density in (0.001, 0.003, 0.01, 0.05):
            indices = torch.randperm(height * width)[: int(density * height * width)].sort().values
            cells = [f"{median_milliseconds(kernel, dy, x, indices):.2f}" for kernel in KERNELS]
            print(f"| {height} x {width} | {density:g} | " + " | ".join(cells) + " |")


def median_milliseconds(kernel, dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor) -> float:
    kernel(dy, x, indices)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        kernel(dy, x, indices)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
