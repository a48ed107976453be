"""Before merging: how far adapters get in each other's way, pair by pair."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import combinations
from math import prod, sqrt
from typing import Any

from torch import nn

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.inspection import place
from finepoint.adapters.union import aligned
from finepoint.errors import FinepointError


@dataclass
class Tally:
    """Sums over weights of what two adapters hold there; a, b: entries of each; by_chance: shared by random sets."""

    a: int = 0
    b: int = 0
    shared: int = 0
    by_chance: float = 0.0
    conflicts: int = 0
    dot: float = 0.0
    energy_a: float = 0.0
    energy_b: float = 0.0
    shared_energy_a: float = 0.0
    shared_energy_b: float = 0.0

    def __iadd__(self, other: "Tally") -> "Tally":
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self


def interference(adapters: Mapping[str, SparseAdapter], model: nn.Module | None = None) -> list[dict[str, Any]]:
    """A row for every two adapters: over all weights, by layer and by kind of module; JSON-ready.

    Args:
        adapters: by name.
        model: the base, which tells the deltas of exact values (half precision); without it such pairs have counts,
            and None for all that takes deltas.

    Returns:
        Rows with `a`, `b`, `scope` (`all`, `layer 3`, `module up_proj`), `entries_a`, `entries_b`, `shared`,
        `jaccard` = shared / union, `by_chance` (how many random choices of as many entries in each weight share on
        average, k_a k_b / n summed), `jaccard_by_chance` (that as a Jaccard index), `sign_conflicts` (shared entries
        moved in opposite directions), `conflict_share` (of the shared), `cosine` of the deltas, `energy_a`, `energy_b`
        (the share of each one's squared delta that lies on shared entries).

    Raises:
        FinepointError: whole weights, other shapes or dtypes, other bases; an adapter that does not fit the model.
    """
    if model is not None:
        for name, adapter in adapters.items():
            if problems := adapter.problems(model):
                raise FinepointError(f"adapter {name} does not fit this model: {problems[0]}")
    return [row for a, b in combinations(adapters, 2) for row in _pair(a, b, adapters, model)]


def _pair(a: str, b: str, adapters: Mapping[str, SparseAdapter], model: nn.Module | None) -> list[dict[str, Any]]:
    both = [adapters[a], adapters[b]]
    parameters = dict(model.named_parameters(remove_duplicate=False)) if model is not None else {}
    scopes: dict[str, Tally] = defaultdict(Tally)
    unknown: set[str] = set()
    for name in dict.fromkeys([*both[0], *both[1]]):
        layer, module = place(name)
        found, known = _tally(name, both, parameters)
        for scope in ("all", f"layer {layer}", *([f"module {module}"] if module != "-" else [])):
            scopes[scope] += found
            if not known:
                unknown.add(scope)
    order = sorted(scopes, key=lambda scope: ("all", "layer", "module").index(scope.split()[0]))
    return [{"a": a, "b": b, "scope": scope, **_row(scopes[scope], scope not in unknown)} for scope in order]


def _tally(name: str, both: list[SparseAdapter], parameters: Mapping[str, nn.Parameter]) -> tuple[Tally, bool]:
    """What two adapters hold of one weight, and whether their deltas are known."""
    at = aligned(name, both, parameters.get(name))
    held = [change for change in at.changes if change is not None]
    k = at.present.sum(1).tolist()
    shared = at.present.all(0)
    tally = Tally(k[0], k[1], int(shared.sum()), k[0] * k[1] / prod(held[0].shape))
    if at.weight is None and any(change.kind != "delta" for change in held):
        return tally, False
    one, other = at.deltas
    products = one * other
    tally.conflicts, tally.dot = int((products < 0).sum()), float(products.sum())
    tally.energy_a, tally.energy_b = float(one.square().sum()), float(other.square().sum())
    tally.shared_energy_a = float(one[shared].square().sum())
    tally.shared_energy_b = float(other[shared].square().sum())
    return tally, True


def _row(tally: Tally, known: bool) -> dict[str, Any]:
    entries = tally.a + tally.b
    row: dict[str, Any] = {
        "entries_a": tally.a,
        "entries_b": tally.b,
        "shared": tally.shared,
        "jaccard": tally.shared / (entries - tally.shared),
        "by_chance": tally.by_chance,
        "jaccard_by_chance": tally.by_chance / (entries - tally.by_chance),
    }
    deltas = {
        "sign_conflicts": tally.conflicts,
        "conflict_share": _ratio(tally.conflicts, tally.shared),
        "cosine": _ratio(tally.dot, sqrt(tally.energy_a) * sqrt(tally.energy_b)),
        "energy_a": _ratio(tally.shared_energy_a, tally.energy_a),
        "energy_b": _ratio(tally.shared_energy_b, tally.energy_b),
    }
    return row | (deltas if known else dict.fromkeys(deltas))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
