"""Checks the settings of a run and fills in the defaults. Without torch, so that a mistake is told at once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from finepoint.adapters.hub import FILES
from finepoint.baselines.registry import Baseline, baseline_named, options_of
from finepoint.errors import FinepointError, needing
from finepoint.models.names import is_gguf
from finepoint.runtime import distributed
from finepoint.runtime.files import read_json
from finepoint.runtime.settings import default_of, refuse_out_of_range, sections
from finepoint.selection.rates import DENSITY, usual_rate
from finepoint.selection.rules import known_rule, rule_named
from finepoint.selection.settings import check_structure, refuse_two_sizes, refuse_unread, share_within
from finepoint.training.keep import Protection, protection_named, protection_of
from finepoint.training.losses import loss_named
from finepoint.training.schedule import schedule_of
from finepoint.training.settings import TrainConfig, Training

Told = TypeVar("Told", bound=Training)
CHECKPOINTS = "checkpoints"  # of a run, in its folder
RESUMES_TOGETHER = (5, 18)  # the transformers since which several processes on CPUs load an optimizer's state


@dataclass(frozen=True)
class RunSpec(Generic[Told]):
    """What a run is told, with what was left open spelled out; nobody works it out again."""

    config: Told
    lr: float
    usual_lr: float
    """that of such a run where none is given"""
    baseline: Baseline | None
    options: dict[str, float]
    """the baseline's"""
    usual_of: str = ""
    """what has that rate, in words"""
    protection: Protection | None = None
    strength: float = 0.0
    """the protection's"""


def resolve(config: TrainConfig) -> RunSpec[TrainConfig]:
    """Spells out what `finepoint train` is told.

    Raises:
        FinepointError: whatever can be refused before any work.
    """
    if config.density == "auto":
        raise FinepointError("density 'auto' is a search over many runs; call finepoint.studies.density.train_auto")
    if config.fit:
        raise FinepointError("--fit is of the command finepoint train; in Python: "
                             "train(finepoint.memory.fit.fitted(config))")  # fmt: skip
    if config.data is None:
        raise FinepointError("training needs examples; give --data FILE.jsonl")
    spec = resolve_common(config)
    answers = config.answers not in (0, TrainConfig.answers)
    validated = [
        ("answers", answers),
        ("eval_every", config.eval_every),
        ("keep=best", config.keep == "best"),
        ("patience", config.patience),
    ]
    for name, given in validated:
        if given and config.validation is None:
            raise FinepointError(f"{name} is given without examples; give --validation FILE.jsonl")
    if config.refresh:
        _check_refresh(config)
    elif config.dropped != "revert":
        raise FinepointError("dropped says what becomes of entries that are trained no more; give --refresh with it")
    loss_named(config.loss)
    if bool(spec.baseline and spec.baseline.fisher) != (config.fisher_data is not None):
        raise FinepointError("baseline ewc, and it alone, takes examples of what is not to be forgotten; "
                             "give --baseline ewc --fisher-data FILE.jsonl")  # fmt: skip
    if config.disturb_at_most is not None:
        if config.ema is not None:
            raise FinepointError("a budget is kept by what is trained, and an average is left; leave out --ema, or "
                                 "scale the adapter afterwards: finepoint scale --disturb-at-most")  # fmt: skip
        _check_budget(config)
    return spec


def _check_on_grid(config: Training) -> None:
    """Refuses bases without a grid, and what would leave it."""
    others = {"baseline": config.baseline, "quantise": is_gguf(config.model) and config.quantise,
              **{name: getattr(config, name, None) for name in ("refresh", "round_to")},
              "store": config.store == "delta"}  # fmt: skip
    if given := next((name for name, value in others.items() if value), None):
        raise FinepointError(f"--on-grid trains chosen entries on the codes of the base, which goes without "
                             f"--{given.replace('_', '-')}; leave out one of them")  # fmt: skip
    from finepoint.models.loading import has_grid  # and with it torch: nothing else asks what a model is

    if not has_grid(config.model, config.quantise):
        raise FinepointError(f"{config.model} has no grid: --on-grid trains on the codes of a quantised base; give "
                             "--model FILE.gguf, smollm2, gemma3-270m or a quantised checkpoint, or --quantise int8, "
                             "int4 or nf4")  # fmt: skip


