"""What each command takes: one frozen dataclass a command, its fields the flags and the YAML keys.

This file imports nothing heavy, so that help is instant.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from finepoint.settings import DType, Quantise, TargetsOption, setting

ImportFormat = Literal["auto", "shira", "supertuning", "sparta"]
Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]

DEFAULT_RULE = "random"
"""What nothing measured so far beats at equal forgetting, and needs no pass over the data: docs/study.md."""

# fmt: off


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which entries of a model are chosen."""

    rule: str = setting(
        "which entries; `finepoint rules` lists them; or module:function, or a formula of w and g",
        DEFAULT_RULE, "selection", "which entries")
    rule_options: dict[str, float] = setting("the rule's options, e.g. epsilon=1e-6", {}, "selection", "which entries")
    density: float | None = setting(
        "share of the target entries to train, in (0, 1]; 0.001 where no count is given",
        None, "selection", "which entries")
    count: int | None = setting("how many entries to train, instead of density", None, "selection", "which entries")
    structure: str = setting(
        "entry, or whole groups: row, column, block:RxC, head; density and count then are of groups",
        "entry", "selection", "which entries")
    pooling: Literal["mean", "sum"] = setting(
        "a group's score is the mean or the sum of its entries'", "mean", "selection", "which entries")
    scope: Literal["global", "weight", "layer"] = setting(
        "what competes with each other: all target entries, or those of one weight or one layer",
        "global", "selection", "which entries")
    targets: TargetsOption = setting(
        "linear (default), all, attention, mlp, short names (v,o), patterns, or a density for each pattern",
        "linear", "statistics", "which entries")
    exclude: list[str] = setting(
        "adapter folders whose entries may not be chosen", [], "selection", "which entries", file=True)
    scoring_examples: float = setting(
        "how many training examples gradients are taken over; a share where below 1", 256, "statistics", "scoring")
    scoring_memory: float = setting(
        "share of the weights whose gradients are held at a time; less memory, more passes", 1.0, section="scoring")
    threshold: Literal["exact", "sampled"] = setting(
        "exact (exactly so many entries) or sampled (about as many, lean SAFT)", "exact", "selection", "scoring")


