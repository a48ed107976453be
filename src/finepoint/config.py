"""What each command takes: one frozen dataclass a command, its fields the flags and the YAML keys.

This file imports nothing heavy, so that help is instant.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from finepoint.errors import FinepointError

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
ExportFormat = Literal["merged", "shira", "supertuning", "sparta", "vllm-patch", "gguf"]
ImportFormat = Literal["auto", "shira", "supertuning", "sparta"]
Quantise = Literal["int8", "int4", "nf4"]
Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]
TargetsOption = str | list[str] | dict[str, float]

DEFAULT_RULE = "random"
"""What nothing measured so far beats at equal forgetting, and needs no pass over the data: docs/study.md."""


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Choose which entries to train and write them as an adapter that changes nothing yet.

    Args:
        model: a folder, a hub id, a .gguf file, smollm2, or gemma3-270m
        data: training examples, a JSON Lines file; some rules need none
        output: folder to write
        rule: which entries; `finepoint rules` lists them; or module:function, or a formula of w and g
        rule_options: the rule's options, e.g. epsilon=1e-6
        density: share of the target entries to train, in (0, 1]; 0.001 where no count is given
        count: how many entries to train, instead of density
        structure: entry, or whole groups: row, column, block:RxC, head; density and count then are of groups
        pooling: a group's score is the mean or the sum of its entries'
        scope: what competes with each other: all target entries, or those of one weight or one layer
        targets: linear (default), all, attention, mlp, short names (v,o), patterns, or a density for each pattern
        exclude: adapter folders whose entries may not be chosen
        scoring_examples: how many training examples gradients are taken over; a share where below 1
        scoring_memory: share of the weights whose gradients are held at a time; less memory, more passes
        threshold: exact (exactly so many entries) or sampled (about as many, lean SAFT)
        max_length: longest example in tokens; the model's context where not given
        batch_size: examples a batch
        dtype: of the weights; auto keeps the checkpoint's, float32 on a CPU without bfloat16
        quantise: hold the linear layers of the base in int8 or int4 (torchao) or nf4 (bitsandbytes); what is trained
            stays float
        seed: of everything random
        overwrite: allow an output folder that holds something
        json: print one JSON object on stdout
    """

    model: str
    output: str
    data: str | None = None
    rule: str = DEFAULT_RULE
    rule_options: dict[str, float] = field(default_factory=dict)
    density: float | None = None
    count: int | None = None
    structure: str = "entry"
    pooling: Literal["mean", "sum"] = "mean"
    scope: Literal["global", "weight", "layer"] = "global"
    targets: TargetsOption = "linear"
    exclude: list[str] = field(default_factory=list)
    scoring_examples: float = 256
    scoring_memory: float = 1.0
    threshold: Literal["exact", "sampled"] = "exact"
    max_length: int | None = None
    batch_size: int = 16
    dtype: DType = "auto"
    quantise: Quantise | None = None
    seed: int = 0
    overwrite: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SelectConfig):
    """Choose entries, train them in place, save them as an adapter.

    Args:
        data: training examples, a JSON Lines file
        density: share of the target entries to train, in (0, 1]; auto searches a good one, 0.001 if none
        validation: examples to evaluate on while training, a JSON Lines file
        validation_limit: at most so many of them, always the same
        indices: folder of a selection or an adapter whose entries to train, instead of choosing by a rule
        baseline: instead of chosen entries full, lora, dora, head, bitfit, random-half, ewc, mofo; rosa: with lora's
        baseline_options: the baseline's options, e.g. rank=8 alpha=16
        fisher_data: for ewc: examples of what is not to be forgotten, a JSON Lines file
        refresh: choose anew while training: every:N [until:M], or drop-grow:FRACTION [every:N] [until:M] as SpIEL does
        dropped: with --refresh: entries no longer trained get the base's bits back (revert), or stay as they are (keep)
        keep: the parameters of the last step, or the best: of the evaluation with the lowest validation loss
        patience: stop after so many evaluations without a lower validation loss
        round_to: a control: round what is trained to this dtype after every step, as if no wider copy were kept
        lr: learning rate; 3e-4 for rules that look at gradients, 1e-2 for the others; a baseline has its own
        steps: optimizer steps; epochs where not given
        epochs: passes over the data, where steps is not given
        accumulation: batches added up for one step
        packing: several examples in a row, each as if it were alone: the same batches with less padding
        warmup: share of the steps over which the learning rate rises
        schedule: how the learning rate falls afterwards
        weight_decay: pulls the deltas to zero, i.e. towards the base model; a baseline's weights or factors to zero
        clip: largest norm of the gradient of all that is trained; 0 for none
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time
        no_audit: do not try on the model that every chosen entry gets the gradient of its own loss
        eval_every: steps between evaluations on the validation examples; a fifth of the run where not given
        save_every: steps between checkpoints that --resume can go on from
        resume: go on from the last checkpoint in output
        report_to: trackers that follow the run: tensorboard, trackio, wandb, mlflow; log.jsonl is always written
        store: float32 deltas, the exact trained values, or (auto) values of half-precision weights, which are smaller
        compact: write positions as gaps, in one or two bytes each instead of four; as exact
    """

    density: float | Literal["auto"] | None = None  # type: ignore[assignment]  # wider than select's
    validation: str | None = None
    validation_limit: int | None = None
    indices: str | None = None
    baseline: str | None = None
    baseline_options: dict[str, float] = field(default_factory=dict)
    fisher_data: str | None = None
    refresh: str | list[str] | None = None
    dropped: Literal["revert", "keep"] = "revert"
    keep: Literal["last", "best"] = "last"
    patience: int | None = None
    round_to: Literal["bfloat16", "float16"] | None = None
    lr: float | None = None
    steps: int | None = None
    epochs: float = 1.0
    accumulation: int = 1
    packing: bool = False
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    gradient_checkpointing: bool = False
    no_audit: bool = False
    eval_every: int | None = None
    save_every: int | None = None
    resume: bool = False
    report_to: list[Tracker] = field(default_factory=list)
    store: Literal["auto", "delta", "value"] = "auto"
    compact: bool = False


