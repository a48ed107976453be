"""Two lines: `sparsify` makes a model ready for anybody's trainer, `save` keeps the change, `load` brings it back."""

import logging
from collections.abc import Mapping, Sequence
from math import inf
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from finepoint.adapters.adapter import SparseAdapter, applied_to
from finepoint.adapters.entries import gather
from finepoint.adapters.scaling import MEASURED
from finepoint.data.batches import Collator, context_length
from finepoint.data.examples import as_examples, read_examples
from finepoint.data.leaks import Seen
from finepoint.data.recipes.table import OWN, text_file
from finepoint.data.sources import is_place, name_of
from finepoint.errors import FinepointError
from finepoint.huggingface.scoring_data import scoring_batches
from finepoint.huggingface.session import ATTACHED, SESSION, Results, Session, adapter_of, attach, session_of
from finepoint.models.loading import from_bitsandbytes_, gguf_file, head_of
from finepoint.models.weights import in_memory
from finepoint.selection.passes import Batch, label_count, on_device, split
from finepoint.selection.rates import usual_rate
from finepoint.selection.reach import name_unreached
from finepoint.selection.rules import rule_named
from finepoint.selection.select import Scope, Selection, refuse_excluded, select
from finepoint.selection.settings import DEFAULT_RULE
from finepoint.selection.structure import Pooling
from finepoint.selection.targets import Targets, target_weights
from finepoint.training.keep import PROTECTIONS, fisher_at
from finepoint.training.settings import READ
from finepoint.training.texts import (
    TOKENS_READ,
    Writer,
    examples_to_keep,
    names_own,
    rows_to_keep,
    rows_to_read,
    texts_read,
)
from finepoint.tuner.audit import outcome
from finepoint.tuner.on_grid import snap_to_base_
from finepoint.tuner.tuner import CONTAINER, SparseTuner
from finepoint.version import __version__

logger = logging.getLogger(__name__)
HELD = ("protect", "protect_by", "protect_strength", "protect_steps", "earlier", *MEASURED)
SINGLE = "single_label_classification"
Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model,
    rule: str = DEFAULT_RULE,
    density: float | None = None,
    *,
    data: Any = None,
    tokenizer: Any = None,
    indices: Mapping[str, Tensor] | str | Path | None = None,
    count: int | None = None,
    scope: Scope = "global",
    targets: Targets = "linear",
    exclude: Sequence[Mapping[str, Tensor]] = (),
    whole: Sequence[str] | None = None,
    rule_options: Mapping[str, float] | None = None,
    structure: str = "entry", pooling: Pooling = "mean", within: str | None = None,
    scoring_examples: float = 256, scoring_memory: float | Literal["disk"] = 1.0,
    batch_size: int = 16, max_length: int | None = None, seed: int = 0,
    refreshable: bool = False,
    audit: bool = True,
    protect: Any = None, protect_strength: float = PROTECTIONS["anchor"].strength,
    on_grid: str | bool = False,
) -> Model:  # fmt: skip
    """Chooses entries of a model and makes them, and them alone, trainable: by any trainer, in place. Returns it.

    The model stays the same object. `model.save_pretrained` now writes the adapter and what a trainer resumes from,
    which is O(k); `unload` gives back the plain model.

    Args:
        model: a transformers model; everything in it is frozen but the deltas of the chosen entries. One that was
            loaded with bitsandbytes goes through `from_bitsandbytes_` first, which lasts.
        rule: a name from `finepoint.RULES`, or `module:function`.
        density: share of the target entries, in (0, 1]; 0.001 where neither it nor `count` is given.
        data: what rules that look at gradients score on: a JSON Lines file, examples (as in its lines), rows of
            `input_ids`, or ready batches, all of them; of these two masks say what counts. Other rules need none.
        tokenizer: turns examples into tokens; not needed for the latter two.
        indices: entries to train, by weight name (a selection, an adapter or its folder), instead of choosing any.
        whole: names of weights to train and store whole, `()` for none. Where not given, those of a head that puts out
            something else than words (a classifier's `score.weight`), which no checkpoint of the base holds.
        scoring_examples, batch_size: how many examples (a share below 1) gradients are taken over, how many at a time.
        refreshable: entries of any target weight may be chosen later, by `tuner_of(model).choose_`. A stock trainer's
            checkpoint can be resumed only as long as the entries are those of the beginning.
        audit: try that every chosen entry gets the gradient of its own loss, on `data`, or the first input there is.
        protect: up to 16 texts to predict as before, in any form of `data`, or "own", 32 that the model writes: what
            matters to them is pulled back before each step (EWC, by `protect_strength`); for `gain`, too.
        on_grid: the entries take the values that their base's codes can stand for, and no others: the `.gguf` file that
            the model was loaded from, or True where its layers are quantised. They are chosen once.
        max_length: longest scoring example in tokens; the model's context where not given.
        count, scope, targets, exclude, rule_options, structure, pooling, within, scoring_memory, seed: see `select`.

    Raises:
        FinepointError: as for `select` and `SparseTuner`; a rule that needs data without any; text without tokenizer.
    """
    batches: list[Batch] = []
    indices = _given(indices, rule=rule, density=density, count=count, structure=structure, within=within)
    whole, info = _whole(model, whole, indices), _origin(model, data)
    file = _grid_file(on_grid, refreshable)
    from_bitsandbytes_(model)
    entire = {name: torch.arange(model.get_parameter(name).numel()) for name in whole}
    refuse_excluded(indices or {}, exclude, model)
    kept = _kept(model, protect, tokenizer, seed, protect_strength)
    if indices is None:
        indices, batches = _selected(
            model, data, tokenizer, scoring_examples, batch_size, max_length, rule=rule, density=density, count=count,
            scope=scope, targets=targets, exclude=[*exclude, entire] if entire else exclude, seed=seed, kept=kept,
            scoring_memory=scoring_memory, rule_options=rule_options, structure=structure, pooling=pooling,
            within=within, gguf=file,
        )  # fmt: skip
        info |= _choice(indices, scope, seed, targets)
    chosen = {**indices, **entire}
    in_memory({name: weight for name, weight in model.named_parameters(remove_duplicate=False) if name in chosen})
    ready = target_weights(model, targets) if refreshable else ()
    tuner = SparseTuner(model, chosen, ready, audit=audit and not batches)
    if on_grid:
        snap_to_base_(tuner, file)
        info |= {"on_grid": True}
    _audit_(tuner, batches[:1] if audit else [])
    _want_(tuner, indices, structure, on_grid=bool(on_grid), held=bool(kept and protect_strength))
    attach(model, Session(tuner, info | _hold_(tuner, kept, seed, protect_strength), whole, _seen(data)))
    return model


