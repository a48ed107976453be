"""The rules: each scores every entry of one weight, higher = train it.

A rule is one function. Its parameters say what it needs, and it is given just that:

    weight            the weight as it is, any shape and dtype
    gradient          the weight's shape: the signed mean of the loss gradient over the scoring examples
    squared_gradient  the weight's shape: the mean over the examples of the squared per-example gradient
    input_norm        a shape that broadcasts against the weight's: the norm of every input over all tokens of the
                      scoring examples (`input_norms.py`), (1, in) for a linear layer; other weights are refused
    movement          the weight's shape: the sum over a short training of -w g (`warmup.py`; options `steps`, `lr`)
    change            the weight's shape: what a short training adds to the weight (the same)
    kept_squared_gradient  the weight's shape: the Fisher information, a token, of text that is to be kept
    kept_mean         a scalar: its mean over all target weights
    kept_input_norm   as `input_norm`, over the text that is to be kept
    grid_step         the weight's shape: on the grid of a quantised base, how far neighbouring numbers lie apart there
    grid_room         the weight's shape: how far the entry can go against its mean gradient before the grid ends
    generator         a `torch.Generator` that depends on the seed and on the weight's name alone

All these are float32 (float64 over float64 weights). Every further parameter is an option with a default
(`--rule-options epsilon=1e-6`). A rule may be written as a formula, too: see `formula.py`. Rules of other packages
are found by name as well (`plugins.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from finepoint.errors import FinepointError
from finepoint.runtime.settings import Cited, did_you_mean
from finepoint.selection.formula import expression, is_expression
from finepoint.selection.plugins import function_of, offered, package_of

if TYPE_CHECKING:  # which a rule imports when it scores: a misspelt name is refused without waiting for it
    import torch
    from torch import Tensor

OURS = "finepoint"
FROM_DATA = ("gradient", "squared_gradient", "input_norm", "movement", "change", "grid_room")
"""What is made of the scoring examples."""
FROM_KEPT = ("kept_squared_gradient", "kept_mean", "kept_input_norm")
"""What is made of the text that is to be kept."""
FROM_GRID = ("grid_step", "grid_room")
"""What is made of the grid of a quantised base."""
STATISTICS = tuple(dict.fromkeys((*FROM_DATA, *FROM_KEPT, *FROM_GRID)))
NEEDS = ("weight", *STATISTICS, "generator")


@dataclass(frozen=True, repr=False)
class Rule(Cited):
    """A rule, by name, with its formula and where it comes from."""

    name: str
    score: Callable[..., Tensor]
    formula: str
    source: str
    package: str = OURS
    """what it comes from: finepoint, a package with its version, or a module"""

    @property
    def needs(self) -> tuple[str, ...]:
        """Which of `NEEDS` the function asks for."""
        return tuple(name for name in inspect.signature(self.score).parameters if name in NEEDS)

    @property
    def options(self) -> dict[str, float]:
        """The rule's options and their defaults."""
        parameters = inspect.signature(self.score).parameters.values()
        return {parameter.name: parameter.default for parameter in parameters if parameter.name not in NEEDS}

    @property
    def needs_data(self) -> bool:
        return any(need in FROM_DATA for need in self.needs)

    @property
    def needs_kept(self) -> bool:
        """Whether it looks at text that is to be kept."""
        return any(need in FROM_KEPT for need in self.needs)

    @property
    def needs_grid(self) -> bool:
        """Whether it looks at the grid of a quantised base."""
        return any(need in FROM_GRID for need in self.needs)

    @property
    def uniform(self) -> bool:
        """Whether it takes every set of entries alike, so that its choice can be drawn without scores."""
        return self is RULES["random"] and self.package == OURS


class _Rules(dict[str, Rule]):
    """The rules by name; printed a line each."""

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.values()))


RULES: dict[str, Rule] = _Rules()
"""The rules by name, each with its function, formula and source."""
ALIASES = {"sparta": "random", "saft": "gradient"}


def register(name: str, score: Callable[..., Tensor], formula: str = "", source: str = "", package: str = "") -> Rule:
    """Make a function known as a rule: `finepoint.register("mine", my_function)`.

    Args:
        formula: for the list of rules; the first line of the function's docstring where not given.
        source: whom to cite.
        package: what the function comes from; its module where not given.

    Raises:
        FinepointError: an option of the function has no default, or one that is no number.
    """
    formula = formula or (inspect.getdoc(score) or "").split("\n")[0]
    rule = Rule(name, score, formula, source, package or getattr(score, "__module__", ""))
    try:
        options = rule.options
    except (TypeError, ValueError) as error:  # no function, or one that hides its parameters
        raise FinepointError(f"rule {name!r} cannot be asked what it needs: {error}; give a plain function") from error
    for option, default in options.items():
        if default is inspect.Parameter.empty:
            raise FinepointError(
                f"rule {name!r} asks for {option!r}, which finepoint does not provide; it provides "
                f"{', '.join(NEEDS)}, and every other parameter needs a default"
            )
        if not isinstance(default, int | float):
            raise FinepointError(f"rule {name!r} has the option {option!r} with default {default!r}; give a number")
    RULES[name] = rule
    return rule


