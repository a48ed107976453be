"""A page that needs nothing but itself: headings, drawings and tables in one HTML file, with its data as CSV, the
drawings as SVG, the same as Markdown, and the tables for papers. What it is about is its caller's business."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from finepoint.errors import FinepointError, needing
from finepoint.reporting import tables
from finepoint.reporting.tables import Table
from finepoint.reporting.views import Row
from finepoint.runtime.files import write_text

OURS = "finepoint report"
PAGE = 60  # rows of a table that fit a paper's page


@dataclass(frozen=True)
class Drawing:
    """A figure: panels that share a caption; none where there is no data for it.

    Args:
        data: the name of the rows that it shows.
        without: why there are no panels, where there are none.
        arms: what its legend names.
        small: panels that stay legible side by side.
    """

    name: str
    title: str
    caption: str
    data: str
    panels: Sequence[Any]
    without: str
    arms: list[str] = field(default_factory=list)
    small: bool = False


@dataclass(frozen=True)
class Section:
    """A heading with its figures and tables."""

    title: str
    text: str
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its address in the page."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """What is to be written.

    Args:
        title: of the file, as browsers show it.
        heading: what stands at its top.
        byline: what was looked at, in a line.
        findings: the sentences that matter most.
        warnings: what is to be held against them.
        data: the rows behind figures and tables, by the name of their CSV.
        definitions: what each quantity means.
        configuration: everything that decided the numbers, as YAML.
        marks: the SVG of each legend entry's marker.
    """

    title: str
    heading: str
    byline: str
    findings: Sequence[str]
    warnings: Sequence[str]
    sections: Sequence[Section]
    data: Mapping[str, Sequence[Row]]
    definitions: Mapping[str, str]
    configuration: str
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def drawings(self) -> list[Drawing]:
        return [drawing for section in self.sections for drawing in section.drawings]


def drawing_package() -> Any:
    """The figures' module, whose libraries are an extra.

    Raises:
        FinepointError: one of them is missing.
    """
    with needing("the report", "report"):
        import jinja2  # noqa: F401

        from finepoint.reporting import figures
    return figures


def cleared(folder: Path) -> Path:
    """The folder, without what an earlier report left in it; refused if it holds something else.

    Raises:
        FinepointError: it is a file, or holds something and no report of ours.
    """
    page = folder / "index.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
        ours = page.is_file() and OURS in page.read_text(encoding="utf-8", errors="replace")[:600]
    except OSError as error:
        raise FinepointError(f"cannot use {folder} as an output folder: {error.strerror}") from error
    if occupied and not ours:
        raise FinepointError(f"{folder} holds something that is no report; choose another --output")
    for old in [*folder.glob("data/*.csv"), *folder.glob("figures/*.svg")]:
        old.unlink()
    return folder


def write_page(page: Page, folder: Path) -> dict[str, Any]:
    """Writes index.html, report.md, tables.tex, data/*.csv and figures/*.svg; returns what was written, JSON-ready."""
    figures = drawing_package()
    for name, rows in page.data.items():
        if rows:
            write_text(folder / "data" / f"{name}.csv", tables.to_csv(rows))
    for drawing in page.drawings:
        for i, panel in enumerate(drawing.panels):
            write_text(folder / "figures" / f"{drawing.name}-{i + 1}.svg", figures.standalone(panel.svg))
    write_text(folder / "tables.tex", latex(page.sections))
    write_text(folder / "report.md", markdown(page))
    write_text(folder / "index.html", html(page, figures))
    return {
        "report": str(folder / "index.html"),
        "figures": [drawing.name for drawing in page.drawings if drawing.panels],
        "left_out": {drawing.name: drawing.without for drawing in page.drawings if not drawing.panels},
        "headline": list(page.findings),
        "warnings": list(page.warnings),
    }


def latex(sections: Sequence[Section]) -> str:
    """The tables for a paper, one for each task; what fills pages is for the CSV."""
    parts = ["% Tables by finepoint; \\usepackage{booktabs,graphicx}"]
    for whole_table in (one for section in sections for one in section.tables if one.rows):
        for one in tables.by_task(whole_table):
            too_long = f"% {tables.escape_latex(one.title)}: {len(one.rows)} rows, too many for a page; see data/*.csv"
            parts.append(too_long if len(one.rows) > PAGE else tables.to_latex(one))
    return "\n\n".join(parts) + "\n"


def markdown(page: Page) -> str:
    """The page as Markdown, with its figures as files."""
    clean = tables.escape_markdown
    parts = [f"# {clean(page.title)}", clean(" ".join(page.findings))]
    if page.warnings:
        parts.append("Held against these numbers:\n\n" + "\n".join(f"- {clean(one)}" for one in page.warnings))
    for section in page.sections:
        parts.append(f"## {section.title}\n\n{section.text}")
        for one in section.tables:
            if one.rows:
                parts.append(f"**{clean(one.title)}.** {clean(one.caption)}.\n\n{tables.to_markdown(one)}")
        for drawing in section.drawings:
            shown = [
                f"![{clean(panel.title)}](figures/{drawing.name}-{i + 1}.svg)" for i, panel in enumerate(drawing.panels)
            ]
            words = drawing.caption if shown else f"Left out: {drawing.without}."
            parts.append(f"**{drawing.title}.** {words}" + ("\n\n" + "\n".join(shown) if shown else ""))
    meanings = "\n".join(f"- **{clean(name)}**: {clean(words)}" for name, words in page.definitions.items())
    settings = page.configuration.replace("```", "'''")
    parts += [f"## Definitions\n\n{meanings}", f"## Configuration\n\n```yaml\n{settings}```"]
    return "\n\n".join(parts) + "\n"


def html(page: Page, figures: Any) -> str:
    """The page: text, tables and drawings in one file."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    numbers = iter(range(1, 1 << 30))  # drawings must not share ids

    def svg(raw: str) -> Markup:
        return Markup(figures.themed(raw, f"d{next(numbers)}"))

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"groups": tables.GROUPS, "nothing": tables.NOTHING}
    template = environment.from_string(files("finepoint.reporting").joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(ours=OURS, page=page, svg=svg, data=[name for name, rows in page.data.items() if rows],
                           colours=[(name, light) for name, light in figures.COLOURS.values()])  # fmt: skip
