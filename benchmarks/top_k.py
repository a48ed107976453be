"""The exact top-k of 100 million scores that come a weight at a time: seconds, and memory beyond one weight's scores.

Beside it torch.topk over all scores in one tensor, which has to hold them.

    python benchmarks/top_k.py
"""

import json
import subprocess
import sys
import time

from common import options, report

WEIGHTS = 10


def one(way: str, scores: int, density: float) -> dict[str, float]:
    import torch

    from finepoint.runtime.devices import peak_bytes, reset_peak
    from finepoint.selection.select import TopK

    size = scores // WEIGHTS
    generator = torch.Generator().manual_seed(0)
    k = int(scores * density)
    torch.randn(size).abs_()
    reset_peak()
    before = peak_bytes()
    seconds = 0.0
    if way == "streamed":
        best = TopK(k)
        for source in range(WEIGHTS):
            part = torch.randn(size, generator=generator).abs_()
            started = time.perf_counter()
            best.add(source, part, None)
            seconds += time.perf_counter() - started
        started = time.perf_counter()
        sources, positions, _ = best.result()
        seconds += time.perf_counter() - started
        found = int((sources * size + positions).sum())
    else:
        everything = torch.cat([torch.randn(size, generator=generator).abs_() for _ in range(WEIGHTS)])
        started = time.perf_counter()
        found = int(torch.topk(everything, k, sorted=False).indices.sum())
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "extra MB": (peak_bytes() - before) / 1e6, "checksum": found}


def main() -> None:
    given = options(__doc__, scores=100_000_000, way="", density=0.0)
    if given.way:
        print(json.dumps(one(given.way, given.scores, given.density)))
        return
    rows = []
    for density in (1e-3, 1e-2):
        for way in ("streamed", "torch.topk"):
            command = [sys.executable, __file__, "--way", way, "--scores", str(given.scores), "--density", str(density)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"way": way, "density": density} | json.loads(done.stdout))
        assert rows[-1]["checksum"] == rows[-2]["checksum"], "the two ways chose different entries"
    report("top_k", given.output, ["way", "density", "seconds", "extra MB"], rows, scores=given.scores)


if __name__ == "__main__":
    main()
