"""The command line: `finepoint COMMAND --flag value`, every command also from YAML with `--config FILE`.

Exit status: 0 done; 2 the user's mistake, one line on stderr; 1 our fault.
"""

import errno
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

if TYPE_CHECKING:
    from finepoint.runtime.interruption import BrokenOff

# The files of the commands, and what each does.
FILES = {
    "runs": {
        "demo": "fine-tune a small real model and compare: the quickest look",
        "train": "choose entries, train them in place, save an adapter",
        "align": "train entries by preferences (DPO) or rewards (GRPO)",
        "select": "choose entries, train nothing",
        "plan": "predict the peak memory of choosing and training",
        "eval": "measure a model and adapters: ID, OOD, forgetting",
        "watch": "follow a run from another terminal",
    },
    "talk": {
        "generate": "ask a model and adapters, print what they write",
        "chat": "talk to a model, switch adapters meanwhile",
    },
    "studies": {
        "compare": "run a study: methods x rates x seeds x tasks, resumable",
        "sequence": "train task after task, each on entries of its own",
        "report": "write the page of a study: figures, tables, data",
    },
    "adapters": {
        "inspect": "say what is in an adapter",
        "verify": "check an adapter, alone and against its model",
        "merge": "combine adapters into one, see how they interfere",
        "scale": "weaken an adapter until it keeps a budget of disturbance",
        "extract": "make an adapter of the difference of two checkpoints",
        "export": "write a plain model, or files for PEFT, peft-sparta, vLLM, GGUF",
        "import": "make an adapter of one of PEFT's or peft-sparta's",
        "push": "send an adapter with its model card to the hub",
        "pull": "fetch an adapter from the hub into a folder",
    },
    "patches": {
        "patch": "change a quantised .gguf file as an adapter does",
        "unpatch": "take a patched .gguf file back, bit for bit",
    },
    "lists": {
        "data": "list the data recipes, write one; preview files",
        "rules": "list rules and baselines with formula and source",
        "schema": "print the JSON schema of a command's YAML file",
        "doctor": "say what this machine has, and what will be slow on it",
    },
    "completion": {
        "completion": "print a script that completes flags in bash, zsh or fish",
    },
}
COMMANDS = {name: what for commands in FILES.values() for name, what in commands.items()}

# What a disk says that is full, read-only or not the user's.
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
TOGETHER = ("train", "select")  # what several processes do together


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        status = _main(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads the output has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again at the end
        return 141  # 128 + SIGPIPE, as a shell reports it


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from finepoint.version import __version__

        print(f"finepoint {__version__}")
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        from finepoint.runtime.settings import did_you_mean

        hint = did_you_mean(command, COMMANDS, f"commands: {', '.join(COMMANDS)}")
        print(f"finepoint: no command {command!r}{hint}", file=sys.stderr)
        return 2
    return _run(command, arguments[1:])


def _run(command: str, arguments: list[str]) -> int:
    from finepoint.cli.options import parse
    from finepoint.errors import FinepointError
    from finepoint.runtime import distributed, interruption

    known = command_named(command)
    # For `--rule module:function`; last, so that no file lying about hides a package.
    sys.path.append("")
    try:
        with interruption.noticed():
            config: Any = parse(known.config, command, arguments, known.after_help)
            from finepoint.cli.refusals import refuse_at_once
            from finepoint.runtime.files import refuse_model_folder
            from finepoint.runtime.progress import log_to_stderr

            refuse_model_folder(config)
            log_to_stderr()
            refuse_at_once(command, config)
            if distributed.launched() and command not in TOGETHER:
                raise FinepointError(f"{command} runs in one process; start it without torchrun or accelerate launch")
            status = known.run(config)
            if not status and distributed.is_first():
                from finepoint.cli.next_step import say_next

                say_next(command, config)
    except FinepointError as error:
        who = "" if distributed.is_first() else f"process {distributed.rank()}: "
        print(f"finepoint {command}: {who}{error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        print(f"finepoint {command}: cannot write {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        left = f" {_left(error, command, arguments)}" if isinstance(error, interruption.BrokenOff) else ""
        print(f"finepoint {command}: interrupted{left}", file=sys.stderr)
        return 130
    return status or 0


def _left(error: "BrokenOff", command: str, arguments: Sequence[str]) -> str:
    """What an interrupted run has left, and the command that goes on with it."""
    if not error.resumable:
        return str(error)
    same = [word for word in arguments if word != "--resume" and word.partition("=")[0] != "--overwrite"]
    return f"{error}; go on with: {shlex.join(['finepoint', command, *same, '--resume'])}"


class Command(NamedTuple):
    """What a command is made of."""

    config: type
    """its settings"""
    run: Callable[[Any], int | None]
    after_help: Callable[[], str] | None
    """what `--help` shows beyond the flags"""


def command_named(name: str) -> Command:
    """The function `run_NAME` of its file with the settings that it takes, and `help_NAME` where there is one."""
    module = import_module(f"finepoint.cli.{next(file for file, names in FILES.items() if name in names)}")
    run = getattr(module, f"run_{name}")
    return Command(get_type_hints(run)["config"], run, getattr(module, f"help_{name}", None))


def _overview() -> str:
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    return (
        "usage: finepoint COMMAND [--config FILE.yaml] [--flag value ..]\n\n"
        "Sparse fine-tuning: train a chosen handful of a model's own weights, in place.\n\n"
        + "\n".join(lines)
        + "\n\n`finepoint COMMAND --help` lists the flags of a command."
    )
