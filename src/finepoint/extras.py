"""Packages that only some features need: finepoint's extras."""

from collections.abc import Iterator
from contextlib import contextmanager

from finepoint.errors import FinepointError


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
