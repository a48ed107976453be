"""Packages that only some features need: finepoint's extras."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from finepoint.errors import FinepointError

# transformers and PEFT import these where they are installed, needed or not, and they report the GPUs and the kernels
# that they find no libraries for.
CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes")


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


def quiet_libraries() -> None:
    """Keeps what some libraries say of themselves, whenever another imports them, from a user who did not ask."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
