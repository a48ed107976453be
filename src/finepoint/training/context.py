"""What a run works on: a model, its tokenizer, examples in tokens, and the entries that are chosen there, or given."""

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from finepoint.adapters.adapter import ANY_BASE, SparseAdapter
from finepoint.adapters.fingerprint import contents_of, fingerprint
from finepoint.adapters.format import write
from finepoint.data.batches import Collator, Packer, context_length
from finepoint.data.chats import learned_turns
from finepoint.data.examples import (
    Example,
    label_names,
    read_examples,
    read_parts,
    refuse_other_task,
    some,
)
from finepoint.data.leaks import Seen
from finepoint.data.sources import name_of
from finepoint.data.store import BATCHES_SORTED, LargeData, StoredRows, identity_of, large_data, learnable, lengths
from finepoint.data.tokens import Row, encode_all, padding_id
from finepoint.errors import FinepointError
from finepoint.models.loading import (
    block_of,
    class_order,
    gguf_file,
    has_grid,
    load_config,
    load_model,
    load_tokenizer,
    new_head,
)
from finepoint.models.probing import PACKABLE, counts_from_zero, keeps_apart
from finepoint.models.quantised import quantised_layers
from finepoint.runtime import distributed
from finepoint.runtime.files import claim_folder, write_record
from finepoint.selection.on_grid import NO_GRID
from finepoint.selection.rules import rule_named
from finepoint.selection.select import Budget, Selection, refuse_excluded, select
from finepoint.selection.settings import SelectConfig, check_select
from finepoint.selection.statistics import stream_statistics
from finepoint.training.settings import TrainConfig, Training
from finepoint.training.texts import (
    CLASSIFIERS,
    Writer,
    apart,
    examples_to_keep,
    rows_to_keep,
    rows_to_read,
    texts_read,
)
from finepoint.tuner.tuner import SparseTuner
from finepoint.version import __version__

TRAINING = "training example"
# What an adapter says of how its entries were chosen.
CHOSEN = ("rule", "density", "scope", "structure", "within", "targets", "selection")
ALONE = "a quantised base trains in one process"


@dataclass(frozen=True)
class TrainingContext:
    """What a run works on: the model, its tokenizer, and the examples in tokens."""

    model: Any
    tokenizer: Any
    labels: list[str]
    rows: Sequence[Row]
    collator: Collator
    seen: Seen | None = None
    """digests of the examples"""
    form: str = ""
    """of the examples, e.g. `chat` or `completion`"""
    sources: Sequence[dict[str, Any]] = ()
    """where the examples are from"""
    kept: Sequence[Row] = ()
    """what a run is to keep, once it has been read"""
    own: Mapping[str, Any] = field(default_factory=dict)
    """of it, what the base has written itself, for the record"""


def prepare(config: SelectConfig, reads: int | None = None) -> TrainingContext:
    """Reads the data and loads the model they call for.

    Args:
        reads: of large files so many rows suffice, in the order that is drawn by the seed; None: all are read.
    """
    if rule_named(config.rule).needs_grid and not has_grid(config.model, config.quantise):
        raise FinepointError(NO_GRID)  # neither this nor a misspelt rule should wait for the model to load
    if config.quantise and distributed.count() > 1:
        raise FinepointError(f"{ALONE}; leave out --quantise, or start it without a launcher")
    large = large_data(config.data, config.columns, need=True) if config.data else None
    parts = read_parts(config.data, config.columns, config.seed, need=True) if config.data and not large else []
    examples = [example for part in parts for example in part.examples]
    labels = large.labels if large else label_names(examples)
    if len(labels) == 1:
        raise FinepointError(f"{name_of(config.data)} knows only the label {labels[0]!r}; a classifier needs two")
    form = large.form if large else form_of(examples)
    if config.chat_turns != "all" and form != "chat":
        raise FinepointError("--chat-turns is for conversations, and the data hold none; leave it out")
    tokenizer = load_tokenizer(config.model)
    if labels:
        labels = class_order(load_config(config.model), labels)
    # To be sharded it is loaded beside the device, which may not have room for all of it.
    device = "cpu" if wanted() else None
    model = load_model(config.model, config.dtype, labels, config.seed, device=device, quantise=config.quantise)
    if distributed.count() > 1 and quantised_layers(model):
        raise FinepointError(f"{ALONE}; give a float base, or start it without a launcher")
    if labels:
        model.config.pad_token_id = padding_id(tokenizer, model)
    if distributed.count() > 1:
        distributed.check_alike("the base model", [json.dumps(fingerprint(contents_of(model)).as_json()).encode()])
    if wanted():
        shard_(model, "cuda" if torch.cuda.is_available() else "cpu")
    if large and identity_of(tokenizer):
        rows = rows_on_disk(config, large, tokenizer, model, labels, reads)
        context = replace(_around(model, tokenizer, labels, rows, rows.seen, form), sources=rows.told(large.sources))
    else:
        if large:
            parts = read_parts(config.data, config.columns, config.seed, need=True)
            examples = [example for part in parts for example in part.examples]
        context = training_context(config, model, tokenizer, examples, labels)
        context = replace(context, sources=[part.told() for part in parts])
    if labels and not context.collator.positions and not counts_from_zero(model, context.rows[0].ids):
        raise FinepointError(f"{type(model).__name__} numbers its positions by the padding token, and such encoders "
                             "are trained in Python alone; use finepoint.sparsify, or another encoder")  # fmt: skip
    return context


