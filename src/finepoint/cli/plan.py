"""finepoint plan --model M --density D --tokens T --batch-size B"""

from dataclasses import asdict

from finepoint.cli.output import print_json, print_table
from finepoint.memory.settings import PlanConfig

CONFIG = PlanConfig


def run(config: PlanConfig) -> None:
    from finepoint.memory.plan import PARTS, plan

    found = plan(config)
    passes = {"selection": found.selection, "training": found.training}
    peaks = {f"{name}_peak_bytes": parts and sum(parts.values()) for name, parts in passes.items()}
    if config.json:
        print_json({"model": config.model, **asdict(found), **peaks})
        return
    print(
        f"{config.model}: {found.parameters:,} parameters in {found.dtype} on {found.device}; {found.trained:,} of "
        f"{found.entries:,} target entries trained; {config.batch_size} x {config.tokens} tokens a batch"
    )
    shown = {name: parts for name, parts in passes.items() if parts}
    rows = [
        [meaning, *(parts.get(part, 0) / 2**30 for parts in shown.values())]
        for part, meaning in PARTS.items()
        if any(part in parts for parts in shown.values())
    ]
    rows.append(["peak", *(sum(parts.values()) / 2**30 for parts in shown.values())])
    print_table(["GiB, at the peak", *shown], rows)
