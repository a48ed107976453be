"""Scores to indices: exactly the entries with the highest scores, without ever holding all scores."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finepoint.errors import FinepointError
from finepoint.models.loading import block_of
from finepoint.models.quantised import float_values
from finepoint.models.weights import in_memory
from finepoint.runtime import distributed
from finepoint.runtime.settings import fits, spelled
from finepoint.selection.passes import Batch, drawn
from finepoint.selection.reach import is_text, reached_by_text
from finepoint.selection.rules import OURS, STATISTICS, Rule, checked_options, rule_named
from finepoint.selection.settings import DEFAULT_RULE, refuse_two_sizes
from finepoint.selection.statistics import Statistics, seeded_generator, stream_statistics
from finepoint.selection.structure import (
    Pooling,
    Tiling,
    columns_within,
    confine,
    entries_within,
    places_within,
    room_within,
    share_within,
    tilings,
)
from finepoint.selection.summary import Summary
from finepoint.selection.targets import Targets, match, target_weights
from finepoint.selection.uniform import draw_uniformly

Scope = Literal["global", "weight", "layer"]
Threshold = Literal["exact", "sampled"]
Scored = tuple[str, Tensor, Tensor | None]
"""A weight's name, the scores of its entries or groups, and each entry's |gradient| where the rule uses gradients."""

SLICE = 1 << 22  # scores looked at in one go: bounds the temporaries of one large weight
SAMPLE = 1 << 20  # scores from which --threshold sampled estimates its thresholds


@dataclass(frozen=True)
class Selection(Mapping[str, Tensor]):
    """The chosen indices: a mapping from weight name to flat positions, (k,) int64, ascending, unique.

    Weights without a chosen entry are left out.
    """

    indices: dict[str, Tensor]
    rule: str
    statistics: dict[str, Any] = field(default_factory=dict, repr=False)
    """Counts, shares and quantiles of the chosen entries against all (see `selection/summary.py`); JSON-ready."""

    def __getitem__(self, name: str) -> Tensor:
        return self.indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"Selection({self.count:,} entries of {len(self)} weights, rule {self.rule})"

    @property
    def count(self) -> int:
        """How many entries are chosen in all."""
        return sum(len(indices) for indices in self.indices.values())

    def told(self, scope: str) -> dict[str, Any]:
        """How it was made, as an adapter says it."""
        found = self.statistics
        groups = {key: found[key] for key in ("structure", "within") if found.get(key, "entry") != "entry"}
        return {"rule": self.rule, "density": found.get("density"), **groups, "scope": scope, "selection": found}


@dataclass(frozen=True)
class Budget:
    """So many entries out of these weights, compared with each other."""

    names: tuple[str, ...]
    k: int


def select(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    rule: str = DEFAULT_RULE,
    density: float | None = None,
    count: int | None = None,
    scope: Scope = "global",
    targets: Targets = "linear",
    exclude: Sequence[Mapping[str, Tensor]] = (),
    seed: int = 0,
    scoring_memory: float | Literal["disk"] = 1.0,
    threshold: Threshold = "exact",
    rule_options: Mapping[str, float] | None = None,
    structure: str = "entry",
    pooling: Pooling = "mean",
    within: str | None = None,
    plan: Sequence[Budget] | None = None,
    stream: Callable[..., Iterator[tuple[str, Statistics]]] = stream_statistics,
    text: bool = False,
    kept: Iterable[Batch] = (),
    gguf: str | Path | None = None,
) -> Selection:
    """Chooses the entries to train; the model is left exactly as found.

    Several processes (torch.distributed) call it together with the same batches; each scores on its share and all
    choose the same entries.

    Args:
        model: a model whose forward takes a batch and returns an output with a `loss`.
        batches: scoring examples, each a mapping with `labels`; only gradient rules need them.
        rule: a name from `finepoint.RULES` or of a plug-in, or `module:function`.
        density, count: share of the target entries to choose, in (0, 1], or how many; 0.001 where neither is given.
        scope: `global` compares all target entries with each other, `layer` those of one decoder block, `weight`
            those of one weight; the budget is spread in proportion to size.
        targets: see `target_weights`; a mapping from pattern to density gives every pattern its own budget.
        exclude: adapters (or indices by weight name) whose entries may not be chosen; of weights of this model.
        seed: for rules that draw, and for the sampled threshold.
        scoring_memory: share of the weights whose gradients are held at a time: less, more passes; `disk`: one pass.
        threshold: `exact` gives exactly k entries; `sampled` about k, those above an estimated threshold.
        rule_options: the rule's options, e.g. `{"epsilon": 1e-6}`.
        structure: `entry`; or whole groups of entries, each scored by the `pooling` of its entries' scores: `row` and
            `column` of a weight as it is stored, `block:RxC`, `head` (of an attention projection). Density and count
            then are shares and numbers of groups, and a group with an excluded entry is not chosen.
        pooling: `mean`, which puts groups of different sizes on one scale, or `sum`.
        within: `columns:SHARE`: entries in so large a share of each weight's columns alone, those of the highest scores
            (for `random` drawn), so that no more of a layer's input is kept for the backward pass.
        plan: how many out of which target weights, each weight once, instead of density, count and scope.
        stream: where statistics come from; another one with `stream_statistics`' parameters may have kept them.
        text: it will be trained on text alone, as such batches say too; weights that text never reaches take no part.
        kept: for `gain`: text to be kept, labelled where the model is to go on as it does; with whatever labels.
        gguf: for rules that look at the grid (`step`, `room`): the GGUF file that the model was loaded from.

    Raises:
        FinepointError: unknown rule or option, no target matched, a density that is out of range or chooses nothing,
            missing batches, scores that are not finite, a target weight that is not in memory.
    """
    _check_words(scope=scope, pooling=pooling, threshold=threshold)
    chosen_rule = rule_named(rule)
    options, batches = checked_options(chosen_rule, rule_options or {}), list(batches or ())
    kept = drawn(model, list(kept), seed) if chosen_rule.needs_kept else []
    weights, plan = _taking_part(model, targets, plan, text or is_text(batches))
    cut, share = tilings(model, weights, structure), share_within(within, structure, density)
    columns = tilings(model, weights, "column") if share else {}
    taken = {name: cut[name].tiles(out) for name, out in _union(exclude, model, weights).items()}
    sizes, held = _sizes(cut, taken, columns, share or 1)
    plan = plan or budgets(model, sizes, held, density=density, count=count, scope=scope, targets=targets)
    summary = Summary(seed)

    def scores() -> Iterator[Scored]:
        sources = chosen_rule.needs, scoring_memory, chosen_rule.options | options, kept, gguf and Path(gguf)
        for name, found in stream(model, weights, batches, *sources):
            scored = _scored(chosen_rule, name, weights[name], found, seed, options, cut[name], pooling, taken, summary)
            yield _confined(scored, columns[name], share, pooling, chosen_rule, seed) if share else scored

    exactly = partial(_uniform, weights, taken, summary, columns, share) if chosen_rule.uniform else exact
    tiles, gradients = (sampled if threshold == "sampled" else exactly)(scores, plan, sizes, seed)
    _check_room(tiles, plan, within if threshold == "exact" else None)
    indices = {name: cut[name].indices(tiles[name]) for name in weights if len(tiles.get(name, ()))}
    return Selection(indices, chosen_rule.name, summary.result(weights, indices, gradients, plan, structure, within))


def _uniform(
    weights: Mapping[str, nn.Parameter],
    taken: Mapping[str, Tensor],
    summary: Summary,
    columns: Mapping[str, Tiling],
    share: float | None,
    scores: Any,
    plan: Sequence[Budget],
    sizes: Mapping[str, int],
    seed: int,
) -> "Chosen":
    """What the rule `random` chooses, without a score for each entry; in a share of the columns, if there is one."""
    confined = {name: _drawn_columns(name, columns[name], share, seed) for name in weights} if share else {}
    for name, weight in weights.items():
        summary.see(name, distributed.whole(weight), None)
    sizes = dict(sizes) | {name: len(kept) * columns[name].height for name, kept in confined.items()}
    taken = dict(taken) | {name: places_within(taken[name].cpu(), columns[name], kept)
                           for name, kept in confined.items() if name in taken}  # fmt: skip
    found: dict[str, Tensor] = {}
    for budget in plan:
        part = {name: sizes[name] for name in budget.names}
        free = sum(part.values()) - sum(len(taken.get(name, ())) for name in part)
        if part:
            found |= draw_uniformly(part, min(budget.k, free), taken, seed)
    return {name: entries_within(places, columns[name], confined[name]) if name in confined else places
            for name, places in found.items()}, {}  # fmt: skip


def _scored(
    rule: Rule,
    name: str,
    weight: nn.Parameter,
    statistics: Statistics,
    seed: int,
    options: Mapping[str, float],
    cut: Tiling,
    pooling: Pooling,
    taken: Mapping[str, Tensor],
    summary: Summary,
) -> Scored:
    """What a weight offers; -inf for what may not be chosen."""
    weight = distributed.whole(weight)  # of a sharded model one weight at a time is put together
    values = score(rule, name, weight, statistics, seed, options)
    gradient = None if statistics.gradient is None else statistics.gradient.abs()
    summary.see(name, weight, gradient)
    # A mean of many draws is near the middle, which would leave random's choice to the smallest groups.
    values = cut.pooled(values, "first" if rule.uniform else pooling)
    if name in taken:  # on a copy: a rule may have returned the weight itself
        values = values.index_fill(0, taken[name].to(values.device), -torch.inf)
    return name, values, gradient if cut.is_entries else None


def _sizes(
    cut: Mapping[str, Tiling], taken: Mapping[str, Tensor], columns: Mapping[str, Tiling], share: float
) -> tuple[dict[str, int], dict[str, int]]:
    """How many entries or groups each weight has, and how many of them at least may not be chosen."""
    sizes = {name: tiling.count for name, tiling in cut.items()}
    # Where the columns lie is not known yet.
    outside = {name: sizes[name] - room_within(tiling, share) for name, tiling in columns.items()}
    return sizes, {name: max(outside.get(name, 0), len(taken.get(name, ()))) for name in sizes}


def _confined(scored: Scored, columns: Tiling, share: float, pooling: Pooling, rule: Rule, seed: int) -> Scored:
    """What a weight offers in the best share of its columns, or in such as are drawn; -inf elsewhere."""
    name, values, gradient = scored
    if rule.uniform:
        kept = _drawn_columns(name, columns, share, seed)
    else:
        by = columns.pooled(values.masked_fill(values == -torch.inf, 0), pooling)
        kept = largest(by, columns_within(columns, share))
    return name, confine(values, columns, kept), gradient


def _drawn_columns(name: str, columns: Tiling, share: float, seed: int) -> Tensor:
    """So large a share of a weight's columns, drawn: their numbers, ascending."""
    by = torch.rand(columns.count, generator=seeded_generator(seed, f"columns of {name}"), dtype=torch.float64)
    return largest(by, columns_within(columns, share))