def rule_named(name: str) -> Rule:
    """The rule called `name`, one of its aliases, a plug-in's, the function at `module:function`, or a formula.

    Raises:
        FinepointError: there is no such rule; the known ones are listed. Or a plug-in is broken.
    """
    if ":" in name:
        return _imported(name)
    name = ALIASES.get(name, name)
    if name in RULES:
        return RULES[name]
    plugins = offered()
    if name in plugins:
        return register(name, function_of(name, plugins[name]), package=package_of(plugins[name][0]))
    if is_expression(name):
        return _formula(name)
    known = [*RULES, *ALIASES, *plugins]
    listed = f"known rules: {', '.join(known)}, module:function, or a formula of w, g, f, x, k, step and room such as "
    raise FinepointError(f"unknown rule {name!r}{did_you_mean(name, known, listed)} 'abs(g) / (abs(w) + 1e-6)'")


def _formula(text: str) -> Rule:
    return Rule(text, expression(text), text, "a formula")


def known_rule(name: object) -> Rule | None:
    """The rule that a stranger's file names, where no code need be run for it: finepoint's own, or a formula."""
    if not isinstance(name, str):
        return None
    name = ALIASES.get(name, name)
    if name in RULES:
        return RULES[name]
    try:
        return _formula(name) if is_expression(name) else None
    except FinepointError:
        return None


def checked_options(rule: Rule, options: Mapping[str, float]) -> dict[str, float]:
    """The options of a rule, refused by name where it has no such option."""
    for name in options:
        if name not in rule.options:
            known = ", ".join(f"{option}={default}" for option, default in rule.options.items()) or "none"
            raise FinepointError(f"rule {rule.name!r} has no option {name!r}; its options: {known}")
    for name, default in rule.options.items():
        if default is inspect.Parameter.empty and name not in options:
            raise FinepointError(f"rule {rule.name!r} leaves {name} open; give --rule-options {name}=..")
    return dict(options)


def every_rule() -> tuple[list[Rule], list[str]]:
    """finepoint's rules with those of all plug-ins that can be had, and what is wrong with the others."""
    problems = []
    for name, points in offered().items():
        if name in ALIASES or (name in RULES and RULES[name].package == OURS):
            problems.append(f"rule {name!r} of {package_of(points[0])} is hidden by finepoint's own of that name")
            continue
        try:
            rule_named(name)
        except FinepointError as error:
            problems.append(str(error))
    return list(RULES.values()), problems


def _imported(path: str) -> Rule:
    module, _, function = path.partition(":")
    try:
        return register(path, getattr(import_module(module), function), package=module)
    except (ImportError, AttributeError) as error:
        raise FinepointError(f"cannot import rule {path!r}: {error}") from error


