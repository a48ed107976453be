"""`finepoint align`: preferences or rewards, on chosen entries, through TRL; measured before and after."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from finepoint.adapters.fingerprint import Fingerprint
from finepoint.alignment.methods import METHODS, Alignment, Measured, beta_of, on_cpu
from finepoint.alignment.resolve import resolve
from finepoint.alignment.settings import AlignConfig
from finepoint.data.examples import some
from finepoint.data.leaks import Seen, leaks, warn_of_leaks
from finepoint.data.sources import name_of
from finepoint.errors import FinepointError, needing
from finepoint.huggingface.reference import Reference
from finepoint.models.loading import gguf_file, load_model, load_tokenizer
from finepoint.training.callbacks import Watch
from finepoint.training.context import TrainingContext, entries_for, training_context
from finepoint.training.logfile import LOG, read_log
from finepoint.training.resolve import RunSpec
from finepoint.training.run import Run, audit_, baseline_method, begun, carry_out_, claimed, saved_by
from finepoint.training.tracking import tracked
from finepoint.training.trainer import shared_arguments
from finepoint.training.writing import sampling_plainly
from finepoint.tuner.audit import outcome
from finepoint.tuner.interface import Method
from finepoint.tuner.on_grid import snap_to_base_
from finepoint.tuner.tuner import SparseTuner

logger = logging.getLogger(__name__)
Steps = Watch  # its former name


def align(config: AlignConfig) -> dict[str, Any]:
    """Runs the whole of `finepoint align`; the adapter, the log and the record are in `config.output`.

    Returns:
        The record: `trained`, `changed`, `before`, `after`, `seconds`, `log` (a row a step), ..

    Raises:
        FinepointError: whatever the user can mend.
        BrokenOff: it was interrupted; the adapter of the last good step and a checkpoint have been saved.
    """
    with needing("alignment", "trl"):
        import trl  # noqa: F401
    spec = resolve(config)
    with claimed(config) as folder:
        saved = saved_by(config, folder)
        alignment = METHODS[config.method](config)
        rows = alignment.read(config.data, need=True)
        measured_on = name_of(config.validation or config.data)
        held_out = some(alignment.read(config.validation) if config.validation else rows, config.validation_limit)
        context = prepare(config, alignment, rows)
        assert context.seen is not None
        leaked = leaks(context.seen, {Path(measured_on).name: held_out})
        warn_of_leaks(leaked)
        make = partial(_method, spec)
        facts: dict[str, Any] = {"method": config.method, "beta": beta_of(config)}
        facts |= {"on_grid": True} if config.on_grid else {}
        with begun(spec, context, folder, saved, make, rows, config.steps or 0, **facts) as run:
            reference = Reference(context.model, run.method.tuner.as_it_is())
            before = alignment.measure(context.model, context.tokenizer, held_out)
            logger.info("before: %s", _told(before.means))
            results = _train(run, alignment, rows, reference)
            results |= run.outcome(", or no answer was worth more than another")
            run.save()  # whatever comes of the measuring
            after = alignment.measure(context.model, context.tokenizer, held_out)
            logger.info("after: %s", _told(after.means))
            measured = {"results": {Path(measured_on).stem: after.means}}
            _, size = replace(run, facts=run.facts | measured).save()
        return run.write_record({
            "method": config.method, "adapter_bytes": size, "beta": beta_of(config), **results, "leaks": leaked,
            "measured_on": measured_on, "measured_rows": len(held_out), "before": before.means,
            "after": after.means | _against(before, after), "log": _rows_of(folder / LOG),
        })  # fmt: skip


def prepare(config: AlignConfig, alignment: Alignment, rows: list[Any]) -> TrainingContext:
    """Loads the model; the examples of its context are what a rule that looks at gradients scores on."""
    tokenizer = load_tokenizer(config.model)
    if tokenizer.eos_token_id is None:
        raise FinepointError(f"the tokenizer of {config.model!r} has no end token, and alignment must know where an "
                             "answer ends; set tokenizer.eos_token and save the tokenizer with the model")  # fmt: skip
    model = load_model(config.model, config.dtype, quantise=config.quantise)
    return replace(training_context(config, model, tokenizer, alignment.examples(rows)), seen=Seen.of(rows))


def _method(
    spec: RunSpec[AlignConfig], context: TrainingContext, head: list[str], base: Fingerprint, resumed: Path | None
) -> tuple[Method, dict[str, Any]]:
    """What trains, and how its entries were chosen."""
    if spec.baseline:
        return baseline_method(spec, context, head)
    indices, chosen = entries_for(spec.config, context, resumed)
    tuner = SparseTuner(context.model, indices, audit=False, base=base)
    if spec.config.on_grid:
        snap_to_base_(tuner, gguf_file(spec.config.model))
    audit_(spec.config, context, tuner, lambda batch: outcome(context.model(**batch)))
    if not spec.config.no_audit:
        tuner.check_steps()  # TRL's loss does things with the model that the audit has not seen
    return Method(tuner), chosen


def _train(run: Run[AlignConfig], alignment: Alignment, rows: list[Any], reference: Reference) -> dict[str, Any]:
    """Trains, followed by trackers; returns what the record says of it."""
    context, spec = run.context, run.spec
    set_seed(spec.config.seed)
    with _quiet(), tracked(spec.config, run.folder, run.done()) as (tracking, followers):
        arguments = shared_arguments(spec, run.folder, run.steps) | tracking | {
            "bf16": False,  # the weights have the dtype they were loaded in
            "use_cpu": on_cpu(),
            "dataloader_pin_memory": not on_cpu(),
        }  # fmt: skip
        trainer = alignment.trainer(context.model, context.tokenizer, rows, reference, arguments)
        trainer.method, trainer.settings = run.method, run.settings
        for follower in followers:
            trainer.add_callback(follower)
        # Answers are sampled as --temperature says: other settings, such as beams, are no part of the gradient.
        with sampling_plainly(context.model, context.tokenizer):
            return carry_out_(run, trainer, "aligning", summed_up=False)


def _rows_of(log: Path) -> list[dict[str, Any]]:
    """What the log says of each step, without the time."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_log(log)]


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
