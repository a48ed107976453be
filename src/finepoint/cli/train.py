"""finepoint train --model M --data F --rule gallop --density 0.001 --output DIR"""

from math import inf
from typing import Any

from finepoint import ranks
from finepoint.cli.output import print_json, print_table
from finepoint.config import TrainConfig
from finepoint.errors import FinepointError

CONFIG = TrainConfig


def run(config: TrainConfig) -> None:
    if config.density == "auto":
        from finepoint.studies.density import train_auto as train

        if ranks.launched():
            raise FinepointError("the search of --density auto runs in one process; start it without a launcher")
    else:
        from finepoint.training.run import train

    record = train(config)
    if not ranks.is_first():
        return
    if config.json:
        print_json({"output": config.output, **record})
        return
    if "search" in record:
        print_search(record["search"])
    what = "numbers" if record.get("baseline") else "entries"
    print(
        f"trained {record['trained']:,} {what} for {record['steps']} steps in {record['seconds']:.0f} s (selection "
        f"{record['selection_seconds']:.0f} s); loss {record['first_loss']:.3f} -> {record['last_loss']:.3f}; "
        f"{record['changed']:,} stored weights changed{lost(record)}\n"
        f"adapter: {config.output} ({record['adapter_bytes']:,} bytes); "
        f"peak memory {record['peak_bytes'] / 2**30:.2f} GiB"
    )


def lost(record: dict[str, Any]) -> str:
    """What rounding to the weights' dtype has taken of the training, in words."""
    if not record["vanished"]:
        return ""
    return f", {record['vanished']:,} moved too little for their dtype and hold the base's value"


def print_search(trials: list[dict[str, Any]]) -> None:
    """A row a trial, the longest runs first, each rung by its loss."""
    columns = ["steps", "density", "lr", "trained", "validation_loss", "last_validation_loss", "last_loss", "kl"]
    losses = {id(trial): inf if trial["validation_loss"] is None else trial["validation_loss"] for trial in trials}
    ordered = sorted(trials, key=lambda trial: (-trial["steps"], losses[id(trial)]))  # those that failed are the last
    rows = [[f"{trial[name]:g}" if name in ("density", "lr") else trial[name] for name in columns] for trial in ordered]
    print_table(
        ["steps", "density", "lr", "trained", "best validation loss", "last", "training loss", "KL on prompts"], rows
    )
