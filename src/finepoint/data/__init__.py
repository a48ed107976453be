"""Files to examples, examples to tokens, tokens to batches; data of other people by recipe.

`from finepoint.data import read_examples, as_examples` takes what is in `examples`.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("_"):  # of a package, which Python itself asks for
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("finepoint.data.examples"), name)


def __dir__() -> list[str]:
    return ["as_examples", "read_examples"]
