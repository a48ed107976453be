"""finepoint report DIR [--output DIR]"""

from finepoint.cli.output import print_json, print_table
from finepoint.reporting.settings import ReportConfig

CONFIG = ReportConfig


def run(config: ReportConfig) -> None:
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