def _check_room(tiles: Mapping[str, Tensor], plan: Sequence[Budget], within: str | None) -> None:
    found, wanted = sum(map(len, tiles.values())), sum(budget.k for budget in plan)
    if within and found < wanted:
        raise FinepointError(f"{wanted} entries are asked for, and {found} are left within {within} after exclude; "
                             "give a larger share, or a lower density")  # fmt: skip
    if not found:
        raise FinepointError("no entry was chosen: every score lies below the sampled threshold; use --threshold exact")


def _taking_part(
    model: nn.Module, targets: Targets, plan: Sequence[Budget] | None, text: bool
) -> tuple[dict[str, nn.Parameter], Sequence[Budget] | None]:
    """The target weights and the plan without those that the data cannot reach."""
    weights = in_memory(target_weights(model, targets))
    if text:
        weights = reached_by_text(model, weights)
        plan = [Budget(tuple(name for name in part.names if name in weights), part.k) for part in plan or ()]
    return weights, plan


def _check_words(**given: str) -> None:
    for name, kind in (("scope", Scope), ("pooling", Pooling), ("threshold", Threshold)):
        if not fits(given[name], kind):
            raise FinepointError(f"{name} is {given[name]!r}; it is {' or '.join(spelled(kind))}")


def score(rule: Rule, name: str, weight: Tensor, statistics: Any, seed: int, options: Mapping[str, float]) -> Tensor:
    """The rule's scores of one weight: finite, the weight's shape.

    Raises:
        FinepointError: the rule gave another shape, or a number that is not finite; or one that is not ours failed.
    """
    offered = {"weight": float_values(weight), "generator": seeded_generator(seed, name)}
    offered |= {need: getattr(statistics, need) for need in STATISTICS}
    try:
        with torch.no_grad():
            scores = rule.score(**{need: offered[need] for need in rule.needs}, **options)
    except Exception as error:
        if rule.package == OURS:
            raise
        raise FinepointError(f"rule {rule.name!r} of {rule.package} failed on {name}: {type(error).__name__}: "
                             f"{error}") from error  # fmt: skip
    if not isinstance(scores, Tensor):
        raise FinepointError(f"rule {rule.name!r} gave {type(scores).__name__} for {name}, not a tensor of scores")
    if scores.shape != weight.shape:
        raise FinepointError(f"rule {rule.name!r} gave scores of shape {tuple(scores.shape)} for {name}, "
                             f"which has shape {tuple(weight.shape)}")  # fmt: skip
    if not scores.is_floating_point() or not torch.isfinite(scores).all():
        raise FinepointError(f"rule {rule.name!r} gave scores that are not finite numbers for {name}")
    return scores.contiguous()


