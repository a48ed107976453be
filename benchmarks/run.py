"""Runs every benchmark after the other; `--quick` runs them with fewer repeats and cases.

python benchmarks/run.py [--quick]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUICK = ("startup", "sampled_gradient", "swap", "file_size", "top_k", "step", "memory", "scoring", "sync")
ALL = (*QUICK, "profile_step", "selection", "loss", "scaling")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    folder, failed = Path(__file__).parent, []
    with tempfile.TemporaryDirectory() as scratch:
        for name in QUICK if quick else ALL:
            print(f"\n## {name}", flush=True)
            started = time.perf_counter()
            # A quick run is for looking, not for the record.
            extra = ["--quick", "--output", f"{scratch}/{name}.json"] if quick else []
            if subprocess.run([sys.executable, "-W", "ignore", str(folder / f"{name}.py"), *extra]).returncode:
                failed.append(name)
            print(f"({time.perf_counter() - started:.0f} s)", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
