"""`finepoint align`: preferences or rewards, on chosen entries, through TRL; measured before and after."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

import finepoint
from finepoint import interruption
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.fingerprint import FINGERPRINT, Fingerprint, contents_of, fingerprint
from finepoint.adapters.format import read
from finepoint.adapters.lowrank import forget_others
from finepoint.batches import Collator, context_length
from finepoint.choosing.passes import on_device
from finepoint.choosing.rules import rule_named
from finepoint.choosing.selection import refuse_excluded
from finepoint.config import AlignConfig, refuse_out_of_range
from finepoint.data import some
from finepoint.errors import FinepointError
from finepoint.extras import needing
from finepoint.files import claim_folder, write_record
from finepoint.integrations.methods import METHODS, Alignment, Measured, beta_of, on_cpu
from finepoint.integrations.reference import Reference, as_it_is
from finepoint.integrations.rewards import reward_named
from finepoint.leaks import Seen, leaks, warn_of_leaks
from finepoint.models import load_model, load_tokenizer
from finepoint.progress import progress
from finepoint.tokens import encode_all
from finepoint.training.audit import outcome
from finepoint.training.baselines import Setting, baseline_named, options_of
from finepoint.training.checkpoints import CHECKPOINTS, RECORD, checkpoints, deciding, refuse_other_base, to_go_on_from
from finepoint.training.finite import NotFiniteError, refuse_not_finite
from finepoint.training.interface import Tuner
from finepoint.training.log import LOG, append, cut_log_
from finepoint.training.lowrank import PeftTuner
from finepoint.training.memory import peak_bytes, reset_peak
from finepoint.training.run import AUDITED, CHECKPOINTING, forget_earlier_run, versions
from finepoint.training.settings import check_warmup, refuse_quantised, warmup_of
from finepoint.training.tuner import SparseTuner
from finepoint.training.unfinished import LastStep, left_by, marked
from finepoint.training.workplace import Workplace, excluded, select_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """What a run works on."""

    model: Any
    tokenizer: Any
    rows: list[Any]
    held_out: list[Any]
    measured_on: str

    def leaks(self) -> dict[str, dict[str, int]]:
        """How many of the rows that are learned from are among those that are measured on."""
        return leaks(Seen.of(self.rows), {Path(self.measured_on).name: self.held_out})


def align(config: AlignConfig) -> dict[str, Any]:
    """Runs the whole of `finepoint align`; the adapter, the log and the record are in `config.output`.

    Returns:
        The record: `trained`, `changed`, `before`, `after`, `seconds`, `log` (a row a step), ..

    Raises:
        FinepointError: whatever the user can mend.
    """
    check(config)
    with interruption.noticed(), claim_folder(config.output, config.overwrite or config.resume) as folder:
        return _align(config, folder)


def _align(config: AlignConfig, folder: Path) -> dict[str, Any]:
    saved = checkpoints(folder / CHECKPOINTS) if config.resume else []
    method = METHODS[config.method](config)
    place = _prepare(config, method)
    base = fingerprint(contents_of(place.model))
    if saved:
        refuse_other_base(saved[0], base)
    settings = deciding(config, place.rows, base)
    checkpoint = to_go_on_from(folder, saved, config.steps, settings) if saved else None
    reset_peak()
    started = time.perf_counter()
    tuner, without, facts = _tuner(config, place, method, folder if checkpoint else None)
    selection_seconds = time.perf_counter() - started
    logger.info("%d numbers to train, prepared in %.1f s", tuner.count, selection_seconds)
    try:
        if not checkpoint:
            forget_earlier_run(folder)
            if config.save_every and not config.baseline:
                # Its indices are what a resumed run trains.
                _keep(config, tuner, facts, place, base, folder, 0)
        before = method.measure(place.model, place.tokenizer, place.held_out)
        logger.info("before: %s", _told(before.means))
        keep = partial(_keep, config, tuner, facts, place, base)
        log, seconds = _train(config, place, method, tuner, Reference(place.model, without), folder, checkpoint,
                              settings, keep)  # fmt: skip
        peak = peak_bytes()
        changed, norm = tuner.changed(), tuner.norm()
        if not changed:
            raise FinepointError(f"training changed none of the {tuner.count} trained numbers; give a larger --lr than "
                                 f"{learning_rate(config)}, or rows whose answers differ in reward")  # fmt: skip
        keep(folder, config.steps)  # whatever comes of the measuring
        after = method.measure(place.model, place.tokenizer, place.held_out)
        logger.info("after: %s", _told(after.means))
        facts |= {"results": {Path(place.measured_on).stem: after.means}}
        files = _write(config, tuner, facts, base, folder)
        forget_others(folder, files)
        Seen.of(place.rows).save(folder)
    finally:
        tuner.revert_()
        tuner.close()
    record = {
        "method": config.method, "baseline": config.baseline, "trained": tuner.count, "changed": changed,
        "adapter_bytes": sum(file.stat().st_size for file in files), "seconds": round(time.perf_counter() - started, 2),
        "selection_seconds": round(selection_seconds, 2), "train_seconds": round(seconds, 2), "peak_bytes": peak,
        "lr": learning_rate(config), "beta": beta_of(config), "update_norm": norm, "steps": len(log),
        "audit": tuner.audited.facts() if isinstance(tuner, SparseTuner) and tuner.audited else None,
        "measured_on": place.measured_on, "measured_rows": len(place.held_out), "before": before.means,
        "leaks": place.leaks(),
        "after": after.means | _against(before, after), "log": log, "config": asdict(config), "versions": versions(),
    }  # fmt: skip
    write_record(folder / RECORD, record)
    return record


def check(config: AlignConfig) -> None:
    """Refuses what can be refused before any work."""
    with needing("alignment", "trl"):
        import trl  # noqa: F401
    if config.data is None:
        raise FinepointError("alignment needs rows to learn from; give --data FILE.jsonl")
    refuse_out_of_range(config)
    if learning_rate(config) <= 0:
        raise FinepointError(f"lr is {config.lr}; give a rate above 0")
    check_warmup(config.warmup)
    if config.method == "grpo":
        reward_named(config.reward)
        if config.generations < 2:
            raise FinepointError(f"generations is {config.generations}; answers are compared, so give at least 2")
        answers = config.batch_size * config.accumulation
        if answers % config.generations:
            raise FinepointError(f"batch_size x accumulation is {answers} answers; give a multiple of the "
                                 f"{config.generations} generations")  # fmt: skip
    if config.baseline:
        refuse_quantised(config.baseline, config.quantise)
        options_of(baseline_named(config.baseline), config.baseline_options)
    elif config.baseline_options:
        raise FinepointError("baseline_options are given without a baseline; give --baseline, or --rule-options")


def learning_rate(config: AlignConfig) -> float:
    """The learning rate, by default the baseline's or that of the kind of rule."""
    if config.lr is not None:
        return config.lr
    if config.baseline:
        return baseline_named(config.baseline).lr
    return 1e-4 if rule_named(config.rule).needs_data else 3e-3