def _check_budget(config: TrainConfig) -> None:
    """Refuses a budget of disturbance that there is nothing to measure by, or nothing to keep with."""
    if config.protect is None:
        raise FinepointError("--disturb-at-most measures on text whose predictions are to be kept; give --protect "
                             "FILE.jsonl")  # fmt: skip
    if config.dropped == "keep":
        raise FinepointError("--disturb-at-most scales away what is too much at the end, and entries that stay as they "
                             "are (--dropped keep) are trained no more; give --dropped revert")  # fmt: skip
    if config.protect_strength == 0:
        raise FinepointError("--disturb-at-most adapts the strength by factors; it needs a --protect-strength above 0")


def resolve_common(config: Told) -> RunSpec[Told]:
    """What training by a loss, by preferences and by rewards have in common.

    Raises:
        FinepointError: what none of them can do.
    """
    refuse_out_of_range(config)
    if config.report_to:
        from finepoint.training.tracking import require

        require(config.report_to)
    if not 0 <= config.warmup <= 1:
        raise FinepointError(f"warmup is {config.warmup}; it is a share of the steps, in [0, 1]")
    if config.lr is not None and config.lr <= 0:
        raise FinepointError(f"lr is {config.lr}; give a rate above 0")
    check_structure(config.structure)
    share_within(config.within, config.structure, config.density)
    if config.on_grid:
        _check_on_grid(config)
    if config.baseline_options and not config.baseline:
        raise FinepointError("baseline_options are given without a baseline; give --baseline, or --rule-options")
    if config.baseline:
        baseline = baseline_named(config.baseline)
        _check_baseline(config, baseline)
        usual, options = config.FACTORS or baseline.lr, options_of(baseline, config.baseline_options)
        spec = RunSpec(config, config.lr or usual, usual, baseline, options, f"of baseline {config.baseline}")
    else:
        if not config.indices:
            refuse_two_sizes(config.density, config.count, config.targets)
            refuse_unread(config)
        usual, of = usual_of(config)
        spec = RunSpec(config, config.lr or usual, usual, None, {}, of)
    if not (protection := protection_of(config, spec.baseline)):
        return spec
    strength = protection.strength if config.protect_strength is None else config.protect_strength
    return replace(spec, protection=protection, strength=strength)


def usual_of(config: Training, share: float | None = None) -> tuple[float, str]:
    """The learning rate of chosen entries where none is given, and in words what it is that of.

    Of `--indices`, what their folder says of them counts, as far as it can be understood without running its code.

    Args:
        share: of all target entries, where it is known better than by `--density`.

    Raises:
        FinepointError: there is no such rule; or it is another's, and no rate is given.
    """
    info = _told(config.indices) if config.indices else {}
    named = info.get("rule")
    rule = rule_named(config.rule) if named is None else known_rule(named)
    if rule is None and config.lr is None:
        raise FinepointError(f"which learning rate suits entries of rule {named!r}, as {config.indices} has them, is "
                             "not known here; give --lr")  # fmt: skip
    rule = rule or rule_named(config.rule)
    if config.RATES:
        return config.RATES[0 if rule.needs_data else 1], f"of rule {rule.name}"
    density = share if share is not None else next(filter(_is_share, (info.get("density"), config.density)), None)
    structure = next(filter(None, (info.get("structure"), config.structure)))
    held = config.protect_strength != 0 and (config.protect or not protection_named(config.protect_by).reads)
    rate = usual_rate(rule, density, structure if isinstance(structure, str) else "entry", config.on_grid, bool(held))
    unsaid = f"; {config.indices} does not say how its entries were chosen" if config.indices and not named else ""
    return rate, f"of rule {rule.name} at a density of {density or DENSITY:.2g}{unsaid}"


def spec_for(spec: RunSpec[Told], model: Any) -> RunSpec[Told]:
    """The spec with the rate of the share that `--count`, or densities by pattern, come to in this model."""
    config: Any = spec.config
    if spec.baseline or config.indices or config.RATES or not (config.count or isinstance(config.targets, Mapping)):
        return spec
    from finepoint.selection.select import share_chosen

    share = share_chosen(model, config.targets, config.structure, config.count)
    usual, of = usual_of(config, share)
    return replace(spec, lr=config.lr or usual, usual_lr=usual, usual_of=of)


def _told(folder: str) -> dict[str, Any]:
    """What an adapter's folder says of its entries; nothing where it says it in a way that means nothing."""
    file = Path(folder) / FILES[1]
    info = read_json(file).get("info") if file.is_file() else None
    return info if isinstance(info, dict) else {}