@dataclass(frozen=True, kw_only=True)
class SelectConfig(Choice):
    """Choose which entries to train and write them as an adapter that changes nothing yet."""

    model: str = setting(
        "a folder, a hub id, a .gguf file, smollm2, or gemma3-270m", decides="statistics", section="files", file=True)
    output: str = setting("folder to write", section="files", file=True)
    data: str | None = setting(
        "training examples, a JSON Lines file; some rules need none", None, "statistics", "files", file=True)
    max_length: int | None = setting(
        "longest example in tokens; the model's context where not given", None, "statistics", "training")
    batch_size: int = setting("examples a batch", 16, "statistics", "training")
    dtype: DType = setting(
        "of the weights; auto keeps the checkpoint's, float32 on a CPU without bfloat16",
        "auto", "statistics", "memory")
    quantise: Quantise | None = setting(
        "hold the linear layers of the base in int8 or int4 (torchao) or nf4 (bitsandbytes); what is trained stays "
        "float",
        None, "statistics", "memory")
    seed: int = setting("of everything random", 0, "statistics", "everything else")
    overwrite: bool = setting("allow an output folder that holds something", False, section="files")
    json: bool = setting("print one JSON object on stdout", False, section="everything else")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What training entries by a loss, by preferences and by rewards have in common."""

    validation: str | None = setting(
        "examples to evaluate on while training, a JSON Lines file", None, "length", "files", file=True)
    validation_limit: int | None = setting("at most so many of them, always the same", None, "length", "files")
    indices: str | None = setting(
        "folder of a selection or an adapter whose entries to train, instead of choosing by a rule",
        None, "selection", "which entries", file=True)
    baseline: str | None = setting(
        "instead of chosen entries full, lora, dora, head, bitfit, random-half, ewc, mofo; rosa: with lora's",
        None, "bits", "instead of entries")
    baseline_options: dict[str, float] = setting(
        "the baseline's options, e.g. rank=8 alpha=16", {}, "bits", "instead of entries")
    lr: float | None = setting(
        "learning rate; 3e-4 for rules that look at gradients, 1e-2 for the others; a baseline has its own",
        None, "bits", "training")
    steps: int | None = setting("optimizer steps; epochs where not given", None, "length", "training")
    accumulation: int = setting("batches added up for one step", 1, "bits", "training")
    warmup: float = setting("share of the steps over which the learning rate rises", 0.1, "bits", "training")
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "how the learning rate falls afterwards", "linear", "bits", "training")
    weight_decay: float = setting(
        "pulls the deltas to zero, i.e. towards the base model; a baseline's weights or factors to zero",
        0.0, "bits", "training")
    clip: float = setting("largest norm of the gradient of all that is trained; 0 for none", 1.0, "bits", "training")
    gradient_checkpointing: bool = setting(
        "recompute activations in the backward pass: less memory, more time", False, "bits", "memory")
    no_audit: bool = setting(
        "do not try on the model that every chosen entry gets the gradient of its own loss",
        False, section="while it runs")
    save_every: int | None = setting(
        "steps between checkpoints that --resume can go on from", None, section="while it runs")
    resume: bool = setting("go on from the last checkpoint in output", False, section="files")
    store: Literal["auto", "delta", "value"] = setting(
        "float32 deltas, the exact trained values, or (auto) values of half-precision weights, which are smaller",
        "auto", section="the adapter")
    compact: bool = setting(
        "write positions as gaps, in one or two bytes each instead of four; as exact", False, section="the adapter")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Training, SelectConfig):
    """Choose entries, train them in place, save them as an adapter."""

    RATES: ClassVar = (3e-4, 1e-2)  # for rules that look at gradients, and for the others

    data: str | None = setting("training examples, a JSON Lines file", None, "statistics", "files", file=True)
    density: float | Literal["auto"] | None = setting(  # type: ignore[assignment]  # wider than select's
        "share of the target entries to train, in (0, 1]; auto searches a good one, 0.001 if none",
        None, "selection", "which entries")
    fisher_data: str | None = setting(
        "for ewc: examples of what is not to be forgotten, a JSON Lines file", None, "bits", "files", file=True)
    refresh: str | list[str] | None = setting(
        "choose anew while training: every:N [until:M], or drop-grow:FRACTION [every:N] [until:M] as SpIEL does",
        None, "bits", "which entries")
    dropped: Literal["revert", "keep"] = setting(
        "with --refresh: entries no longer trained get the base's bits back (revert), or stay as they are (keep)",
        "revert", "bits", "which entries")
    keep: Literal["last", "best"] = setting(
        "the parameters of the last step, or the best: of the evaluation with the lowest validation loss",
        "last", "length", "while it runs")
    patience: int | None = setting(
        "stop after so many evaluations without a lower validation loss", None, "length", "while it runs")
    round_to: Literal["bfloat16", "float16"] | None = setting(
        "a control: round what is trained to this dtype after every step, as if no wider copy were kept",
        None, "bits", "training")
    epochs: float = setting("passes over the data, where steps is not given", 1.0, "length", "training")
    packing: bool = setting(
        "several examples in a row, each as if it were alone: the same batches with less padding",
        False, "bits", "training")
    eval_every: int | None = setting(
        "steps between evaluations on the validation examples; a fifth of the run where not given",
        None, "length", "while it runs")
    report_to: list[Tracker] = setting(
        "trackers that follow the run: tensorboard, trackio, wandb, mlflow; log.jsonl is always written",
        [], section="while it runs")


@dataclass(frozen=True, kw_only=True)
class AlignConfig(Training, SelectConfig):
    """Align a model by preferences (DPO) or rewards (GRPO) through TRL, on chosen entries; measured on both sides."""

    RATES: ClassVar = (1e-4, 3e-3)

    method: Literal["dpo", "grpo"] = setting(
        "dpo learns from pairs of answers, grpo from a reward for answers the model samples itself",
        decides="bits", section="alignment")
    data: str | None = setting(
        'JSON Lines: {"prompt", "chosen", "rejected"} for dpo, {"prompt", "completion"} for grpo',
        None, "statistics", "files", file=True)
    validation: str | None = setting(
        "held-out rows of the same form, to measure on; those of --data where not given",
        None, "length", "files", file=True)
    validation_limit: int | None = setting("at most so many of them, always the same", 200, "length", "files")
    baseline: str | None = setting(
        "instead of chosen entries: lora or dora, to compare with", None, "bits", "instead of entries")
    reward: str = setting(
        "for grpo: number, line, exact, or module:function of (answer, reference)", "number", "bits", "alignment")
    beta: float | None = setting(
        "how strongly the base holds back; 0.1 for dpo, 0 for grpo, where not given", None, "bits", "alignment")
    generations: int = setting(
        "for grpo: answers sampled to each prompt, which are compared with each other", 8, "bits", "alignment")
    new_tokens: int = setting("for grpo: most tokens of an answer", 32, "bits", "alignment")
    temperature: float = setting("for grpo: of the sampling", 1.0, "bits", "alignment")
    lr: float | None = setting(
        "learning rate; 1e-4 for rules that look at gradients, 3e-3 for the others; a baseline has its own",
        None, "bits", "training")
    steps: int = setting("optimizer steps", 50, "length", "training")
    batch_size: int = setting(
        "pairs (dpo) or answers (grpo: a multiple of generations) a batch; examples a scoring batch",
        16, "statistics", "training")
    weight_decay: float = setting("pulls the deltas to zero, i.e. towards the base model", 0.0, "bits", "training")
    save_every: int | None = setting(
        "write a checkpoint after every so many steps; it holds what is trained and the optimizer's state",
        None, section="while it runs")
    resume: bool = setting("go on from the newest checkpoint in --output", False, section="files")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Predict the peak memory of selection and of training, from the model's shapes alone."""

    model: str = setting(
        "a folder, hub id, .gguf file, smollm2, gemma3-270m, llama-3-8b or gemma-2b; only its shape is read")
    rule: str = setting("a rule that looks at no example has no selection pass", DEFAULT_RULE)
    density: float | None = setting(
        "share of the target entries to train, in (0, 1]; 0.001 where no count is given", None)
    count: int | None = setting("how many entries to train, instead of density", None)
    targets: TargetsOption = setting(
        "linear (default), all, attention, mlp, short names (v,o), patterns, or a density for each pattern", "linear")
    scoring_memory: float = setting("share of the weights whose gradients are held at a time", 1.0)
    tokens: int = setting("length of every example", 512)
    learned: int | None = setting("how many tokens at the end of every example carry a loss; all where not given", None)
    batch_size: int = setting("examples a batch", 16)
    padded: bool = setting(
        "examples differ in length (the longest has so many tokens), so that attention needs a mask", True)
    gradient_checkpointing: bool = setting("recompute activations in the backward pass", False)
    dtype: DType = setting("of the weights; auto keeps the checkpoint's, float32 on a CPU without bfloat16", "auto")
    quantise: Quantise | None = setting(
        "the linear layers of the base are held in int8 or int4 (torchao) or nf4 (bitsandbytes)", None)
    device: Literal["cpu", "cuda"] | None = setting(
        "cpu (which counts the process with its libraries) or cuda; where not given, what training would use", None)
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure a model, and adapters on it: in distribution, out of distribution, and what was forgotten."""

    model: str = setting("a folder, a hub id, a .gguf file, smollm2, or gemma3-270m")
    adapter: list[str] = setting("adapter folders, each measured on its own against the base", [])
    id: list[str] = setting("in-distribution sets, each NAME=FILE", [])
    ood: list[str] = setting("out-of-distribution sets, each NAME=FILE", [])
    probe: list[str] = setting("texts whose likelihood shows forgetting, each NAME=FILE", [])
    tasks: list[str] = setting("tasks of lm-evaluation-harness, by name; needs the extra lm-eval", [])
    include_path: str | None = setting("folder with tasks of your own for lm-evaluation-harness, as YAML", None)
    output: str | None = setting("JSON file to write", None)
    limit: int | None = setting("at most so many examples of each set, always the same; of each task the first", None)
    max_length: int | None = setting("longest example in tokens; the model's context where not given", None)
    scale: list[float] = setting(
        "strengths at which each adapter is measured too (WiSE-FT), e.g. 0.25 0.5: base + strength x change", [])
    generate: int = setting("at most so many examples of each set are answered by generation as well; 0 for none", 0)
    new_tokens: int = setting("most tokens to generate where an answer is written", 64)
    dtype: DType = setting("of the weights; auto keeps the checkpoint's, float32 on a CPU without bfloat16", "auto")
    any_dtype: bool = setting(
        "take adapters trained in a narrower dtype too, where the wider weights hold the same base values", False)
    any_base: bool = setting(
        "take a model that is another than the adapter's base beside the entries it changes", False)
    quantise: Quantise | None = setting(
        "hold the linear layers in int8, int4 or nf4, as the adapters' training did", None)
    overwrite: bool = setting("replace the output file", False)
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write the page of a study, of a sequence, or of adapters side by side: figures, tables, and their data."""

    folder: list[str] = setting(
        "the --output of `finepoint compare`, finished or not, or of `finepoint sequence`; or several adapters",
        positional=True)
    output: str | None = setting(
        "folder to write; DIR/report where not given; an earlier report there is replaced", None)
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Make an adapter of the difference between two checkpoints, read weight by weight."""

    base: str = setting("the model before: a folder, a hub id, a .gguf file, smollm2, or gemma3-270m")
    tuned: str = setting("the model after, of the same shape and dtype")
    output: str = setting("folder to write")
    density: float | None = setting("share of all entries to keep, those that changed most, in (0, 1]", None)
    all: bool = setting(
        "keep every entry that changed: applied to the base, it gives the tuned checkpoint bit for bit", False)
    compact: bool = setting(
        "write the gaps between positions in one or two bytes instead of the positions in four", False)
    overwrite: bool = setting("allow an output folder that holds something", False)
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an adapter in another layout: merged into its model, for PEFT, peft-sparta, vLLM, llama.cpp."""

    model: str = setting("the base: a folder, a hub id, a .gguf file, smollm2, or gemma3-270m")
    adapter: str = setting(
        "adapter folder, also without its flag; for merged and gguf also LoRA or DoRA as PEFT writes them",
        positional=True)
    format: str = setting(
        "merged, shira, supertuning, sparta, vllm-patch, or gguf (with llama.cpp's converter on the PATH)")
    output: str = setting("folder to write")
    dtype: DType = setting("of the written weights (merged, gguf, vllm-patch); auto keeps the base's", "auto")
    any_base: bool = setting(
        "take a model that is another than the adapter's base beside the entries it changes", False)
    overwrite: bool = setting("allow an output folder that holds something", False)
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make an adapter of somebody else's: PEFT's SHiRA and Super-Tuning, peft-sparta's files."""

    folder: str = setting("their folder, also without its flag: `finepoint import DIR ..`", positional=True)
    model: str = setting("the base it was trained on: a folder, a hub id, a .gguf file, smollm2, or gemma3-270m")
    output: str = setting("folder to write")
    format: ImportFormat = setting(
        "shira, supertuning or sparta; auto tells it by the files; --from is the same flag", "auto", also="from")
    dtype: DType = setting("of the weights the adapter will be applied to; auto for the base's", "auto")
    compact: bool = setting(
        "write the gaps between positions in one or two bytes instead of the positions in four", False)
    overwrite: bool = setting("allow an output folder that holds something", False)
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Say what is in an adapter: facts, a table by layer and module, a map of where its entries lie."""

    folder: str = setting("adapter folder", positional=True)
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check that an adapter's file is sound and that it belongs to a model; revert is tried, bit for bit."""

    folder: str = setting("adapter folder", positional=True)
    model: str = setting("a folder, a hub id, a .gguf file, smollm2, or gemma3-270m")
    dtype: DType | None = setting("of the weights; that of the adapter where not given", None)
    any_base: bool = setting(
        "take a model that is another than the adapter's base beside the entries it changes", False)
    quantise: Quantise | None = setting(
        "hold the linear layers in int8, int4 or nf4, as the adapter's training did", None)
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Combine adapters of one base model into one adapter; look at their interference first with --dry-run."""

    adapter: list[str] = setting(
        "adapter folders, also without their flag: `finepoint merge DIR DIR ..`", [], positional=True)
    how: str = setting(
        "sum (task arithmetic), mean, ties, dare, breadcrumbs or consensus; on shared entries first, last or error",
        "sum")
    weights: list[float] = setting("a factor for each adapter, in their order, may be negative; 1 where not given", [])
    options: dict[str, float] = setting("the method's options, e.g. density=0.5 for ties, drop=0.5 seed=1 for dare", {})
    model: str | None = setting(
        "the base model; needed for half-precision adapters where their deltas matter, and for --tune", None)
    any_base: bool = setting(
        "take a model that is another than the adapter's base beside the entries it changes", False)
    tune: str | None = setting(
        "search the weights that do best on these examples, a JSON Lines file; needs --model", None)
    tune_by: Literal["accuracy", "nll"] | None = setting(
        "accuracy or nll (likelihood); accuracy where the examples have one", None)
    limit: int | None = setting("at most so many of these examples, always the same", None)
    dry_run: bool = setting("print how far the adapters interfere, pair by pair, and merge nothing", False)
    output: str | None = setting("folder to write; required unless --dry-run", None)
    compact: bool = setting("write positions as gaps, in one or two bytes each instead of four; as exact", False)
    overwrite: bool = setting("allow an output folder that holds something", False)
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Fetch the data of a recipe and write it as JSON Lines; without a name, list the recipes."""

    name: str | None = setting("the recipe, also without its flag: `finepoint data vader`", None, positional=True)
    output: str | None = setting("folder to write; required with a name", None)
    overwrite: bool = setting("allow an output folder that holds something", False)
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """List the rules, those of installed plug-ins too, the baselines and the schedules, with formulas and sources."""

    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Run a study: arms x learning rates x seeds x tasks, every arm tuned on validation, all measured alike.