@dataclass(frozen=True, kw_only=True)
class AlignConfig(SelectConfig):
    """Align a model by preferences (DPO) or rewards (GRPO) through TRL, on chosen entries; measured before and after.

    Args:
        method: dpo learns from pairs of answers, grpo from a reward for answers the model samples itself
        data: JSON Lines: {"prompt", "chosen", "rejected"} for dpo, {"prompt", "completion"} for grpo
        validation: held-out rows of the same form, to measure on; those of --data where not given
        validation_limit: at most so many of them, always the same
        indices: folder of a selection or an adapter whose entries to train, instead of choosing by a rule
        baseline: instead of chosen entries: lora or dora, to compare with
        baseline_options: the baseline's options, e.g. rank=8 alpha=16
        reward: for grpo: number, line, exact, or module:function of (answer, reference)
        beta: how strongly the base holds back; 0.1 for dpo, 0 for grpo, where not given
        generations: for grpo: answers sampled to each prompt, which are compared with each other
        new_tokens: for grpo: most tokens of an answer
        temperature: for grpo: of the sampling
        lr: learning rate; 1e-4 for rules that look at gradients, 3e-3 for the others; a baseline has its own
        steps: optimizer steps
        batch_size: pairs (dpo) or answers (grpo: a multiple of generations) a batch; examples a scoring batch
        accumulation: batches added up for one step
        warmup: share of the steps over which the learning rate rises
        schedule: how the learning rate falls afterwards
        weight_decay: pulls the deltas to zero, i.e. towards the base model
        clip: largest norm of the gradient of all that is trained; 0 for none
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time
        no_audit: do not try on the model that every chosen entry gets the gradient of its own loss
        save_every: write a checkpoint after every so many steps; it holds what is trained and the optimizer's state
        resume: go on from the newest checkpoint in --output
        store: float32 deltas, the exact trained values, or (auto) values of half-precision weights, which are smaller
        compact: write positions as gaps, in one or two bytes each instead of four; as exact
    """

    method: Literal["dpo", "grpo"]
    validation: str | None = None
    validation_limit: int | None = 200
    indices: str | None = None
    baseline: Literal["lora", "dora"] | None = None
    baseline_options: dict[str, float] = field(default_factory=dict)
    reward: str = "number"
    beta: float | None = None
    generations: int = 8
    new_tokens: int = 32
    temperature: float = 1.0
    lr: float | None = None
    steps: int = 50
    accumulation: int = 1
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    gradient_checkpointing: bool = False
    no_audit: bool = False
    save_every: int | None = None
    resume: bool = False
    store: Literal["auto", "delta", "value"] = "auto"
    compact: bool = False


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Predict the peak memory of selection and of training, from the model's shapes alone.

    Args:
        model: a folder, hub id, .gguf file, smollm2, gemma3-270m, llama-3-8b or gemma-2b; only its shape is read
        rule: a rule that looks at no example has no selection pass
        density: share of the target entries to train, in (0, 1]; 0.001 where no count is given
        count: how many entries to train, instead of density
        targets: linear (default), all, attention, mlp, short names (v,o), patterns, or a density for each pattern
        scoring_memory: share of the weights whose gradients are held at a time
        tokens: length of every example
        learned: how many tokens at the end of every example carry a loss; all where not given
        batch_size: examples a batch
        padded: examples differ in length (the longest has so many tokens), so that attention needs a mask
        gradient_checkpointing: recompute activations in the backward pass
        dtype: of the weights; auto keeps the checkpoint's, float32 on a CPU without bfloat16
        quantise: the linear layers of the base are held in int8 or int4 (torchao) or nf4 (bitsandbytes)
        device: cpu (which counts the process with its libraries) or cuda; where not given, what training would use
        json: print one JSON object on stdout
    """

    model: str
    rule: str = DEFAULT_RULE
    density: float | None = None
    count: int | None = None
    targets: TargetsOption = "linear"
    scoring_memory: float = 1.0
    tokens: int = 512
    learned: int | None = None
    batch_size: int = 16
    padded: bool = True
    gradient_checkpointing: bool = False
    dtype: DType = "auto"
    quantise: Quantise | None = None
    device: Literal["cpu", "cuda"] | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure a model, and adapters on it: in distribution, out of distribution, and what was forgotten.

    Args:
        model: a folder, a hub id, a .gguf file, smollm2, or gemma3-270m
        adapter: adapter folders, each measured on its own against the base
        id: in-distribution sets, each NAME=FILE
        ood: out-of-distribution sets, each NAME=FILE
        probe: texts whose likelihood shows forgetting, each NAME=FILE
        tasks: tasks of lm-evaluation-harness, by name; needs the extra lm-eval
        include_path: folder with tasks of your own for lm-evaluation-harness, as YAML
        output: JSON file to write
        limit: at most so many examples of each set, always the same; of each task the first
        max_length: longest example in tokens; the model's context where not given
        scale: strengths at which each adapter is measured too (WiSE-FT), e.g. 0.25 0.5: base + strength x change
        generate: at most so many examples of each set are answered by generation as well; 0 for none
        new_tokens: most tokens to generate where an answer is written
        dtype: of the weights; auto keeps the checkpoint's, float32 on a CPU without bfloat16
        any_dtype: take adapters trained in a narrower dtype too, where the wider weights hold the same base values
        any_base: take a model that is another than the adapter's base beside the entries it changes
        quantise: hold the linear layers in int8, int4 or nf4, as the adapters' training did
        overwrite: replace the output file
        json: print one JSON object on stdout
    """

    model: str
    adapter: list[str] = field(default_factory=list)
    id: list[str] = field(default_factory=list)
    ood: list[str] = field(default_factory=list)
    probe: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    output: str | None = None
    limit: int | None = None
    max_length: int | None = None
    scale: list[float] = field(default_factory=list)
    generate: int = 0
    new_tokens: int = 64
    dtype: DType = "auto"
    any_dtype: bool = False
    any_base: bool = False
    quantise: Quantise | None = None
    overwrite: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write the page of a study, of a sequence, or of adapters side by side: figures, tables, and their data.

    Args:
        folder: the --output of `finepoint compare`, finished or not, or of `finepoint sequence`; or several adapters
        output: folder to write; DIR/report where not given; an earlier report there is replaced
        json: print one JSON object on stdout
    """

    folder: list[str]
    output: str | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Make an adapter of the difference between two checkpoints, read weight by weight.

    Args:
        base: the model before: a folder, a hub id, a .gguf file, smollm2, or gemma3-270m
        tuned: the model after, of the same shape and dtype
        output: folder to write
        density: share of all entries to keep, those that changed most, in (0, 1]
        all: keep every entry that changed: applied to the base, it gives the tuned checkpoint bit for bit
        compact: write the gaps between positions in one or two bytes instead of the positions in four
        overwrite: allow an output folder that holds something
        json: print one JSON object on stdout
    """

    base: str
    tuned: str
    output: str
    density: float | None = None
    all: bool = False
    compact: bool = False
    overwrite: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an adapter in another layout: merged into its model, for PEFT, peft-sparta, vLLM, llama.cpp.

    Args:
        model: the base: a folder, a hub id, a .gguf file, smollm2, or gemma3-270m
        adapter: adapter folder, also without its flag; for merged and gguf also LoRA or DoRA as PEFT writes them
        format: merged, shira, supertuning, sparta, vllm-patch, or gguf (with llama.cpp's converter on the PATH)
        output: folder to write
        dtype: of the written weights (merged, gguf, vllm-patch); auto keeps the base's
        any_base: take a model that is another than the adapter's base beside the entries it changes
        overwrite: allow an output folder that holds something
        json: print one JSON object on stdout
    """

    model: str
    adapter: str = field(metadata={"positional": True})
    format: ExportFormat
    output: str
    dtype: DType = "auto"
    any_base: bool = False
    overwrite: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make an adapter of somebody else's: PEFT's SHiRA and Super-Tuning, peft-sparta's files.

    Args:
        folder: their folder, also without its flag: `finepoint import DIR ..`
        model: the base it was trained on: a folder, a hub id, a .gguf file, smollm2, or gemma3-270m
        output: folder to write
        format: shira, supertuning or sparta; auto tells it by the files; --from is the same flag
        dtype: of the weights the adapter will be applied to; auto for the base's
        compact: write the gaps between positions in one or two bytes instead of the positions in four
        overwrite: allow an output folder that holds something
        json: print one JSON object on stdout
    """

    folder: str
    model: str
    output: str
    format: ImportFormat = field(default="auto", metadata={"also": "from"})
    dtype: DType = "auto"
    compact: bool = False
    overwrite: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Say what is in an adapter: facts, a table by layer and module, a map of where its entries lie.

    Args:
        folder: adapter folder
        json: print one JSON object on stdout
    """

    folder: str
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check that an adapter's file is sound and that it belongs to a model; revert is tried, bit for bit.

    Args:
        folder: adapter folder
        model: a folder, a hub id, a .gguf file, smollm2, or gemma3-270m
        dtype: of the weights; that of the adapter where not given
        any_base: take a model that is another than the adapter's base beside the entries it changes
        quantise: hold the linear layers in int8, int4 or nf4, as the adapter's training did
        json: print one JSON object on stdout
    """

    folder: str
    model: str
    dtype: DType | None = None
    any_base: bool = False
    quantise: Quantise | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Combine adapters of one base model into one adapter; look at their interference first with --dry-run.

    Args:
        adapter: adapter folders, also without their flag: `finepoint merge DIR DIR ..`
        how: sum (task arithmetic), mean, ties, dare, breadcrumbs or consensus; on shared entries first, last or error
        weights: a factor for each adapter, in their order, may be negative; 1 where not given
        options: the method's options, e.g. density=0.5 for ties, drop=0.5 seed=1 for dare
        model: the base model; needed for half-precision adapters where their deltas matter, and for --tune
        any_base: take a model that is another than the adapter's base beside the entries it changes
        tune: search the weights that do best on these examples, a JSON Lines file; needs --model
        tune_by: accuracy or nll (likelihood); accuracy where the examples have one
        limit: at most so many of these examples, always the same
        dry_run: print how far the adapters interfere, pair by pair, and merge nothing
        output: folder to write; required unless --dry-run
        compact: write positions as gaps, in one or two bytes each instead of four; as exact
        overwrite: allow an output folder that holds something
        json: print one JSON object on stdout
    """

    adapter: list[str] = field(default_factory=list, metadata={"positional": True})
    how: Literal["sum", "mean", "ties", "dare", "breadcrumbs", "consensus", "first", "last", "error"] = "sum"
    weights: list[float] = field(default_factory=list)
    options: dict[str, float] = field(default_factory=dict)
    model: str | None = None
    any_base: bool = False
    tune: str | None = None
    tune_by: Literal["accuracy", "nll"] | None = None
    limit: int | None = None
    dry_run: bool = False
    output: str | None = None
    compact: bool = False
    overwrite: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Fetch the data of a recipe and write it as JSON Lines; without a name, list the recipes.

    Args:
        name: the recipe, also without its flag: `finepoint data vader`
        output: folder to write; required with a name
        overwrite: allow an output folder that holds something
        json: print one JSON object on stdout
    """

    name: str | None = None
    output: str | None = None
    overwrite: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """List the rules, those of installed plug-ins too, the baselines and the schedules, with formulas and sources.

    Args:
        json: print one JSON object on stdout
    """

    json: bool = False


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Run a study: arms x learning rates x seeds x tasks, every arm tuned on validation, all measured alike.

    The same command goes on where it stopped; finished cells are never run again, failed ones are tried once more.

    Args:
        model: a folder, a hub id, a .gguf file, or smollm2
        tasks: files by task, e.g. {movies: {train: F, validation: F, test: F}, tweets: {test: F}}
        arms: what is compared, e.g. [{rule: gallop, density: [0.001, 0.01]}, {baseline: lora, options: {rank: 8}}]
        output: folder of the study
        probes: files of text by name, whose likelihood shows forgetting
        train_on: tasks to train on, one after the other; all that have train, validation and test where not given
        seeds: the first tunes the learning rates, all measure the best one
        tuning: best validation accuracy, or one-se: the smallest rate within one standard error of it
        train: settings of finepoint train that all arms share, e.g. {steps: 40, eval_every: 10}
        validation_limit: at most so many examples of each validation set
        test_limit: at most so many examples of each test set
        probe_limit: at most so many texts of each probe
        generate: at most so many examples of each test set are answered by generation too; 0 for none
        new_tokens: most tokens to generate
        keep_adapters: keep every cell's adapter in the folder of the study
        dtype: of the weights; auto keeps the checkpoint's, float32 on a CPU without bfloat16
        quantise: hold the linear layers of the base in int8 or int4 (torchao) or nf4 (bitsandbytes); for arms that
            choose entries
        workers: processes that run cells side by side; 1 runs them in this process
        executor: local (this machine) or ray
        address: of a running Ray cluster; one on this machine is started where not given
        dry_run: print the cells and an estimate of the time, and run none
        json: print one JSON object on stdout
    """

    model: str
    tasks: dict[str, dict[str, str]]
    arms: list[dict[str, Any]]
    output: str
    probes: dict[str, str] = field(default_factory=dict)
    train_on: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    tuning: Literal["best", "one-se"] = "best"
    train: dict[str, Any] = field(default_factory=dict)
    validation_limit: int | None = None
    test_limit: int | None = None
    probe_limit: int | None = None
    generate: int = 64
    new_tokens: int = 8
    keep_adapters: bool = False
    dtype: DType = "auto"
    quantise: Quantise | None = None
    workers: int = 1
    executor: Literal["local", "ray"] = "local"
    address: str | None = None
    dry_run: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Train tasks one after the other on one model, each on entries of its own, and measure all after each.

    The same command goes on where it stopped.

    Args:
        model: a folder, a hub id, a .gguf file, or smollm2
        tasks: files by task, in the order of training, e.g. {movies: {train: F, test: F}, words: {..}}
        output: folder to write
        rule: which entries; `finepoint rules` lists them
        density: share of the target entries that each task trains
        lr: learning rate; 3e-4 for rules that look at gradients, 1e-2 for the others
        overlap: exclude entries that earlier tasks own, allow them, or both ways one after the other
        train: further settings of finepoint train, e.g. {steps: 60}
        test_limit: at most so many examples of each test set
        new_tokens: most tokens to generate where an answer is written
        seed: of everything random in the first task; the next one has the next seed
        dtype: of the weights; auto keeps the checkpoint's, float32 on a CPU without bfloat16
        json: print one JSON object on stdout
    """

    model: str
    tasks: dict[str, dict[str, str]]
    output: str
    rule: str = DEFAULT_RULE
    density: float = 0.001
    lr: float | None = None
    overlap: Literal["exclude", "allow", "both"] = "both"
    train: dict[str, Any] = field(default_factory=dict)
    test_limit: int | None = None
    new_tokens: int = 8
    seed: int = 0
    dtype: DType = "auto"
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Fine-tune SmolLM2-135M on movie reviews with GaLLoP and at random, and compare both with the base.

    Args:
        output: folder to write
        steps: optimizer steps of each run
        limit: at most so many examples of the ID set, three eighths as many of each OOD set
        overwrite: allow an output folder that holds something
        json: print one JSON object on stdout
    """

    output: str = "runs/demo"
    steps: int = 40
    limit: int = 200
    overwrite: bool = False
    json: bool = False


LEAST = {
    "max_length": 1, "batch_size": 1, "accumulation": 1, "steps": 1, "eval_every": 1, "save_every": 1, "patience": 1,
    "limit": 1, "validation_limit": 1, "test_limit": 1, "probe_limit": 1, "new_tokens": 1, "generate": 0, "seed": 0,
    "clip": 0, "weight_decay": 0, "workers": 1,
}  # fmt: skip
ABOVE_0 = ("epochs", "temperature")
LARGEST_SEED = 2**32 - 1  # numpy's


def refuse_out_of_range(config: Any) -> None:
    """Refuses numbers that no run could have, or that would silently mean something else.

    Raises:
        FinepointError: there is one; it is named.
    """
    for name in (own.name for own in fields(config)):
        value = getattr(config, name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if value < LEAST.get(name, value):
            raise FinepointError(f"{name} is {value}; give at least {LEAST[name]}")
        if name in ABOVE_0 and not value > 0:
            raise FinepointError(f"{name} is {value}; give a number above 0")
        if name == "seed" and value > LARGEST_SEED:
            raise FinepointError(f"seed is {value}; give at most {LARGEST_SEED}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value, as YAML gives it, can stand in a field of this type."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in members
    if origin in (Union, UnionType):
        return any(fits(value, member) for member in members)
    if origin is list:
        return isinstance(value, list) and all(fits(item, members[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def spelled(kind: Any) -> list[str]:
    """What may stand in a field of this type, for messages."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        return [str(member) for member in members]
    if origin in (Union, UnionType):
        return [text for member in members if member is not NoneType for text in spelled(member)]
    if origin in (list, dict):
        return [f"a {'list' if origin is list else 'mapping'}"]
    return [{int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]]
