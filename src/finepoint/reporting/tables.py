"""Tables of a report: rows as text with the numbers' precision, and the same table as CSV, Markdown or LaTeX."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finepoint.reporting.views import Row

Show = Callable[[Row], str]
Column = tuple[str, Show, bool]
"""Header, cell, whether it holds numbers."""

NOTHING = "–"
GROUPS = "trained on"  # the header of a first column by which rows are grouped
TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "–": "--", "−": "$-$", "→": r"$\rightarrow$", "≤": r"$\leq$",
    "ε": r"$\varepsilon$", "\"": r"\textquotedbl{}",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table as text.

    Args:
        name: of its LaTeX label and place in the page.
        numeric: which columns are set on the right.
        folded: shown only when asked for, for being long.
        root: cells of the columns `linked` are paths below it, as an address.
    """

    name: str
    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    folded: bool = False
    root: str = ""
    linked: tuple[str, ...] = ()


def table(name: str, title: str, caption: str, rows: Sequence[Row], columns: Sequence[Column], fold: int = 30) -> Table:
    """The rows as text; columns that are empty in every row are left out."""
    cells = [[show(row) for _, show, _ in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] != NOTHING for line in cells)]
    return Table(
        name, title, caption, [columns[i][0] for i in kept], [[line[i] for i in kept] for line in cells],
        [columns[i][2] for i in kept], len(rows) > fold,
    )  # fmt: skip


def text(header: str, key: str) -> Column:
    """A column of words."""
    return header, lambda row: NOTHING if row[key] is None else str(row[key]), False


def fixed(header: str, key: str, digits: int = 3) -> Column:
    """A column of numbers with so many decimals."""
    return header, lambda row: shown(row[key], f".{digits}f"), True


def general(header: str, key: str) -> Column:
    """A column of numbers of any size, three digits."""
    return header, lambda row: shown(row[key], ".3g"), True


def change(header: str, key: str, digits: int = 3) -> Column:
    """A column of differences, with their sign."""
    return header, lambda row: shown(row[key], f"+.{digits}f"), True


def whole(header: str, key: str) -> Column:
    """A column of counts."""
    return header, lambda row: shown(row[key], ",.0f"), True


def between(header: str, key: str, style: str = ".3f") -> Column:
    """A column of means with half the width of their interval; `key` with `_high`, or `mean` with `high`."""
    high = "high" if key == "mean" else f"{key}_high"

    def show(row: Row) -> str:
        if row[key] is None or row.get(high) is None:
            return shown(row[key], style)
        return f"{shown(row[key], style)} ± {shown(row[high] - row[key], style.lstrip('+'))}"

    return header, show, True


def size(header: str, key: str) -> Column:
    """A column of bytes."""
    return header, lambda row: NOTHING if row[key] is None else bytes_shown(row[key]), True


def shown(value: Any, style: str) -> str:
    """A number, or a dash where there is none; a sign only where something is left after rounding."""
    if value is None:
        return NOTHING
    return format(value, f"+z{style[1:]}").replace("-", "−") if style[0] == "+" else format(value, style)


def bytes_shown(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def by_task(found: Table) -> list[Table]:
    """The table without its first column, once for each of its values, where these are tasks; else as it is."""
    if found.header[:1] != [GROUPS]:
        return [found]
    parts = []
    for i, task in enumerate(dict.fromkeys(row[0] for row in found.rows)):
        rows = [row[1:] for row in found.rows if row[0] == task]
        parts.append(Table(f"{found.name}-{i + 1}", f"{found.title}, {task}", found.caption, found.header[1:], rows,
                           found.numeric[1:], found.folded))  # fmt: skip
    return parts


def to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV: all keys of all rows, numbers in full, empty where there is none."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_markdown(found: Table) -> str:
    """The table in Markdown, with names that cannot leave their cell."""
    lines = [
        "| " + " | ".join(map(escape_markdown, found.header)) + " |",
        "|" + "|".join("---:" if numeric else "---" for numeric in found.numeric) + "|",
        *("| " + " | ".join(map(escape_markdown, row)) + " |" for row in found.rows),
    ]
    return "\n".join(lines)


def escape_markdown(words: str) -> str:
    """Text as plain text in Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", " ".join(words.split()))


FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def to_latex(found: Table) -> str:
    """The table in LaTeX, with rules of the package booktabs; one wider than the line shrinks to it (graphicx)."""
    columns = "".join("r" if numeric else "l" for numeric in found.numeric)
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{escape_latex(f'{found.title}. {found.caption}')}}}",
        rf"\label{{tab:{found.name}}}", r"\small", FITTED, rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
        " & ".join(map(escape_latex, found.header)) + r" \\", r"\midrule",
        *(" & ".join(map(escape_latex, row)) + r" \\" for row in found.rows),
        r"\bottomrule", r"\end{tabular}}", r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines)


def escape_latex(words: str) -> str:
    """Text as LaTeX typesets it, on one line: nothing in it is a command, and nothing unprintable is left."""
    printable = "".join(letter if letter.isprintable() else " " for letter in words)
    return "".join(TEX.get(letter, letter) for letter in " ".join(printable.split()))
