"""Completion of commands, flags and their choices, as a script for the user's shell; made from the settings."""

from dataclasses import dataclass, fields
from typing import Literal

from finepoint.runtime.settings import JSON, setting, values_of

Shell = Literal["bash", "zsh", "fish"]


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Print a script that completes commands and flags in a shell: `source <(finepoint completion bash)`."""

    shell: Shell = setting("bash, zsh or fish, also without its flag", positional=True)
    json: bool = setting(JSON, False)


def run_completion(config: CompletionConfig) -> None:
    from finepoint.cli.output import print_json

    script = {"bash": _bash, "zsh": _zsh, "fish": _fish}[config.shell]()
    if config.json:
        print_json({"shell": config.shell, "script": script})
    else:
        print(script, end="")


def known() -> dict[str, dict[str, list[str]]]:
    """Every command's flags, each with what may follow it; nothing where that is a file or anything else."""
    from finepoint.cli import COMMANDS, command_named

    return {
        command: {"--config": [], "--help": []}
        | {f"--{field.name.replace('_', '-')}": values_of(field) for field in fields(command_named(command).config)}
        for command in COMMANDS
    }


def _bash() -> str:
    flags, values = [], []
    for command, own in known().items():
        flags.append(f'    {command}) words="{" ".join(own)}" ;;')
        values += [f'    {command}:{flag}) words="{" ".join(few)}" ;;' for flag, few in own.items() if few]
    return "\n".join([
        "_finepoint() {",
        '  local words="" current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f'    words="{" ".join(known())}"',
        '  elif [[ "$current" == -* ]]; then case "${COMP_WORDS[1]}" in',
        *flags,
        '  esac; else case "${COMP_WORDS[1]}:$before" in',
        *values,
        "  esac; fi",
        '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        "complete -o default -F _finepoint finepoint",
        "",
    ])  # fmt: skip


def _zsh() -> str:
    return "autoload -U +X bashcompinit && bashcompinit\n" + _bash()


def _fish() -> str:
    from finepoint.cli import COMMANDS

    lines = [f"complete -c finepoint -n __fish_use_subcommand -a {command} -d '{_quoted(what)}'"
             for command, what in COMMANDS.items()]  # fmt: skip
    for command, own in known().items():
        for flag, few in own.items():
            after = f" -x -a '{' '.join(few)}'" if few else ""
            lines.append(f"complete -c finepoint -n '__fish_seen_subcommand_from {command}' -l {flag[2:]}{after}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
