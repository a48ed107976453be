"""A run: what is trained, the loop it is trained in, what it leaves; and `train` itself. `align` has its own room."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from finepoint.adapters.adapter import SparseAdapter, base_beneath
from finepoint.adapters.fingerprint import FINGERPRINT, Fingerprint
from finepoint.adapters.peft import forget_others
from finepoint.baselines.registry import BaselineContext
from finepoint.data.batches import Packer, Row
from finepoint.data.chats import clock, tells_time
from finepoint.data.examples import read_examples, some
from finepoint.data.leaks import TRAINED_ON, leaks, warn_of_leaks
from finepoint.data.store import learnable, lengths
from finepoint.errors import FinepointError
from finepoint.models.loading import gguf_file, new_head
from finepoint.runtime import distributed, interruption
from finepoint.runtime.devices import peak_bytes, reset_peak
from finepoint.runtime.files import claim_folder, refuse_inputs_among, refuse_model_folder, write_record
from finepoint.runtime.interruption import BrokenOff
from finepoint.runtime.progress import progress
from finepoint.selection.large_inputs import warn_of_large_inputs
from finepoint.selection.passes import Batch, on_device
from finepoint.selection.rates import slow
from finepoint.selection.rules import rule_named
from finepoint.selection.select import Selection
from finepoint.training.budget import Holding
from finepoint.training.callbacks import UNFINISHED, LastStep, Watch, left_by, marked, refreshes, validation_losses
from finepoint.training.checkpoints import (
    RECORD,
    TIME,
    checkpoints,
    decisive,
    evaluated,
    refuse_other_base,
    step_of,
    take_kernels_,
    to_go_on_from,
    told_time,
)
from finepoint.training.context import (
    TrainingContext,
    batches_of,
    described,
    entries_for,
    kept_rows,
    packer_for,
    prepare,
    rows_of,
    rows_read,
    scoring_rows,
)
from finepoint.training.context import choose as choose  # its former place
from finepoint.training.earlier import EARLIER, Earlier
from finepoint.training.keep import Protected, step_sizes, texts_a_step
from finepoint.training.logfile import LOG, UNDER_WAY
from finepoint.training.loss import completion_loss, loss_named, refuse_unweighable
from finepoint.training.refresh import Refresh, refreshable
from finepoint.training.resolve import (
    CHECKPOINTS,
    RunSpec,
    Told,
    check_processes,
    has_checkpoint,
    resolve,
    spec_for,
    steps_of,
)
from finepoint.training.settings import TrainConfig, Training
from finepoint.training.texts import Writer, apart, texts_read
from finepoint.training.tracking import tracked
from finepoint.training.trainer import CHECKPOINTING, SparseCheckpoints, SparseTrainer, kept_at, shared_arguments
from finepoint.tuner.finite import NotFiniteError, TrainingFailedError
from finepoint.tuner.interface import Method
from finepoint.tuner.kernels import choice
from finepoint.tuner.on_grid import snap_to_base_
from finepoint.tuner.optimizers import MovingAverage, PerEntryAdamW
from finepoint.tuner.tuner import SparseTuner
from finepoint.version import __version__

logger = logging.getLogger(__name__)
ANSWERS = "answers.json"
"""a few validation examples with what was answered before training and after, where they were asked"""
OWN_TEXTS = "own-texts"
"""what the base has written to be held by, where it was told to"""
BEST = ".best.safetensors"  # while a run without checkpoints is under way
NOT_KEPT = ("--keep best may need an evaluation before the checkpoint, and what was trained then is not there; train "
            "afresh, or go on with --keep last")  # fmt: skip
FOLDERS = (CHECKPOINTS, OWN_TEXTS)
FILES = (LOG, UNDER_WAY, RECORD, BEST, TRAINED_ON, ANSWERS)
"""of an earlier run, which a new one in its folder takes away"""
LOOKED_AT = 8  # examples whose inputs are looked at
AUDITED = 2  # examples that the gradients are tried on
Make = Callable[[TrainingContext, list[str], Fingerprint, Path | None], tuple[Method, dict[str, Any]]]
Afterwards = Callable[[TrainConfig, TrainingContext, SparseAdapter, Path], None]
EVALUATIONS = 5  # over a run with validation examples and no --eval-every


class Record(dict[str, Any]):
    """What a run was told and has found, as `run.json` has it; printed in a line."""

    def __repr__(self) -> str:
        what = "numbers" if self["baseline"] else "entries"
        return (f"Record({self['trained']:,} {what} in {self['steps']} steps of {self['config']['output']}: "
                f"loss {self['first_loss']:.3f} -> {self['last_loss']:.3f}, {self['seconds']:.0f} s)")  # fmt: skip


@dataclass(frozen=True)
class Run(Generic[Told]):
    """A run under way: what its adapter is made of and where it goes."""

    spec: RunSpec[Told]
    context: TrainingContext
    folder: Path
    method: Method
    head: list[str]
    """weights of a new classification head, which are trained and stored whole"""
    base: Fingerprint
    """of the model before training"""
    steps: int
    facts: dict[str, Any]
    """what the adapter says of itself"""
    chosen: dict[str, Any]
    """how its entries were chosen"""
    settings: dict[str, Any]
    """what decides its bits"""
    checkpoint: str | None
    """the one that it goes on from"""
    keeps: bool
    """whether it leaves something when it is interrupted"""
    began: float
    prepared: float
    """seconds until its method was made"""
    holding: float = 0.0
    """of these, seconds to make what holds it to its base"""

    def done(self) -> int | None:
        """The step that it goes on from, if it is resumed."""
        return step_of(self.checkpoint) if self.checkpoint else None

    def save(self, step: int | None = None, *places: Path) -> tuple[SparseAdapter, int]:
        """Writes the change as it stands into the run's folder; returns it as an adapter, and the tensors' bytes.

        All processes put it together, the first one writes it.

        Args:
            step: after which the run stands, if it is not at its end: the adapter then says that it is unfinished.
            places: further folders to write it into.
        """
        tuner = self.method.tuner
        facts = self.facts if step is None else self.facts | marked(step, self.steps)
        with self.method.as_it_is_left():
            adapter = tuner.adapter(self.spec.config.store, self.head, facts)
            if FINGERPRINT not in adapter.base:  # a baseline's
                base = self.base.without(tuner.whole, adapter.base.get("tied", ()))
                adapter = replace(adapter, base=adapter.base | {FINGERPRINT: base.as_json()})
            return adapter, distributed.on_first(
                lambda: [self._write(adapter, place) for place in (*places, self.folder)][-1]
            )

    def _write(self, adapter: SparseAdapter, place: Path) -> int:
        written = self.method.tuner.save(place, adapter, self.spec.config.compact)
        forget_others(place, written)
        if self.keeps and self.context.seen and place == self.folder:  # for `finepoint eval`
            self.context.seen.save(place)
        return sum(file.stat().st_size for file in written)

    def outcome(self, why: str = "") -> dict[str, Any]:
        """What the training has come to, for the record.

        Raises:
            TrainingFailedError: nothing has changed, for lack of precision, or `why` else.
        """
        tuner = self.method.tuner
        peak = peak_bytes()  # of training: what follows makes copies
        with self.method.as_it_is_left():
            changed, norm, facts = tuner.changed(), tuner.norm(exclude=self.head), tuner.facts()
        if not changed and getattr(self.spec.config, "keep", None) == "best":
            raise TrainingFailedError(f"no evaluation had a lower validation loss than one before anything had changed "
                                      f"(best of --keep best); give a smaller --lr than {self.spec.lr}, or --keep "
                                      "last")  # fmt: skip
        if not changed:
            raise TrainingFailedError(f"training changed none of the {tuner.count} chosen weights: every update was "
                                      f"lost to rounding in {self.context.model.dtype}{why}; give a larger --lr than "
                                      f"{self.spec.lr}")  # fmt: skip
        return {"trained": tuner.count, "peak_bytes": peak, "changed": changed, "update_norm": norm, **facts}

    def write_record(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Writes, last of all, what the run was told and has found."""
        record = Record({
            "baseline": self.spec.config.baseline,
            "seconds": round(time.perf_counter() - self.began, 2),
            "selection_seconds": round(self.prepared, 2),
            "lr": self.spec.lr,
            "selection": self.chosen.get("selection", {}),
            **self._protection(),
            **found,
            **({"sources": list(self.context.sources)} if self.context.sources else {}),
            **({"kernels": kernels} if (kernels := choice.told()) else {}),
            "config": asdict(self.spec.config),
            "versions": versions(),
        })  # fmt: skip
        distributed.on_first(partial((self.folder / UNDER_WAY).unlink, missing_ok=True))
        distributed.on_first(partial(write_record, self.folder / RECORD, record))
        return record

    def _protection(self) -> dict[str, Any]:
        """What holding it to its base has cost before the steps, for the record; nothing where it is not held."""
        method, tuner = self.method, self.method.tuner
        own = {"own": dict(self.context.own)} if self.context.own else {}
        if not (self.spec.protection and method.penalty):
            return {"protection": own} if own else {}
        tensors = [*method.penalty.holds(), *method.steps.values()]
        held, seconds = sum(tensor.nbytes for tensor in tensors), time.perf_counter() - self.began
        return {"protection": {"seconds": round(self.holding, 2), "share": round(self.holding / seconds, 4),
                               "bytes": held, "bytes_an_entry": round(held / tuner.count, 2), **own}}  # fmt: skip


