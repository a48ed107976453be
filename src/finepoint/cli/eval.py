"""finepoint eval --model M [--adapter DIR ..] --id NAME=F --ood NAME=F .. --probe NAME=F .."""

from typing import Any

from finepoint.cli.output import print_json, print_table, signed
from finepoint.config import EvalConfig

CONFIG = EvalConfig


def run(config: EvalConfig) -> None:
    from finepoint.files import write_json
    from finepoint.measuring.evaluation import evaluate_config

    found = evaluate_config(config)
    if config.output:
        from pathlib import Path

        write_json(Path(config.output), found)
    if config.json:
        print_json(found)
    else:
        print_scores(found)


def print_scores(found: dict[str, Any]) -> None:
    """A row a set; the base, then every adapter with its change."""
    rows = []
    for kind, measure in (("id", "accuracy"), ("ood", "accuracy"), ("probe", "nll")):
        for name, scores in found["base"][kind].items():
            row = [f"{kind} {name}", measure, scores.get("n", scores.get("tokens")), round(scores[measure], 3)]
            for adapter in found["adapters"].values():
                row += [f"{adapter[kind][name][measure]:.3f} ({signed(adapter[f'{kind}_change'][name])})"]
            rows.append(row)
    print_table(["set", "measure", "n", "base", *found["adapters"]], rows)
