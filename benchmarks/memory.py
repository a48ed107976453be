"""Peak memory of training SmolLM2-135M, every arm in a process of its own.

The peak of three steps over what the process held before the model was loaded. The aim for a sparse arm is the bound +
5 % + 24 bytes for each trained entry.

    python benchmarks/memory.py
"""

import json
import subprocess
import sys

from common import ARMS, QUICK_ARMS, options, report, text_batches

BYTES_AN_ENTRY = 24


def one(name: str, rows: int, tokens: int, dtype: str, logits: str) -> dict[str, float]:
    """Runs one arm in this process."""
    from finepoint.models import load_model
    from finepoint.training.memory import peak_bytes, reset_peak

    batches = text_batches(rows, tokens, 8 if logits == "learned" else None)
    reset_peak()
    before = peak_bytes()
    step = ARMS[name](load_model("smollm2", dtype))
    for batch in batches[:3]:
        reset_peak()  # the last step counts: the first allocates the optimizer's state
        step(batch)
    return {"peak": peak_bytes() - before, "trained": step.count}  # type: ignore[attr-defined]


def main() -> None:
    given = options(__doc__, dtype="float32", logits="learned", rows=4, tokens=512, arm="")
    tokens = 128 if given.quick else given.tokens
    if given.arm:
        print(json.dumps(one(given.arm, given.rows, tokens, given.dtype, given.logits)))
        return
    found, failed = {}, {}
    for name in QUICK_ARMS if given.quick else ARMS:
        command = [sys.executable, __file__, "--arm", name, "--rows", str(given.rows), "--tokens", str(tokens),
                   "--dtype", given.dtype, "--logits", given.logits]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            failed[name] = done.stderr.strip().splitlines()[-1][:160]
            print(f"{name}: {failed[name]}")
        else:
            found[name] = json.loads(done.stdout.splitlines()[-1])
    bound = found["bound"]["peak"]
    rows = [
        {"arm": name, "trained": result["trained"], "peak MB": result["peak"] / 1e6, "x bound": result["peak"] / bound,
         "x aim": result["peak"] / (1.05 * bound + BYTES_AN_ENTRY * result["trained"])}
        for name, result in found.items()
    ]  # fmt: skip
    settings = {"dtype": given.dtype, "logits": given.logits, "rows": given.rows, "tokens": tokens}
    report("memory", given.output, ["arm", "trained", "peak MB", "x bound", "x aim"], rows,
           settings=settings, failed=failed)  # fmt: skip


if __name__ == "__main__":
    main()
