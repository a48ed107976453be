"""Several adapters become one, entry by entry; nothing of a weight's size is ever made.

A method only says how much of each adapter's delta enters at each entry, as a table of coefficients. What is made of
the deltas, with which bits, and which base the result lies on, is the same for all.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.adapters.adapter import SparseAdapter, base_beneath, check_base
from finepoint.adapters.change import Change, Kind
from finepoint.adapters.entries import checksum, gather, moved
from finepoint.adapters.fingerprint import FINGERPRINT, Fingerprint, form_of, unlike
from finepoint.adapters.union import Aligned, aligned
from finepoint.errors import FinepointError
from finepoint.runtime.settings import REGISTRIES, named


def merge(
    adapters: Sequence[SparseAdapter],
    weights: Sequence[float] | None = None,
    how: str = "sum",
    *,
    model: nn.Module | None = None,
    **options: float,
) -> SparseAdapter:
    """One adapter of several, of any densities and rules, over the entries that any of them holds.

    Sums are taken in float64, in an order that does not depend on the adapters', and rounded once. Where nothing but
    one adapter's delta enters at an entry, its own bits are kept: merged disjoint adapters give the model that applying
    one after the other gives.

    Args:
        adapters: of one base model; none may hold whole weights (a new head, dense training).
        weights: a factor for each, 1 where not given; may be negative (task arithmetic, arXiv:2212.04089).
        how: one of `METHODS`.
        model: the base model, which stays as it is. Every adapter is then checked against it and the result has one
            checksum; without it the result keeps the checksums of its parts, with their indices. It is needed where
            adapters hold exact values (half precision) whose deltas matter.
        options: the method's, see there.

    Returns:
        Changes of kind `delta` (float32; float64 over float64 weights), or `value` where an adapter's are.

    Raises:
        FinepointError: adapters that do not go together or do not fit the model, numbers that are not finite, an
            unknown method or option, weights of the wrong count, a base model that is needed, nothing left.
    """
    factors = _checked(adapters, weights)
    coefficients, settings = _method(how, options)
    if model is not None:
        _check_base(adapters, model)
    parameters = dict(model.named_parameters(remove_duplicate=False)) if model is not None else {}
    changes = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        at = aligned(name, adapters, parameters.get(name))
        change = _combined(at, coefficients(at, factors, **settings))
        if len(change):
            changes[name] = change
    if not changes:
        raise FinepointError(f"merging by {how!r} leaves no entry; choose other options, weights or another method")
    return SparseAdapter(changes, _info(adapters, factors, how, settings), _base(adapters, model))


METHODS: dict[str, Callable[..., Tensor]] = {}


def method(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Makes a function a merge method, by this name; its options are its further parameters, all numbers.

    It gives coefficients, (n, u) float64, one for each adapter's delta at each entry of the union; `weights` are the
    adapters' factors, (n, 1) float64.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        METHODS[name] = function
        return function

    return register


@method("sum")
def add(at: Aligned, weights: Tensor) -> Tensor:
    """The weighted sum. Task arithmetic, arXiv:2212.04089."""
    return at.present * weights


@method("mean")
def mean(at: Aligned, weights: Tensor) -> Tensor:
    """The weighted mean over all adapters; one that has no entry leaves the base's value."""
    total = float(ordered_sum(weights))
    if abs(total) <= 1e-12 * float(weights.abs().sum()):
        raise FinepointError("the weights add up to 0, so they have no mean; use --how sum")
    return at.present * (weights / total)


@method("ties")
def ties(at: Aligned, weights: Tensor, density: float = 1.0, scale: float = 1.0) -> Tensor:
    """Trim each delta, elect the sign with the larger mass, average what agrees with it. TIES, arXiv:2306.01708.

    Args:
        density: share of each adapter's entries of a weight that trimming keeps, the largest.
        scale: factor of the merged delta, the paper's lambda.
    """
    _within("density", density, 0 < density <= 1, "in (0, 1]")
    deltas = at.deltas * at.spread([_largest(at.deltas[i, place], density) for i, place in enumerate(at.places)])
    weighted = deltas * weights
    elected = torch.where(ordered_sum(weighted) >= 0, 1.0, -1.0)  # equal masses: the positive sign
    agree = weighted.sign() == elected
    # By the weights' size: of a subtracted adapter's lone entry remains the subtracted delta.
    shares = agree * weights
    return scale * shares / ordered_sum(shares.abs()).clamp(min=torch.finfo(torch.float64).tiny)


@method("dare")
def dare(at: Aligned, weights: Tensor, drop: float = 0.5, seed: float = 0) -> Tensor:
    """The weighted sum of what is left of each delta, drawn at random, times 1 / (1 - drop). DARE, arXiv:2311.03099.

    Args:
        drop: the probability with which an entry is dropped.
        seed: of the draw; with the adapter's own numbers, so that it does not depend on the adapters' order.
    """
    _within("drop", drop, 0 <= drop < 1, "in [0, 1)")
    draws = [torch.rand(len(place), generator=_generator(at, i, seed)) for i, place in enumerate(at.places)]
    return at.spread([draw >= drop for draw in draws]) * weights / (1 - drop)


