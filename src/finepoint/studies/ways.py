"""What a sequence is told, checked, and spelled out for each task and way. Without torch."""

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from finepoint.baselines.registry import baseline_named
from finepoint.errors import FinepointError
from finepoint.runtime.settings import did_you_mean, named
from finepoint.studies.results import OVERLAPS, WAYS
from finepoint.studies.settings import SequenceConfig
from finepoint.training.resolve import resolve, unused_by
from finepoint.training.settings import TrainConfig

logger = logging.getLogger(__name__)


def check(config: SequenceConfig) -> None:
    """Refuses what can be seen without a model.

    Raises:
        FinepointError: tasks without their sets, ways that are none, or what `finepoint train` would refuse.
    """
    if len(config.tasks) < 2:
        raise FinepointError("a sequence needs two tasks or more; give tasks: {a: {train: F, test: F}, b: ..}")
    for name, files in config.tasks.items():
        if set(files) != {"train", "test"}:
            raise FinepointError(f"task {name!r} has the sets {sorted(files)}; give train and test")
    known = {setting.name for setting in fields(TrainConfig)} - set(_own(config, next(iter(config.tasks)), "", []))
    if unknown := sorted(set(config.train) - known):
        raise FinepointError(f"train gives {unknown[0]!r}, which is no setting that a sequence takes there"
                             f"{did_you_mean(unknown[0], known)}")  # fmt: skip
    _check_ways(config)
    ways = [WAYS[way] for way in ways_of(config)]
    for name, looks in (
        ("earlier_examples", "anchored"),
        ("earlier_strength", "anchored"),
        ("apart_strength", "apart"),
    ):
        if getattr(config, name) != getattr(SequenceConfig, name) and not any(getattr(way, looks) for way in ways):
            logger.warning("no way here looks at %s, which is %s", name, getattr(config, name))


def _check_ways(config: SequenceConfig) -> None:
    """Refuses ways that are none, and what `finepoint train` would refuse, before hours of other tasks."""
    if config.ways and config.overlap != SequenceConfig.overlap:
        raise FinepointError("ways says which ways, and so does overlap; leave out one of them")
    if twice := next((way for way in config.ways if config.ways.count(way) > 1), None):
        raise FinepointError(f"ways names {twice} twice; give it once")
    for way in (*ways_of(config), *config.rates):
        named(WAYS, way, "unknown way", "ways")
    for way in ways_of(config):
        try:
            spec = resolve(told(config, way, next(iter(config.tasks)), config.output, []))
        except FinepointError as error:
            raise FinepointError(f"way {way}: {error}") from error
        if WAYS[way].anchored and spec.config.refresh:
            raise FinepointError(f"way {way}: earlier tasks hold entries that are chosen once; leave out refresh")


def ways_of(config: SequenceConfig) -> Sequence[str]:
    return config.ways or OVERLAPS[config.overlap]


def told(config: SequenceConfig, way: str, task: str, output: str, exclude: list[str]) -> TrainConfig:
    """What `finepoint train` would be told for a task; what its way does not look at is left out."""
    baseline = baseline_named(WAYS[way].baseline) if WAYS[way].baseline else None
    left_out = unused_by(baseline) if baseline else {"baseline_options": {}}
    further = {name: value for name, value in config.train.items() if name not in left_out}
    own = _own(config, task, output, exclude)
    own |= {name: default for name, default in left_out.items() if name in own}
    rate = config.rates.get(way, None if baseline else config.lr)
    return TrainConfig(**own | {"baseline": WAYS[way].baseline or None, "lr": rate}, **further)


def _own(config: SequenceConfig, task: str, output: str, exclude: list[str]) -> dict[str, Any]:
    """What a sequence sets for every task by itself."""
    # Of one seed, random choices would be the same entries for every task.
    seed = config.seed + list(config.tasks).index(task)
    return {
        "model": config.model, "dtype": config.dtype, "quantise": None, "data": config.tasks[task]["train"],
        "output": output, "overwrite": True, "baseline": None, "rule": config.rule, "density": config.density,
        "exclude": exclude, "lr": config.lr, "seed": seed,
    }  # fmt: skip
