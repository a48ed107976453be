"""One training step on SmolLM2-135M, side by side: the bound, sparse, and every rival.

All arms live in one process and take turns on the same batches of real text. A step is forward, backward and AdamW; it
is compared with the bound: the same model with nothing trainable in its linear layers, forward and input gradients
only. `--logits learned` computes logits at the last 8 positions of a row for every arm, `--logits all` everywhere.

    python benchmarks/step.py
"""

import statistics
import time

from common import ARMS, QUICK_ARMS, median_ratios, options, report, text_batches

WARM_UP = 2  # turns: caches, allocators, compiled kernels


def main() -> None:
    given = options(__doc__, dtype="float32", logits="learned", rows=4, tokens=128, repeats=9, arms="")
    from finepoint.models.loading import load_model

    batches = text_batches(given.rows, given.tokens, 8 if given.logits == "learned" else None)
    steps, failed = {}, {}
    for name in given.arms.split(",") if given.arms else QUICK_ARMS if given.quick else ARMS:
        try:
            steps[name] = ARMS[name](load_model("smollm2", given.dtype))
            steps[name](batches[0])
        except Exception as error:  # a rival that is not installed, or does not run with these versions
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else repr(error)
            steps.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range((3 if given.quick else given.repeats) + WARM_UP):
        for name, step in steps.items():
            started = time.perf_counter()
            step(batches[turn % len(batches)])
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - started)
    over_bound = median_ratios(times, "bound")
    over_lora = median_ratios(times, "LoRA r8") if "LoRA r8" in times else {}
    rows = [
        {"arm": name, "trained": step.count, "seconds": statistics.median(times[name]),  # type: ignore[attr-defined]
         "x bound": over_bound[name], "x LoRA": over_lora.get(name)}
        for name, step in steps.items()
    ]  # fmt: skip
    for name, reason in failed.items():
        print(f"{name}: {reason}")
    settings = {key: getattr(given, key) for key in ("dtype", "logits", "rows", "tokens")}
    name = "step" if given.dtype == "float32" else f"step-{given.dtype}"
    name += "-all-logits" if given.logits == "all" else ""
    columns = ["arm", "trained", "seconds", "x bound", "x LoRA"]
    report(name, given.output, columns, rows, settings=settings, times=times, failed=failed)


if __name__ == "__main__":
    main()
