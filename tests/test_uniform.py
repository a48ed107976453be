"""Drawing entries uniformly: as likely as each other, exactly so many, none that is taken."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finepoint.selection.uniform import draw_uniformly


def flat(drawn, sizes):
    """Positions of all weights together, as if they were one."""
    starts = dict(zip(sizes, [sum(list(sizes.values())[:i]) for i in range(len(sizes))], strict=True))
    return tuple(starts[name] + int(place) for name in sizes for place in drawn[name])


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_every_set_is_drawn_equally_often(k):
    sizes, taken = {"a": 2, "b": 1, "c": 3}, {"c": torch.tensor([1])}
    free = [place for place in range(6) if place != 4]
    sets = list(combinations(free, k))
    times = 200 * len(sets)
    seen = Counter(flat(draw_uniformly(sizes, k, taken, seed), sizes) for seed in range(times))
    assert set(seen) == set(sets)
    # The statistic's mean is its degrees of freedom, its variance twice that.
    freedom = len(sets) - 1
    chi_squared = sum((seen[each] - 200) ** 2 / 200 for each in sets)
    assert chi_squared <= freedom + 5 * (2 * freedom) ** 0.5


@given(st.lists(st.integers(1, 400), min_size=1, max_size=5), st.data(), st.integers(0, 1 << 40))
def test_exactly_so_many_different_free_positions_are_drawn_in_order(lengths, data, seed):
    sizes = {f"w{i}": length for i, length in enumerate(lengths)}
    taken = {name: torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1)))), dtype=torch.long)
             for name, size in sizes.items() if data.draw(st.booleans())}  # fmt: skip
    free = sum(lengths) - sum(map(len, taken.values()))
    k = data.draw(st.integers(0, free))
    drawn = draw_uniformly(sizes, k, taken, seed)
    assert list(drawn) == list(sizes)
    assert sum(map(len, drawn.values())) == k
    for name, places in drawn.items():
        assert places.dtype == torch.int64
        assert (places.diff() > 0).all()
        assert all(0 <= place < sizes[name] for place in places.tolist())
        assert not set(places.tolist()) & set(taken.get(name, torch.tensor([])).tolist())
    again = draw_uniformly(sizes, k, taken, seed)
    assert all(torch.equal(places, again[name]) for name, places in drawn.items())


def test_another_seed_draws_others():
    sizes = {"a": 10_000}
    one, other = (draw_uniformly(sizes, 100, {}, seed)["a"] for seed in (0, 1))
    assert len(set(one.tolist()) & set(other.tolist())) < 20
