"""What `finepoint compare` and `finepoint sequence` take.

Nothing heavy is imported here, so that help is instant.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from finepoint.runtime.settings import DTYPE, JSON, LARGEST_SEED, SHARE, DType, Quantise, setting
from finepoint.selection.settings import DEFAULT_RULE
from finepoint.training.settings import TrainConfig

# The keys of the mappings in a study's file.
TRAIN: dict[str, Any] = dict.fromkeys(each.name for each in fields(TrainConfig))
ARM: dict[str, Any] = dict.fromkeys(
    ["name", "rule", "baseline", "density", "options", "lrs", "wise_ft", "lines"]
) | {"train": TRAIN}  # fmt: skip
TASKS = {"*": dict.fromkeys(["train", "validation", "test"])}

# fmt: off


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Run a study: arms x learning rates x seeds x tasks, every arm tuned on validation, all measured alike.

The same command goes on where it stopped; finished cells are never run again, failed ones are tried once more."""

    model: str = setting("a folder, a hub id, a .gguf file, or smollm2", decides="bits")
    tasks: dict[str, dict[str, str]] = setting(
        "files by task, e.g. {movies: {train: F, validation: F, test: F}, tweets: {test: F}}", decides="bits",
        keys=TASKS)
    arms: list[dict[str, Any]] = setting(
        "what is compared, e.g. [{rule: gallop, density: [0.001, 0.01]}, {baseline: lora, options: {rank: 8}}]",
        decides="length", keys=ARM)
    output: str = setting("folder of the study")
    probes: dict[str, str] = setting("files of text by name, whose likelihood shows forgetting", {}, "bits")
    train_on: list[str] = setting(
        "tasks to train on, one after the other; all that have train, validation and test where not given",
        [], "length")
    seeds: list[int] = setting("the first tunes the learning rates, all measure the best one", [0, 1, 2], "length")
    tuning: Literal["best", "one-se"] = setting(
        "best validation accuracy, or one-se: the smallest rate within one standard error of it", "best", "length")
    train: dict[str, Any] = setting(
        "settings of finepoint train that all arms share, e.g. {steps: 40, eval_every: 10}", {}, "bits", keys=TRAIN)
    validation_limit: int | None = setting("at most so many examples of each validation set", None, "bits", least=1)
    test_limit: int | None = setting("at most so many examples of each test set", None, "bits", least=1)
    probe_limit: int | None = setting("at most so many texts of each probe", None, "bits", least=1)
    generate: int = setting(
        "at most so many examples of each test set are answered by generation too; 0 for none", 64, "bits", least=0)
    new_tokens: int = setting("most tokens to generate", 8, "bits", least=1)
    keep_adapters: bool = setting("keep every cell's adapter in the folder of the study", False, "length")
    dtype: DType = setting(DTYPE, "auto", "bits")
    quantise: Quantise | None = setting(
        "hold the linear layers of the base in int8 or int4 (torchao) or nf4 (bitsandbytes); for arms that choose "
        "entries",
        None, "bits")
    workers: int = setting("processes that run cells side by side; 1 runs them in this process", 1, least=1)
    executor: Literal["local", "ray"] = setting("local (this machine) or ray", "local")
    address: str | None = setting("of a running Ray cluster; one on this machine is started where not given", None)
    dry_run: bool = setting("print the cells and an estimate of the time, and run none", False)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Train tasks one after the other on one model, each on entries of its own, and measure all after each.

The same command goes on where it stopped."""

    model: str = setting("a folder, a hub id, a .gguf file, or smollm2", decides="bits")
    tasks: dict[str, dict[str, str]] = setting(
        "files by task, in the order of training, e.g. {movies: {train: F, test: F}, words: {..}}", decides="bits",
        keys=TASKS)
    output: str = setting("folder to write")
    rule: str = setting("which entries; `finepoint rules` lists them", DEFAULT_RULE, "bits")
    density: float = setting("share of the target entries that each task trains", 0.001, "bits", **SHARE)
    lr: float | None = setting(
        "learning rate; where not given, as `finepoint train` chooses it by rule and density", None, "bits")
    overlap: Literal["exclude", "allow", "both"] = setting(
        "exclude entries that earlier tasks own, allow them, or both ways one after the other", "both", "length")
    ways: list[Literal[
        "exclude", "allow", "anchored", "exclude-anchored", "lora", "lora-on", "lora-apart", "full",
        "full-anchored"]] = setting(
        "instead of overlap: which of exclude, allow; anchored, exclude-anchored (what each earlier task has left is "
        "held back where its examples need it: EWC); lora, lora-on (one, trained on), lora-apart (O-LoRA), full, "
        "full-anchored",
        [], "length")
    rates: dict[str, float] = setting(
        "learning rates by way, e.g. lora=1e-3; lr or the default where not given", {}, "bits")
    earlier_examples: int = setting(
        "for anchored ways: so many training examples of each earlier task are read, always the same", 64, "bits",
        least=1)
    earlier_strength: float = setting("for anchored ways: how strongly earlier tasks are held", 1000.0, "bits", least=0)
    apart_strength: float = setting("for lora-apart: how strongly factors are kept apart", 0.5, "bits", least=0)
    train: dict[str, Any] = setting("further settings of finepoint train, e.g. {steps: 60}", {}, "bits", keys=TRAIN)
    test_limit: int | None = setting("at most so many examples of each test set", None, "bits", least=1)
    new_tokens: int = setting("most tokens to generate where an answer is written", 8, "bits", least=1)
    seed: int = setting(
        "of everything random in the first task; the next one has the next seed", 0, "bits", least=0, most=LARGEST_SEED)
    dtype: DType = setting(DTYPE, "auto", "bits")
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write the page of a study, a sequence, a run, or of adapters side by side: figures, tables, and their data."""

    folder: list[str] = setting(
        "the --output of `finepoint compare`, finished or not, of `sequence` or of `train`; or several adapters",
        positional=True)
    output: str | None = setting(
        "folder to write; DIR/report where not given; an earlier report there is replaced", None)
    json: bool = setting(JSON, False)
