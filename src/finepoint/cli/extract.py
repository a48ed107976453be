"""finepoint extract --base M --tuned M2 --density D | --all --output DIR"""

from dataclasses import dataclass

from finepoint.cli.output import print_json, print_table
from finepoint.runtime.settings import setting

# fmt: off


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Make an adapter of the difference between two checkpoints, read weight by weight."""

    base: str = setting("the model before: a folder, a hub id, a .gguf file, smollm2, or gemma3-270m")
    tuned: str = setting("the model after, of the same shape and dtype")
    output: str = setting("folder to write")
    density: float | None = setting("share of all entries to keep, those that changed most, in (0, 1]", None)
    all: bool = setting(
        "keep every entry that changed: applied to the base, it gives the tuned checkpoint bit for bit", False)
    compact: bool = setting(
        "write the gaps between positions in one or two bytes instead of the positions in four", False)
    overwrite: bool = setting("allow an output folder that holds something", False)
    json: bool = setting("print one JSON object on stdout", False)


# fmt: on
CONFIG = ExtractConfig
SHOWN = 12  # weights in the table for people; --json has all


def run(config: ExtractConfig) -> None:
    from finepoint.errors import FinepointError
    from finepoint.exchange.extract import extract
    from finepoint.runtime.files import check_output

    if config.all == (config.density is not None):
        raise FinepointError("give either --density, to keep the largest changes, or --all, to keep every change")
    check_output(config.output, config.overwrite)
    adapter, rows = extract(config.base, config.tuned, config.density)
    adapter.save(config.output, config.overwrite, config.compact)
    info = adapter.info
    if config.json:
        print_json({"output": config.output, "entries": adapter.count, **info, "weights": rows})
        return
    print(
        f"{adapter.count:,} of {info['changed']:,} changed entries in {len(adapter)} weights keep "
        f"{info['kept_energy']:.4%} of the change (sum of squares) -> {config.output}"
    )
    rows.sort(key=lambda row: -row["energy"])
    print_table(
        ["weight", "changed", "kept", "share of the change", "of which kept"],
        [
            [row["weight"], row["changed"], row["kept"], _share(row["energy"], sum(other["energy"] for other in rows)),
             _share(row["kept_energy"], row["energy"])]
            for row in rows[:SHOWN]
        ],
    )  # fmt: skip
    if len(rows) > SHOWN:
        print(f".. and {len(rows) - SHOWN} more weights; --json lists all")


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "-"