def _rule(name: str, formula: str, source: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def add(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
        register(name, score, formula, source, OURS)
        return score

    return add


FLOOR = 0.1  # of the mean Fisher information, beneath that of any entry
TINIEST = 1e-30  # below any Fisher information that says something; a divisor that is not 0


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is float64: the dtype every score is computed in."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@_rule("random", "uniform in [0, 1), seeded by seed and weight name", "SpaRTA, arXiv:2502.15975")
def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    import torch

    from finepoint.runtime.devices import home_of_float64

    # 53 random bits: with the 24 of float32 a weight of 2^24 entries would be full of ties.
    return torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(home_of_float64(weight.device))


@_rule("gradient", "|mean g|", "SAFT, arXiv:2407.03036")
def gradient(gradient: Tensor) -> Tensor:
    return gradient.abs()


@_rule("gallop", "|mean g| / (|w| + epsilon)", "GaLLoP, arXiv:2510.19778")
def gallop(weight: Tensor, gradient: Tensor, epsilon: float = 1e-8) -> Tensor:
    refuse_negative("epsilon", epsilon)
    # float32, since |w| + 1e-8 is |w| in bfloat16 and in float16.
    return gradient.abs() / (wide(weight).abs() + epsilon)


@_rule("magnitude-low", "-|w|", "PaFi, arXiv:2305.16742")
def magnitude_low(weight: Tensor) -> Tensor:
    return -wide(weight).abs()


@_rule("magnitude-high", "|w|", "Super-Tuning, arXiv:2607.09287")
def magnitude_high(weight: Tensor) -> Tensor:
    return wide(weight).abs()


@_rule("snip", "|mean g * w|", "SNIP, arXiv:1810.02340")
def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    return (gradient * wide(weight)).abs()


@_rule("fisher", "mean over examples of (d log p(y|x) / dw)^2", "FISH, arXiv:2111.09839")
def fisher(squared_gradient: Tensor) -> Tensor:
    return squared_gradient


@_rule("lift", "|W'|, W' the best approximation of rank `rank`", "LIFT, arXiv:2506.00772")
def lift(weight: Tensor, generator: torch.Generator, rank: float = 32) -> Tensor:
    matrix = wide(weight)
    return (low_rank(matrix, int(rank), generator) if weight.ndim > 1 else matrix).abs()


@_rule("neuroada", "the place of |w| among the inputs of its output neuron (row)", "NeuroAda, arXiv:2510.18940")
def neuroada(weight: Tensor) -> Tensor:
    return by_row(wide(weight).abs())


@_rule("gps", "the place of |mean g| among the inputs of its output neuron (row)", "GPS, arXiv:2312.10136")
def gps(gradient: Tensor) -> Tensor:
    return by_row(gradient.abs())


@_rule("wanda", "|w| * norm of its input over the tokens of the scoring examples", "Wanda, arXiv:2306.11695")
def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    return wide(weight).abs() * input_norm


@_rule(
    "gain",
    "(mean g)^2 / (F + floor * mean F), F the Fisher information of text to keep (--protect)",
    "EWC's, arXiv:1612.00796, as a price",
)
def gain(gradient: Tensor, kept_squared_gradient: Tensor, kept_mean: Tensor, floor: float = FLOOR) -> Tensor:
    refuse_negative("floor", floor)
    return gradient.square() / (kept_squared_gradient + (floor * kept_mean).clamp(min=TINIEST))


@_rule("movement", "-sum of w g over a warm-up of `steps` steps of AdamW at `lr`", "movement pruning, arXiv:2005.07683")
def movement(movement: Tensor, steps: float = 50, lr: float = 1e-5) -> Tensor:
    return movement


@_rule(
    "lottery",
    "|change of w| by a warm-up of `steps` steps of AdamW at `lr`",
    "LT-SFT, arXiv:2110.07560; LoTA, arXiv:2406.16797",
)
def lottery(change: Tensor, steps: float = 50, lr: float = 1e-5) -> Tensor:
    return change.abs()


def refuse_negative(option: str, value: float) -> None:
    """Refuses what would make of a divisor another one than the formula's."""
    if not value >= 0:
        raise FinepointError(f"{option} is {value:g}; give 0 or more")


def by_row(values: Tensor) -> Tensor:
    """Scores by which the largest of every row come first, then all the second largest, ..; values: not negative.

    Between entries of one place the larger value decides, however small both are: a number's bits, read as an integer,
    are ordered as the number is, and a float64 has room for the 31 of a float32 behind the place. Of float64 values
    the leading bits count.
    """
    import torch

    from finepoint.runtime.devices import in_float64

    order = values.argsort(dim=-1, descending=True, stable=True)
    place = in_float64(order.argsort(dim=-1))
    whole, held = (torch.int64, 63) if values.dtype == torch.float64 else (torch.int32, 31)
    room = min(held, 52 - values.shape[-1:].numel().bit_length())
    bits = values.contiguous().view(whole) >> (held - room)
    scores = in_float64(bits) / 2.0**room - place
    return scores.masked_fill_(~values.isfinite().to(scores.device), torch.nan)


def low_rank(matrix: Tensor, rank: int, generator: torch.Generator, oversampling: int = 8, rounds: int = 4) -> Tensor:
    """The matrix (.., m, n) at a lower rank, nearly the best one: randomised subspace iteration (arXiv:0909.4061)."""
    import torch

    if rank < 1:
        raise FinepointError(f"rank is {rank}; it is a number of dimensions, 1 or more")
    if rank >= min(matrix.shape[-2:]):
        return matrix
    width = min(rank + oversampling, *matrix.shape[-2:])
    start = torch.randn(matrix.shape[-1], width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ start.to(matrix.dtype).to(matrix.device)).Q
    for _ in range(rounds):  # each sharpens the gap between what is kept and what is not
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    left, sizes, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ (left[..., :rank] * sizes[..., None, :rank]) @ right[..., :rank, :]