def budgets(
    model: nn.Module,
    sizes: Mapping[str, int],
    taken: Mapping[str, int],
    *,
    density: float | None,
    count: int | None,
    scope: Scope,
    targets: Targets,
) -> list[Budget]:
    """How many entries (or groups) to choose out of which weights; the counts add up to exactly round(density x all).

    Args:
        sizes: how many every target weight has.
        taken: how many of them may not be chosen.
    """
    refuse_two_sizes(density, count, targets)
    parts: list[tuple[list[str], float, int | None]]
    if isinstance(targets, Mapping):
        parts = [(names, share, None) for names, share in _pattern_parts(model, sizes, targets)]
    else:
        parts = [(list(sizes), density if density is not None else 1e-3, count)]

    plan = []
    for names, share, fixed in parts:
        total = sum(sizes[name] for name in names)
        k = fixed if fixed is not None else _count(share, total)
        if not 1 <= k <= total:
            raise FinepointError(f"count is {k}; the targets have {total} entries, so give 1 to {total}")
        groups = _groups(model, names, scope)
        free = [sum(sizes[name] - taken.get(name, 0) for name in group) for group in groups]
        if k > sum(free):
            raise FinepointError(
                f"{k} entries are asked for and {sum(free)} are left after exclude and within; lower the "
                "density or the count, or give a larger share of within"
            )
        shares = allocate([sum(sizes[name] for name in group) for group in groups], free, k)
        plan += [Budget(tuple(group), k) for group, k in zip(groups, shares, strict=True)]
    return plan


