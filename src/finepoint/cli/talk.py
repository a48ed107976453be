"""Commands that let a model speak: generate, chat."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.table import Table

from finepoint.cli.output import console, harmless, print_json
from finepoint.errors import FinepointError
from finepoint.evaluation.settings import ChatConfig, GenerateConfig
from finepoint.runtime import interruption

if TYPE_CHECKING:
    from finepoint.evaluation.chat import Conversation


def run_generate(config: GenerateConfig) -> None:
    from finepoint.evaluation.generate import generate_config

    found = generate_config(config)
    if config.json:
        print_json({"model": config.model, **found.as_json()})
        return
    if len(found.prompts) == len(found.by) == 1:
        print(harmless(found.texts[0]))
        return
    for number, (prompt, answers) in enumerate(found.rows()):
        print(f"{chr(10) if number else ''}> {harmless(prompt)}")
        for name, text in answers.items():
            print(f"{name}: {harmless(text)}" if len(answers) > 1 else harmless(text))


COMMANDS = {
    "/base": "ask the model without an adapter",
    "/adapter [NAME]": "ask it with this adapter; without a name, with the next one",
    "/both": "ask both, side by side; the conversation goes on from the adapter's answer",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does",
}


def help_chat() -> str:
    """What can be said besides text, for `--help`."""
    lines = [f"  {command:<16} {what}" for command, what in COMMANDS.items()]
    return "\n".join(["in the conversation:", *lines, "  a line that ends in \\ goes on with the next"])


def run_chat(config: ChatConfig) -> None:
    from finepoint.evaluation.chat import conversation

    with conversation(config) as talk:
        own = "" if talk.template else "; every text is a prompt of its own, without the chat template"
        _note(f"{_who(talk)}{own}; /help lists what else can be said")
        while (text := _next("> ")) is not None:
            if text in ("/quit", "/exit"):
                break
            try:
                _command(talk, text) if text.startswith("/") else _answer(talk, text)
            except FinepointError as error:  # a slip of the tongue does not end a conversation
                _note(str(error))


def _next(prompt: str) -> str | None:
    """What the user says next; None at the end. Empty lines are skipped, lines ending in a backslash go on."""
    said = ""
    while True:
        try:
            line = input(prompt) if sys.stdin.isatty() else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return said.strip() or None
        if line.endswith("\\"):
            said += line[:-1] + "\n"
        elif said + line.strip():
            return said + line if said else line.strip()


def _answer(talk: "Conversation", text: str) -> None:
    """Prints what is answered: as it is written, or side by side."""
    if len(talk.asked) == 1:
        try:
            talk.answers(text, lambda piece: print(harmless(piece), end="", flush=True))
        except KeyboardInterrupt:
            interruption.forget()
            _note("broken off; the conversation is where it was")
        print(flush=True)
        return
    answers = talk.answers(text)
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for name in answers:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(harmless(answer) for answer in answers.values()))
    console().print(table)


def _command(talk: "Conversation", text: str) -> None:
    """Carries out what begins with a slash."""
    command, _, name = text.partition(" ")
    done: dict[str, Callable[[], object]] = {
        "/base": lambda: _ask(talk, "base"),
        "/adapter": lambda: _ask(talk, name.strip() or _following(talk)),
        "/both": lambda: _ask(talk, "base", name.strip() or _current(talk)),
        "/reset": lambda: _reset(talk),
        "/help": lambda: _note(help_chat() + f"\n{_who(talk)}; there are: {', '.join(talk.names)}"),
    }
    if command not in done:
        raise FinepointError(f"there is no command {command}; the commands: {', '.join(done)}, /quit")
    done[command]()


def _ask(talk: "Conversation", *names: str) -> None:
    seconds = talk.ask(*names)
    _note(f"{_who(talk)}, switched in {seconds * 1000:.1f} ms")


def _reset(talk: "Conversation") -> None:
    talk.reset()
    _note("the conversation begins anew")


def _current(talk: "Conversation") -> str:
    """The adapter that is asked, or the first one."""
    return talk.asked[-1] if talk.asked[-1] != "base" else _following(talk)


def _following(talk: "Conversation") -> str:
    """The adapter after the one that is asked."""
    if len(talk.names) == 1:
        raise FinepointError("no adapter was given; start again with --adapter DIR")
    place = talk.names.index(talk.asked[-1]) + 1
    return talk.names[place] if place < len(talk.names) else talk.names[1]


def _who(talk: "Conversation") -> str:
    return f"{talk.asked[0]} answers" if len(talk.asked) == 1 else f"{' and '.join(talk.asked)} answer"


def _note(text: str) -> None:
    """What is no answer, on stderr."""
    print(text, file=sys.stderr, flush=True)