The same command goes on where it stopped; finished cells are never run again, failed ones are tried once more."""

    model: str = setting("a folder, a hub id, a .gguf file, or smollm2", decides="bits")
    tasks: dict[str, dict[str, str]] = setting(
        "files by task, e.g. {movies: {train: F, validation: F, test: F}, tweets: {test: F}}", decides="bits")
    arms: list[dict[str, Any]] = setting(
        "what is compared, e.g. [{rule: gallop, density: [0.001, 0.01]}, {baseline: lora, options: {rank: 8}}]",
        decides="length")
    output: str = setting("folder of the study")
    probes: dict[str, str] = setting("files of text by name, whose likelihood shows forgetting", {}, "bits")
    train_on: list[str] = setting(
        "tasks to train on, one after the other; all that have train, validation and test where not given",
        [], "length")
    seeds: list[int] = setting("the first tunes the learning rates, all measure the best one", [0, 1, 2], "length")
    tuning: Literal["best", "one-se"] = setting(
        "best validation accuracy, or one-se: the smallest rate within one standard error of it", "best", "length")
    train: dict[str, Any] = setting(
        "settings of finepoint train that all arms share, e.g. {steps: 40, eval_every: 10}", {}, "bits")
    validation_limit: int | None = setting("at most so many examples of each validation set", None, "bits")
    test_limit: int | None = setting("at most so many examples of each test set", None, "bits")
    probe_limit: int | None = setting("at most so many texts of each probe", None, "bits")
    generate: int = setting(
        "at most so many examples of each test set are answered by generation too; 0 for none", 64, "bits")
    new_tokens: int = setting("most tokens to generate", 8, "bits")
    keep_adapters: bool = setting("keep every cell's adapter in the folder of the study", False, "length")
    dtype: DType = setting(
        "of the weights; auto keeps the checkpoint's, float32 on a CPU without bfloat16", "auto", "bits")
    quantise: Quantise | None = setting(
        "hold the linear layers of the base in int8 or int4 (torchao) or nf4 (bitsandbytes); for arms that choose "
        "entries",
        None, "bits")
    workers: int = setting("processes that run cells side by side; 1 runs them in this process", 1)
    executor: Literal["local", "ray"] = setting("local (this machine) or ray", "local")
    address: str | None = setting("of a running Ray cluster; one on this machine is started where not given", None)
    dry_run: bool = setting("print the cells and an estimate of the time, and run none", False)
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Train tasks one after the other on one model, each on entries of its own, and measure all after each.

The same command goes on where it stopped."""

    model: str = setting("a folder, a hub id, a .gguf file, or smollm2", decides="bits")
    tasks: dict[str, dict[str, str]] = setting(
        "files by task, in the order of training, e.g. {movies: {train: F, test: F}, words: {..}}", decides="bits")
    output: str = setting("folder to write")
    rule: str = setting("which entries; `finepoint rules` lists them", DEFAULT_RULE, "bits")
    density: float = setting("share of the target entries that each task trains", 0.001, "bits")
    lr: float | None = setting(
        "learning rate; 3e-4 for rules that look at gradients, 1e-2 for the others", None, "bits")
    overlap: Literal["exclude", "allow", "both"] = setting(
        "exclude entries that earlier tasks own, allow them, or both ways one after the other", "both", "length")
    train: dict[str, Any] = setting("further settings of finepoint train, e.g. {steps: 60}", {}, "bits")
    test_limit: int | None = setting("at most so many examples of each test set", None, "bits")
    new_tokens: int = setting("most tokens to generate where an answer is written", 8, "bits")
    seed: int = setting("of everything random in the first task; the next one has the next seed", 0, "bits")
    dtype: DType = setting(
        "of the weights; auto keeps the checkpoint's, float32 on a CPU without bfloat16", "auto", "bits")
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Fine-tune SmolLM2-135M on movie reviews with GaLLoP and at random, and compare both with the base."""

    output: str = setting("folder to write", "runs/demo")
    steps: int = setting("optimizer steps of each run", 40)
    limit: int = setting("at most so many examples of the ID set, three eighths as many of each OOD set", 200)
    overwrite: bool = setting("allow an output folder that holds something", False)
    json: bool = setting("print one JSON object on stdout", False)


@dataclass(frozen=True, kw_only=True)
class SchemaConfig:
    """Print the JSON schema of a command's YAML file, for editors that complete and check it."""

    name: str = setting("the command, also without its flag: `finepoint schema train`", positional=True)
    json: bool = setting("print one JSON object on stdout, as it does in any case", False)
