"""What a run is told: refused where it cannot be done, and spelled out where it is left open."""

from importlib.metadata import version

import torch

from finepoint import ranks
from finepoint.choosing.rules import rule_named
from finepoint.choosing.structure import check_structure
from finepoint.config import TrainConfig, refuse_out_of_range
from finepoint.errors import FinepointError
from finepoint.training.baselines import baseline_named, options_of
from finepoint.training.refreshing import schedule_of
from finepoint.training.tracking import require

RESUMES_TOGETHER = (5, 18)  # the transformers since which several processes on CPUs load an optimizer's state


def check(config: TrainConfig) -> None:
    """Refuses what can be refused before any work."""
    if config.density == "auto":
        raise FinepointError("density 'auto' is a search over many runs; call finepoint.studies.density.train_auto")
    if config.data is None:
        raise FinepointError("training needs examples; give --data FILE.jsonl")
    refuse_out_of_range(config)
    check_warmup(config.warmup)
    if learning_rate(config) <= 0:
        raise FinepointError(f"lr is {config.lr}; give a rate above 0")
    check_structure(config.structure)
    require(config.report_to)
    needing = [("eval_every", config.eval_every), ("keep=best", config.keep == "best"), ("patience", config.patience)]
    for name, given in needing:
        if given and config.validation is None:
            raise FinepointError(f"{name} is given without examples; give --validation FILE.jsonl")
    if config.baseline:
        _check_baseline(config)
    elif config.baseline_options:
        raise FinepointError("baseline_options are given without a baseline; give --baseline, or --rule-options")
    if config.refresh:
        _check_refresh(config)
    elif config.dropped != "revert":
        raise FinepointError("dropped says what becomes of entries that are trained no more; give --refresh with it")
    if (config.baseline == "ewc") != (config.fisher_data is not None):
        raise FinepointError("baseline ewc, and it alone, takes examples of what is not to be forgotten; "
                             "give --baseline ewc --fisher-data FILE.jsonl")  # fmt: skip


def _check_refresh(config: TrainConfig) -> None:
    """Refuses schedules that cannot be read, and settings under which entries cannot be chosen anew."""
    schedule = schedule_of(config.refresh or "")
    if config.quantise:
        raise FinepointError("entries of a quantised base are chosen once; leave out --refresh or --quantise")
    if config.threshold == "sampled":
        raise FinepointError("--threshold sampled chooses about as many entries each time, and --refresh keeps their "
                             "number; leave out one of them")  # fmt: skip
    if config.structure == "entry":
        return
    if schedule.fraction:
        raise FinepointError(f"--refresh drop-grow is for single entries, not for structure {config.structure!r}; "
                             "give --refresh every:N")  # fmt: skip
    if config.indices and config.density is None and config.count is None:
        raise FinepointError("--refresh with --indices and a structure must know how many groups to choose; "
                             "give --density or --count")  # fmt: skip


def _check_baseline(config: TrainConfig) -> None:
    """Refuses unknown baselines and options, and settings that only choosing entries has."""
    baseline = baseline_named(config.baseline or "")
    refuse_quantised(baseline.name, config.quantise)
    options_of(baseline, config.baseline_options)
    defaults = TrainConfig(model=config.model, output=config.output)
    unused = ["refresh", "dropped"]
    if not baseline.chooses:
        unused += ["density", "count", "indices", "exclude", "rule", "rule_options"]
    if baseline.name not in ("lora", "dora", "rosa"):
        unused.append("targets")
    elif config.round_to:
        raise FinepointError(f"round_to is for weights trained in place, which {baseline.name} does not do")
    for name in unused:
        if getattr(config, name) != getattr(defaults, name):
            raise FinepointError(f"{name} is for choosing entries, which baseline {baseline.name!r} does not do; "
                                 f"leave out --{name.replace('_', '-')} or --baseline")  # fmt: skip


def refuse_quantised(baseline: str, quantise: str | None) -> None:
    """Refuses a baseline over a quantised base."""
    if quantise:
        raise FinepointError(f"quantise is for choosing entries, and baseline {baseline!r} trains float weights; "
                             "leave out quantise or the baseline")  # fmt: skip


def check_processes(config: TrainConfig) -> None:
    """Refuses what several processes cannot do together."""
    if ranks.count() > 1 and config.baseline:
        raise FinepointError(f"baseline {config.baseline!r} trains in one process; leave out --baseline, or start it "
                             "without a launcher")  # fmt: skip
    if ranks.count() > 1 and config.resume and not resumes_together():
        least = ".".join(map(str, RESUMES_TOGETHER))
        raise FinepointError(f"several processes on CPUs go on from a checkpoint with transformers {least} or newer, "
                             f"and here is {version('transformers')}; install that, or resume alone")  # fmt: skip


def resumes_together() -> bool:
    """Whether several processes can go on from a checkpoint here."""
    return torch.cuda.is_available() or tuple(map(int, version("transformers").split(".")[:2])) >= RESUMES_TOGETHER


def learning_rate(config: TrainConfig) -> float:
    """The learning rate, by default the baseline's or that of the kind of rule: gradient rules need smaller steps."""
    if config.lr is not None:
        return config.lr
    if config.baseline:
        return baseline_named(config.baseline).lr
    return 3e-4 if rule_named(config.rule).needs_data else 1e-2


def check_warmup(warmup: float) -> None:
    """Refuses what is no share of the steps."""
    if not 0 <= warmup <= 1:
        raise FinepointError(f"warmup is {warmup}; it is a share of the steps, in [0, 1]")


def warmup_of(warmup: float, steps: int) -> float:
    """The share of the steps over which the learning rate rises, as transformers takes it: 1 would be one step.

    The rate of the first warm-up step is 0: a run of one step has none.
    """
    return 0 if steps == 1 else min(warmup, 0.999999)


def steps_of(config: TrainConfig, examples: int) -> int:
    """How many optimizer steps a run over so many examples takes; each process has a batch of its own."""
    if config.steps:
        return config.steps
    batches = -(-examples // config.batch_size)
    return max(1, round(config.epochs * -(-batches // (config.accumulation * ranks.count()))))
