"""finepoint compare --config study.yaml --output DIR"""

import logging

from finepoint.cli.output import print_json
from finepoint.studies.settings import CompareConfig

CONFIG = CompareConfig


def run(config: CompareConfig) -> int:
    from finepoint.studies.compare import compare, duration

    # What a single run says of itself would bury what is said of the study.
    logging.getLogger("finepoint.training").setLevel(logging.WARNING)
    found = compare(config)
    if config.json:
        print_json(found)
    elif config.dry_run:
        print("\n".join(found["todo"]))
        later = f" and {found['later']} at the best rates, once these are done" if found["later"] else ""
        print(f"{len(found['todo'])} cells to run{later}; {found['done']} of {found['cells']} are done. "
              f"About {duration(found['estimated_seconds'])} in all ({found['seconds_a_cell']:.0f} s a cell, "
              f"by {found['estimated_from']}).")  # fmt: skip
    else:
        for name, error in found["failed"].items():
            print(f"{name} failed: {error}")
        print(f"{found['done']} of {found['cells']} cells are done, {len(found['failed'])} failed. Next:\n"
              f"  finepoint report {config.output}")  # fmt: skip
    return 1 if found.get("failed") else 0
