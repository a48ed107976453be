"""Commands that tell what there is: data, rules, schema."""

import logging
from dataclasses import dataclass

from finepoint.cli.output import print_json, print_table
from finepoint.errors import FinepointError
from finepoint.runtime.settings import JSON, OVERWRITE, did_you_mean, json_schema, setting
from finepoint.selection.settings import DEFAULT_RULE

# fmt: off


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Fetch the data of a recipe and write it as JSON Lines; without a name, list the recipes."""

    name: str | None = setting("the recipe, also without its flag: `finepoint data vader`", None, positional=True)
    output: str | None = setting("folder to write; required with a name", None)
    overwrite: bool = setting(OVERWRITE, False)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """List the rules, those of installed plug-ins too, the baselines and the schedules, with formulas and sources."""

    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class SchemaConfig:
    """Print the JSON schema of a command's YAML file, for editors that complete and check it."""

    name: str = setting("the command, also without its flag: `finepoint schema train`", positional=True)
    json: bool = setting("print one JSON object on stdout, as it does in any case", False)


# fmt: on


def help_data() -> str:
    """The recipes, for `--help`."""
    from finepoint.data.recipes.table import RECIPES

    return "\n".join(["recipes:", *(f"  {name:<24} {recipe.what}" for name, recipe in RECIPES.items())])


def run_data(config: DataConfig) -> None:
    from finepoint.data.recipes.table import recipe

    if config.name is None:
        _list(config.json)
        return
    found = recipe(config.name)
    if config.output is None:
        raise FinepointError(f"--output is required: the folder that {config.name} shall be written to")
    counts = found.write(config.output, config.overwrite)
    if config.json:
        print_json({
            "output": config.output, "rows": counts, "recipe": config.name,
            "licence": found.licence, "source": found.source, "caveat": found.caveat,
        })  # fmt: skip
        return
    print(f"source: {found.source}\nlicence: {found.licence}" + (f"\nnote: {found.caveat}" if found.caveat else ""))
    print_table(["file", "rows"], list(counts.items()), title=config.output)


def _list(as_json: bool) -> None:
    from finepoint.data.recipes.table import RECIPES

    if as_json:
        print_json({
            name: {"what": recipe.what, "files": recipe.files, "licence": recipe.licence, "source": recipe.source,
                   "caveat": recipe.caveat, "needs_hub": recipe.needs_hub}
            for name, recipe in RECIPES.items()
        })  # fmt: skip
        return
    rows = [
        [name, recipe.what, recipe.licence, "hub" if recipe.needs_hub else "packages"]
        for name, recipe in RECIPES.items()
    ]
    print_table(["recipe", "what", "licence", "from"], rows)


logger = logging.getLogger(__name__)


def run_rules(config: RulesConfig) -> None:
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


def run_schema(config: SchemaConfig) -> None:
    from finepoint.cli import COMMANDS, command_named

    if config.name not in COMMANDS:
        raise FinepointError(f"no command {config.name!r}{did_you_mean(config.name, COMMANDS)}")
    print_json(json_schema(command_named(config.name).config, f"finepoint {config.name}"))
