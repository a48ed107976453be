"""What is kept of the base: the cells of studies/keep.yaml and columns.yaml, or of parts of them, as one table.

    finepoint compare --config studies/keep.yaml --output runs/keep
    python studies/keep.py runs/keep    # adds them to docs/study/keep.csv, draws the figures, prints means over seeds

A row is one training of one arm. Rows that are there already, of earlier runs, stay.
"""

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

TABLE = Path(__file__).parent.parent / "docs" / "study" / "keep.csv"
PROBES = ["novels", "editorials", "solutions"]
KEY = ["model", "task", "arm", "lr", "seed"]
COLUMNS = [*KEY, "validation_loss", "validation_accuracy", *(f"kl_{probe}" for probe in PROBES), "kl_prompts",
           "kl_protected", "trained", "train_seconds", "selection_seconds", "peak_bytes"]  # fmt: skip
PLAIN = {"lora-rank=8": "lora", "random-0.01": "random", "gradient-0.01": "gradient"}
Shown = dict[str, tuple[str, str, str, str | None]]
FIGURES: dict[str, Shown] = {
    "keep": {
        "lora": ("LoRA, rank 8", "#b0b7bd", "o", "0.001"),
        "random": ("random", "#8fc1d4", "o", "0.003"),
        "columns-own": ("random columns, anchored", "#1f6f8b", "D", None),
        "full-own": ("full, anchored", "#c0392b", "s", None),
        "full-own-strongly": ("full, anchored at 10,000", "#c0392b", "^", None),
    },
    "columns": {
        "entries-01": ("entries, 0.1 %", "#c0392b", "^", None),
        "entries-1": ("1 %", "#c0392b", "o", None),
        "entries-3": ("3 %", "#c0392b", "s", None),
        "columns-01": ("columns, 0.1 %", "#1f6f8b", "^", None),
        "columns-1": ("1 %", "#1f6f8b", "o", None),
        "columns-3": ("3 %", "#1f6f8b", "s", None),
        "within-1": ("entries in a tenth of the columns, 1 %", "#b0b7bd", "o", None),
        "gain-columns-1": ("columns by gain, 1 %", "#d9a441", "o", None),
    },
}
"""By file: what each arm is called and drawn as, and at which rate alone, if not at all of them."""
TASKS = {"keep": ["movies", "words", "sums"], "columns": ["movies", "words", "sums", "school"]}
Row = dict[str, Any]


def rows_of(cells: Iterable[Path]) -> Iterator[Row]:
    """What the table has of each cell."""
    for path in cells:
        cell = json.loads(path.read_text())
        tested, cost = cell["scores"]["id"][cell["task"]], cell["cost"]
        measured = {"validation_loss": cell["validation"]["loss"], "kl_prompts": tested["kl_prompts"],
                    "validation_accuracy": cell["validation"]["accuracy"],
                    "kl_protected": cell["changes"].get("protected", {}).get("kl"),
                    **{f"kl_{name}": probe["kl"] for name, probe in cell["scores"]["probe"].items()}}  # fmt: skip
        yield {
            "model": Path(cell["settings"]["model"]).stem,
            **{key: cell[key] for key in KEY[1:]},
            "arm": PLAIN.get(cell["arm"], cell["arm"]),
            **{name: f"{value:.6g}" for name, value in measured.items() if value is not None},
            **{name: cost[name] for name in ("trained", "peak_bytes")},
            **{name: round(cost.get(name, 0)) for name in ("train_seconds", "selection_seconds")},
        }


def key(row: Row, named: Sequence[str] = KEY) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in named)


def means(rows: Sequence[Row]) -> Iterator[str]:
    """Loss and KL of each arm, mean and standard deviation over its seeds, and the ratio of its KL to LoRA's."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)[:4]].append(row)
    for group, members in sorted(groups.items()):
        found = [f"{name} {_mean([float(each[name]) for each in members if each.get(name)])}"
                 for name in ("validation_loss", *(f"kl_{probe}" for probe in PROBES))]  # fmt: skip
        yield f"{' '.join(group)}: {len(members)} seeds, {', '.join(found)}"


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{fmean(values):.4g}{spread}" if values else "-"


def draw(rows: Sequence[Row], shown: Shown, tasks: Sequence[str], path: Path) -> None:
    """Loss against KL on text that no arm has seen: a point a seed and rate, a panel a task."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "finepoint"
    figure, axes = plt.subplots(1, len(tasks), figsize=(1 + 2.8 * len(tasks), 2.8), sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        for arm, (name, colour, marker, lr) in shown.items():
            here = [row for row in rows if (row["model"], row["task"], row["arm"]) == ("smollm2", task, arm)
                    and lr in (None, str(row["lr"]))]  # fmt: skip
            axis.scatter([float(row["validation_loss"]) for row in here], [float(row["kl_novels"]) for row in here],
                         color=colour, marker=marker, s=30, label=name)  # fmt: skip
        axis.set(yscale="log", title=task, xlabel="validation loss")
        axis.set_yticks([0.001, 0.01, 0.1], ["0.001", "0.01", "0.1"])
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("KL to the base on novels")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(shown), frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def added(table: Path, columns: Sequence[str], named: Sequence[str], rows: Iterable[Row]) -> list[Row]:
    """All rows of a table after some are added, of which each replaces the one that is named alike."""
    known: dict[tuple[str, ...], Row] = {}
    if table.exists():
        with table.open(encoding="utf-8", newline="") as file:
            known = {key(row, named): row for row in csv.DictReader(file)}
    known |= {key(row, named): row for row in rows}
    found = [known[each] for each in sorted(known)]
    with table.open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        out.writeheader()
        out.writerows(found)
    return found


def main(folders: Sequence[str]) -> None:
    cells = (path for at in folders for path in Path(at).glob("cells/*.json"))
    rows = added(TABLE, COLUMNS, KEY, rows_of(cells))
    for name, shown in FIGURES.items():
        draw(rows, shown, TASKS[name], TABLE.with_name(f"{name}.svg"))
    print(*means(rows), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
