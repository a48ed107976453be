"""A training run: data, selection or baseline, tuner, transformers.Trainer, adapter; and `select` alone."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from finepoint.adapters.adapter import ANY_BASE, SparseAdapter, base_beneath
from finepoint.adapters.fingerprint import FINGERPRINT, Fingerprint
from finepoint.adapters.format import write
from finepoint.adapters.peft import forget_others
from finepoint.baselines.dense import DenseTuner
from finepoint.baselines.registry import BaselineContext, baseline_named
from finepoint.data.batches import Packer, Row, learned
from finepoint.data.examples import read_examples, some
from finepoint.data.leaks import TRAINED_ON, leaks, warn_of_leaks
from finepoint.errors import FinepointError
from finepoint.models.loading import new_head
from finepoint.runtime import distributed, interruption
from finepoint.runtime.files import claim_folder, write_record
from finepoint.runtime.peak import peak_bytes, reset_peak
from finepoint.runtime.progress import progress
from finepoint.selection.passes import on_device
from finepoint.selection.rules import rule_named
from finepoint.selection.select import Selection, refuse_excluded
from finepoint.selection.settings import SelectConfig
from finepoint.training.arguments import CHECKPOINTING, shared_arguments
from finepoint.training.checkpoints import (
    CHECKPOINTS,
    RECORD,
    checkpoints,
    decisive,
    refuse_other_base,
    step_of,
    to_go_on_from,
)
from finepoint.training.context import (
    TrainingContext,
    batches_of,
    excluded,
    packer_for,
    prepare,
    rows_of,
    scoring_rows,
    select_for,
)
from finepoint.training.interrupted import LastStep, left_by, marked
from finepoint.training.keep import anchor_for, kept_rows
from finepoint.training.log import LOG
from finepoint.training.loss import completion_loss
from finepoint.training.refresh import Refresh, refreshable
from finepoint.training.resolve import RunSpec, check_processes, resolve, steps_of
from finepoint.training.settings import TrainConfig
from finepoint.training.tracking import tracked
from finepoint.training.trainer import SparseTrainer, Watch, refreshes, validation_losses
from finepoint.tuner.finite import NotFiniteError, TrainingFailedError
from finepoint.tuner.interface import Method
from finepoint.tuner.optimizers import PerEntryAdamW
from finepoint.tuner.tuner import SparseTuner
from finepoint.version import __version__

logger = logging.getLogger(__name__)
BEST = ".best.safetensors"  # while a run is under way
AUDITED = 2  # examples that the gradients are tried on
EVALUATIONS = 5  # over a run with validation examples and no --eval-every


@dataclass(frozen=True)
class Run:
    """A run under way: what its adapter is made of and where it goes."""

    spec: RunSpec[TrainConfig]
    place: TrainingContext
    folder: Path
    method: Method
    head: list[str]
    """weights of a new classification head, which are stored whole"""
    facts: dict[str, Any]
    """what the adapter says of itself"""
    base: Fingerprint
    """of the model before training"""
    steps: int
    keeps: bool
    """whether it leaves something when it is interrupted"""
    kept: list[Row] = field(default_factory=list)
    """what is not trained on and decides the bits all the same"""

    @property
    def config(self) -> TrainConfig:
        return self.spec.config

    def save(self, step: int | None = None, *places: Path) -> tuple[SparseAdapter, int]:
        """Writes the change as it stands into the run's folder; returns it as an adapter, and the tensors' bytes.

        All processes put it together, the first one writes it.

        Args:
            step: after which the run stands, if it is not at its end: the adapter then says that it is unfinished.
            places: further folders to write it into.
        """
        facts = self.facts if step is None else self.facts | marked(step, self.steps)
        adapter = self.method.tuner.adapter(self.config.store, self.head, facts)
        if FINGERPRINT not in adapter.base:  # a baseline's: weights that are whole lie on nothing, factors on all
            whole = adapter if isinstance(self.method.tuner, DenseTuner) else ()
            base = self.base.without(list(whole), adapter.base.get("tied", ()))
            adapter = replace(adapter, base=adapter.base | {FINGERPRINT: base.as_json()})
        return adapter, distributed.on_first(
            lambda: [self._write(adapter, place) for place in (*places, self.folder)][-1]
        )

    def _write(self, adapter: SparseAdapter, place: Path) -> int:
        written = self.method.tuner.save(place, adapter, self.config.compact)
        forget_others(place, written)
        if self.keeps and self.place.seen and place == self.folder:  # for `finepoint eval`
            self.place.seen.save(place)
        return sum(file.stat().st_size for file in written)


def train(config: TrainConfig, context: TrainingContext | None = None) -> dict[str, Any]:
    """Runs the whole of `finepoint train`; the adapter, the log and the record of the run are in `config.output`.

    Args:
        context: a loaded model and data to train on instead of loading them; its model is left at the base.

    Returns:
        The record: `trained`, `changed`, `vanished` (moved, and lost to rounding),
        `adapter_bytes`, `seconds`, `selection_seconds`, `peak_bytes`, `loss`, ..

    Raises:
        FinepointError: whatever the user can mend: bad input, nothing trained, a loss that is not finite (then the
            adapter of the last good step has been saved).
        BrokenOff: it was interrupted; the adapter of the last good step and a checkpoint have been saved.
    """
    return _claimed(config, context, keeps=True)[0]


def fit(config: TrainConfig, context: TrainingContext | None = None) -> tuple[dict[str, Any], SparseAdapter]:
    """`train`, which also returns the trained change: of every method in one form, so that all are measured alike.

    Several processes call it together; the first one writes, and all return the same.

    Returns:
        The record, and the change: that of the chosen entries, or of a baseline's whole weights (LoRA's merged).

    Raises:
        FinepointError: as for `train`.
    """
    return _claimed(config, context, keeps=False)


def _claimed(config: TrainConfig, context: TrainingContext | None, keeps: bool) -> tuple[dict[str, Any], SparseAdapter]:
    spec = resolve(config)
    distributed.join()
    check_processes(config)
    # Whoever runs many decides himself what becomes of the one in hand.
    with interruption.noticed() if keeps else nullcontext(), ExitStack() as claims:
        claim = claim_folder(config.output, config.overwrite or config.resume)
        return _fit(spec, distributed.on_first(lambda: claims.enter_context(claim)), context, keeps)


def _fit(
    spec: RunSpec[TrainConfig], folder: Path, context: TrainingContext | None, keeps: bool
) -> tuple[dict[str, Any], SparseAdapter]:
    config = spec.config
    saved = distributed.on_first(partial(checkpoints, folder / CHECKPOINTS)) if config.resume else []
    place = context or prepare(config)
    validation = rows_of(config, place, config.validation, "validation example", config.validation_limit)
    leaked = _leaks(config, place, keeps)
    packer = packer_for(place) if config.packing else None
    reset_peak()
    started = time.perf_counter()
    head = new_head(place.model) if place.labels else []
    base = base_beneath(place.model).without(head)  # of a sequence the earlier tasks' adapters are applied
    if saved:
        distributed.on_first(partial(refuse_other_base, saved[0], base))
    kept = kept_rows(config, place)
    method, statistics = _method(spec, place, head, folder if saved else None, base, kept)
    selection_seconds = time.perf_counter() - started
    tuner = method.tuner
    what = f"numbers to train, {config.baseline} prepared" if config.baseline else "entries chosen"
    logger.info("%d %s in %.1f s", tuner.count, what, selection_seconds)
    try:
        steps = steps_of(config, sum(learned(row) > 0 for row in place.rows))
        facts = _description(config, place, statistics, spec.lr)
        run = Run(spec, place, folder, method, head, facts, base, steps, keeps, kept)
        if not saved:
            distributed.on_first(partial(forget_earlier_run, folder))
            if config.save_every and not config.baseline:
                run.save(0)  # its indices are what a resumed run trains
        results = _run_trainer(run, validation, packer, saved)
        peak = peak_bytes()  # of training: what follows makes copies
        changed, norm = tuner.changed(), tuner.norm(exclude=head)
        own = tuner.facts()
        if not changed:
            raise TrainingFailedError(
                f"training changed none of the {tuner.count} chosen weights: every update was lost to rounding in "
                f"{place.model.dtype}; give a larger --lr than {spec.lr}"
            )
        adapter, size = run.save()
    finally:
        tuner.revert_()
        tuner.close()
    record = {
        "baseline": config.baseline,
        "trained": tuner.count,
        "changed": changed,
        "adapter_bytes": size,
        "seconds": round(time.perf_counter() - started, 2),
        "selection_seconds": round(selection_seconds, 2),
        "peak_bytes": peak,
        "lr": spec.lr,
        "update_norm": norm,
        **results,
        **({"settled": adapter.count - tuner.count} if config.refresh else {}),
        **own,
        "leaks": leaked,
        "selection": statistics,
        "config": asdict(config),
        "versions": versions(),
    }
    distributed.on_first(partial(write_record, folder / RECORD, record))
    # Not before a killed run has no more use for it.
    distributed.on_first(partial((folder / BEST).unlink, missing_ok=True))
    return record, adapter


def _leaks(config: TrainConfig, place: TrainingContext, alone: bool) -> dict[str, dict[str, int]]:
    """How many training examples are among the validation examples, where there are any.

    Args:
        alone: the run is none of a study, which says it once for all.
    """
    if not place.seen:
        return {}
    validation = some(read_examples(config.validation), config.validation_limit) if config.validation else []
    found = leaks(place.seen, {"validation": validation})
    if alone and distributed.is_first():
        warn_of_leaks(found)
    return found


def choose(config: SelectConfig) -> Selection:
    """Runs the whole of `finepoint select`: the output is an adapter whose deltas are zero.

    Raises:
        FinepointError: whatever the user can mend.
    """
    distributed.join()
    with ExitStack() as claims:
        folder = distributed.on_first(lambda: claims.enter_context(claim_folder(config.output, config.overwrite)))
        place = prepare(config)
        selection = select_for(config, place)
        with SparseTuner(place.model, selection, audit=False) as tuner:
            head = new_head(place.model) if place.labels else []
            adapter = tuner.adapter(full=head, info=_description(config, place, selection.statistics))
        distributed.on_first(partial(_write_selection, folder, adapter, config, selection))
    return selection


def _write_selection(folder: Path, adapter: SparseAdapter, config: SelectConfig, selection: Selection) -> None:
    write(adapter, folder)
    write_record(folder / "selection.json", {"statistics": selection.statistics, "config": asdict(config)})


def versions() -> dict[str, str]:
    """What a result was made with."""
    packages = ("torch", "transformers", "accelerate", "safetensors", "numpy")
    return {"finepoint": __version__} | {package: version(package) for package in packages}


def _method(
    spec: RunSpec[TrainConfig],
    place: TrainingContext,
    head: list[str],
    resumed: Path | None,
    base: Fingerprint,
    kept: list[Row],
) -> tuple[Method, dict[str, Any]]:
    """The tuner the configuration asks for, and what is known of the selection (where nothing is chosen, nothing)."""
    config, baseline = spec.config, spec.baseline
    if baseline is None:
        # In one order whatever is chosen first, so that a resumed run meets its optimizer's state.
        ready = refreshable(place.model, config.targets) if config.refresh else {}
        indices, statistics = _indices(config, place, resumed)
        indices = dict(indices) | {name: torch.arange(place.model.get_parameter(name).numel()) for name in head}
        tuner = SparseTuner(place.model, indices, ready, audit=False, base=base)
        if not config.no_audit:
            _audit_(config, place, tuner)
        penalty = anchor_for(config, place, tuner, kept).add_ if kept else None
        method = Method(tuner, penalty, after_step=_rounding(config, tuner))
        if config.refresh:
            optimizer = PerEntryAdamW(tuner.parameters(), spec.lr, weight_decay=config.weight_decay)
            method = replace(method, optimizer=optimizer, refresh=Refresh(config, place, tuner, head))
        return method, statistics
    indices, statistics = _indices(config, place, None) if baseline.chooses else ({}, {})
    rows = rows_of(config, place, config.fisher_data, "Fisher example")
    fisher = batches_of(config, place, scoring_rows(rows, config.scoring_examples, config.seed)) if rows else []
    given = BaselineContext(
        place.model, head, spec.options, config.targets, config.seed, spec.lr, config.weight_decay, fisher,
        config.scoring_memory, indices, audit=not config.no_audit,
    )  # fmt: skip
    method = baseline.make(given)
    return replace(method, after_step=_rounding(config, method.tuner)), statistics


def _audit_(config: TrainConfig, place: TrainingContext, tuner: SparseTuner) -> None:
    """Tries the gradients of the chosen entries on the longest example and others, by the loss of training."""
    if config.gradient_checkpointing:  # as the Trainer will
        getattr(place.model, f"{CHECKPOINTING}_enable")()
    rows = [row for row in place.rows if learned(row)]
    longest = max(range(len(rows)), key=lambda at: len(rows[at].ids))
    rows = [rows[longest], *rows[:longest], *rows[longest + 1 :]][:AUDITED]
    batch = on_device(place.collator.batches(rows, len(rows))[0], next(place.model.parameters()).device)
    tuner.audit_(lambda: completion_loss(place.model, batch))
    tuner.audit_later()


def _rounding(config: TrainConfig, tuner: Any) -> Callable[[], None] | None:
    """What `--round-to` does after each step of a tuner that trains in place."""
    return partial(tuner.round_, getattr(torch, config.round_to)) if config.round_to else None


def _indices(
    config: TrainConfig, place: TrainingContext, resumed: Path | None
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    given = Path(config.indices) if config.indices else None
    # With --refresh a checkpoint knows its entries itself; what is given tells how many they are.
    source = given or resumed if config.refresh else resumed or given
    if source is None:
        selection = select_for(config, place)
        return selection, selection.statistics
    adapter = SparseAdapter.read(source) if source == resumed else SparseAdapter.load(source)
    if problems := adapter.problems(place.model):
        reason = problems[0].removesuffix(f"; {ANY_BASE}")  # which is of no use to training
        raise FinepointError(f"the indices in {source} do not fit this model: {reason}")
    if source == given:
        refuse_excluded(adapter, [excluded(folder, place.model) for folder in config.exclude], place.model)
    return {name: adapter[name] for name in adapter}, adapter.info.get("selection", {})


def _run_trainer(run: Run, validation: list[Row] | None, packer: Packer | None, saved: list[str]) -> dict[str, Any]:
    """Trains, followed by trackers; returns the steps, their losses and the seconds they took."""
    config, folder = run.config, run.folder
    rows = [row for row in run.place.rows if learned(row)]
    settings = decisive(config, rows + run.kept, run.base)
    checkpoint = distributed.on_first(partial(to_go_on_from, folder, saved, run.steps, settings)) if saved else None
    with tracked(config, folder, step_of(checkpoint) if checkpoint else None) as (tracking, followers):
        arguments = _arguments(run.spec, folder, run.steps, tracking, alone=run.place.collator.side == "none")
        return _steps(run, arguments, followers, rows, validation, packer, checkpoint, settings)


def _steps(
    run: Run,
    arguments: TrainingArguments,
    followers: list[Any],
    rows: list[Row],
    validation: list[Row] | None,
    packer: Packer | None,
    checkpoint: str | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    config, place, folder = run.config, run.place, run.folder
    set_seed(config.seed)
    trainer = SparseTrainer(
        run.method,
        packer,
        settings,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=place.collator,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.keep_adapter = lambda checkpoint, step: run.save(step, checkpoint)
    for follower in followers:
        trainer.add_callback(follower)
    best = folder / BEST if config.keep == "best" else None
    with progress("training", arguments.max_steps) as advance:
        watch = Watch(trainer, folder / LOG, advance, best, config.patience)
        last = LastStep(trainer)
        for callback in (watch, last):
            trainer.add_callback(callback)
        try:
            with interruption.as_itself():
                output = trainer.train(resume_from_checkpoint=checkpoint)
                if validation and trainer.state.global_step not in dict(validation_losses(trainer.state)):
                    trainer.evaluate()
        except NotFiniteError as error:
            interruption.let_go()
            saved = ""
            if trainer.state.global_step:
                run.save(trainer.state.global_step)
                saved = f"; the adapter of step {trainer.state.global_step} is in {folder}"
            raise TrainingFailedError(f"{error}{saved}; try a smaller --lr than {run.spec.lr}") from error
        except KeyboardInterrupt as error:
            kept = run.keeps and left_by(last, lambda: run.save(last.done), folder)
            raise kept or error from None
        finally:
            interruption.let_go(feel=False)
    if best:
        if not best.is_file():
            raise FinepointError("the best evaluation lies before the checkpoint, and that run did not keep it; "
                                 "train afresh, or go on with --keep last")  # fmt: skip
        trainer.restore_(best)
    place.model.eval()
    logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    losses = validation_losses(trainer.state)
    best_step, lowest = min(losses, key=lambda found: found[1], default=(None, None))
    return {
        "steps": output.global_step,
        "first_loss": float(logged[0]) if logged else None,
        "loss": output.training_loss,
        "last_loss": float(logged[-1]) if logged else None,
        "validation_loss": lowest if best else losses[-1][1] if losses else None,
        "last_validation_loss": losses[-1][1] if losses else None,
        "best_step": best_step,
        "stopped_early": output.global_step < trainer.args.max_steps,
        "train_seconds": round(output.metrics["train_runtime"], 2),
        "step_seconds": round(trainer.tokens.seconds / watch.steps, 4),
        **trainer.tokens.of_all().rates(),
        "processes": distributed.count(),
        **({"refreshes": refreshes(trainer.state)} if run.method.refresh else {}),
    }


def forget_earlier_run(folder: Path) -> None:
    """Takes away what would be taken for this run's: its adapter comes in the place of the earlier one."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for name in (LOG, RECORD, BEST, TRAINED_ON):
        (folder / name).unlink(missing_ok=True)


