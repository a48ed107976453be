"""Writes the tables of docs/benchmarks.md and its appendix, and draws the figures, from benchmarks/results/.

python benchmarks/page.py
"""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from common import RESULTS, print_table

DOCS = Path(__file__).parent.parent / "docs"
FIGURES = DOCS / "figures"
OURS, RIVAL, LIMIT = "#1f6f8b", "#b0b7bd", "#c0392b"


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "finepoint"  # the same picture from the same figures
    FIGURES.mkdir(exist_ok=True)
    for page in (DOCS / "benchmarks.md", DOCS / "benchmarks-appendix.md"):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- (\w\S*) -->", text):
            path = RESULTS / f"{name}.json"
            if path.is_file():
                text = filled(text, name, json.loads(path.read_text()))
        page.write_text(text, encoding="utf-8")
    bars("step", "x bound", "A training step over the bound, SmolLM2-135M", 1.05)
    bars("memory", "x bound", "Peak memory of training over the bound, SmolLM2-135M", None)
    scaling()


def filled(text: str, name: str, result: dict[str, Any]) -> str:
    """The page with the table of one result between `<!-- name -->` and `<!-- /name -->`."""
    out = io.StringIO()
    with redirect_stdout(out):
        print_table(result["columns"], result["rows"])
    about = result["facts"]
    where = result.get("gpu") or f"{about['processor']}, {about['threads']} threads"
    note = f"({about['date']}; {where}, torch {about['versions']['torch']}.)"
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n\n{out.getvalue()}\n{note}\n\n{end}{rest.split(end)[1]}"


def bars(name: str, column: str, title: str, limit: float | None) -> None:
    rows = read(name)
    if not rows:
        return
    names = [row["arm"] for row in rows][::-1]
    colours = [OURS if name.startswith("sparse") else RIVAL for name in names]
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(rows) + 1))
    drawn = axes.barh(names, [row[column] for row in rows][::-1], color=colours)
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    if limit:
        axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1, label=f"aim: {limit}")
        axes.legend(loc="lower right", frameon=False)
    finished(figure, axes, title, column, FIGURES / f"{name}.svg")


def scaling() -> None:
    rows = read("scaling")
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(7, 3.5))
    for style, size in zip(("-", "--", ":", "-."), dict.fromkeys(row["model"] for row in rows), strict=False):
        part = [row for row in rows if row["model"] == size]
        lengths = [row["tokens a row"] for row in part]
        axes.plot(lengths, [row["sparse x bound"] for row in part], style, color=OURS, label=f"sparse 1 %, {size}")
        axes.plot(lengths, [row["LoRA x bound"] for row in part], style, color=RIVAL, label=f"LoRA r8, {size}")
    axes.set_xscale("log", base=2)
    axes.set_ylabel("x bound")
    axes.legend(frameon=False, ncols=2, fontsize=8)
    finished(figure, axes, "A step over the bound by model size and length", "tokens a row", FIGURES / "scaling.svg")


def finished(figure: Any, axes: Any, title: str, label: str, path: Path) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def read(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


if __name__ == "__main__":
    main()
