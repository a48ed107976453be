"""finepoint rules: the rules, those of plug-ins too, the baselines they are measured against, and the schedules"""

import logging

from finepoint.cli.output import print_json, print_table
from finepoint.config import DEFAULT_RULE, RulesConfig

CONFIG = RulesConfig
logger = logging.getLogger(__name__)


def run(config: RulesConfig) -> None:
    from finepoint.choosing.rules import ALIASES, OURS, every_rule
    from finepoint.training.baselines import BASELINES
    from finepoint.training.refreshing import SCHEDULES

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