def train(
    config: TrainConfig, context: TrainingContext | None = None, afterwards: Afterwards | None = None
) -> dict[str, Any]:
    """Runs the whole of `finepoint train`; the adapter, the log and the record of the run are in `config.output`.

    Args:
        context: a loaded model and data to train on instead of loading them; its model is left at the base.
        afterwards: called with what was trained once it is saved and the model is the base again; in one process.

    Returns:
        The record: `trained`, `changed`, `vanished` (moved, and lost to rounding),
        `adapter_bytes`, `seconds`, `selection_seconds`, `peak_bytes`, `loss`, ..

    Raises:
        FinepointError: whatever the user can mend: bad input, nothing trained, a loss that is not finite (then the
            adapter of the last good step has been saved).
        BrokenOff: it was interrupted; the adapter of the last good step and a checkpoint have been saved.
    """
    return _fit(config, context, keeps=True, afterwards=afterwards)[0]


def fit(
    config: TrainConfig,
    context: TrainingContext | None = None,
    earlier: Earlier | None = None,
    start: Path | None = None,
) -> tuple[dict[str, Any], SparseAdapter]:
    """`train`, which also returns the trained change: of every method in one form, so that all are measured alike.

    Several processes call it together; the first one writes, and all return the same.

    Args:
        earlier: tasks whose adapters are applied to the context's model, and that are held to.
        start: the folder of an adapter of the same method, to go on from.

    Returns:
        The record, and the change: that of the chosen entries, or of a baseline's whole weights (LoRA's merged).

    Raises:
        FinepointError: as for `train`.
    """
    return _fit(config, context, keeps=False, earlier=earlier, start=start)


