"""Selection on SmolLM2-135M: time and peak memory of the exact top-k, of less scoring memory, and of the lean SAFT.

Every variant runs in a process of its own, after the same model and the same batches were loaded, in turn, three
times; the median is shown. Peak memory is what selection adds to the process (VmHWM over VmRSS before it).

    python benchmarks/selection.py --output benchmarks/results/selection.json
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

VARIANTS = {
    "full-gradient pass (the bound)": None,
    "exact, memory 1.0": {"threshold": "exact", "scoring_memory": 1.0},
    "exact, memory 0.25": {"threshold": "exact", "scoring_memory": 0.25},
    "sampled, memory 1.0": {"threshold": "sampled", "scoring_memory": 1.0},
    "sampled, memory 0.25": {"threshold": "sampled", "scoring_memory": 0.25},
}


def one(variant: str, data: str, examples: int) -> dict[str, float]:
    """Runs one variant in this process."""
    import torch

    import finepoint
    from finepoint.batches import Collator, encode_all
    from finepoint.data import read_examples
    from finepoint.models import load_model, load_tokenizer
    from finepoint.training.memory import peak_bytes, reset_peak

    model, tokenizer = load_model("smollm2", "float32"), load_tokenizer("smollm2")
    rows = encode_all(tokenizer, read_examples(data)[:examples], 8192)
    collator = Collator.of(model, tokenizer)
    batches = [collator(rows[at : at + 8]) for at in range(0, len(rows), 8)]
    with torch.no_grad():
        model(**batches[0])  # warm-up
    before = resident()
    reset_peak()
    started = time.perf_counter()
    options = VARIANTS[variant]
    chosen = 0
    if options is None:
        weights = finepoint.target_weights(model)
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            model(**batch).loss.backward()
    else:
        chosen = finepoint.select(model, batches, rule="saft", density=1e-3, **options).count
    return {"seconds": time.perf_counter() - started, "extra_bytes": peak_bytes() - before, "chosen": chosen}


def resident() -> int:
    """Resident memory now, in bytes (Linux)."""
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="runs/demo/data/movies-train.jsonl", help="examples; `make demo` makes them")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="benchmarks/results/selection.json")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(one(options.variant, options.data, options.examples)))
        return
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.repeats):
        for variant, results in runs.items():
            command = [sys.executable, __file__, "--variant", variant, "--data", options.data,
                       "--examples", str(options.examples)]  # fmt: skip
            results.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    medians = {
        variant: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for variant, results in runs.items()
    }
    bound = medians["full-gradient pass (the bound)"]
    print(f"{'variant':<32} {'seconds':>8} {'ratio':>6} {'extra MB':>9} {'ratio':>6} {'chosen':>9}")
    for variant, row in medians.items():
        print(f"{variant:<32} {row['seconds']:8.1f} {row['seconds'] / bound['seconds']:6.2f} "
              f"{row['extra_bytes'] / 1e6:9.0f} {row['extra_bytes'] / bound['extra_bytes']:6.2f} "
              f"{row['chosen']:9.0f}")  # fmt: skip
    from finepoint.training.run import versions

    facts = {"date": str(date.today()), "examples": options.examples, "repeats": options.repeats,
             "processor": platform.processor() or platform.machine(), "versions": versions()}  # fmt: skip
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"facts": facts, "medians": medians, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