def _prepare(config: AlignConfig, method: Alignment) -> Place:
    rows = method.read(config.data or "")
    held_out = method.read(config.validation) if config.validation else rows
    tokenizer = load_tokenizer(config.model)
    if tokenizer.eos_token_id is None:
        raise FinepointError(f"the tokenizer of {config.model!r} has no end token, and alignment must know where an "
                             "answer ends; set tokenizer.eos_token and save the tokenizer with the model")  # fmt: skip
    model = load_model(config.model, config.dtype, quantise=config.quantise)
    measured_on = config.validation or config.data or ""
    place = Place(model, tokenizer, rows, some(held_out, config.validation_limit), measured_on)
    warn_of_leaks(place.leaks())
    return place


def _tuner(
    config: AlignConfig, place: Place, method: Alignment, resumed: Path | None
) -> tuple[Tuner, Any, dict[str, Any]]:
    """What trains, the context in which the model is the base, and what the adapter will say of itself."""
    facts: dict[str, Any] = {
        "base_model": config.model, "task": "causal", "method": config.method, "targets": config.targets,
        "seed": config.seed, "data": config.data, "finepoint_version": finepoint.__version__,
        "lr": learning_rate(config), "steps": config.steps, "batch_size": config.batch_size, "beta": beta_of(config),
    } | ({"quantise": config.quantise} if config.quantise else {})  # fmt: skip
    if config.baseline:
        baseline = baseline_named(config.baseline)
        options = options_of(baseline, config.baseline_options)
        setting = Setting(place.model, [], options, config.targets, config.seed, learning_rate(config),
                          config.weight_decay)  # fmt: skip
        low = baseline.make(setting).tuner
        assert isinstance(low, PeftTuner)
        return low, low.disabled, facts | {"baseline": baseline.name, "baseline_options": options}
    if given := resumed or config.indices:
        source = read(given) if given == resumed else SparseAdapter.load(given)
        source.check(place.model, in_place=False)
        if given != resumed:
            refuse_excluded(source, [excluded(folder, place.model) for folder in config.exclude], place.model)
        sparse = SparseTuner(place.model, source, audit=False)
        chosen = source.info
    else:
        limit = context_length(place.model, config.max_length)
        tokens = encode_all(place.tokenizer, method.examples(place.rows), limit, model=place.model)
        collator = Collator.of(place.model, place.tokenizer, [row.ids for row in tokens])
        selection = select_for(config, Workplace(place.model, place.tokenizer, [], tokens, collator))
        sparse = SparseTuner(place.model, selection, audit=False)
        kept = {key: value for key, value in selection.statistics.items() if key != "weights"}
        chosen = {"rule": selection.rule, "density": kept.get("density"), "scope": config.scope, "selection": kept}
    if not config.no_audit:
        _audit_(config, place, method, sparse)
    facts |= {key: chosen[key] for key in ("rule", "density", "scope", "selection") if key in chosen}
    return sparse, as_it_is(sparse), facts