def _arguments(
    spec: RunSpec[TrainConfig], folder: Path, steps: int, tracking: Mapping[str, Any], alone: bool
) -> TrainingArguments:
    """What the Trainer is told; `alone`: examples cannot share a batch, so that a step is made of batches of one."""
    config = spec.config
    alike = shared_arguments(spec, folder, steps)
    if alone:
        alike["gradient_accumulation_steps"] *= config.batch_size
        alike["per_device_train_batch_size"] = 1
    return TrainingArguments(
        **alike,
        per_device_eval_batch_size=alike["per_device_train_batch_size"],
        eval_strategy="steps" if config.validation else "no",
        eval_steps=config.eval_every or max(1, steps // EVALUATIONS),
        **tracking,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )


def _description(
    config: SelectConfig, place: TrainingContext, statistics: Mapping[str, Any], lr: float | None = None
) -> dict[str, Any]:
    """What an adapter says of itself."""
    facts: dict[str, Any] = {
        "base_model": config.model,
        "task": "classification" if place.labels else "causal",
        "labels": place.labels,
    }
    if isinstance(config, TrainConfig) and config.baseline:
        facts |= {"baseline": config.baseline, "baseline_options": config.baseline_options}
    if not facts.get("baseline") or baseline_named(facts["baseline"]).chooses:
        facts |= {"quantise": config.quantise} if config.quantise else {}
        facts |= {"rule": rule_named(config.rule).name, "density": statistics.get("density"), "scope": config.scope}
    facts |= {
        "targets": config.targets,
        "seed": config.seed,
        "data": config.data,
        "finepoint_version": __version__,
        "selection": {key: value for key, value in statistics.items() if key != "weights"},
    }
    if isinstance(config, TrainConfig):
        facts |= {"lr": lr, "steps": config.steps, "batch_size": config.batch_size}
        facts |= {"protect": config.protect, "protect_strength": config.protect_strength} if config.protect else {}
        facts |= {"refresh": config.refresh, "dropped": config.dropped} if config.refresh else {}
    return facts
