"""finepoint sequence --config tasks.yaml --output DIR"""

from finepoint.cli.output import print_json, print_table, signed
from finepoint.studies.settings import SequenceConfig

CONFIG = SequenceConfig
TITLES = {"exclude": "every task on entries of its own", "allow": "overlap allowed"}


def run(config: SequenceConfig) -> None:
    from finepoint.studies.sequence import run_sequence

    found = run_sequence(config)
    if config.json:
        print_json(found)
        return
    tasks = found["tasks"]
    for way in (way for way in TITLES if way in found):
        result = found[way]
        rows = [["base", *(found["base"][task] for task in tasks)]]
        rows += [[f"after {task}", *row] for task, row in zip(tasks, result["matrix"], strict=True)]
        print_table(["accuracy", *tasks], rows, title=TITLES[way])
        removable = [task for task, yes in zip(tasks, result["removable"], strict=True) if yes]
        print(f"average accuracy {result['average_accuracy']:.3f}, backward transfer "
              f"{signed(result['backward_transfer'])}, forgetting {signed(result['forgetting'])}; "
              f"can be taken out again, bit for bit: {', '.join(removable) or 'none'}\n")  # fmt: skip