def rows_on_disk(
    config: SelectConfig, large: LargeData, tokenizer: Any, model: Any, labels: Sequence[str] = (),
    reads: int | None = None,
) -> StoredRows:  # fmt: skip
    """The examples of large files in tokens; see `prepare`."""
    drawn = None if reads is None else (config.seed, reads)
    limit = context_length(model, config.max_length)
    return large.encoded(tokenizer, limit, labels, TRAINING, model, config.chat_turns, drawn)


def rows_read(config: SelectConfig) -> int | None:
    """How many rows of large files a run draws at most; None where it may be any of them."""
    steps = getattr(config, "steps", 0)
    if steps is None or getattr(config, "refresh", None) or config.scoring_examples < 1:
        return None
    together = config.batch_size * distributed.count()
    trained = int(steps * together * getattr(config, "accumulation", 1))
    # Batches are made of whole stretches, and every process takes one before it is needed.
    return max(trained, int(config.scoring_examples)) + 2 * (config.batch_size * BATCHES_SORTED + together)


def training_context(
    config: SelectConfig, model: Any, tokenizer: Any, examples: Sequence[Example], labels: Sequence[str] = ()
) -> TrainingContext:
    """A context around a model that is loaded already."""
    limit = context_length(model, config.max_length)
    examples, given = learned_turns(examples, config.chat_turns), examples
    rows = encode_all(tokenizer, examples, limit, labels, TRAINING, model) if examples else []
    return _around(model, tokenizer, labels, rows, Seen.of(given), form_of(examples))


def form_of(examples: Sequence[Example]) -> str:
    return type(examples[0]).__name__.lower() if examples else ""


def _around(
    model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Row], seen: Seen, form: str
) -> TrainingContext:
    """A context around rows; its collator is tried on a short and the longest one."""
    sizes = lengths(rows)
    tried = [rows[sizes.index(size)].ids for size in (min(sizes), max(sizes))] if sizes else []
    return TrainingContext(model, tokenizer, list(labels), rows, Collator.of(model, tokenizer, tried), seen, form)


@lru_cache(maxsize=1)
def wanted() -> bool:
    """Whether the launcher was told to shard the model (`accelerate launch --use_fsdp --fsdp_version 2`).

    The word is taken out of the environment: it is done before a trainer comes to see the model.
    """
    found = distributed.count() > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if found:
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    return found


def shard_(model: Any, device: str) -> None:
    """Shards a loaded model over all processes, each decoder block a unit, the rest another.

    Raises:
        FinepointError: the model has no decoder blocks.
    """
    names = {block_of(model, name) for name, _ in model.named_parameters()} - {None}
    if not names:
        raise FinepointError(f"{type(model).__name__} has no list of decoder blocks to shard by; train it without FSDP")
    mesh = init_device_mesh(device, (distributed.count(),))
    for name in sorted(names, key=str):
        fully_shard(model.get_submodule(str(name)), mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)


