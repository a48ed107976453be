"""The one exception a user of finepoint is meant to see; a package that only some features need is one reason."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 2000  # characters of a message: it may quote what a stranger's file holds


class FinepointError(ValueError):
    """The user's mistake: the message says what was given, what was expected and the way out.

    The command line prints it as one line and leaves with exit status 2.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


def one_line(text: str, longest: int = LONGEST) -> str:
    """A text as one line that is safe to print: no control characters, and the middle of a long one left out."""
    text = " ".join(text.split())
    if len(text) > longest:
        text = f"{text[: longest // 2]} .. {text[-longest // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason_of(error: BaseException) -> str:
    """What other people's code says of its failure, in a line of some length."""
    return " ".join(str(error).split())[:300]


@contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """Inside, a package that is not installed is the user's to install: `what` needs it, `finepoint[extra]` brings it.

    Raises:
        FinepointError: an import inside failed; the package and the extra are named.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise FinepointError(f"{what} needs the package {package}: pip install 'finepoint[{extra}]'") from error
