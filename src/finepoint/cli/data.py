"""finepoint data NAME --output DIR"""

from finepoint.cli.output import print_json, print_table
from finepoint.config import DataConfig

CONFIG = DataConfig


def run(config: DataConfig) -> None:
    from finepoint.recipes.vader import write_vader

    counts = write_vader(config.output, config.overwrite)
    if config.json:
        print_json({"output": config.output, "rows": counts})
        return
    print_table(["file", "rows"], list(counts.items()), title=f"{config.output} (VADER, Hutto and Gilbert 2014, MIT)")