def select_for(
    config: SelectConfig,
    context: TrainingContext,
    stream: Callable[..., Any] = stream_statistics,
    taken: Sequence[Mapping[str, Tensor]] = (),
    plan: Sequence[Budget] | None = None,
) -> Selection:
    """Chooses entries as the configuration says, scoring on a random sample of the training examples.

    Args:
        stream: where the rule's statistics come from, as for `finepoint.select`.
        taken: further indices that may not be chosen.
        plan: instead of the configuration's density, count and scope, as for `finepoint.select`.
    """
    rule = rule_named(config.rule)
    batches: list[dict[str, Any]] = []
    if rule.needs_data:
        if not context.rows:
            raise FinepointError(f"rule {rule.name!r} scores by examples and needs some; give --data FILE.jsonl")
        batches = batches_of(config, context, scoring_rows(context.rows, config.scoring_examples, config.seed))
    kept: list[dict[str, Any]] = []
    if rule.needs_kept:
        kept_here, _ = apart(config, list(context.kept) or kept_rows(config, context))
        most = texts_read(config.protect, config.protect_read)
        kept = batches_of(config, context, rows_to_read(kept_here, context.tokenizer, most))
    # What is trained whole, a new classification head, takes no part.
    head = new_head(context.model) if context.labels else []
    whole = {name: torch.arange(context.model.get_parameter(name).numel()) for name in head}
    return select(
        context.model,
        batches,
        rule=config.rule,
        density=config.density,
        count=config.count,
        scope=config.scope,
        targets=config.targets,
        exclude=[*(excluded(folder, context.model) for folder in config.exclude), *taken, whole],
        seed=config.seed,
        scoring_memory=config.scoring_memory,
        threshold=config.threshold,
        rule_options=config.rule_options,
        structure=config.structure,
        pooling=config.pooling,
        within=config.within,
        plan=plan,
        stream=stream,
        text=True,
        kept=kept,
        gguf=gguf_file(config.model) if rule.needs_grid else None,
    )