def _given(indices: Any, **choice: Any) -> Mapping[str, Tensor] | None:
    """The entries that are given, those of a folder read; None where a rule is to choose.

    Raises:
        FinepointError: they come with a way to choose others; or as for `SparseAdapter.load`.
    """
    usual = {"rule": DEFAULT_RULE, "structure": "entry"}
    if indices is None:
        return None
    if told := next((name for name, value in choice.items() if value != usual.get(name)), None):
        raise FinepointError(f"indices are trained as they are; leave out {told}, or indices")
    found: Mapping[str, Tensor] = SparseAdapter.load(indices) if isinstance(indices, str | Path) else indices
    return found


def _selected(
    model: Any, data: Any, tokenizer: Any, amount: float, size: int, longest: int | None, **choice: Any
) -> tuple[Selection, list[Batch]]:
    """The entries that a rule chooses, and the batches it has scored on."""
    rule, batches = choice["rule"], []
    if rule_named(rule).needs_data:
        batches = scoring_batches(model, rule, data, tokenizer, amount, size, longest, choice["seed"])
    found = select(model, batches, text=isinstance(data, str | Path), **choice)
    name_unreached(model, {} if batches else found)  # what it will be trained on is not known
    return found, batches


def _grid_file(on_grid: str | bool, refreshable: bool) -> Path | None:
    """The GGUF file whose grid is meant; None for the model's own layers.

    Raises:
        FinepointError: it is none; entries are to be chosen anew.
    """
    if on_grid and refreshable:
        raise FinepointError("entries on a grid are chosen once; leave out refreshable, or on_grid")
    if isinstance(on_grid, bool):
        return None
    if file := gguf_file(str(on_grid)):
        return file
    raise FinepointError(f"on_grid is {on_grid!r}; give the .gguf file that the model was loaded from, or True where "
                         "its layers are quantised")  # fmt: skip


def _want_(tuner: SparseTuner, chosen: Any, structure: str, **more: bool) -> None:
    """Has a rate told that is far too small for what a rule has chosen."""
    if isinstance(chosen, Selection):
        usual = usual_rate(rule_named(chosen.rule), chosen.statistics["density"], structure, **more)
        tuner.want_(usual, f"those of rule {chosen.rule}")


def _hold_(tuner: SparseTuner, kept: Sequence[Batch], seed: int, strength: float) -> dict[str, Any]:
    """Has the trained entries pulled back by what texts need of them; what an adapter says of that."""
    if not kept or not strength:
        return {}
    try:
        tuner.hold_(fisher_at(tuner, tuner.model, kept, seed), strength)
    except BaseException:  # it reads text for a while
        tuner.close()
        raise
    return {"protect_by": "anchor", "protect_strength": strength}


