"""What `finepoint train` takes.

Nothing heavy is imported here, so that help is instant.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from finepoint.runtime.settings import COMPACT, DATA, DTYPE, HELD, JSON, SHARE, DType, Quantise, TargetsOption, setting
from finepoint.selection.settings import DEFAULT_RULE, SelectConfig

Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]

EXAMPLES, READ = 64, 16  # texts that are read or fetched: so many are kept, and so many read for what they need

# fmt: off


@dataclass(frozen=True, kw_only=True, repr=False)
class Keeping(SelectConfig):
    """How training is held to its base."""

    protect_by: str = setting(
        "how: anchor (entries that matter to the text are held back: EWC), empirical (the same, as baseline ewc has "
        "it), l2 (all are; needs no text), kl (the text's predictions stay near the base's), replay (it is trained "
        "along)",
        "anchor", "bits", "what is kept", registry="training/keep.py protection")
    protect_strength: float | None = setting(
        "how strongly; anchor and empirical 1000, l2 0.03, kl and replay 1 where not given",
        None, "bits", "what is kept", least=0)
    protect_share: float = setting(
        "for kl and replay: how many of these texts go into a step for each training example in it",
        0.25, "bits", "what is kept", above=0)
    protect_steps: bool = setting(
        "what the texts need takes smaller steps: each is multiplied by c / sqrt(F + mean F / 10), 1 on average, F as "
        "for anchor",
        False, "bits", "what is kept")


@dataclass(frozen=True, kw_only=True, repr=False)
class Training(Keeping):
    """What training entries by a loss, by preferences and by rewards have in common."""

    RATES: ClassVar[tuple[float, float] | None] = None
    """default learning rates: for rules that look at gradients, and for the others; None: as `selection.rates` says"""
    FACTORS: ClassVar[float | None] = None
    """default learning rate of low-rank factors; the baseline's if None"""

    validation: str | list[str] | None = setting(
        "examples to evaluate on while training, like --data", None, "length", "files", file=True)
    validation_limit: int | None = setting("at most so many of them, always the same", None, "length", "files", least=1)
    indices: str | None = setting(
        "folder of a selection or an adapter whose entries to train, instead of choosing by a rule",
        None, "selection", "which entries", file=True)
    baseline: str | None = setting(
        "instead of chosen entries: full, lora, dora, head, bitfit, random-half, ewc, mofo, orthogonal; rosa: with "
        "lora's",
        None, "bits", "instead of entries", registry="baselines/registry.py baseline")
    baseline_options: dict[str, float] = setting(
        "the baseline's options, e.g. rank=8 alpha=16", {}, "bits", "instead of entries")
    lr: float | None = setting(
        "learning rate; where not given, by rule and density: at random 0.03 for 0.001, 0.003 for 0.01 (0.01 if "
        "held); 3e-4 for rules that look at gradients; gain 0.003 and 0.001, three times that for columns; "
        "on the grid at random 0.03 and 0.003; a baseline has its own",
        None, "bits", "training")
    steps: int | None = setting("optimizer steps; epochs where not given", None, "length", "training", least=1)
    accumulation: int = setting("batches added up for one step", 1, "bits", "training", least=1)
    warmup: float = setting("share of the steps over which the learning rate rises", 0.1, "bits", "training")
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "how the learning rate falls afterwards", "linear", "bits", "training")
    weight_decay: float = setting(
        "pulls the deltas to zero, i.e. towards the base model; a baseline's weights or factors to zero",
        0.0, "bits", "training", least=0)
    on_grid: bool = setting(
        "train on the codes of a quantised base, so that the file, patched, is the model that was measured",
        False, "bits", "training")
    clip: float = setting(
        "largest norm of the gradient of all that is trained; 0 for none", 1.0, "bits", "training", least=0)
    gradient_checkpointing: bool = setting(
        "recompute activations in the backward pass: less memory, more time", False, "bits", "memory")
    no_audit: bool = setting(
        "do not try on the model that every chosen entry gets the gradient of its own loss",
        False, section="while it runs")
    save_every: int | None = setting(
        "steps between checkpoints that --resume can go on from", None, section="while it runs", least=1)
    report_to: list[Tracker] = setting(
        "trackers that follow the run: tensorboard, trackio, wandb, mlflow; log.jsonl is always written",
        [], section="while it runs")
    resume: bool = setting("go on from the last checkpoint in output", False, section="files")
    store: Literal["auto", "delta", "value"] = setting(
        "float32 deltas, the exact trained values, or (auto) values of half-precision weights, which are smaller",
        "auto", section="the adapter")
    compact: bool = setting(COMPACT, False, section="the adapter")


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainConfig(Training):
    """Choose entries, train them in place, save them as an adapter."""

    data: str | list[str] | None = setting(DATA, None, "statistics", "files", file=True)
    density: float | Literal["auto"] | None = setting(  # type: ignore[assignment]  # wider than select's
        "share of the target entries to train, in (0, 1]; auto searches a good one, 0.001 if none",
        None, "selection", "which entries", **SHARE)
    fisher_data: str | None = setting(
        "for ewc: examples of what is not to be forgotten, a file like those of --data",
        None, "bits", "files", file=True)
    disturb_at_most: float | None = setting(
        "a budget: the KL of the base's predictions to the trained model's, in nats a token, on a fourth of these "
        "texts that is kept out of training; how strongly the model is held is adapted on the way, beginning with "
        "--protect-strength, and what is too much at the end is scaled away",
        None, "statistics", "what is kept", least=1e-6)
    refresh: str | list[str] | None = setting(
        "choose anew while training: every:N [until:M], or drop-grow:FRACTION [every:N] [until:M] as SpIEL does",
        None, "bits", "which entries")
    dropped: Literal["revert", "keep"] = setting(
        "with --refresh: entries no longer trained get the base's bits back (revert), or stay as they are (keep)",
        "revert", "bits", "which entries")
    keep: Literal["last", "best"] = setting(
        "the parameters of the last step, or the best: of the evaluation with the lowest validation loss",
        "last", "length", "while it runs")
    answers: int = setting(
        "how many validation examples are answered before and after training, for `finepoint report`; 0 for none",
        3, section="while it runs", least=0)
    patience: int | None = setting(
        "stop after so many evaluations without a lower validation loss", None, "length", "while it runs", least=1)
    round_to: Literal["bfloat16", "float16"] | None = setting(
        "a control: round what is trained to this dtype after every step, as if no wider copy were kept",
        None, "bits", "training")
    epochs: float = setting("passes over the data, where steps is not given", 1.0, "length", "training", above=0)
    ema: float | None = setting(
        "the adapter is the moving average of what is trained, each step counting e.g. 0.99 times as much as the next",
        None, "bits", "training", above=0, most=0.999999)
    loss: str = setting(
        "what is minimised: nll, or one that weighs tokens by what the model says of them: dft, eaft, talr",
        "nll", "bits", "training", registry="training/losses.py token_loss")
    packing: bool = setting(
        "several examples in a row, each as if it were alone: the same batches with less padding",
        False, "bits", "training")
    fit: bool = setting(
        "choose batch size, accumulation and gradient checkpointing for the memory there is; a step keeps its "
        "batch-size x accumulation examples", False, section="memory")
    eval_every: int | None = setting(
        "steps between evaluations on the validation examples; a fifth of the run where not given",
        None, "length", "while it runs", least=1)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Predict the peak memory of selection and of training, from the model's shapes alone."""

    model: str = setting(
        "a folder, hub id, .gguf file, smollm2, gemma3-270m, llama-3-8b or gemma-2b; only its shape is read")
    rule: str = setting("a rule that looks at no example has no selection pass", DEFAULT_RULE)
    density: float | None = setting(
        "share of the target entries to train, in (0, 1]; 0.001 where no count is given", None, **SHARE)
    count: int | None = setting("how many entries to train, instead of density", None)
    targets: TargetsOption = setting(
        "linear (default), attention, mlp, linear-everywhere, all, short names (v,o), patterns, or a density for each",
        "linear")
    structure: str = setting(
        "entry, or whole groups: row, column, block:RxC, head; density and count then are of groups", "entry")
    within: str | None = setting("columns:SHARE, single entries in so large a share of each weight's columns", None)
    scoring_memory: float | Literal["disk"] = setting(
        "share of the weights whose gradients are held at a time, or disk", 1.0, **HELD)
    tokens: int = setting("length of every example", 512)
    learned: int | None = setting("how many tokens at the end of every example carry a loss; all where not given", None)
    batch_size: int = setting("examples a batch", 16, least=1)
    padded: bool = setting(
        "examples differ in length (the longest has so many tokens), so that attention needs a mask; --padded off "
        "where they do not", True)
    gradient_checkpointing: bool = setting("recompute activations in the backward pass", False)
    protect_by: str | None = setting(
        "training is held to its base in this way", None, registry="training/keep.py protection")
    protect_steps: bool = setting("what text to keep needs takes smaller steps", False)
    dtype: DType = setting(DTYPE, "auto")
    quantise: Quantise | None = setting(
        "the linear layers of the base are held in int8 or int4 (torchao) or nf4 (bitsandbytes)", None)
    device: Literal["cpu", "cuda"] | None = setting(
        "cpu (which counts the process with its libraries) or cuda; where not given, what training would use", None)
    json: bool = setting(JSON, False)
