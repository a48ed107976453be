"""What `finepoint select` takes, and with it everything that chooses entries.

Nothing heavy is imported here, so that help is instant.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finepoint.data.sources import place_or_rows
from finepoint.errors import FinepointError
from finepoint.runtime.settings import (
    CHAT_TURNS,
    DATA,
    DTYPE,
    HELD,
    JSON,
    LARGEST_SEED,
    MODEL,
    OVERWRITE,
    SHARE,
    ChatTurns,
    DType,
    Printed,
    Quantise,
    TargetsOption,
    refuse_without,
    setting,
)

DEFAULT_RULE = "random"
"""What nothing measured so far beats at equal forgetting, and needs no pass over the data: docs/study.md."""
STRUCTURES = "entry, row, column, block:RxC (e.g. block:16x16) or head"

# fmt: off


@dataclass(frozen=True, kw_only=True, repr=False)
class Choice(Printed):
    """Which entries of a model are chosen."""

    rule: str = setting(
        "which entries; `finepoint rules` lists them; or module:function, or a formula of w and g",
        DEFAULT_RULE, "selection", "which entries")
    rule_options: dict[str, float] = setting("the rule's options, e.g. epsilon=1e-6", {}, "selection", "which entries")
    density: float | None = setting(
        "share of the target entries to train, in (0, 1]; 0.001 where no count is given",
        None, "selection", "which entries", **SHARE)
    count: int | None = setting("how many entries to train, instead of density", None, "selection", "which entries")
    structure: str = setting(
        "entry, or whole groups: row, column, block:RxC, head; density and count then are of groups",
        "entry", "selection", "which entries")
    pooling: Literal["mean", "sum"] = setting(
        "a group's score is the mean or the sum of its entries'", "mean", "selection", "which entries")
    within: str | None = setting(
        "columns:SHARE, single entries within this share of each weight's columns, the best ones (rule random draws "
        "them): a smaller product, and less memory in small batches",
        None, "selection", "which entries")
    scope: Literal["global", "weight", "layer"] = setting(
        "what competes with each other: all target entries, or those of one weight or one layer",
        "global", "selection", "which entries")
    targets: TargetsOption = setting(
        "linear (default), attention, mlp, linear-everywhere, all, short names (v,o), patterns, or a density for each",
        "linear", "statistics", "which entries")
    exclude: list[str] = setting(
        "adapter folders whose entries may not be chosen", [], "selection", "which entries", file=True)
    scoring_examples: float = setting(
        "how many training examples gradients are taken over; a share where below 1", 256, "statistics", "scoring")
    scoring_memory: float | Literal["disk"] = setting(
        "share of the weights whose gradients are held at a time: less memory, more passes; disk: one pass, and what "
        "is added up waits in a temporary file",
        1.0, section="scoring", **HELD)
    threshold: Literal["exact", "sampled"] = setting(
        "exact (exactly so many entries) or sampled (about as many, lean SAFT)", "exact", "selection", "scoring")


@dataclass(frozen=True, kw_only=True, repr=False)
class SelectConfig(Choice):
    """Choose which entries to train and write them as an adapter that changes nothing yet."""

    model: str = setting(MODEL, decides="statistics", section="files", file=True)
    output: str = setting("folder to write", section="files", file=True)
    data: str | list[str] | None = setting(
        DATA + "; some rules need none", None, "statistics", "files", file=True)
    columns: dict[str, str] = setting(
        "what the data's columns are called: prompt=question completion=answer; a validation file without any of them "
        "is read as it is",
        {}, "statistics", "files", file=True)
    chat_turns: ChatTurns = setting(CHAT_TURNS, "all", "statistics", "files")
    protect: str | list[str] | None = setting(
        "text whose predictions are to be kept: files like those of --data (equal parts of several), news, novels, or "
        "own, which the base writes itself; rules may look at it (gain), and training holds the model to its base "
        "there",
        None, "statistics", "what is kept", file=True)
    protect_examples: int | None = setting(
        "at most so many of these texts, always the same, up to 256 tokens of each; 64, of own alone 32 where not "
        "given",
        None, "statistics", "what is kept", least=1)
    protect_read: int | None = setting(
        "how many of them rules and anchor read to see which entries matter, 64 tokens of each; 16, with own 32 where "
        "not given",
        None, "statistics", "what is kept", least=1)
    max_length: int | None = setting(
        "longest example in tokens; the model's context where not given", None, "statistics", "training", least=1)
    batch_size: int = setting("examples a batch", 16, "statistics", "training", least=1)
    dtype: DType = setting(DTYPE, "auto", "statistics", "memory")
    quantise: Quantise | None = setting(
        "hold the linear layers of the base in int8 or int4 (torchao) or nf4 (bitsandbytes); what is trained stays "
        "float",
        None, "statistics", "memory")
    seed: int = setting("of everything random", 0, "statistics", "everything else", least=0, most=LARGEST_SEED)
    overwrite: bool = setting(OVERWRITE, False, section="files")
    json: bool = setting(JSON, False, section="everything else")

    def __post_init__(self) -> None:
        for name in ("data", "validation", "protect", "fisher_data"):
            if hasattr(self, name):  # rows that Python holds stand in for a file
                object.__setattr__(self, name, place_or_rows(getattr(self, name)))


# fmt: on


def check_structure(structure: str) -> re.Match[str] | None:
    """Refuses what is no structure; rows and columns of a block where it is one.

    Raises:
        FinepointError: no such structure.
    """
    block = re.fullmatch(r"block:([1-9]\d*)x([1-9]\d*)", structure)
    if not block and structure not in ("entry", "row", "column", "head"):
        raise FinepointError(f"structure is {structure!r}; it is {STRUCTURES}")
    return block


def share_within(within: str | None, structure: str = "entry", density: Any = None) -> float | None:
    """The share of each weight's columns that single entries may lie in, of `columns:SHARE`; None for all.

    Raises:
        FinepointError: it is spelled in another way; groups are chosen whole; a density that has no room in it.
    """
    if within is None:
        return None
    what, _, share = str(within).partition(":")
    try:
        found = float(share) if what == "columns" else 0.0
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        raise FinepointError(f"within is {within!r}; it is columns:SHARE, a share of each weight's columns in (0, 1], "
                             "e.g. columns:0.03")  # fmt: skip
    if structure != "entry":
        raise FinepointError(f"within is for single entries, and structure {structure!r} chooses whole groups; leave "
                             "out one of them")  # fmt: skip
    if isinstance(density, float | int) and density > found:
        raise FinepointError(f"density {density} of all entries does not fit within {found} of the columns; give more "
                             f"of them, e.g. --within columns:{min(1, 2 * density):g}")  # fmt: skip
    return found


def refuse_two_sizes(density: Any, count: int | None, targets: str | Sequence[str] | Mapping[str, float]) -> None:
    """Refuses two ways of saying how many entries are chosen.

    Raises:
        FinepointError: there are two.
    """
    if isinstance(targets, Mapping) and not (density is None and count is None):
        raise FinepointError("targets give a density for each pattern; leave out density and count")
    if density is not None and count is not None:
        raise FinepointError(f"both density {density} and count {count} are given; give one of them")


def refuse_unread(config: SelectConfig) -> None:
    """Refuses a rule without what it looks at.

    Raises:
        FinepointError: it has no examples, or no text that is to be kept.
    """
    from finepoint.selection.rules import rule_named

    rule = rule_named(config.rule)
    if rule.needs_data and config.data is None:
        raise FinepointError(f"rule {rule.name!r} scores by examples and needs some; give --data FILE.jsonl")
    if rule.needs_kept and config.protect is None:
        raise FinepointError(f"rule {rule.name!r} looks at what is to be kept; give text of it by --protect")


def check_select(config: SelectConfig) -> None:
    """What `finepoint select` must be told.

    Raises:
        FinepointError: it is not.
    """
    from finepoint.selection.rules import rule_named

    refuse_without(config, "protect", ["protect_examples", "protect_read"])
    if config.protect and not rule_named(config.rule).needs_kept:
        raise FinepointError(f"rule {config.rule!r} looks at no text that is to be kept; leave out --protect, or give "
                             "another rule, e.g. gain")  # fmt: skip
    refuse_two_sizes(config.density, config.count, config.targets)
    refuse_unread(config)
