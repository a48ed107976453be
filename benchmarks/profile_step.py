"""Where the time of a training step goes, SmolLM2-135M, 4 x 128 tokens, one arm alone in each process.

Wall time around the calls, median of the steps after the warm-up: forward, backward, optimizer, and of them the sampled
gradient (with and without the Python around it), the hooks in the forward and the weights' following.

    python benchmarks/profile_step.py
"""

import json
import statistics
import subprocess
import sys
import time

from common import options, report, text_batches

PARTS = ("forward", "backward", "optimizer", "all", "sampled gradient", "in the kernel", "hooks", "following")


def one(density: float, dtype: str, repeats: int) -> dict[str, float]:
    import torch

    import finepoint
    from common import bound
    from finepoint.models.loading import load_model
    from finepoint.tuner import autograd, deltas
    from finepoint.tuner.kernels import numba as compiled

    spent = dict.fromkeys(PARTS, 0.0)

    def timed(owner, name: str, part: str) -> None:
        work = getattr(owner, name)

        def wrapper(*args, **kwargs):
            started = time.perf_counter()
            result = work(*args, **kwargs)
            spent[part] += time.perf_counter() - started
            return result

        setattr(owner, name, wrapper)

    timed(autograd, "sampled_gradient", "sampled gradient")
    timed(compiled, "in_torch_threads", "in the kernel")
    timed(deltas.Deltas, "write_", "following")
    timed(autograd._Output, "of_linear", "hooks")
    batches = text_batches(4, 128, 8)
    model = load_model("smollm2", dtype).train()
    optimizer = None
    if density:
        tuner = finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=density))
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-5, fused=True)
    else:
        bound(model)
    found = []
    for turn in range(repeats + 2):
        spent.update(dict.fromkeys(PARTS, 0.0))
        at = [time.perf_counter()]
        loss = model(**batches[turn % len(batches)]).loss
        at.append(time.perf_counter())
        loss.backward()
        at.append(time.perf_counter())
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        at.append(time.perf_counter())
        spent |= {"forward": at[1] - at[0], "backward": at[2] - at[1], "optimizer": at[3] - at[2], "all": at[3] - at[0]}
        found.append(dict(spent))
    return {part: statistics.median(row[part] for row in found[2:]) for part in PARTS}


def main() -> None:
    given = options(__doc__, density=-1.0, dtype="float32", repeats=9)
    if given.density >= 0:
        print(json.dumps(one(given.density, given.dtype, given.repeats)))
        return
    rows = []
    for density in (0.0, 1e-3, 1e-2):
        command = [sys.executable, __file__, "--density", str(density), "--dtype", given.dtype,
                   "--repeats", "3" if given.quick else str(given.repeats)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"density": density or "bound"} | json.loads(done.stdout.splitlines()[-1]))
    report("profile_step", given.output, ["density", *PARTS], rows, dtype=given.dtype)


if __name__ == "__main__":
    main()