def share_chosen(model: nn.Module, targets: Targets, structure: str, count: int | None) -> float:
    """The share of all target entries that a count, or densities by pattern, come to."""
    weights = target_weights(model, targets)
    sizes = {name: tiling.count for name, tiling in tilings(model, weights, structure).items()}
    plan = budgets(model, sizes, {}, density=None, count=count, scope="global", targets=targets)
    return sum(part.k for part in plan) / sum(sizes.values())


def _count(density: float, total: int) -> int:
    if not (isinstance(density, Real) and 0 < density <= 1):
        raise FinepointError(f"density is {density!r}; it is a share of the target entries, in (0, 1]")
    k = int(density * total + 0.5)
    if not k:
        raise FinepointError(f"density {density} chooses none of {total} entries; use at least {1 / total:.2g}")
    return k


def _pattern_parts(
    model: nn.Module, weights: Iterable[str], targets: Mapping[str, float]
) -> list[tuple[list[str], float]]:
    """The weights of every pattern with its density; a weight that several match belongs to the first."""
    free = dict.fromkeys(weights)
    parts = []
    for pattern, density in targets.items():
        names = [name for name in match(model, pattern.strip()) if name in free]
        for name in names:
            del free[name]
        if names:
            parts.append((names, density))
    return parts


def compared(model: nn.Module, names: Sequence[str], scope: Scope, targets: Targets) -> list[list[str]]:
    """The target weights, by name, in groups of those whose entries are compared with each other."""
    parts = [part for part, _ in _pattern_parts(model, names, targets)] if isinstance(targets, Mapping) else [names]
    return [group for part in parts for group in _groups(model, part, scope)]


