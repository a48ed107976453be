"""Switching SmolLM2-135M between two adapters of 1 % of its linear weights, with the bits checked.

python benchmarks/swap.py
"""

import statistics
import time

import torch

from common import options, random_adapter, report


def main() -> None:
    given = options(__doc__, repeats=50)
    rows = [timed(dtype, 10 if given.quick else given.repeats) for dtype in ("float32", "bfloat16")]
    report("swap", given.output, ["dtype", "entries", "switch ms", "apply ms", "revert ms", "exact"], rows)


def timed(dtype: str, repeats: int) -> dict[str, object]:
    import finepoint
    from finepoint.models.loading import load_model

    model = load_model("smollm2", dtype)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    switch, adapters = finepoint.AdapterSet(model), [random_adapter(model, seed, density=0.01) for seed in (0, 1)]
    for name, adapter in zip("ab", adapters, strict=True):
        switch.add(name, adapter)
    switches, applies, reverts = [], [], []
    for i in range(repeats):
        switches.append(milliseconds(lambda i=i: switch.set("ab"[i % 2])))
    switch.disable()
    for _ in range(5):
        applies.append(milliseconds(lambda: adapters[0].apply(model)))
        reverts.append(milliseconds(lambda: adapters[0].revert(model)))
    exact = all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    median = statistics.median
    return {"dtype": dtype, "entries": adapters[0].count, "switch ms": median(switches[2:]),
            "apply ms": median(applies), "revert ms": median(reverts), "exact": exact}  # fmt: skip


def milliseconds(work) -> float:
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


if __name__ == "__main__":
    main()