def _fit(
    config: TrainConfig,
    context: TrainingContext | None,
    keeps: bool,
    earlier: Earlier | None = None,
    start: Path | None = None,
    afterwards: Afterwards | None = None,
) -> tuple[dict[str, Any], SparseAdapter]:
    spec = resolve(config)
    with claimed(config, keeps) as folder:
        saved = saved_by(config, folder)
        context = context or prepare(config, rows_read(config))
        spec = spec_for(spec, context.model)
        validation = rows_of(config, context, config.validation, "validation example", config.validation_limit)
        leaked = _leaks(config, context, keeps)
        packer = packer_for(context) if config.packing else None
        rows = learnable(context.rows)
        steps = steps_of(config, len(rows))
        make, facts = partial(_method, spec, steps), _unusual(config)
        if keeps and not spec.baseline and (told := slow(spec.lr, spec.usual_lr, f"those {spec.usual_of}")):
            logger.warning(told)
        if keeps and config.lr is None:
            logger.info("the learning rate is %g, the usual one %s; --lr takes another", spec.lr, spec.usual_of)
        with begun(spec, context, folder, saved, make, rows, steps, keeps, earlier, **facts) as run:
            if start:
                run.method.tuner.start_from_(start)
            results = _train_by_loss(run, rows, validation, packer)
            results |= run.outcome()
            adapter, size = run.save()
        settled = {"settled": adapter.count - results["trained"]} if config.refresh else {}
        if afterwards and distributed.count() == 1:
            afterwards(config, context, adapter, folder)
        # The record says that all is done, and comes last: a killed run without it is gone on with.
        record = run.write_record({"adapter_bytes": size, **results, **settled, "leaks": leaked})
        distributed.on_first(partial((folder / BEST).unlink, missing_ok=True))
        return record, adapter


