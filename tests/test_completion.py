"""A shell completes what a command takes: tried in bash itself."""

import shutil
import subprocess
from dataclasses import fields
from typing import Literal

import pytest

from finepoint.cli import COMMANDS, command_named, main
from finepoint.cli.completion import known
from finepoint.runtime.settings import choices


def completed(script, *words):
    """What bash offers for the last of the words."""
    quoted = " ".join(f"'{word}'" for word in ("finepoint", *words))
    ask = f'{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _finepoint; echo "${{COMPREPLY[@]}}"'
    return subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes_commands_flags_and_choices(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "tr") == ["train"]
    assert sorted(completed(script, "")) == sorted(COMMANDS)
    assert completed(script, "train", "--protect-by") == ["--protect-by"]
    assert "float64" in completed(script, "train", "--dtype", "")
    assert "breadcrumbs" in completed(script, "merge", "--how", "")
    assert completed(script, "train", "--dtype", "bfl") == ["bfloat16"]
    assert completed(script, "train", "--data", "x") == []  # a file's name, which bash knows
    assert completed(script, "nonsense", "--") == []


def test_every_flag_of_every_command_is_known():
    for command, own in known().items():
        wanted = {f"--{field.name.replace('_', '-')}" for field in fields(command_named(command).config)}
        assert set(own) == wanted | {"--config", "--help"}


def test_choices_are_those_of_the_type():
    assert choices(Literal["a", "b"] | None) == ["a", "b"]
    assert choices(str) == choices(int | None) == choices(dict[str, str]) == choices(list[str]) == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_take_their_script(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "quantise" in script
    if shutil.which(shell):
        subprocess.run([shell, "-c", script], check=True, capture_output=True)
    assert main(["completion", "tcsh"]) == 2
    assert "expected one of 'bash', 'zsh', 'fish'" in capsys.readouterr().err
