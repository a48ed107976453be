"""finepoint eval --model M [--adapter DIR ..] --id NAME=F --ood NAME=F .. --probe NAME=F .."""

from typing import Any

from finepoint.cli.output import print_json, print_table, signed
from finepoint.evaluation.settings import EvalConfig

CONFIG = EvalConfig
KL = "KL to the base"


def run(config: EvalConfig) -> None:
    from finepoint.evaluation.evaluate import evaluate_config
    from finepoint.runtime.files import write_json

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
            rows += more_rows(f"{kind} {name}", kind, name, found)
    for task, metrics in found["base"].get("tasks", {}).items():
        for metric, value in metrics.items():
            if metric == "n" or "_stderr" in metric:
                continue
            row = [f"task {task}", metric, metrics.get("n", ""), round(value, 3)]
            for adapter in found["adapters"].values():
                row += [f"{adapter['tasks'][task][metric]:.3f} ({signed(adapter['tasks_change'][task][metric])})"]
            rows.append(row)
    if any("protected" in adapter for adapter in found["adapters"].values()):
        kept = [adapter["protected"] for adapter in found["adapters"].values()]
        rows.append(["protected", KL, kept[0]["tokens"], "-", *(f"{scores['kl']:.4f}" for scores in kept)])
    print_table(["set", "measure", "n", "base", *found["adapters"]], rows)


def more_rows(title: str, kind: str, name: str, found: dict[str, Any]) -> list[list[Any]]:
    """What else is known of a set: KL to the base of a probe, answers by generation."""
    adapters = [adapter[kind][name] for adapter in found["adapters"].values()]
    rows: list[list[Any]] = []
    for key, measure in (("kl", KL), ("kl_prompts", f"{KL}, prompts")):
        if any(key in scores for scores in adapters):
            rows.append([title, measure, "", "-", *(f"{scores[key]:.4f}" for scores in adapters)])
    base = found["base"][kind][name].get("generated", {})
    for measure in ("accuracy", "format_failures", "empty", "memorised"):
        values = [scores.get("generated", {}).get(measure) for scores in adapters]
        if any(value is not None for value in (base.get(measure), *values)):
            shown = ["-" if value is None else f"{value:.3f}" for value in (base.get(measure), *values)]
            rows.append([title, f"generated: {measure.replace('_', ' ')}", base["n"], *shown])
    return rows