def _audit_(config: AlignConfig, place: Place, method: Alignment, tuner: SparseTuner) -> None:
    """Tries the gradients of the chosen entries on the first rows."""
    if config.gradient_checkpointing:  # as the trainer will
        getattr(place.model, f"{CHECKPOINTING}_enable")()
    limit = context_length(place.model, config.max_length)
    rows = encode_all(place.tokenizer, method.examples(place.rows[:AUDITED]), limit, model=place.model)
    batch = on_device(Collator.of(place.model, place.tokenizer)(rows), next(place.model.parameters()).device)
    tuner.audit_(lambda: outcome(place.model(**batch)))
    tuner.audit_later()


def _train(
    config: AlignConfig, place: Place, method: Alignment, tuner: Tuner, reference: Reference, folder: Path,
    checkpoint: str | None, settings: dict[str, Any], keep: Callable[[Path, int], None],
) -> tuple[list[dict[str, Any]], float]:  # fmt: skip
    """Trains; returns a row for each step, and the seconds it took."""
    set_seed(config.seed)
    with _quiet(), progress("aligning", config.steps) as advance:
        arguments = _arguments(config, folder)
        trainer = method.trainer(place.model, place.tokenizer, place.rows, reference, arguments)
        trainer.tuner, trainer.settings = tuner, settings
        trainer.remove_callback(PrinterCallback)
        watch, last = Steps(tuner, folder / LOG, config.steps, advance), LastStep(trainer)
        for callback in (watch, last):
            trainer.add_callback(callback)
        if not config.baseline:
            trainer.keep_adapter = keep
        started = time.perf_counter()
        try:
            with interruption.as_itself():
                trainer.train(resume_from_checkpoint=checkpoint)
        except NotFiniteError as error:
            raise FinepointError(f"{error}; try a smaller --lr than {learning_rate(config)}") from error
        except KeyboardInterrupt as error:
            raise left_by(last, lambda: keep(folder, last.done), folder) or error from None
        finally:
            interruption.let_go(feel=False)
    return watch.records, time.perf_counter() - started


def _keep(
    config: AlignConfig, tuner: Tuner, facts: dict[str, Any], place: Place, base: Fingerprint, folder: Path, step: int
) -> None:
    """Writes the adapter of a step, which says that it is not that of the last, into a folder."""
    _write(config, tuner, facts | marked(step, config.steps), base, folder)
    Seen.of(place.rows).save(folder)


def _write(config: AlignConfig, tuner: Tuner, facts: dict[str, Any], base: Fingerprint, folder: Path) -> list[Path]:
    """Writes the adapter as it stands into a folder; factors too know the base that they lie on."""
    adapter = tuner.adapter(config.store, info=facts)
    adapter = replace(adapter, base={FINGERPRINT: base.as_json()} | adapter.base)
    return tuner.save(folder, adapter, config.compact)


def _arguments(config: AlignConfig, folder: Path) -> dict[str, Any]:
    """What DPO's and GRPO's settings have in common."""
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": learning_rate(config),
        "lr_scheduler_type": config.schedule if config.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": warmup_of(config.warmup, config.steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.clip,
        CHECKPOINTING: config.gradient_checkpointing,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if config.save_every else "no",
        "save_steps": config.save_every or 500,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,  # the weights have the dtype they were loaded in
        "use_cpu": on_cpu(),
        "dataloader_pin_memory": not on_cpu(),
        "seed": config.seed,
    }


class Steps(TrainerCallback):
    """Stops before a gradient that is not finite reaches the weights; writes the log; moves the progress bar."""

    def __init__(self, tuner: Tuner, log: Path, steps: int, advance: Any) -> None:
        self.tuner, self.log, self.steps, self.advance = tuner, log, steps, advance
        self.records: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.records = cut_log_(self.log, state.global_step)
        self.advance(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        refuse_not_finite(self.tuner.trained(), f" at step {state.global_step + 1}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        numbers = {key: float(value) for key, value in logs.items() if isinstance(value, int | float | str)}
        record = {"step": state.global_step} | {key: v for key, v in numbers.items() if math.isfinite(v)}
        self.records.append(record)
        append(self.log, record)
        shown = {key: record[key] for key in ("loss", "reward", "rewards/margins", "rewards/accuracies")
                 if key in record}  # fmt: skip
        if state.global_step % 10 == 0 or state.global_step == self.steps:
            logger.info("step %d of %d: %s", state.global_step, self.steps, _told(shown))


def _against(before: Measured, after: Measured) -> dict[str, float]:
    """Of preference margins: how they moved, pair by pair, which is what DPO trains (its reward is beta x that)."""
    if "margin" not in after.means:
        return {}
    moved = [new - old for old, new in zip(before.rows, after.rows, strict=True)]
    return {"margin_gain": sum(moved) / len(moved), "reward_accuracy": sum(m > 0 for m in moved) / len(moved)}


def _told(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries from drawing bars of their own and from warning about each other."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        enable_progress_bar()
