"""Models and tokenizers: found, loaded, quantised, asked what they do with a batch.

`from finepoint.models import load_model, load_tokenizer` takes what is in `loading`.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("_"):  # of a package, which Python itself asks for
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("finepoint.models.loading"), name)


def __dir__() -> list[str]:
    return ["load_model", "load_tokenizer"]
