"""What `finepoint report` takes.

Nothing heavy is imported here, so that help is instant.
"""

from dataclasses import dataclass

from finepoint.runtime.settings import setting

# fmt: off


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write the page of a study, of a sequence, or of adapters side by side: figures, tables, and their data."""

    folder: list[str] = setting(
        "the --output of `finepoint compare`, finished or not, or of `finepoint sequence`; or several adapters",
        positional=True)
    output: str | None = setting(
        "folder to write; DIR/report where not given; an earlier report there is replaced", None)
    json: bool = setting("print one JSON object on stdout", False)
