"""finepoint demo"""

import time
from typing import Any

from finepoint.cli.output import print_json, print_table, signed
from finepoint.evaluation.settings import DemoConfig

CONFIG = DemoConfig


def run(config: DemoConfig) -> None:
    from finepoint.evaluation.demo import run_demo

    started = time.perf_counter()
    found = run_demo(config)
    if config.json:
        print_json(found)
        return
    print_demo(found)
    print(f"\n{time.perf_counter() - started:.0f} s in all; adapters and data are in {config.output}. Next:\n"
          f"  finepoint inspect {config.output}/gallop\n"
          f"  finepoint verify {config.output}/gallop --model smollm2")  # fmt: skip


def print_demo(found: dict[str, Any]) -> None:
    """The table of the demo: a column for the base and for each rule."""
    base, runs = found["base"], found["runs"]
    settings = found["settings"]
    rows: list[list[Any]] = []
    for kind, measure in (("id", "accuracy"), ("ood", "accuracy"), ("probe", "nll")):
        for name, scores in base[kind].items():
            error = f" ± {scores['stderr']:.3f}" if "stderr" in scores else ""
            what = {"id": "accuracy", "ood": "accuracy", "probe": "nats a token"}[kind]
            row = [f"{name} ({kind.upper() if kind != 'probe' else kind}), {what}", f"{scores[measure]:.3f}{error}"]
            row += [f"{r[kind][name][measure]:.3f} ({signed(r[f'{kind}_change'][name])})" for r in runs.values()]
            rows.append(row)
    means = [r["ood_mean"] for r in runs.values()]
    row = ["mean OOD accuracy", f"{means[0]['base']:.3f}"]
    rows.append(row + [f"{mean['adapted']:.3f} ({signed(mean['change'])})" for mean in means])
    rows.append(["trained weights", "-", *(f"{r['trained']:,}" for r in runs.values())])
    rows.append(["adapter", "-", *(f"{r['adapter_bytes'] / 1e6:.2f} MB" for r in runs.values())])
    rows.append(["time, selection + training", "-",
                 *(f"{r['selection_seconds']:.0f} + {r['train_seconds']:.0f} s" for r in runs.values())])  # fmt: skip
    rows.append(["peak memory", "-", *(f"{r['peak_bytes'] / 2**30:.2f} GiB" for r in runs.values())])
    title = (f"SmolLM2-135M, density {settings['density']:g}, {settings['steps']} steps of 16, {settings['dtype']}, "
             f"seed {settings['seed']}")  # fmt: skip
    print_table(["", "base", *(f"{rule} (lr {r['lr']:g})" for rule, r in runs.items())], rows, title=title)
