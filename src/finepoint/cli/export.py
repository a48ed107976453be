"""finepoint export --model M --adapter DIR --format F --output DIR"""

from finepoint.cli.output import print_json
from finepoint.config import ExportConfig

CONFIG = ExportConfig
# What a layout could not keep, in words; each is a key of what `export` returns.
LOSSES = {
    "rounded": "values were rounded to the written dtype",
    "vanished": "changes were too small for it and vanished",
    "inexact": "values will come out differently there, by rounding",
    "padding": "entries with a change of 0 fill what the layout asks for",
    "idle": "entries are all that the adapter has, and none differs from the base: it changes nothing",
}


def run(config: ExportConfig) -> None:
    from finepoint.exchange.formats import export

    found = export(config.model, config.adapter, config.format, config.output, config.dtype, config.overwrite,
                   config.any_base)  # fmt: skip
    if config.json:
        print_json({"model": config.model, "adapter": config.adapter, **found})
        return
    print(f"{config.adapter} on {config.model} as {config.format} -> {config.output} ({found['bytes']:,} bytes)")
    for key, meaning in LOSSES.items():
        if found.get(key):
            print(f"{found[key]:,} {meaning}")
