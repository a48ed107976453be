"""finepoint rules: the rules, those of plug-ins too, the baselines they are measured against, and the schedules"""

import logging
from dataclasses import dataclass

from finepoint.cli.output import print_json, print_table
from finepoint.runtime.settings import setting
from finepoint.selection.settings import DEFAULT_RULE

# fmt: off


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """List the rules, those of installed plug-ins too, the baselines and the schedules, with formulas and sources."""

    json: bool = setting("print one JSON object on stdout", False)


# fmt: on
CONFIG = RulesConfig
logger = logging.getLogger(__name__)


def run(config: RulesConfig) -> None:
    from finepoint.baselines.registry import BASELINES
    from finepoint.selection.rules import ALIASES, OURS, every_rule
    from finepoint.training.refresh import SCHEDULES

    rules, problems = every_rule()
    for problem in problems:
        logger.warning("left out: %s", " ".join(problem.split()))
    other_names = {rule.name: [alias for alias, name in ALIASES.items() if name == rule.name] for rule in rules}
    if config.json:
        listed = {
            rule.name: {"formula": rule.formula, "source": rule.source, "package": rule.package,
                        "options": rule.options, "also": other_names[rule.name], "needs_data": rule.needs_data}
            for rule in rules
        }  # fmt: skip
        baselines = {
            baseline.name: {"formula": baseline.formula, "source": baseline.source, "options": baseline.options,
                            "lr": baseline.lr}
            for baseline in BASELINES.values()
        }  # fmt: skip
        schedules = {name: {"formula": formula, "source": source} for name, (formula, source) in SCHEDULES.items()}
        print_json(listed | {"baselines": baselines, "schedules": schedules})
        return
    rows = [
        [", ".join([rule.name, *other_names[rule.name]]), rule.formula,
         rule.source if rule.package == OURS else f"plug-in: {rule.package}", _options(rule.options),
         "yes" if rule.needs_data else "no"]
        for rule in rules
    ]  # fmt: skip
    print_table(["rule", "score (higher = train it)", "source", "options", "needs data"], rows)
    print(f"where no rule is given: {DEFAULT_RULE}\n")
    rows = [
        [baseline.name, baseline.formula, baseline.source, _options(baseline.options), f"{baseline.lr:g}"]
        for baseline in BASELINES.values()
    ]
    print_table(["baseline", "what is trained", "source", "options", "default lr"], rows)
    print()
    print_table(["--refresh", "what is chosen anew while training", "source"], [[n, *f] for n, f in SCHEDULES.items()])


def _options(options: dict[str, float]) -> str:
    return ", ".join(f"{option}={default:g}" for option, default in options.items()) or "-"
