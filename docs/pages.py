"""What the site has beside the pages in this folder: a reference of the commands and one of the public names, made
from the code when the site is built, and every how-to in the navigation."""

from itertools import groupby
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
HOW_TOS = "How-tos"
ROOMS = {
    "selection": "Choosing entries", "tuner": "Training them in place", "adapters": "Keeping and combining them",
    "training": "A whole run", "huggingface": "In other people's trainers", "exchange": "Other layouts",
    "models": "Loading models", "evaluation": "Asking and measuring",
}  # fmt: skip
OTHERS = "Errors"


def on_config(config: Any) -> Any:
    for entry in config.nav:
        if HOW_TOS in entry:
            entry[HOW_TOS] = with_the_rest(entry[HOW_TOS])
    return config


def with_the_rest(listed: list[str]) -> list[str]:
    """The listed how-tos, then those that lie in the folder and are not listed."""
    return listed + [
        page for path in sorted((DOCS / "how-to").glob("*.md")) if (page := f"how-to/{path.name}") not in listed
    ]


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    files.append(File.generated(config, "reference/python.md", content=python_page()))
    return files


def commands_page() -> str:
    """Every command with its own help: what it does, and a table of its flags."""
    from finepoint.cli import COMMANDS

    lines = [
        "# Command line", "",
        "`finepoint COMMAND --help` prints what stands here. Flags have the names of the YAML keys of `--config`; a "
        "flag overrides the file, unknown keys are errors. Exit status: 0 done; 2 your mistake, one line on stderr "
        "that says what to do; 1 ours. `--json` prints one JSON object on stdout, logs and progress go to stderr.",
    ]  # fmt: skip
    for command in COMMANDS:
        lines += ["", f"## finepoint {command}", "", *command_section(command)]
    return "\n".join(lines) + "\n"


def command_section(command: str) -> list[str]:
    from finepoint.cli import command_named
    from finepoint.cli.options import flags, summary

    config, _, after_help = command_named(command)
    lines = [escaped(summary(config)), "", "| flag | meaning | default |", "| --- | --- | --- |"]
    lines += [f"| `{flag}` | {escaped(meaning)} | {escaped(default)} |" for flag, meaning, default in flags(config)]
    return lines + (["", "```text", after_help(), "```"] if after_help else [])


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def python_page() -> str:
    """The public names by room, each with its docstring."""
    import finepoint

    def room(name: str) -> str:
        home = finepoint._HOMES[name].split(".")
        return ROOMS.get(home[1], OTHERS) if len(home) > 2 else OTHERS

    names = sorted(finepoint.__all__, key=lambda name: ([*ROOMS.values(), OTHERS].index(room(name)), name.lower()))
    lines = [
        "# Python",
        "",
        "The names in `finepoint`, imported when first used. What stands here comes from the code.",
    ]
    for title, found in groupby(names, room):
        lines += ["", f"## {title}"]
        for name in found:
            lines += ["", f"::: finepoint.{name}"]
    lines += ["", "## Live models, servers"]
    for name in ("sync.Sender", "sync.Receiver", "sync.SendEachStep", "sync.GroupLine", "exchange.vllm_engine.switch"):
        lines += ["", f"::: finepoint.{name}"]
    return "\n".join(lines) + "\n"