def _groups(model: nn.Module, names: Sequence[str], scope: Scope) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        key = {"global": "", "weight": name, "layer": block_of(model, name) or name}[scope]
        groups[key].append(name)
    return list(groups.values())


def allocate(sizes: Sequence[int], free: Sequence[int], k: int) -> list[int]:
    """Spreads k over groups in proportion to their sizes (largest remainder), at most `free` each; the sum is k.

    What a group cannot take goes to the others in the same proportion.
    """
    counts = [0] * len(sizes)
    open_groups = [i for i in range(len(sizes)) if free[i]]
    while left := k - sum(counts):
        total = sum(sizes[i] for i in open_groups)
        # Integer arithmetic: a quotient of floats would lose exactness beyond 2^53.
        fair = {i: divmod(left * sizes[i], total) for i in open_groups}
        by_remainder = sorted(open_groups, key=lambda i: (-fair[i][1], i))
        extra = set(by_remainder[: left - sum(quotient for quotient, _ in fair.values())])
        for i in open_groups:
            counts[i] = min(free[i], counts[i] + fair[i][0] + (i in extra))
        open_groups = [i for i in open_groups if counts[i] < free[i]]
    return counts


def refuse_excluded(indices: Mapping[str, Tensor], exclude: Sequence[Mapping[str, Tensor]], model: nn.Module) -> None:
    """Refuses entries that were given, where some of them are excluded.

    Raises:
        FinepointError: it is so; or what is excluded is not of this model.
    """
    taken, own = (_union(part, model, dict(model.named_parameters())) for part in (exclude, [indices]))
    for name in taken.keys() & own.keys():
        if shared := int(torch.isin(own[name].cpu(), taken[name].cpu()).sum()):
            raise FinepointError(f"{shared} of the entries of {name} that are given are to be excluded, too; give "
                                 "others, or leave out exclude")  # fmt: skip


def _union(adapters: Sequence[Mapping[str, Tensor]], model: nn.Module, weights: Collection[str]) -> dict[str, Tensor]:
    """All indices of these weights that occur in any of the adapters, by weight, each once.

    Raises:
        FinepointError: an adapter names a weight that the model has not, or an index outside one; or is no mapping.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[Tensor]] = defaultdict(list)
    for adapter in adapters:
        if not isinstance(adapter, Mapping):
            raise FinepointError(f"exclude holds {adapter!r}; give a list of adapters, each as SparseAdapter.load "
                                 "gives it, or of indices by weight name")  # fmt: skip
        for name in adapter:
            if name not in parameters:
                raise FinepointError(f"the model has no weight {name!r}, entries of which are to be excluded; "
                                     f"its weights are called like {next(iter(first.values()))!r}")  # fmt: skip
            indices, entries = adapter[name], parameters[name].numel()
            if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < entries:
                raise FinepointError(f"an index to exclude lies outside {name}, which has {entries} entries")
            if (own := first[id(parameters[name])]) in weights:  # a tied weight goes by its first name
                found[own].append(indices)
    return {name: torch.cat(parts).unique() for name, parts in found.items()}


class TopK:
    """The k largest of a stream of scores, ties to the earlier one; holds at most 2k + one slice of candidates."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.floor = -torch.inf  # once k candidates are held, only a larger score can enter
        self.held = 0
        self.columns: list[tuple[Tensor, ...]] = []

    def add(self, source: int, scores: Tensor, extra: Tensor | None) -> None:
        """Offers all scores of one weight (any shape), with a number to carry along for each; -inf is never taken."""
        flat = scores.view(-1)
        carried = flat if extra is None else extra.reshape(-1)
        for start in range(0, len(flat) if self.k else 0, SLICE):
            values = flat[start : start + SLICE]
            positions = (values > self.floor).nonzero().view(-1)
            if not len(positions):
                continue
            values = values[positions]
            positions += start
            columns = (
                values.cpu(),
                torch.full_like(positions, source).cpu(),
                positions.cpu(),
                carried[positions].cpu(),
            )
            self.columns.append(columns)
            self.held += len(positions)
            if self.held >= 2 * self.k:
                self._prune()

    def _prune(self) -> None:
        columns = tuple(torch.cat(parts) for parts in zip(*self.columns, strict=True))
        if self.held > self.k:
            kept = largest(columns[0], self.k)
            columns = tuple(column[kept] for column in columns)
        self.columns = [columns]
        self.held = len(columns[0])
        if self.held == self.k:
            self.floor = columns[0].min().item()

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sources, positions and carried numbers of the k largest, in the order they were offered."""
        if not self.columns:
            return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0)
        self._prune()
        _, sources, positions, carried = self.columns[0]
        return sources, positions, carried


def largest(values: Tensor, k: int) -> Tensor:
    """Positions of the k largest values, ascending; ties go to the lower position. values: (n,), k <= n."""
    if not k:
        return torch.empty(0, dtype=torch.long, device=values.device)
    threshold = torch.topk(values, k, sorted=False).values.min()
    keep = values > threshold
    ties = (values == threshold).nonzero().view(-1)
    keep[ties[: k - int(keep.sum())]] = True
    return keep.nonzero().view(-1)


Chosen = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Indices by weight, and the |gradient| at them (empty where the rule uses none)."""


