"""What commands print: one JSON object with --json, else tables for people; both on stdout."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from finepoint.errors import one_line


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on stdout; text on the left, numbers on the right."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(header):
        numeric = bool(rows) and all(isinstance(row[i], int | float) or row[i] in ("", "-") for row in rows)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(one_line(plain(cell)) for cell in row))  # may come from a stranger's file
    if title:  # by itself, or it would be broken to the table's width
        console().print(one_line(title), style="italic", highlight=False, soft_wrap=True)
    console().print(table)


def plain(cell: Any) -> str:
    """A cell as text: whole numbers with separators, others with three decimals."""
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return str(cell)
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}"


def console() -> Console:
    """stdout; wide enough for a table when it is not a terminal."""
    plain_text: dict[str, Any] = {"markup": False, "emoji": False}  # a name in brackets is a name
    found = Console(**plain_text)
    return found if found.is_terminal else Console(width=140, **plain_text)


def harmless(text: str) -> str:
    """What a model wrote, as a terminal may show it: no control characters but the ends of lines and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def print_marked(pieces: Sequence[tuple[str, bool]], longest: int = 600) -> None:
    """A text of pieces under a bar, some of them marked: in colour in a terminal, else in double brackets."""
    from rich.text import Text

    out, text = console(), Text()
    for piece, marked in pieces:
        shown = harmless(piece)
        shown = shown if len(shown) <= longest else f"{shown[: longest // 2]} .. {shown[-longest // 2 :]}"
        if out.is_terminal:
            text.append(shown, "bold green" if marked else "dim")
        else:
            text.append(f"[[{shown}]]" if marked else shown)
    for line in text.split("\n", allow_blank=False):
        out.print(Text("  | ") + line, soft_wrap=True)
    out.print()


def signed(value: float) -> str:
    """A change with its sign."""
    return f"{value:+.3f}"