@method("breadcrumbs")
def breadcrumbs(at: Aligned, weights: Tensor, smallest: float = 0.85, largest: float = 0.007) -> Tensor:
    """The weighted sum without each delta's small and outlying entries. Model Breadcrumbs, arXiv:2312.06795.

    Args:
        smallest: share of each adapter's entries of a weight to drop, the smallest; the paper's beta for dense deltas.
        largest: share to drop, the largest; the paper's gamma is 1 minus this.
    """
    _within("smallest", smallest, 0 <= smallest < 1, "in [0, 1)")
    _within("largest", largest, 0 <= largest < 1 - smallest, "at least 0, and below 1 with smallest")
    kept = []
    for i, place in enumerate(at.places):
        deltas, k = at.deltas[i, place], len(place)
        ranks = _ranks(deltas)
        kept.append((ranks >= round(largest * k)) & (ranks < k - round(smallest * k)))
    return at.spread(kept) * weights


@method("consensus")
def consensus(at: Aligned, weights: Tensor, least: float = 2, strictness: float = 0.4, same_sign: float = 0) -> Tensor:
    """The weighted sum, where it matters to enough adapters. Consensus merging (TALL masks), arXiv:2405.07813.

    An entry matters to an adapter t where |x_t| > strictness |sum - x_t|, with x_t its weighted delta.

    Args:
        least: to so many adapters it has to matter.
        strictness: the paper's lambda, chosen there in [0.2, 0.6]; at 0 every delta but 0 matters.
        same_sign: 1 counts only adapters whose sign is the sum's.
    """
    _within("least", least, 1 <= least <= len(at.changes) and least == int(least), f"1 to {len(at.changes)}")
    _within("strictness", strictness, strictness >= 0, "at least 0")
    _within("same_sign", same_sign, same_sign in (0, 1), "0 or 1")
    weighted = at.deltas * weights
    total = ordered_sum(weighted)
    matters = weighted.abs() > strictness * (total - weighted).abs()
    if same_sign:
        matters &= weighted.sign() == total.sign()
    return at.present * weights * (matters.sum(0) >= least)


@method("first")
def first(at: Aligned, weights: Tensor) -> Tensor:
    """Of the adapters that hold an entry, the first, times its weight."""
    return (at.present & (at.present.cumsum(0) == 1)) * weights


@method("last")
def last(at: Aligned, weights: Tensor) -> Tensor:
    """Of the adapters that hold an entry, the last, times its weight."""
    later = at.present.flip(0).cumsum(0).flip(0)
    return (at.present & (later == 1)) * weights


@method("error")
def error(at: Aligned, weights: Tensor) -> Tensor:
    """The weighted sum of adapters that share no entry; sharing one is an error."""
    if shared := int((at.present.sum(0) > 1).sum()):
        raise FinepointError(f"{at.name}: the adapters share {shared} entries; choose another --how than error")
    return add(at, weights)


def ordered_sum(table: Tensor) -> Tensor:
    """(n, u) -> (u,): sums down the columns, in the order of size, so that the rows' order makes no difference."""
    return table.sort(0).values.sum(0)


def _ranks(deltas: Tensor) -> Tensor:
    """0 for the largest |delta|, and so on; of equal ones the lower position comes first."""
    order = deltas.abs().argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def _largest(deltas: Tensor, share: float) -> Tensor:
    """Which entries are the share with the largest |delta|, at least one: (k,) bool."""
    return _ranks(deltas) < max(1, round(share * len(deltas)))


def _generator(at: Aligned, i: int, seed: float) -> torch.Generator:
    change = at.changes[i]
    digest = sha256(f"{seed:g} {at.name}".encode())
    if change is not None:
        for tensor in (change.indices, change.numbers):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7]))


def _within(name: str, value: float, holds: bool, what: str) -> None:
    if not holds:
        raise FinepointError(f"{name} is {value:g}; expected {what}")


# From coefficients to a change.


def _combined(at: Aligned, coefficients: Tensor) -> Change:
    enters = coefficients != 0
    kept = enters.any(0)
    alone = (enters.sum(0) == 1) & (coefficients.sum(0) == 1)  # one adapter's own delta, nothing else
    held = [change for change in at.changes if change is not None]
    some, indices = held[0], at.indices[kept]
    kind: Kind = "delta" if all(change.kind == "delta" for change in held) else "value"
    if kind == "delta":
        numbers = ordered_sum(coefficients * at.deltas)[kept].to(some.numbers.dtype)
    else:
        numbers = _values(at, coefficients, enters, alone)[kept]
    if not bool(torch.isfinite(numbers).all()):
        raise FinepointError(f"{at.name}: the merged numbers do not fit their dtype; use smaller weights")
    base, parts = _lies_on(at, enters, indices)
    return Change(some.shape, some.dtype, kind, indices, numbers, base, parts)


