"""What sparse tuning is measured against: dense and low-rank fine-tuning, with the same data, loop, log and record.

Torch is imported by what is made, so that names and options are known without it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finepoint.errors import FinepointError
from finepoint.runtime.settings import REGISTRIES, Cited, named

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finepoint.baselines.dense import DenseTuner
    from finepoint.baselines.peft import PeftTuner
    from finepoint.selection.passes import Batch
    from finepoint.selection.targets import Targets
    from finepoint.tuner.interface import Method


@dataclass(frozen=True)
class BaselineContext:
    """What a baseline is made of."""

    model: Any
    head: Sequence[str]
    """weights of a new classification head, which every baseline trains"""
    options: Mapping[str, float]
    targets: Targets
    """for LoRA and DoRA: which linear layers"""
    seed: int
    lr: float
    weight_decay: float
    fisher_batches: Sequence[Batch] = ()
    """for EWC: batches of the examples that are not to be forgotten"""
    memory: float | str = 1.0
    """share of the weights whose Fisher information is made at a time"""
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    """for RoSA: the entries that a rule has chosen"""
    audit: bool = True
    """for RoSA: whether their gradients are tried"""

    def __post_init__(self) -> None:
        from finepoint.models.quantised import quantised_layers

        if quantised := quantised_layers(self.model):
            raise FinepointError(f"{min(quantised)} is quantised, and baselines train float weights; give a float base")


@dataclass(frozen=True, repr=False)
class Baseline(Cited):
    """A baseline, by name, with its formula and where it comes from."""

    name: str
    make: Callable[[BaselineContext], Method]
    formula: str
    source: str
    lr: float
    """learning rate where none is given"""
    options: dict[str, float] = field(default_factory=dict)
    """the options and their defaults"""
    chooses: bool = False
    """whether entries are chosen by a rule, to be trained along"""
    low_rank: bool = False
    """whether factors of linear layers are trained, which `targets` names"""
    fisher: bool = False
    """whether it takes examples of what is not to be forgotten"""
    rates: tuple[float, ...] = (3e-6, 1e-5, 3e-5, 1e-4)
    """learning rates that a study tries, where it is told none"""


BASELINES: dict[str, Baseline] = {}
FACTOR_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
Make = Callable[[BaselineContext], "Method"]


def baseline(
    formula: str, source: str, lr: float, options: Mapping[str, float] | None = None, **more: Any
) -> Callable[[Make], Make]:
    """Makes a function a baseline, by its name; see `Baseline`."""

    def register(make: Make) -> Make:
        name = make.__name__.replace("_", "-")
        BASELINES[name] = Baseline(name, make, formula, source, lr, dict(options or {}), **more)
        return make

    return register


def baseline_named(name: str) -> Baseline:
    """The baseline called `name`.

    Raises:
        FinepointError: there is no such baseline; the known ones are listed.
    """
    return named(BASELINES, name, *REGISTRIES["baseline"])


def options_of(baseline: Baseline, given: Mapping[str, float]) -> dict[str, float]:
    """The baseline's options, those given over the defaults.

    Raises:
        FinepointError: an option the baseline does not have, or a value it cannot take.
    """
    for option in given:
        if option not in baseline.options:
            known = ", ".join(baseline.options) or "none"
            raise FinepointError(f"baseline {baseline.name!r} has no option {option!r}; its options: {known}")
    options = baseline.options | dict(given)
    if "alpha" in options and "alpha" not in given:
        options["alpha"] = 2 * options["rank"]
    for option, (fits, expected) in LIMITS.items():
        if option in options and not fits(options[option]):
            raise FinepointError(f"baseline option {option} is {options[option]:g}; it is {expected}")
    return options


LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "rank": (lambda value: value >= 1 and value == int(value), "a whole number from 1"),
    "alpha": (lambda value: value > 0, "above 0"),
    "dropout": (lambda value: 0 <= value < 1, "a probability, in [0, 1)"),
    "strength": (lambda value: value >= 0, "at least 0"),
    "share": (lambda value: 0 < value <= 1, "a share of each tensor, in (0, 1]"),
    "ratio": (lambda value: value > 0, "above 0"),
    "frozen": (lambda value: 0 <= value < 1, "a share of each matrix's singular directions, in [0, 1)"),
}


@baseline("every weight", "full fine-tuning", 3e-5)
def full(context: BaselineContext) -> Method:
    return _dense(context, _all(context.model))


@baseline("the output matrix alone", "head only", 3e-4, rates=(1e-5, 3e-5, 1e-4, 3e-4))
def head(context: BaselineContext) -> Method:
    if context.head:
        return _dense(context, context.head)
    output = context.model.get_output_embeddings()
    if output is None:
        raise FinepointError(f"{type(context.model).__name__} names no output matrix, so there is no head to train")
    owned = {id(parameter) for parameter in output.parameters()}
    named = context.model.named_parameters(remove_duplicate=False)
    return _dense(context, [name for name, parameter in named if id(parameter) in owned])


@baseline("biases and norms alone", "BitFit, arXiv:2106.10199", 1e-3, rates=(3e-4, 1e-3, 3e-3, 1e-2))
def bitfit(context: BaselineContext) -> Method:
    vectors = [name for name, parameter in context.model.named_parameters() if parameter.ndim == 1]
    return _dense(context, [*vectors, *context.head])


@baseline("half of each block's matrices, drawn by the seed", "HFT, arXiv:2404.18466", 3e-5)
def random_half(context: BaselineContext) -> Method:
    names = half_of_matrices(context.model, context.seed)
    return _dense(context, [*names, *context.head])


LOW_RANK = {"rank": 8.0, "alpha": 16.0, "dropout": 0.0}


@baseline("W + (alpha/rank) B A", "LoRA, arXiv:2106.09685", 1e-3, LOW_RANK, low_rank=True, rates=FACTOR_RATES)
def lora(context: BaselineContext) -> Method:
    return _method(_low_rank(context, context.head))


@baseline("m (W + (alpha/rank) B A) / |W + (alpha/rank) B A|, by rows", "DoRA, arXiv:2402.09353", 1e-3, LOW_RANK,
          low_rank=True, rates=FACTOR_RATES)  # fmt: skip
def dora(context: BaselineContext) -> Method:
    return _method(_low_rank(context, context.head, dora=True))


def _low_rank(context: BaselineContext, head: Sequence[str], **more: Any) -> PeftTuner:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from finepoint.baselines.peft import PeftTuner
    from finepoint.selection.targets import target_weights

    names = target_weights(context.model, context.targets)
    layers = [name.rpartition(".")[0] for name in names]
    for name, layer in zip(names, layers, strict=True):
        if not isinstance(context.model.get_submodule(layer), nn.Linear | Conv1D) or not name.endswith(".weight"):
            raise FinepointError(f"{name} is no linear layer's weight, which LoRA needs; give other --targets")
    rank, alpha, dropout = (context.options[option] for option in ("rank", "alpha", "dropout"))
    return PeftTuner(
        context.model, layers, head, rank=int(rank), alpha=alpha, dropout=dropout, seed=context.seed, **more
    )


@baseline("W + sparse + (alpha/rank) B A; entries by --rule, their rate is ratio x lr", "RoSA, arXiv:2401.04679", 1e-3,
          LOW_RANK | {"ratio": 1.0}, chooses=True, low_rank=True, rates=FACTOR_RATES)  # fmt: skip
def rosa(context: BaselineContext) -> Method:
    import torch

    from finepoint.baselines.rosa import HybridTuner
    from finepoint.tuner.tuner import SparseTuner

    whole = {name: torch.arange(context.model.get_parameter(name).numel()) for name in context.head}
    sparse = SparseTuner(context.model, dict(context.indices) | whole, audit=context.audit)
    try:
        low_rank = _low_rank(context, (), beside=sparse)
    except FinepointError:
        sparse.close()
        raise
    groups: list[dict[str, Any]] = [
        {"params": [*low_rank.trained().values()]},
        {"params": sparse.parameters(), "lr": context.options["ratio"] * context.lr},
    ]
    optimizer = torch.optim.AdamW(groups, lr=context.lr, weight_decay=context.weight_decay)
    return _method(HybridTuner(sparse, low_rank, context.head), optimizer=optimizer)


@baseline("every weight; loss + (strength/2) sum F (w - w0)^2", "EWC, arXiv:1612.00796", 3e-5, {"strength": 1000.0},
          fisher=True)  # fmt: skip
def ewc(context: BaselineContext) -> Method:
    from finepoint.selection.statistics import stream_statistics
    from finepoint.tuner.anchor import Anchor

    weights = {name: weight for name, weight in context.model.named_parameters() if name not in context.head}
    statistics = stream_statistics(context.model, weights, context.fisher_batches, ["squared_gradient"], context.memory)
    fisher = {name: found.squared_gradient for name, found in statistics if found.squared_gradient is not None}
    tuner = _dense_tuner(context, _all(context.model))
    start = {name: value.detach().clone() for name, value in tuner.trained().items() if name in fisher}
    return _method(tuner, penalty=Anchor(tuner.trained, fisher, context.options["strength"], start))


@baseline("every weight; a step moves the largest |momentum| of each tensor", "MoFO, arXiv:2407.20999", 3e-5,
          {"share": 0.15})  # fmt: skip
def mofo(context: BaselineContext) -> Method:
    from finepoint.tuner.optimizers import MoFOAdamW

    tuner = _dense_tuner(context, _all(context.model))
    optimizer = MoFOAdamW(
        tuner.trained().values(), context.options["share"], context.lr, weight_decay=context.weight_decay
    )
    return _method(tuner, optimizer=optimizer)


@baseline("linear layers; a step D is (I - U U^T) D (I - V V^T), U and V the base's largest singular vectors, a share "
          "of all", "after OSF, arXiv:2504.07097", 3e-5, {"frozen": 0.5})  # fmt: skip
def orthogonal(context: BaselineContext) -> Method:
    from finepoint.selection.targets import target_weights
    from finepoint.tuner.optimizers import OrthogonalAdamW, largest_directions

    tuner = _dense_tuner(context, [*target_weights(context.model, "linear"), *context.head])
    trained, share = tuner.trained(), context.options["frozen"]
    frozen: dict[Tensor, tuple[Tensor, Tensor]] = {
        value: largest_directions(value.detach(), share) for name, value in trained.items() if name not in context.head
    }
    optimizer = OrthogonalAdamW(trained.values(), frozen, context.lr, weight_decay=context.weight_decay)
    return _method(tuner, optimizer=optimizer)


def half_of_matrices(model: nn.Module, seed: int) -> list[str]:
    """HFT's choice: in every block half of attention's matrices and half of the MLP's, drawn from the seed.

    Where their number is odd, a random half of the blocks has one more than the others.
    """
    from finepoint.models.loading import block_of
    from finepoint.selection.targets import target_weights

    draw = random.Random(f"half:{seed}")
    chosen = []
    for category in ("attention", "mlp"):
        blocks: dict[str | None, list[str]] = {}
        for name in target_weights(model, category):
            blocks.setdefault(block_of(model, name), []).append(name)
        fuller = set(draw.sample(list(blocks), len(blocks) // 2))
        for block, names in blocks.items():
            size = (len(names) + (block in fuller)) // 2
            chosen += draw.sample(names, size)
    return chosen


def _dense_tuner(context: BaselineContext, names: Sequence[str]) -> DenseTuner:
    from finepoint.baselines.dense import DenseTuner

    return DenseTuner(context.model, names)


def _dense(context: BaselineContext, names: Sequence[str]) -> Method:
    return _method(_dense_tuner(context, names))


def _method(tuner: Any, **more: Any) -> Method:
    from finepoint.tuner.interface import Method

    return Method(tuner, **more)


def _all(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