def _unusual(config: TrainConfig) -> dict[str, Any]:
    """What an adapter says of a training by a loss that was out of the ordinary."""
    facts: dict[str, Any] = {"loss": config.loss} if config.loss != "nll" else {}
    facts |= {"ema": config.ema} if config.ema is not None else {}
    facts |= {"on_grid": True} if config.on_grid else {}
    return facts | ({"refresh": config.refresh, "dropped": config.dropped} if config.refresh else {})


@contextmanager
def claimed(config: Training, keeps: bool = True) -> Iterator[Path]:
    """The folder of a run, which nobody else writes to meanwhile; all processes have joined.

    Args:
        keeps: ctrl-C is remembered. Whoever runs many decides himself what becomes of the one in hand.
    """
    distributed.join()
    check_processes(config)
    refuse_model_folder(config)
    refuse_inputs_among(config, [*FOLDERS, *FILES])
    with interruption.noticed() if keeps else nullcontext(), ExitStack() as claims:
        claim = claim_folder(config.output, config.overwrite or config.resume)
        yield distributed.on_first(lambda: claims.enter_context(claim))


def saved_by(config: Training, folder: Path) -> list[str]:
    """The whole checkpoints of the run to go on with, latest first. Chat templates are told the time it was told."""
    found = distributed.on_first(partial(checkpoints, folder / CHECKPOINTS)) if config.resume else []
    clock.at = distributed.on_first(partial(told_time, found[0])) if found else clock.at
    return found


@contextmanager
def begun(
    spec: RunSpec[Told], context: TrainingContext, folder: Path, saved: Sequence[str],
    make: Make, rows: Sequence[Any], steps: int, keeps: bool = True, earlier: Earlier | None = None, **facts: Any,
) -> Iterator[Run[Told]]:  # fmt: skip
    """A run that is ready to train; afterwards the model is the base again, bit for bit.

    Args:
        saved: the checkpoints of the run that is resumed, if one is.
        make: gives the method, and how its entries were chosen, from the context with what is to be kept, the weights
            of a new head, the base's fingerprint, and the folder of the run that is resumed, if one is.
        rows: what decides the bits besides the settings and the text that is to be kept.
        earlier: tasks that are held to besides.
        facts: what else the adapter says of itself.
    """
    config = spec.config
    reset_peak()
    began = time.perf_counter()
    head = new_head(context.model) if context.labels else []
    base = base_beneath(context.model).without(head)  # of a sequence the earlier tasks' adapters are applied
    if saved:
        distributed.on_first(partial(refuse_other_base, saved[0], base))
    writer = Writer(context.model, context.tokenizer, held=folder / OWN_TEXTS if saved else None)
    context = replace(context, kept=kept_rows(config, context, writer), own=writer.told)
    settings = decisive(config, rows, base, context.kept) | ({EARLIER: earlier.facts()} if earlier else {})
    settings |= {TIME: clock.now().isoformat()} if tells_time(context.tokenizer) else {}
    checkpoint = None
    if saved:
        patience = getattr(config, "patience", None)
        checkpoint = distributed.on_first(partial(to_go_on_from, folder, saved, steps, settings, patience))
        take_kernels_(checkpoint)
    method, chosen = make(context, head, base, folder if saved else None)
    choice.take_(distributed.on_first(choice.told))  # all processes as the first one
    try:
        started = time.perf_counter()
        if spec.protection:
            method = held(spec, context, method, head)
        holding = time.perf_counter() - started
        if earlier:
            method = replace(method, anchors=earlier.anchors(method, context.collator, folder))
            facts |= {EARLIER: earlier.facts()}
        prepared = time.perf_counter() - began
        what = f"numbers to train, {config.baseline} prepared" if config.baseline else "entries chosen"
        logger.info("%d %s in %.1f s", method.tuner.count, what, prepared)
        facts |= described(config, context, chosen) | _particulars(spec)
        run = Run(spec, context, folder, method, head, base, steps, facts, chosen, settings, checkpoint, keeps, began,
                  prepared, holding)  # fmt: skip
        if not saved:
            distributed.on_first(partial(forget_earlier_run, folder))
            if keeps:
                distributed.on_first(partial(writer.keep, folder / OWN_TEXTS))
            if config.save_every and not config.baseline:
                run.save(0)  # its indices are what a resumed run trains
        yield run
    finally:
        method.tuner.revert_()
        method.tuner.close()


