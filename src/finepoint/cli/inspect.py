"""finepoint inspect DIR"""

from finepoint.cli.output import console, print_json, print_table
from finepoint.config import InspectConfig

CONFIG = InspectConfig


def run(config: InspectConfig) -> None:
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.inspection import by_module, facts, heat_map

    adapter = SparseAdapter.load(config.folder)
    found = facts(adapter)
    if config.json:
        print_json(found)
        return
    simple = {key: value for key, value in found.items() if isinstance(value, str | int | float)}
    shown = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in simple.items()}
    print_table(["fact", "value"], [[key, value] for key, value in shown.items()], title=config.folder)
    print()
    rows = by_module(adapter)
    print_table(
        ["module", "weights", "entries", "share", "mean |delta|", "max |delta|"],
        [
            [row["module"], row["weights"], row["entries"], scientific(row["share"]),
             scientific(row["mean_abs_delta"]), scientific(row["largest"])]
            for row in rows
        ],
    )  # fmt: skip
    if all(row["largest"] is None for row in rows):
        print("no |delta|: the adapter holds exact values, and how far they are from the base's only the base knows")
    print()
    console().print(heat_map(adapter), highlight=False, markup=False)


def scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"