def _values(at: Aligned, coefficients: Tensor, enters: Tensor, alone: Tensor) -> Tensor:
    """What the entries become: (u,), the weight's dtype; whatever where nothing enters."""
    dtype = next(change.numbers.dtype for change in at.changes if change is not None and change.kind == "value")
    found = torch.zeros(len(at.indices), dtype=dtype)
    if not bool((alone | ~enters.any(0)).all()):
        found = moved(at.base, ordered_sum(coefficients * at.deltas))
    for change, place, row in zip(at.changes, at.places, enters, strict=True):
        own = (row & alone)[place]
        if change is not None and bool(own.any()):
            values = change.numbers.cpu() if change.kind == "value" else change.new_values(at.base[place])
            found[place[own]] = values[own]
    return found


def _lies_on(at: Aligned, enters: Tensor, indices: Tensor) -> tuple[str, tuple[tuple[Tensor, str], ...]]:
    """The checksum of the base at the indices where the base or one part tells it, else the parts that entered."""
    if at.weight is not None:
        return checksum(gather(at.weight, indices)), ()
    taken = [change for change, row in zip(at.changes, enters, strict=True) if change is not None and row.any()]
    parts: list[tuple[Tensor, str]] = []
    for places, digest in (part for change in taken for part in change.checksums()):
        if not any(digest == other and torch.equal(places, known) for known, other in parts):
            parts.append((places, digest))
    if len(parts) == 1 and torch.equal(parts[0][0], indices):
        return parts[0][1], ()
    return "", tuple(parts)


# What is refused.


def _checked(adapters: Sequence[SparseAdapter], weights: Sequence[float] | None) -> Tensor:
    """The weights, (n, 1) float64."""
    if not adapters:
        raise FinepointError("there is nothing to merge; give at least one adapter")
    factors = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(adapters):
        raise FinepointError(f"{len(factors)} weights for {len(adapters)} adapters; give one for each")
    for factor in factors:
        if not isfinite(factor):
            raise FinepointError(f"a weight is {factor}; expected a finite number")
    return torch.tensor(factors, dtype=torch.float64)[:, None]


def _method(how: str, options: Mapping[str, float]) -> tuple[Callable[..., Tensor], dict[str, float]]:
    """The method and all its options, those not given by their default."""
    found = named(METHODS, how, *REGISTRIES["method"])
    parameters = list(inspect.signature(found).parameters.values())[2:]
    known = {parameter.name: parameter.default for parameter in parameters}
    for name, value in options.items():
        if name not in known:
            raise FinepointError(f"{how} has no option {name!r}; it has: {', '.join(known) or 'none'}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise FinepointError(f"{how}: {name} is {value!r}; expected a number")
    return found, known | dict(options)


def _check_base(adapters: Sequence[SparseAdapter], model: nn.Module) -> None:
    check_base(model)
    for number, adapter in enumerate(adapters, 1):
        try:
            adapter.check(model)
        except FinepointError as reason:
            raise FinepointError(f"adapter {number}: {reason}") from reason


def _base(adapters: Sequence[SparseAdapter], model: nn.Module | None) -> dict[str, Any]:
    """The form and the fingerprint of the base that all adapters are of, as far as they know it.

    Raises:
        FinepointError: two tell different ones.
    """
    forms = {
        number: {key: value for key, value in adapter.base.items() if key != FINGERPRINT}
        for number, adapter in enumerate(adapters, 1) if adapter.base
    }  # fmt: skip
    first = next(iter(forms), 0)
    for number, form in forms.items():
        if form != forms[first]:
            raise FinepointError(f"adapters {first} and {number} were trained on different bases: their vocabularies "
                                 "or their tied weights differ")  # fmt: skip
    prints = {number: adapter.fingerprint for number, adapter in enumerate(adapters, 1)}
    whole = _one_fingerprint({number: found for number, found in prints.items() if found})
    form = forms.get(first, {})
    if model is not None:
        form, whole = form or form_of(model), whole or base_beneath(model)
    return form | ({FINGERPRINT: whole.as_json()} if whole else {})


def _one_fingerprint(prints: Mapping[int, Fingerprint]) -> Fingerprint | None:
    """What all of them say together."""
    first = next(iter(prints), 0)
    for number, found in prints.items():
        if others := unlike(prints[first], found):
            raise FinepointError(f"adapters {first} and {number} were trained on different bases: {others[0][0]} "
                                 "differs, beside the entries they change")  # fmt: skip
    known = {name: value for found in prints.values() for name, value in found.weights.items() if value}
    return Fingerprint(prints[first].weights | known, prints[first].one_in) if prints else None


def _info(
    adapters: Sequence[SparseAdapter], factors: Tensor, how: str, settings: Mapping[str, float]
) -> dict[str, Any]:
    """Where the merged adapter comes from; what all its parts share of the base is its own."""
    infos = [adapter.info for adapter in adapters]
    shared = {
        key: infos[0][key]
        for key in ("base_model", "task", "rule", "structure", "targets")
        if key in infos[0] and all(info.get(key) == infos[0][key] for info in infos)
    }
    parts = [
        {"weight": factor, **{key: info[key] for key in ("base_model", "rule", "density", "data") if key in info}}
        for factor, info in zip(factors[:, 0].tolist(), infos, strict=True)
    ]
    return shared | {"merged_by": how, "merge": {"how": how, "options": dict(settings), "parts": parts}}
