"""Commands of many runs: compare, sequence, and report, which shows what they found."""

import logging

from finepoint.cli.output import print_json, print_table, signed
from finepoint.studies.settings import CompareConfig, ReportConfig, SequenceConfig


def run_compare(config: CompareConfig) -> int:
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


def run_sequence(config: SequenceConfig) -> None:
    from finepoint.studies.results import WAYS
    from finepoint.studies.sequence import run_sequence

    found = run_sequence(config)
    if config.json:
        print_json(found)
        return
    tasks = found["tasks"]
    for way in (way for way in WAYS if way in found):
        result = found[way]
        rows = [["base", *(found["base"][task] for task in tasks)]]
        rows += [[f"after {task}", *row] for task, row in zip(tasks, result["matrix"], strict=True)]
        print_table(["accuracy", *tasks], rows, title=WAYS[way].title)
        removable = [task for task, yes in zip(tasks, result["removable"], strict=True) if yes]
        print(f"average accuracy {result['average_accuracy']:.3f}, backward transfer "
              f"{signed(result['backward_transfer'])}, forgetting {signed(result['forgetting'])}; "
              f"average loss {result['average_loss']:.3f}, raised by later tasks by {signed(result['loss_rise'])}; "
              f"can be taken out again, bit for bit: {', '.join(removable) or 'none'}\n")  # fmt: skip


def run_report(config: ReportConfig) -> None:
    from finepoint.reporting.report import write_report

    found = write_report(config)
    if config.json:
        print_json(found)
        return
    print(" ".join(found["headline"]))
    for warning in found["warnings"]:
        print(f"- {warning}")
    print()
    rows = [[name, "drawn"] for name in found["figures"]]
    rows += [[name, f"left out: {why}"] for name, why in found["left_out"].items()]
    print_table(["figure", ""], rows, title=found["report"])
