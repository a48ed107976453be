"""finepoint rules: the rules, and the baselines they are measured against"""

from finepoint.cli.output import print_json, print_table
from finepoint.config import RulesConfig

CONFIG = RulesConfig


def run(config: RulesConfig) -> None:
    from finepoint.choosing.rules import ALIASES, RULES
    from finepoint.training.baselines import BASELINES

    other_names = {name: [alias for alias, rule in ALIASES.items() if rule == name] for name in RULES}
    if config.json:
        rules = {
            rule.name: {"formula": rule.formula, "source": rule.source, "options": rule.options,
                        "also": other_names[rule.name], "needs_data": rule.needs_data}
            for rule in RULES.values()
        }  # fmt: skip
        print_json(rules | {"baselines": {
            baseline.name: {"formula": baseline.formula, "source": baseline.source, "options": baseline.options,
                            "lr": baseline.lr}
            for baseline in BASELINES.values()
        }})  # fmt: skip
        return
    rows = [
        [", ".join([rule.name, *other_names[rule.name]]), rule.formula, rule.source, _options(rule.options),
         "yes" if rule.needs_data else "no"]
        for rule in RULES.values()
    ]  # fmt: skip
    print_table(["rule", "score (higher = train it)", "source", "options", "needs data"], rows)
    print()
    rows = [
        [baseline.name, baseline.formula, baseline.source, _options(baseline.options), f"{baseline.lr:g}"]
        for baseline in BASELINES.values()
    ]
    print_table(["baseline", "what is trained", "source", "options", "default lr"], rows)


def _options(options: dict[str, float]) -> str:
    return ", ".join(f"{option}={default:g}" for option, default in options.items()) or "-"