def _kept(model: Any, protect: Any, tokenizer: Any, seed: int, strength: float) -> list[Batch]:
    """What is to be kept as batches of one text each.

    Raises:
        FinepointError: the model does not write on; or as for `scoring_batches`.
    """
    if protect is None:
        if strength != PROTECTIONS["anchor"].strength:
            raise FinepointError("protect_strength says how strongly texts are kept, and none are given; give protect, "
                                 "or leave it out")  # fmt: skip
        return []
    if model.config.is_encoder_decoder or head_of(model) or model.get_output_embeddings() is None:
        raise FinepointError("protect keeps how a causal language model writes on, and "
                             f"{type(model).__name__} is none; leave it out")  # fmt: skip
    if not isinstance(strength, Real) or not 0 <= strength < inf:
        raise FinepointError(f"protect_strength is {strength!r}; give a number, 0 or more")
    named = [protect] if isinstance(protect, str) else protect if isinstance(protect, list | tuple) else []
    if named and all(isinstance(each, str) for each in named) and names_own(named):
        return _own(model, tokenizer, named)
    if isinstance(protect, str):
        protect = text_file(protect)
    limit = min(TOKENS_READ, context_length(model, None))
    found = scoring_batches(model, "protect", protect, tokenizer, READ, 1, limit, seed)
    if not all(isinstance(batch.get("labels"), Tensor) and batch["labels"].ndim == 2 for batch in found):
        raise FinepointError("protect holds a batch without labels, which say where predictions are to be kept; give "
                             "them, e.g. the input_ids again")  # fmt: skip
    texts: list[Batch] = [text for batch in found for text in split(batch) if label_count(text)]
    if not texts:
        raise FinepointError("protect has no token to keep the prediction of: every label is -100")
    return texts[:READ]


def _own(model: Any, tokenizer: Any, named: Sequence[str]) -> list[Batch]:
    """Texts that the model writes itself, a batch each, in equal parts with those of files that are named beside."""
    if tokenizer is None:
        raise FinepointError(f"protect={OWN!r} has the model write text; give tokenizer=.. as well")
    examples = examples_to_keep(named, None, Writer(model, tokenizer))
    rows = rows_to_read(rows_to_keep(examples, model, tokenizer), tokenizer, texts_read(named, None))
    return [*Collator.of(model, tokenizer, [row.ids for row in rows]).batches(rows, 1)]


def load(model: Model, adapter: str | Path | SparseAdapter, *, trainable: bool = False, audit: bool = True) -> Model:
    """Writes an adapter into a model's weights; or makes it trainable, to go on from there.

    Args:
        adapter: a folder (a trainer's checkpoint is one), the id of an adapter on the hub, or an adapter.
        trainable: its entries become trainable as by `sparsify`, with the deltas it holds. An adapter that stores
            values (of half-precision weights) starts from exactly these, not from the wider deltas behind them.
        audit: of a trainable one, as for `sparsify`.

    Returns:
        The very same model. `unload` gives it back as it was; so does the adapter's own `revert`.

    Raises:
        FinepointError: no adapter is there, or it does not fit the model, which is unchanged then.
    """
    found = adapter if isinstance(adapter, SparseAdapter) else SparseAdapter.load(adapter)
    if found.changes_nothing() and not trainable:
        logger.warning("the adapter changes nothing: no value differs from the base")
    if not trainable:
        found.apply(model)
        return model
    found.check(model)
    tuner = SparseTuner(model, found, audit=audit, base=found.fingerprint)
    _start_from_(tuner, found)
    whole = tuple(name for name, change in found.changes.items() if change.kind == "full")
    seen = None if isinstance(adapter, SparseAdapter) else Seen.beside(adapter)
    attach(model, Session(tuner, _unheld(found.info), whole, seen))
    return model


