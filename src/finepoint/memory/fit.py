"""`--fit`: how a training's steps are divided so that they fit the memory there is, by the memory planner."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from finepoint.adapters.adapter import SparseAdapter
from finepoint.data.batches import context_length
from finepoint.data.examples import Labelled, read_examples
from finepoint.data.store import identity_of, large_data
from finepoint.data.tokens import IGNORED, Row, encode_all
from finepoint.errors import FinepointError
from finepoint.memory.plan import plan
from finepoint.models.loading import load_tokenizer, shape_of
from finepoint.runtime import distributed
from finepoint.runtime.devices import room_bytes
from finepoint.runtime.files import read_json
from finepoint.training.checkpoints import SEAL, checkpoints
from finepoint.training.context import TRAINING, rows_on_disk, rows_read
from finepoint.training.resolve import CHECKPOINTS
from finepoint.training.settings import PlanConfig, TrainConfig

logger = logging.getLogger(__name__)
MARGIN = 1.15  # a plan may be wrong by so much
ENOUGH = 4  # a step divided into more parts than this is worth recomputing activations
SCORING: tuple[float | Literal["disk"], ...] = (1.0, 0.5, "disk")
"""what of the gradients is held for scoring: the same entries by more passes, or with files"""
WAY_OUT = "give shorter examples (--max-length), a narrower --dtype, or a quantised base (--quantise)"
Peak = Callable[[int, bool], int]


@dataclass(frozen=True)
class Fit:
    """How a step of so many examples is divided: `batch_size` x `accumulation` of them."""

    batch_size: int
    accumulation: int
    gradient_checkpointing: bool
    peak: int
    """planned bytes"""

    def __str__(self) -> str:
        recomputing = " --gradient-checkpointing" if self.gradient_checkpointing else ""
        return f"--batch-size {self.batch_size} --accumulation {self.accumulation}{recomputing}"


def fitting(config: PlanConfig, examples: int, room: int) -> Fit | None:
    """The way of dividing a step that is planned to fit, the fastest one: few parts, and without recomputing
    activations unless a step would have more than `ENOUGH` parts.

    Args:
        config: as for `plan`; its batch size does not count.
        examples: of a step.
        room: bytes.

    Returns:
        None where nothing fits.
    """

    def peak(batch_size: int, recompute: bool) -> int:
        return peak_of(replace(config, batch_size=batch_size, gradient_checkpointing=recompute))

    sizes = [size for size in range(examples, 0, -1) if examples % size == 0]
    plain = None if config.gradient_checkpointing else _largest(sizes, room, False, peak)
    if plain and plain.accumulation <= ENOUGH:
        return plain
    recomputing = _largest(sizes, room, True, peak)
    return recomputing if recomputing and (not plain or recomputing.batch_size > plain.batch_size) else plain


def _largest(sizes: list[int], room: int, recompute: bool, peak: Peak) -> Fit | None:
    """The largest of these batch sizes that fits; what a batch takes goes with its size, so that few plans tell."""
    most = sizes[0]
    known = {most: peak(most, recompute)}
    if known[most] * MARGIN > room and most > 1:
        known[1] = peak(1, recompute)
        each = (known[most] - known[1]) / (most - 1)
        for size in sizes[1:]:
            if (known[1] + each * (size - 1)) * MARGIN > room:
                continue
            known[size] = known.get(size) or peak(size, recompute)
            if known[size] * MARGIN <= room:
                break
    found = [size for size, taken in known.items() if taken * MARGIN <= room]
    return Fit(max(found), most // max(found), recompute, known[max(found)]) if found else None


def peak_of(config: PlanConfig) -> int:
    """The larger of both planned peaks, in bytes."""
    found = plan(config)
    return max(sum(found.training.values()), sum((found.selection or {}).values()))


def fitted(config: TrainConfig) -> TrainConfig:
    """The settings of a run with `fit`, so that it fits the memory there is; its steps keep their examples.

    A run that is resumed goes on as it was begun.

    Raises:
        FinepointError: nothing fits; or what is trained, or the system, cannot be planned for.
    """
    if not config.fit:
        return config
    if config.resume:
        sealed = Path(checkpoints(Path(config.output) / CHECKPOINTS)[0]) / SEAL
        before = read_json(sealed)["settings"]
        kept = {name: before[name] for name in ("batch_size", "accumulation", "gradient_checkpointing")}
        return replace(config, fit=False, **kept)
    asked, examples = _asked(config), config.batch_size * config.accumulation
    room = room_bytes(str(asked.device))
    if room is None:
        raise FinepointError("this system does not tell how much memory there is; give --batch-size and --accumulation "
                             "instead of --fit")  # fmt: skip
    for share in _shares(config):
        if found := fitting(replace(asked, scoring_memory=share), examples, room):
            break
    if not found:
        raise FinepointError(f"one example of {asked.tokens} tokens at a time does not fit the {room / 2**30:.1f} GiB "
                             f"there are; {WAY_OUT}")  # fmt: skip
    logger.info("fits with %s: %d examples a step as asked for, of %d tokens at most; %.2f GiB planned, %.2f GiB there",
                found, examples, asked.tokens, found.peak / 2**30, room / 2**30)  # fmt: skip
    return replace(config, fit=False, batch_size=found.batch_size, accumulation=found.accumulation,
                   gradient_checkpointing=found.gradient_checkpointing, scoring_memory=share)  # fmt: skip


def _shares(config: TrainConfig) -> list[float | Literal["disk"]]:
    """What of the gradients may be held for scoring, the fastest way first."""
    given = config.scoring_memory
    if given == "disk":
        return [given]
    # Of quantised bases a part is made floats at a time, so that all of it cannot be scored in one pass.
    ways = (1.0, 0.5, 0.25, 0.1) if config.quantise else SCORING
    return [way for way in ways if way == "disk" or way <= given] or [given]


def _asked(config: TrainConfig) -> PlanConfig:
    """What a run is planned as: every batch as long as its longest example.

    Raises:
        FinepointError: it cannot be planned.
    """
    if config.data is None:
        raise FinepointError("training needs examples; give --data FILE.jsonl")
    if config.baseline or config.density == "auto":
        what = "--baseline" if config.baseline else "--density auto"
        raise FinepointError(f"--fit plans the training of entries at one density; leave it out, or {what}")
    if distributed.launched():
        raise FinepointError("--fit plans for one process; start it without a launcher, or give --batch-size")
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    model = shape_of(config.model, config.dtype, device)
    limit = context_length(model, config.max_length)
    rows = _rows(config, model, limit)
    count = SparseAdapter.read(config.indices).count if config.indices else config.count
    return PlanConfig(
        model=config.model, rule=config.rule, density=None if count else config.density, count=count,
        targets=config.targets, within=None if config.indices else config.within,
        structure="entry" if config.indices else config.structure,
        tokens=max(2, max(len(row.ids) for row in rows)), learned=max(map(_kept, rows)),
        dtype=config.dtype, quantise=config.quantise, device=device,
        gradient_checkpointing=config.gradient_checkpointing,
        protect_by=config.protect_by if config.protect or config.protect_by == "l2" else None,
        protect_steps=config.protect_steps,
    )  # fmt: skip


def _rows(config: TrainConfig, model: Any, limit: int) -> Sequence[Row]:
    """The examples in tokens; of large files those that the run draws.

    Raises:
        FinepointError: they have classes.
    """
    large, tokenizer = large_data(config.data, config.columns, need=True), load_tokenizer(config.model)
    on_disk = large is not None and identity_of(tokenizer)
    examples = [] if on_disk else read_examples(config.data, config.columns, config.seed)
    if (large and large.labels) or any(isinstance(example, Labelled) for example in examples):
        raise FinepointError("--fit plans for language models, and these are examples of classes; leave it out")
    if large and on_disk:
        return rows_on_disk(config, large, tokenizer, model, reads=rows_read(config))
    return encode_all(tokenizer, examples, limit, what=TRAINING, model=model)


def _kept(row: Row) -> int:
    """How many positions at the end of a row have logits."""
    labels = cast(list[int], row.labels)
    return max(1, len(labels) - next((at for at, label in enumerate(labels) if label != IGNORED), len(labels)))
