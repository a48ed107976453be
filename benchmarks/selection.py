"""Selection on SmolLM2-135M: time and peak memory of the exact top-k, of less scoring memory, and of the lean SAFT.

Every variant runs in a process of its own, after the same model and the same batches were loaded, in turn, three
times; the median is shown. Peak memory is what selection adds to the process (VmHWM over VmRSS before it).

    python benchmarks/selection.py
"""

import json
import statistics
import subprocess
import sys
import time

from common import options, report, text_file

VARIANTS = {
    "full-gradient pass (the bound)": None,
    "exact, memory 1.0": {"threshold": "exact", "scoring_memory": 1.0},
    "exact, memory 0.25": {"threshold": "exact", "scoring_memory": 0.25},
    "exact, on disk": {"threshold": "exact", "scoring_memory": "disk"},
    "sampled, memory 1.0": {"threshold": "sampled", "scoring_memory": 1.0},
    "sampled, memory 0.25": {"threshold": "sampled", "scoring_memory": 0.25},
}


def one(variant: str, examples: int) -> dict[str, float]:
    """Runs one variant in this process."""
    import torch

    import finepoint
    from finepoint.data.batches import Collator, encode_all
    from finepoint.data.examples import read_examples
    from finepoint.models.loading import load_model, load_tokenizer
    from finepoint.runtime.devices import peak_bytes, reset_peak, resident_bytes

    model, tokenizer = load_model("smollm2", "float32"), load_tokenizer("smollm2")
    rows = encode_all(tokenizer, read_examples(text_file("movies-train"))[:examples], 8192)
    collator = Collator.of(model, tokenizer)
    batches = [collator(rows[at : at + 8]) for at in range(0, len(rows), 8)]
    with torch.no_grad():
        model(**batches[0])  # warm-up
    before = resident_bytes()
    reset_peak()
    started = time.perf_counter()
    settings = VARIANTS[variant]
    chosen = 0
    if settings is None:
        weights = finepoint.target_weights(model)
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            model(**batch).loss.backward()
    else:
        chosen = finepoint.select(model, batches, rule="saft", density=1e-3, **settings).count
    return {"seconds": time.perf_counter() - started, "extra_bytes": peak_bytes() - before, "chosen": chosen}


def main() -> None:
    given = options(__doc__, examples=32, repeats=3, variant="")
    if given.variant:
        print(json.dumps(one(given.variant, given.examples)))
        return
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(1 if given.quick else given.repeats):
        for variant, results in runs.items():
            command = [sys.executable, __file__, "--variant", variant, "--examples", str(given.examples)]
            results.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    medians = {variant: {key: statistics.median(run[key] for run in results) for key in results[0]}
               for variant, results in runs.items()}  # fmt: skip
    bound = next(iter(medians.values()))
    rows = [
        {"variant": variant, "seconds": row["seconds"], "x bound": row["seconds"] / bound["seconds"],
         "extra MB": row["extra_bytes"] / 1e6, "x bound's MB": row["extra_bytes"] / bound["extra_bytes"],
         "chosen": int(row["chosen"]) or None}
        for variant, row in medians.items()
    ]  # fmt: skip
    report("selection", given.output, ["variant", "seconds", "x bound", "extra MB", "x bound's MB", "chosen"], rows,
           examples=given.examples, runs=runs)  # fmt: skip


if __name__ == "__main__":
    main()
