"""finepoint rules"""

from finepoint.cli.output import print_json, print_table
from finepoint.config import RulesConfig

CONFIG = RulesConfig


def run(config: RulesConfig) -> None:
    from finepoint.choosing.rules import ALIASES, RULES

    other_names = {name: [alias for alias, rule in ALIASES.items() if rule == name] for name in RULES}
    if config.json:
        print_json({
            rule.name: {"formula": rule.formula, "source": rule.source, "options": rule.options,
                        "also": other_names[rule.name], "needs_data": rule.needs_data}
            for rule in RULES.values()
        })  # fmt: skip
        return
    rows = [
        [
            ", ".join([rule.name, *other_names[rule.name]]),
            rule.formula,
            rule.source,
            ", ".join(f"{option}={default:g}" for option, default in rule.options.items()) or "-",
            "yes" if rule.needs_data else "no",
        ]
        for rule in RULES.values()
    ]
    print_table(["rule", "score (higher = train it)", "source", "options", "needs data"], rows)
