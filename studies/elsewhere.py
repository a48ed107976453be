"""What carries over: how cells of a study answer other sets than that of their task, beside the base, as one table.

    finepoint compare --config studies/elsewhere.yaml --output runs/elsewhere
    python studies/elsewhere.py runs/elsewhere    # adds them to docs/study/elsewhere.csv, prints means over seeds

A row is one training and one set; the base's rows have no seed.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from keep import PLAIN, Row, added

TABLE = Path(__file__).parent.parent / "docs" / "study" / "elsewhere.csv"
MEASURES = ["accuracy", "loss", "kl_prompts"]
KEY = ["task", "arm", "lr", "seed", "set"]
COLUMNS = [*KEY, "n", *MEASURES]


def rows_of(study: Path) -> Iterator[Row]:
    """What the table has of a study: of each cell and of the base, every set."""
    cells = [json.loads(path.read_text()) for path in sorted(study.glob("cells/*.json"))]
    base = json.loads((study / "base.json").read_text())["tests"]
    for task in sorted({cell["task"] for cell in cells}):
        yield from _sets({"task": task, "arm": "base", "lr": "", "seed": ""}, base)
    for cell in cells:
        named = {name: cell[name] for name in ("task", "lr", "seed")} | {"arm": PLAIN.get(cell["arm"], cell["arm"])}
        yield from _sets(named, {**cell["scores"]["id"], **cell["scores"]["ood"]})


def _sets(named: Row, scores: Mapping[str, Any]) -> Iterator[Row]:
    for name, score in scores.items():
        loss = (score.get("loss") or {}).get("nll")
        found = {"accuracy": score["accuracy"], "loss": loss, "kl_prompts": score.get("kl_prompts")}
        yield named | {"set": name, "n": score["n"]} | {key: f"{x:.6g}" for key, x in found.items() if x is not None}


def means(rows: Sequence[Row]) -> Iterator[str]:
    """Each arm's measures of each set, means over its seeds."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["set"], row["arm"]].append(row)
    for (task, name, arm), members in sorted(groups.items()):
        found = [f"{key} {fmean(float(row[key]) for row in members):.4g}" for key in MEASURES if members[0].get(key)]
        yield f"{task} on {name}, {arm}: {len(members)} trainings, {', '.join(found)}"


def main(folders: Sequence[str]) -> None:
    rows = added(TABLE, COLUMNS, KEY, (row for at in folders for row in rows_of(Path(at))))
    print(*means(rows), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