def _is_share(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 < value <= 1


def _check_refresh(config: TrainConfig) -> None:
    """Refuses schedules that cannot be read, and settings under which entries cannot be chosen anew."""
    schedule = schedule_of(config.refresh or "")
    if config.ema is not None:
        raise FinepointError("an average is over steps of the same entries; leave out --ema or --refresh")
    if config.quantise:
        raise FinepointError("entries of a quantised base are chosen once; leave out --refresh or --quantise")
    if rule_named(config.rule).needs_grid:
        raise FinepointError("a rule that looks at the grid chooses once, since trained entries lie beside it; leave "
                             "out --refresh, or give another rule")  # fmt: skip
    if config.threshold == "sampled":
        raise FinepointError("--threshold sampled chooses about as many entries each time, and --refresh keeps their "
                             "number; leave out one of them")  # fmt: skip
    if schedule.fraction and config.within:
        raise FinepointError("--refresh drop-grow lets entries grow in any column; leave out --within, or give "
                             "--refresh every:N")  # fmt: skip
    if config.structure == "entry":
        return
    if schedule.fraction:
        raise FinepointError(f"--refresh drop-grow is for single entries, not for structure {config.structure!r}; "
                             "give --refresh every:N")  # fmt: skip
    if config.indices and config.density is None and config.count is None:
        raise FinepointError("--refresh with --indices and a structure must know how many groups to choose; "
                             "give --density or --count")  # fmt: skip


def _check_baseline(config: Training, baseline: Baseline) -> None:
    """Refuses what no baseline of that kind does, and settings that only choosing entries has."""
    if config.quantise:
        raise FinepointError(f"quantise is for choosing entries, and baseline {baseline.name!r} trains float weights; "
                             "leave out quantise or the baseline")  # fmt: skip
    if baseline.low_rank:
        with needing(f"baseline {baseline.name}", "peft"):  # before the model is loaded
            if find_spec("peft") is None:
                raise ModuleNotFoundError(name="peft")
    if baseline.low_rank and getattr(config, "round_to", None):
        raise FinepointError(f"round_to is for weights trained in place, which {baseline.name} does not do")
    for name, default in reversed(unused_by(baseline, type(config)).items()):
        if getattr(config, name) != default:
            raise FinepointError(f"{name} is for choosing entries, which baseline {baseline.name!r} does not do; "
                                 f"leave out --{name.replace('_', '-')} or --baseline")  # fmt: skip


def unused_by(baseline: Baseline, config: type[Training] = TrainConfig) -> dict[str, Any]:
    """The settings of choosing entries that a baseline does not look at, and their defaults."""
    grouped = dict(sections(config))
    entries = {known.name: default_of(known) for known in [*grouped["scoring"], *grouped["which entries"]]}
    used = {"targets"} if baseline.low_rank else set()
    if baseline.chooses:
        used |= set(entries) - {"targets", "refresh", "dropped"}
    if baseline.fisher:  # its pass over the examples is one like that of scoring
        used |= {"scoring_examples", "scoring_memory"}
    return {name: default for name, default in entries.items() if name not in used}


def no_checkpoint(folder: Path) -> FinepointError:
    """What a run is told that is to go on in a folder where it cannot."""
    return FinepointError(f"{folder} has no checkpoint to go on from; start afresh with --overwrite, and with "
                          "--save-every N to get them")  # fmt: skip


def has_checkpoint(folder: Path) -> bool:
    """Whether a run's folder has any, whole or not."""
    return any((folder / CHECKPOINTS).glob("*-*"))


def check_processes(config: Training) -> None:
    """Refuses what several processes cannot do together."""
    if distributed.count() > 1 and config.baseline:
        raise FinepointError(f"baseline {config.baseline!r} trains in one process; leave out --baseline, or start it "
                             "without a launcher")  # fmt: skip
    if distributed.count() > 1 and config.protect and protection_named(config.protect_by).beside:
        raise FinepointError(f"--protect-by {config.protect_by} reads its texts in one process; start it without "
                             "a launcher, or give --protect-by anchor")  # fmt: skip
    if distributed.count() > 1 and config.resume and not resumes_together():
        least = ".".join(map(str, RESUMES_TOGETHER))
        raise FinepointError(f"several processes on CPUs go on from a checkpoint with transformers {least} or newer, "
                             f"and here is {version('transformers')}; install that, or resume alone")  # fmt: skip


def resumes_together() -> bool:
    """Whether several processes can go on from a checkpoint here."""
    import torch

    return torch.cuda.is_available() or tuple(map(int, version("transformers").split(".")[:2])) >= RESUMES_TOGETHER


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
    return max(1, round(config.epochs * -(-batches // (config.accumulation * distributed.count()))))
