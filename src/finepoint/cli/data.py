"""finepoint data [NAME --output DIR]"""

from dataclasses import dataclass

from finepoint.cli.output import print_json, print_table
from finepoint.errors import FinepointError
from finepoint.runtime.settings import setting

# fmt: off


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Fetch the data of a recipe and write it as JSON Lines; without a name, list the recipes."""

    name: str | None = setting("the recipe, also without its flag: `finepoint data vader`", None, positional=True)
    output: str | None = setting("folder to write; required with a name", None)
    overwrite: bool = setting("allow an output folder that holds something", False)
    json: bool = setting("print one JSON object on stdout", False)


# fmt: on
CONFIG = DataConfig


def after_help() -> str:
    """The recipes, for `--help`."""
    from finepoint.data.recipes.table import RECIPES

    return "\n".join(["recipes:", *(f"  {name:<24} {recipe.what}" for name, recipe in RECIPES.items())])


def run(config: DataConfig) -> None:
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
