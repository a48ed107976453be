"""Entries drawn at random, each set as likely as any other: what is drawn costs, not what is drawn from."""

from collections.abc import Mapping
from math import log, sqrt

import numpy as np
import torch
from torch import Tensor

from finepoint.selection.statistics import seed_of


def draw_uniformly(sizes: Mapping[str, int], k: int, taken: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """k different positions out of all of these weights together; the same for the same weights and seed anywhere.

    Positions are drawn with replacement, and what is too many left out again. Which ones are drawn does not depend on
    how many are, so that every set of k is as likely as any other. Takes O(k) memory and O(k log k) time.

    Args:
        sizes: positions by weight, in order.
        taken: those that may not be drawn, by weight: (n,) int64, ascending, each once.

    Returns:
        By weight: (n,) int64, ascending, each once; on the CPU.
    """
    held = {name: taken[name].cpu().numpy() for name in sizes if name in taken}
    free = sum(sizes.values()) - sum(map(len, held.values()))
    assert 0 <= k <= free
    rng = np.random.default_rng(seed_of(seed, next(iter(sizes))))
    if k <= free / 2:
        drawn = _draw(rng, sizes, k, held, free)
    else:  # fewer are left out than taken
        left_out = _draw(rng, sizes, free - k, held, free)
        drawn = {name: np.setdiff1d(np.arange(size), left_out[name], assume_unique=True)
                 for name, size in sizes.items()}  # fmt: skip
        drawn = {name: _without(places, held.get(name)) for name, places in drawn.items()}
    return {name: torch.from_numpy(places) for name, places in drawn.items()}


def _draw(
    rng: np.random.Generator, sizes: Mapping[str, int], k: int, held: Mapping[str, np.ndarray], free: int
) -> dict[str, np.ndarray]:
    total = sum(sizes.values())
    # So many draws hit k different free positions on average; a few more, and they nearly always do.
    draws = round(total * -log(1 - k / free) + 6 * sqrt(k) + 16) if k else 0
    while True:
        found, left, of = {}, draws, total
        for name, size in sizes.items():
            here = int(rng.binomial(left, size / of))
            left, of = left - here, of - size
            found[name] = _without(_different(rng.integers(0, size, here)), held.get(name))
        if (count := sum(map(len, found.values()))) >= k:
            return _leaving_out(rng, found, count - k)
        draws += draws // 8 + 16


def _leaving_out(rng: np.random.Generator, found: Mapping[str, np.ndarray], more: int) -> dict[str, np.ndarray]:
    """What is found without so many of it, drawn among all."""
    ends = np.cumsum([len(places) for places in found.values()])
    ranks = np.sort(rng.choice(int(ends[-1]), more, replace=False, shuffle=False))
    cuts = np.split(ranks, np.searchsorted(ranks, ends[:-1]))
    starts = ends - [len(places) for places in found.values()]
    return {name: np.delete(places, cut - start)
            for (name, places), cut, start in zip(found.items(), cuts, starts, strict=True)}  # fmt: skip


def _without(places: np.ndarray, held: np.ndarray | None) -> np.ndarray:
    return places if held is None else np.setdiff1d(places, held, assume_unique=True)


def _different(places: np.ndarray) -> np.ndarray:
    """Each once, ascending; sorting is several times faster than the hashing of `numpy.unique`."""
    places.sort()
    return places[np.flatnonzero(np.diff(places, prepend=-1))]