def entries_for(
    config: Training, context: TrainingContext, resumed: Path | None
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The entries to train: of the resumed run, as given by --indices, or chosen; and how they were chosen.

    Raises:
        FinepointError: those given are of another model, or are to be excluded.
    """
    source = resumed or (Path(config.indices) if config.indices else None)
    if source is None:
        selection = select_for(config, context)
        return selection, selection.told(config.scope)
    adapter = SparseAdapter.load(source) if resumed is None else SparseAdapter.read(source)
    if problems := adapter.problems(context.model):
        reason = problems[0].removesuffix(f"; {ANY_BASE}")  # which is of no use to training
        raise FinepointError(f"the indices in {source} do not fit this model: {reason}")
    if resumed is None:
        refuse_excluded(adapter, [excluded(folder, context.model) for folder in config.exclude], context.model)
    return {name: adapter[name] for name in adapter}, {key: adapter.info[key] for key in CHOSEN if key in adapter.info}


def kept_rows(config: SelectConfig, context: TrainingContext, writer: Writer | None = None) -> list[Row]:
    """The examples of `--protect` in tokens, so many of them and always the same; none where it is not given.

    Args:
        writer: of text that the base is to write itself; one for this context where None.

    Raises:
        FinepointError: they have classes, or the model is a classifier, or nothing in them has a label.
    """
    if config.protect is None:
        return []
    if context.labels:
        raise FinepointError(CLASSIFIERS)
    writer = writer or Writer(context.model, context.tokenizer)
    examples = examples_to_keep(config.protect, config.protect_examples, writer)
    return rows_to_keep(examples, context.model, context.tokenizer, config.max_length)


def described(config: SelectConfig, context: TrainingContext, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter says of itself.

    Args:
        chosen: how its entries were; nothing where none are.
    """
    keys = {tuple(source["form"] or ()) for source in context.sources}
    return {
        "base_model": config.model,
        "task": "classification" if context.labels else "causal",
        "labels": context.labels,
        **({"form": context.form} if context.form else {}),
        **({"keys": list(*keys)} if len(keys) == 1 else {}),
        "targets": config.targets,
        "seed": config.seed,
        "data": config.data,
        "finepoint_version": __version__,
        **({"quantise": config.quantise} if config.quantise else {}),
        **chosen,
        "selection": {key: value for key, value in chosen.get("selection", {}).items() if key != "weights"},
    }


def choose(config: SelectConfig) -> Selection:
    """Runs the whole of `finepoint select`: the output is an adapter whose deltas are zero.

    Raises:
        FinepointError: whatever the user can mend.
    """
    check_select(config)
    distributed.join()
    with ExitStack() as claims:
        folder = distributed.on_first(lambda: claims.enter_context(claim_folder(config.output, config.overwrite)))
        context = prepare(config, rows_read(config))
        selection = select_for(config, context)
        with SparseTuner(context.model, selection, audit=False) as tuner:
            head = new_head(context.model) if context.labels else []
            adapter = tuner.adapter(full=head, info=described(config, context, selection.told(config.scope)))
        distributed.on_first(partial(_write_selection, folder, adapter, config, selection))
    return selection


def _write_selection(folder: Path, adapter: SparseAdapter, config: SelectConfig, selection: Selection) -> None:
    write(adapter, folder)
    write_record(folder / "selection.json", {"statistics": selection.statistics, "config": asdict(config)})


def excluded(folder: str, model: Any) -> SparseAdapter:
    """An adapter whose entries are not to be chosen; its values do not matter, the weights' names and shapes do."""
    adapter = SparseAdapter.load(folder)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    for name, change in adapter.changes.items():
        if shapes.get(name) != change.shape:
            raise FinepointError(f"the adapter to exclude, {folder}, is of another model: {name} has shape "
                                 f"{change.shape} there, {shapes.get(name, 'none')} here")  # fmt: skip
    return adapter


def scoring_rows(rows: Sequence[Row], amount: float, seed: int) -> list[Row]:
    """A random sample of the rows that have something to learn: so many, or a share of them where below 1."""
    rows = learnable(rows)
    if amount <= 0 or (amount > 1 and amount != int(amount)):
        raise FinepointError(f"scoring_examples is {amount}; give a number of examples or a share in (0, 1)")
    size = round(amount * len(rows)) if amount < 1 else int(amount)
    size = min(max(1, size), len(rows))
    drawn = [rows[at] for at in islice(rows.drawn(seed), size)] if isinstance(rows, StoredRows) else (
        random.Random(seed).sample(rows, size))  # fmt: skip
    return sorted(drawn, key=lambda row: len(row.ids))  # so that batches waste little on padding


def batches_of(config: SelectConfig, context: TrainingContext, rows: list[Row]) -> list[dict[str, Any]]:
    return context.collator.batches(rows, config.batch_size)


def rows_of(
    config: TrainConfig, context: TrainingContext, file: Any, what: str, most: int | None = None
) -> list[Row] | None:
    """The examples of a further file, as the model takes them."""
    if file is None:
        return None
    limit = context_length(context.model, config.max_length)
    examples = some(read_examples(file, config.columns), most)
    refuse_other_task(name_of(file), examples, context.labels)
    return encode_all(context.tokenizer, examples, limit, context.labels, what, context.model)


def packer_for(context: TrainingContext) -> Packer:
    """The packer for a model that is known to keep the examples of a row apart.

    Raises:
        FinepointError: a classifier, or a model that takes no `position_ids` or sees through the boundaries.
    """
    if context.labels:
        raise FinepointError("packing is for examples that are learned token by token, and these have class labels; "
                             "train without --packing")  # fmt: skip
    name = type(context.model).__name__
    if not context.collator.positions:
        raise FinepointError(f"packing tells examples apart by position_ids, which {name} does not take; "
                             "train without --packing")  # fmt: skip
    attention = context.model.config._attn_implementation
    longest = max(lengths(context.rows), default=5)
    if attention not in PACKABLE or context.collator.side == "none" or not keeps_apart(context.model, longest):
        other = "" if attention in PACKABLE else f", or load it with {' or '.join(PACKABLE)} attention"
        raise FinepointError(f"in {name} with {attention} attention the examples packed in a row are not kept apart; "
                             f"train without --packing{other}")  # fmt: skip
    return Packer(context.collator, context.model.get_input_embeddings().embedding_dim)
