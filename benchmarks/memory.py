"""Peak memory of training SmolLM2-135M, every arm in a process of its own.

`peak MB` is what the process held in the third step over what it held before the model was loaded. It has the
allocator's share in it: a C library that keeps small and large blocks in one heap leaves holes. `tensors MB` counts the
bytes of live tensors alone, at their peak in the third step; it does not depend on the allocator. The aim for a sparse
arm is the bound + 5 % + 24 bytes for each trained entry.

    python benchmarks/memory.py
"""

import json
import subprocess
import sys
import time
from argparse import Namespace

from common import ARMS, QUICK_ARMS, options, report, text_batches

BYTES_AN_ENTRY = 24


def one(name: str, rows: int, tokens: int, dtype: str, logits: str) -> dict[str, float]:
    """Runs one arm in this process."""
    from finepoint.models.loading import load_model
    from finepoint.runtime.devices import peak_bytes, reset_peak

    batches = text_batches(rows, tokens, 8 if logits == "learned" else None)
    reset_peak()
    before = peak_bytes()
    step = ARMS[name](load_model("smollm2", dtype))
    for batch in batches[:3]:
        reset_peak()  # the last step counts: the first allocates the optimizer's state
        step(batch)
    return {"peak": peak_bytes() - before, "trained": step.count}  # type: ignore[attr-defined]


def tensors(name: str, rows: int, tokens: int, dtype: str, logits: str) -> dict[str, float]:
    """The peak of live tensors' bytes in the third step of one arm, the model's own included."""
    from torch.profiler import ProfilerActivity, profile

    from finepoint.models.loading import load_model

    batches = text_batches(rows, tokens, 8 if logits == "learned" else None)
    model = load_model("smollm2", dtype)
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
            for part in [*model.parameters(), *model.buffers()]}  # fmt: skip
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step = ARMS[name](model)
        for batch in batches[:3]:
            third = time.time_ns()
            step(batch)
    changes = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = sum(held.values())
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        peak = max(peak, now) if change.start_ns() >= third else now
    return {"tensors": peak}


def main() -> None:
    given = options(__doc__, dtype="float32", logits="learned", rows=4, tokens=512, arm="", live=0)
    tokens = 128 if given.quick else given.tokens
    if given.arm:
        measure = tensors if given.live else one
        print(json.dumps(measure(given.arm, given.rows, tokens, given.dtype, given.logits)))
        return
    found: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for name in QUICK_ARMS if given.quick else ARMS:
        command = [sys.executable, __file__, "--arm", name, "--rows", str(given.rows), "--tokens", str(tokens),
                   "--dtype", given.dtype, "--logits", given.logits]  # fmt: skip
        for live in ("0", "1"):  # in a process of its own each: watching tensors takes memory
            done = subprocess.run([*command, "--live", live], capture_output=True, text=True)
            if done.returncode:
                failed[name] = done.stderr.strip().splitlines()[-1][:160]
                print(f"{name}: {failed[name]}")
                found.pop(name, None)
                break
            found.setdefault(name, {}).update(json.loads(done.stdout.splitlines()[-1]))
        if name in found:
            table(found, failed, given, tokens)  # now, since a dozen arms take minutes


def table(found: dict[str, dict[str, float]], failed: dict[str, str], given: Namespace, tokens: int) -> None:
    """Writes and prints what has been measured so far; the first arm is the bound."""
    bound, bare = found["bound"]["peak"], found["bound"]["tensors"]
    rows = [
        {"arm": name, "trained": result["trained"], "peak MB": result["peak"] / 1e6, "x bound": result["peak"] / bound,
         "x aim": result["peak"] / (1.05 * bound + BYTES_AN_ENTRY * result["trained"]),
         "tensors MB": result["tensors"] / 1e6, "tensors x bound": result["tensors"] / bare}
        for name, result in found.items()
    ]  # fmt: skip
    settings = {"dtype": given.dtype, "logits": given.logits, "rows": given.rows, "tokens": tokens}
    columns = ["arm", "trained", "peak MB", "x bound", "x aim", "tensors MB", "tensors x bound"]
    report("memory", given.output, columns, rows, settings=settings, failed=failed)


if __name__ == "__main__":
    main()
