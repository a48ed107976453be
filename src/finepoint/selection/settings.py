"""What `finepoint select` takes, and with it everything that chooses entries.

Nothing heavy is imported here, so that help is instant.
"""

from dataclasses import dataclass
from typing import Literal

from finepoint.data.sources import place_or_rows
from finepoint.runtime.settings import (
    CHAT_TURNS,
    DATA,
    DTYPE,
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
    setting,
)

DEFAULT_RULE = "random"
"""What nothing measured so far beats at equal forgetting, and needs no pass over the data: docs/study.md."""

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
        "them): less memory, a smaller product",
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
    scoring_memory: float = setting(
        "share of the weights whose gradients are held at a time; less memory, more passes", 1.0, section="scoring")
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