def _particulars(spec: RunSpec[Any]) -> dict[str, Any]:
    """What an adapter says of how it was trained."""
    config = spec.config
    facts = {"lr": spec.lr, "steps": config.steps, "batch_size": config.batch_size}
    if spec.baseline:
        facts |= {"baseline": config.baseline, "baseline_options": config.baseline_options}
    if spec.protection:
        facts |= {"protect": config.protect, "protect_by": spec.protection.name, "protect_strength": spec.strength}
        facts |= {"protect_steps": True} if config.protect_steps else {}
    return facts


def carry_out_(
    run: Run[Any], trainer: SparseCheckpoints, doing: str, best: Path | None = None, patience: int | None = None,
    summed_up: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Runs a trainer's steps; what is trained so far is saved if the run is interrupted or a NaN appears.

    Args:
        best, patience, summed_up: as for `Watch`.

    Returns:
        The steps, their losses and the seconds they took, for the record.
    """
    trainer.keep_adapter = lambda checkpoint, step: run.save(step, checkpoint)
    trainer.remove_callback(PrinterCallback)
    with progress(doing, run.steps, stays=True) as bar:
        watch, last = Watch(trainer, run.folder / LOG, bar, best, patience, summed_up), LastStep(trainer)
        trainer.add_callback(watch)
        trainer.add_callback(last)  # after what logs
        try:
            with interruption.as_itself():
                output = trainer.train(resume_from_checkpoint=run.checkpoint)
        except NotFiniteError as error:
            interruption.let_go()
            done, left = trainer.state.global_step, ""
            if done:
                run.save(done)
                left = f"; the adapter of step {done} is in {run.folder}"
            held = " and a weaker hold" if run.method.penalty or run.method.anchors else ""
            raise TrainingFailedError(f"{error}{left}; try a smaller --lr than {run.spec.lr}{held}") from error
        except KeyboardInterrupt as error:
            raise (run.keeps and left_by(last, lambda: run.save(last.done), run.folder)) or error from None
        finally:
            interruption.let_go(feel=False)
    return _told(trainer, output, watch)


def _told(trainer: SparseCheckpoints, output: Any, watch: Watch) -> dict[str, Any]:
    """What the record says of a training."""
    losses = [float(record["loss"]) for record in trainer.state.log_history if "loss" in record]
    return {
        "steps": output.global_step,
        "first_loss": losses[0] if losses else None,
        "loss": sum(losses) / len(losses) if losses else output.training_loss,  # of the run, resumed or not
        "last_loss": losses[-1] if losses else None,
        "stopped_early": output.global_step < trainer.args.max_steps,
        "train_seconds": round(output.metrics["train_runtime"], 2),
        "step_seconds": round(trainer.tokens.seconds / watch.steps, 4),
        **trainer.tokens.of_all().rates(),
        "processes": distributed.count(),
    }


def _train_by_loss(
    run: Run[TrainConfig], rows: Sequence[Row], validation: list[Row] | None, packer: Packer | None
) -> dict[str, Any]:
    """Trains on examples, followed by trackers; returns what the record says of it."""
    config, context, folder = run.spec.config, run.context, run.folder
    best = _best_file(config, folder) if config.keep == "best" else None
    if best and run.checkpoint and evaluated(run.checkpoint) and not best.is_file():
        raise FinepointError(NOT_KEPT)
    with tracked(config, folder, run.done()) as (tracking, followers):
        arguments = _arguments(run, tracking)
        set_seed(config.seed)
        trainer = SparseTrainer(
            run.method, packer, run.settings, args=arguments, train_dataset=rows, eval_dataset=validation,
            data_collator=context.collator, callbacks=followers, measure=loss_named(config.loss).measure,
        )  # fmt: skip
        results = carry_out_(run, trainer, "training", best, config.patience)
    context.model.eval()
    losses = validation_losses(trainer.state)
    step, lowest = min(losses, key=lambda found: found[1], default=(None, None))
    if best:
        if kept_at(best) not in (step, None):  # another course than the one that it is of
            raise FinepointError(NOT_KEPT)
        trainer.restore_(best)
    last = losses[-1][1] if losses else None
    results |= {"validation_loss": lowest if best else last, "last_validation_loss": last, "best_step": step}
    if run.method.holding:
        results["disturbed"] = found = _settled_(run)
        run.facts.update(disturbed=found["kl"], disturb_at_most=config.disturb_at_most)
        if found["scale"] < 1 and validation:
            results["validation_loss"] = trainer.evaluate()["eval_loss"]
    return results | ({"refreshes": refreshes(trainer.state)} if config.refresh else {})


def _best_file(config: TrainConfig, folder: Path) -> Path:
    """Where what was best so far is kept: beside the checkpoints, where there are some to go on from."""
    if not config.save_every:
        return folder / BEST
    beside, before = folder / CHECKPOINTS / "best.safetensors", folder / BEST

    def move() -> None:
        if before.is_file() and not beside.is_file():  # an earlier finepoint's, of a run that is gone on with
            before.replace(beside)

    distributed.on_first(move)
    return beside


def _settled_(run: Run[TrainConfig]) -> dict[str, Any]:
    """Holds what was trained to the budget of disturbance; until then the adapter there is unfinished."""
    assert run.method.holding
    run.facts[UNFINISHED] = f"step {run.steps} of {run.steps}, and not yet measured against --disturb-at-most"
    run.save()  # whatever comes of the measuring
    try:
        found = run.method.holding.settle_()
    except KeyboardInterrupt as error:
        left = f"after the last step, before its KL was measured; the adapter, marked as unfinished, is in {run.folder}"
        raise (BrokenOff(left, has_checkpoint(run.folder)) if run.keeps else error) from None
    del run.facts[UNFINISHED]
    return found


def _leaks(config: TrainConfig, context: TrainingContext, alone: bool) -> dict[str, dict[str, int]]:
    """How many training examples are among the validation examples, where there are any.

    Args:
        alone: the run is not part of a study (a study warns once for all its runs).
    """
    if not context.seen:
        return {}
    validation = (
        some(read_examples(config.validation, config.columns), config.validation_limit) if config.validation else []
    )
    found = leaks(context.seen, {"validation": validation})
    if alone and distributed.is_first():
        warn_of_leaks(found)
    return found


def versions() -> dict[str, str]:
    """What a result was made with."""
    packages = ("torch", "transformers", "accelerate", "safetensors", "numpy")
    return {"finepoint": __version__} | {package: version(package) for package in packages}


def _method(
    spec: RunSpec[TrainConfig], steps: int, context: TrainingContext,
    head: list[str], base: Fingerprint, resumed: Path | None,
) -> tuple[Method, dict[str, Any]]:  # fmt: skip
    """What trains, as the configuration says, and how its entries were chosen."""
    config = spec.config
    refuse_unweighable(context.model, config.loss, context.labels)
    if spec.baseline:
        rows = rows_of(config, context, config.fisher_data, "Fisher example")
        fisher = batches_of(config, context, scoring_rows(rows, config.scoring_examples, config.seed)) if rows else []
        method, chosen = baseline_method(spec, context, head, fisher)
    else:
        # In one order whatever is chosen first, so that a resumed run meets its optimizer's state.
        ready = refreshable(context.model, config.targets) if config.refresh else {}
        # With --refresh a checkpoint knows its entries itself; what is given tells how many they are.
        selected, chosen = entries_for(config, context, None if config.refresh and config.indices else resumed)
        indices = dict(selected) | {name: torch.arange(context.model.get_parameter(name).numel()) for name in head}
        tuner = SparseTuner(context.model, indices, ready, audit=False, base=base)
        if config.on_grid:
            snap_to_base_(tuner, gguf_file(config.model))
        audit_(config, context, tuner, partial(completion_loss, context.model))
        if isinstance(selected, Selection) and _is_a_draw_of_groups(config):
            rows = scoring_rows(context.rows, LOOKED_AT, config.seed)
            warn_of_large_inputs(context.model, selected, batches_of(config, context, rows))
        method = Method(tuner)
        if config.refresh:
            optimizer = PerEntryAdamW(tuner.parameters(), spec.lr, weight_decay=config.weight_decay)
            refresh = Refresh(config, context, tuner, head, steps).choose_
            method = replace(method, optimizer=optimizer, refresh=refresh)
    if config.ema is not None:
        method = replace(method, average=MovingAverage(method.tuner.trained, method.tuner.put_, config.ema))
    if config.round_to:
        method = replace(method, after_step=partial(method.tuner.round_, getattr(torch, config.round_to)))
    return method, chosen


def _is_a_draw_of_groups(config: TrainConfig) -> bool:
    """Whether a draw decides how much of the inputs is trained, and nothing holds what comes of it."""
    drawn = rule_named(config.rule).uniform and (config.structure != "entry" or config.within is not None)
    return drawn and config.protect is None


def held(spec: RunSpec[Any], context: TrainingContext, method: Method, head: list[str]) -> Method:
    """The method, held to its base as the run is told to; what is trained has not moved yet."""
    config, protection, most = spec.config, spec.protection, getattr(spec.config, "disturb_at_most", None)
    assert protection is not None
    kept, measured = apart(config, list(context.kept))
    given = Protected(context, method.tuner, head, kept, spec.strength, texts_a_step(config), config.seed,
                      texts_read(config.protect, config.protect_read), moving=method.refresh is not None,
                      reads=protection.reads)  # fmt: skip
    method = replace(method, penalty=(penalty := protection.make(given)))
    if config.protect_steps:
        method = replace(method, steps=step_sizes(given, penalty))
    if most is None:
        return method
    if any(map(distributed.is_sharded, context.model.parameters())):
        raise FinepointError("--disturb-at-most keeps what the base's head is given, and this one is sharded over the "
                             "processes; leave it out, or train without FSDP")  # fmt: skip
    return replace(method, holding=Holding(most, method, context.collator, measured, config.schedule != "constant"))


def baseline_method(
    spec: RunSpec[Any], context: TrainingContext, head: list[str], fisher: Sequence[Batch] = ()
) -> tuple[Method, dict[str, Any]]:
    """What a baseline trains, and how its entries were chosen, if it has any."""
    config, baseline = spec.config, spec.baseline
    assert baseline is not None
    indices, chosen = entries_for(config, context, None) if baseline.chooses else ({}, {})
    given = BaselineContext(
        context.model, head, spec.options, config.targets, config.seed, spec.lr, config.weight_decay, fisher,
        config.scoring_memory, indices, audit=not config.no_audit,
    )  # fmt: skip
    return baseline.make(given), chosen


def audit_(
    config: Training, context: TrainingContext, tuner: SparseTuner, loss: Callable[[Any], Tensor | None]
) -> None:
    """Tries the gradients of the chosen entries on the longest example and others, unless told not to.

    Args:
        loss: of a batch, as the training will take it.
    """
    if config.no_audit:
        return
    if config.gradient_checkpointing:  # as the Trainer will
        getattr(context.model, f"{CHECKPOINTING}_enable")()
    rows = learnable(context.rows)
    sizes = lengths(rows)
    longest = sizes.index(max(sizes))
    tried = [rows[longest], *(rows[at] for at in range(min(AUDITED, len(rows))) if at != longest)][:AUDITED]
    batch = on_device(context.collator.batches(tried, len(tried))[0], next(context.model.parameters()).device)
    tuner.audit_(lambda: loss(batch))
    tuner.audit_later()


def forget_earlier_run(folder: Path) -> None:
    """Takes away what would be taken for this run's: its adapter comes in the place of the earlier one."""
    for made in FOLDERS:
        shutil.rmtree(folder / made, ignore_errors=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def _arguments(run: Run[TrainConfig], tracking: Mapping[str, Any]) -> TrainingArguments:
    """What the Trainer is told."""
    config = run.spec.config
    alike = shared_arguments(run.spec, run.folder, run.steps)
    if run.context.collator.side == "none":  # examples cannot share a batch: a step is made of batches of one
        alike["gradient_accumulation_steps"] *= config.batch_size
        alike["per_device_train_batch_size"] = 1
    return TrainingArguments(
        **alike,
        per_device_eval_batch_size=alike["per_device_train_batch_size"],
        eval_strategy="steps" if config.validation else "no",
        eval_steps=config.eval_every or max(1, run.steps // EVALUATIONS),
        **tracking,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )
