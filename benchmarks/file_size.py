"""Bytes on disk for each trained weight, and how fast adapters of SmolLM2-135M are saved and loaded.

Positions chosen by magnitude, values made by random steps. The rest of a file is its header: names, shapes, checksums.

    python benchmarks/file_size.py
"""

import tempfile
import time
from pathlib import Path

import torch

from common import options, report


def main() -> None:
    given = options(__doc__)
    from finepoint.models.loading import load_model

    rows = []
    for dtype in ("bfloat16", "float32"):
        model = load_model("smollm2", dtype)
        for density in (1e-3, 1e-2):
            rows += [written(model, dtype, density, compact) for compact in (False, True)]
    columns = [
        "dtype",
        "density",
        "file",
        "trained",
        "bytes a weight",
        "header",
        "save MB/s",
        "load MB/s",
        "exact",
    ]
    report("file_size", given.output, columns, rows)


def written(model, dtype: str, density: float, compact: bool) -> dict[str, object]:
    import finepoint
    from finepoint.adapters.format import TENSORS

    tuner = finepoint.SparseTuner(model, finepoint.select(model, rule="magnitude-high", density=density))
    for delta in tuner.parameters():
        delta.data.normal_(std=1e-2)
    adapter = tuner.adapter()
    tuner.revert_()
    tuner.close()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        adapter.save(Path(folder) / "a", compact=compact)
        saved = time.perf_counter()
        back = finepoint.SparseAdapter.load(Path(folder) / "a")
        loaded = time.perf_counter()
        path = Path(folder) / "a" / TENSORS
        size = path.stat().st_size
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    exact = all(torch.equal(back[name], adapter[name]) and torch.equal(back.changes[name].numbers, change.numbers)
                for name, change in adapter.changes.items())  # fmt: skip
    return {"dtype": dtype, "density": density, "file": "compact" if compact else "default", "trained": adapter.count,
            "bytes a weight": size / adapter.count, "header": header / adapter.count,
            "save MB/s": size / 1e6 / (saved - started), "load MB/s": size / 1e6 / (loaded - saved),
            "exact": exact}  # fmt: skip


if __name__ == "__main__":
    main()