def exact(scores: Callable[[], Iterable[Scored]], plan: Sequence[Budget], sizes: Iterable[str], seed: int) -> Chosen:
    """Exactly k entries for each budget: one pass over the scores, bounded memory."""
    names = list(sizes)
    source = {name: i for i, name in enumerate(names)}
    pools = [TopK(budget.k) for budget in plan]
    pool_of = {name: pool for budget, pool in zip(plan, pools, strict=True) for name in budget.names}
    has_gradient = False
    for name, values, gradient in scores():
        pool_of[name].add(source[name], values, gradient)
        has_gradient |= gradient is not None

    indices: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for budget, pool in zip(plan, pools, strict=True):
        sources, positions, carried = pool.result()
        for name in budget.names:
            mine = sources == source[name]
            indices[name] = positions[mine]
            if has_gradient:
                gradients[name] = carried[mine]
    return indices, gradients


def sampled(
    scores: Callable[[], Iterable[Scored]], plan: Sequence[Budget], sizes: Mapping[str, int], seed: int
) -> Chosen:
    """All entries that reach a threshold estimated from a random sample: two passes, no candidates held, k near.

    The lean form of SAFT (Stuttgart master thesis 134, 2024): the threshold of a budget is the (k+1)-th largest of
    its scores in expectation, read off a uniform sample of about `SAMPLE` scores of all weights.
    """
    total = sum(sizes.values())
    samples: dict[str, Tensor] = {}
    for name, values, _ in scores():
        flat = values.view(-1)
        size = max(1, min(len(flat), SAMPLE * len(flat) // total))
        draw = torch.randint(len(flat), (size,), generator=seeded_generator(seed, f"threshold {name}"))
        samples[name] = flat[draw.to(flat.device)].cpu()

    thresholds: dict[str, float] = {}
    for budget in plan:
        sample = torch.cat([samples[name] for name in budget.names]).sort(descending=True).values
        share = budget.k / sum(sizes[name] for name in budget.names)
        # At least one sampled score must lie above the threshold, or it would not be an estimate.
        rank = max(1, round(share * len(sample)))
        thresholds |= dict.fromkeys(budget.names, sample[rank - 1].item())

    indices: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for name, values, gradient in scores():
        flat = values.view(-1)
        reached = ((flat >= thresholds[name]) & (flat > -torch.inf)).nonzero().view(-1)
        indices[name] = reached.cpu()
        if gradient is not None:
            gradients[name] = gradient.reshape(-1)[reached].cpu()
    return indices, gradients
