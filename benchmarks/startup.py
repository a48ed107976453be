"""How long the command line takes to answer, and that it answers without torch.

python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time

from common import options, report

COMMANDS = (
    ["--help"], ["train", "--help"], ["select", "--help"], ["compare-nothing"], ["rules"],
    ["train", "--model", "./nowhere", "--output", "made"],
    ["train", "--model", "smollm2", "--output", "made", "--data", "nowhere.jsonl"],
    ["select", "--model", "smollm2", "--output", "made", "--rule", "nonesuch"],
    ["select", "--model", "smollm2", "--output", "made", "--targets", "nonesuch"],
)  # fmt: skip


def main() -> None:
    given = options(__doc__, repeats=11)
    rows = []
    for command in COMMANDS:
        times = []
        for _ in range(3 if given.quick else given.repeats):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "finepoint", *command], capture_output=True)
            times.append(time.perf_counter() - started)
        code = f"import sys; sys.argv[1:] = {command}\nimport finepoint.cli\ntry: finepoint.cli.main()\n"
        code += "except SystemExit: pass\nprint('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        rows.append({"command": "finepoint " + " ".join(command), "seconds": statistics.median(times),
                     "imports torch": done.stdout.strip().endswith("True")})  # fmt: skip
    report("startup", given.output, ["command", "seconds", "imports torch"], rows)


if __name__ == "__main__":
    main()