def _unheld(info: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter says of itself, without what held its training to the base: going on from there, nothing does."""
    if told := [key for key in HELD if key in info]:
        logger.warning("the adapter's training was held to its base (%s); what is trained now is not", ", ".join(told))
    return {key: value for key, value in info.items() if key not in HELD}


def save(
    model: nn.Module, folder: str | Path, *, results: Results | None = None,
    overwrite: bool = False, compact: bool = False,
) -> Path:  # fmt: skip
    """Writes the adapter of a model: the change of one in training, or the one adapter applied to it.

    Args:
        results: what was measured, for the model card: data -> metric -> value.
        overwrite: allow a folder that holds something.
        compact: write positions as gaps, in one or two bytes each instead of four.

    Raises:
        FinepointError: the model has no change to save, or the folder holds something.
    """
    place = adapter_of(model, results).save(folder, overwrite, compact)
    if SESSION in vars(model) and (seen := session_of(model).seen):
        seen.save(place)
    return place


def unload(model: Model, *, revert: bool = False) -> Model:
    """Ends the training of a model: the plain model again, its flags as they were.

    Of a model that is not in training, to which adapters are applied (`load`), it takes these out: the base's exact
    bits again, in any case.

    Args:
        revert: with the base's exact bits instead of the trained values.

    Raises:
        FinepointError: the model is not in training and no adapter is applied to it; or, where the base's bits are to
            be put back, weights were replaced, so that these would be entries of another model.
    """
    if SESSION not in vars(model) and (applied := applied_to(model)):
        for adapter in reversed(applied):
            adapter.revert(model)
        return model
    session = session_of(model)
    if revert:
        session.tuner.check_base()
        session.tuner.revert_()
    session.hook.remove()
    session.tuner.close()
    for name in (SESSION, *ATTACHED):
        model.__dict__.pop(name, None)
    return model


def _start_from_(tuner: SparseTuner, adapter: SparseAdapter) -> None:
    """Sets the deltas to those of an adapter whose entries the tuner trains."""
    weights = dict(tuner.model.named_parameters(remove_duplicate=False))
    owners = {id(entries.weight): entries for entries in tuner.entries.values()}
    missed = 0
    for name, change in adapter.changes.items():
        if not len(change):
            continue
        entries = owners[id(weights[name])]
        values = change.new_values(entries.base)
        wide = entries.delta.dtype
        with torch.no_grad():
            exact = change.kind == "delta"
            entries.delta.copy_(change.numbers if exact else values.to(wide) - entries.base.to(wide))
        entries.follow_()
        missed += int((gather(entries.weight, entries.indices) != values).sum())
    if missed:
        logger.warning("%d entries lie so far from the base that base + delta rounds to another value", missed)


def _audit_(tuner: SparseTuner, batches: Sequence[Batch]) -> None:
    """Tries the gradients of the chosen entries on batches of the user's."""
    for batch in batches:
        inputs = on_device(batch, next(tuner.model.parameters()).device)
        tuner.audit_(lambda inputs=inputs: outcome(tuner.model(**inputs)))  # type: ignore[misc]
        tuner.audit_later()
        tuner.check_steps()


def _whole(model: nn.Module, whole: Sequence[str] | None, indices: Mapping[str, Tensor] | None) -> tuple[str, ...]:
    """The weights to train whole: those named, or else those of a head that no checkpoint of the base holds.

    Raises:
        FinepointError: the model is in training already.
    """
    if hasattr(model, CONTAINER):
        raise FinepointError("the model is being trained already; finepoint.unload(model) ends that")
    return tuple(whole if whole is not None else (name for name in head_of(model) if name not in (indices or {})))


def _seen(data: Any) -> Seen | None:
    """Digests of the examples in `data`, for `finepoint eval`; None where they are no texts, or are read but once."""
    try:
        if is_place(data):
            return Seen.of(read_examples(data))
        kept = isinstance(data, Sequence) or hasattr(data, "column_names") or hasattr(data, "columns")
        return Seen.of(as_examples(data)) if kept and len(data) else None
    except FinepointError:  # rows of tokens, or a file that nothing was chosen by
        return None


def _origin(model: Any, data: Any) -> dict[str, Any]:
    """What an adapter says of where it comes from."""
    origin = {"base_model": _name(model), "finepoint_version": __version__}
    return origin | ({"data": name_of(data)} if is_place(data) else {}) | _classes(model)


def _choice(selection: Selection, scope: str, seed: int, targets: Targets) -> dict[str, Any]:
    """What an adapter says of how its entries were chosen."""
    facts = {key: value for key, value in selection.statistics.items() if key != "weights"}
    return selection.told(scope) | {"seed": seed, "targets": _json(targets), "selection": facts}


def _classes(model: Any) -> dict[str, Any]:
    """What an adapter says of the classes of a model that gives every text one label."""
    config: Any = getattr(model, "config", None)
    if not type(model).__name__.endswith("ForSequenceClassification") or config.problem_type not in (None, SINGLE):
        return {}
    labels = [str(config.id2label[i]) for i in range(config.num_labels)]
    return {"task": "classification", "labels": labels} if len(labels) > 1 else {}


def _name(model: Any) -> str:
    """The id or folder that a model was loaded from."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _json(targets: Targets) -> Any:
    """Targets as JSON holds them."""
    if isinstance(targets, str):
        return targets
    return dict(targets) if isinstance(targets, Mapping) else list(targets)
