"""The layouts that an adapter is exported to, by name: each is one decorated function in a file of this folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from finepoint import exchange
from finepoint.adapters.adapter import SparseAdapter
from finepoint.exchange.checkpoint import Checkpoint
from finepoint.exchange.overlay import Patch, lay_over
from finepoint.runtime.settings import REGISTRIES, named


@dataclass(frozen=True)
class Source:
    """What is exported."""

    adapter: str
    """its folder"""
    checkpoint: Checkpoint
    dtype: str | None
    """of what is written, where a layout has one; None for the base's"""

    @cached_property
    def sparse(self) -> SparseAdapter:
        """The adapter, read once; fails for LoRA and DoRA."""
        return SparseAdapter.load(self.adapter)

    @cached_property
    def patches(self) -> dict[str, Patch]:
        """The adapter laid over the base's files, weight by weight; fails for LoRA and DoRA."""
        return lay_over(self.sparse, self.checkpoint)


Write = Callable[[Source, Path], dict[str, Any]]


@dataclass(frozen=True)
class Layout:
    """A layout, and what it takes."""

    name: str
    write: Write
    """fills an empty folder, and tells what it wrote, JSON-ready"""
    dtype: bool
    peft: bool
    replaces: Sequence[str]
    check: Callable[[], Any]


LAYOUTS: dict[str, Layout] = {}


def layout(
    name: str, *, dtype: bool = False, peft: bool = False, replaces: Sequence[str] = (),
    check: Callable[[], Any] = lambda: None,
) -> Callable[[Write], Write]:  # fmt: skip
    """Makes a function a layout of `finepoint export`.

    Args:
        name: as `--format` takes it.
        dtype: whether what it writes has a dtype of the model's.
        peft: whether it takes LoRA and DoRA as well.
        replaces: files of an earlier export, as patterns, that must not stay beside the new ones.
        check: refuses, before any work, what this machine cannot do.
    """

    def register(write: Write) -> Write:
        LAYOUTS[name] = Layout(name, write, dtype, peft, replaces, check)
        return write

    return register


def layout_named(name: str) -> Layout:
    """The layout called `name`.

    Raises:
        FinepointError: there is none; the known ones are listed.
    """
    for module in iter_modules(exchange.__path__):
        import_module(f"{exchange.__name__}.{module.name}")
    return named(dict(sorted(LAYOUTS.items())), name, *REGISTRIES["layout"])
