"""The print of a weight: equal to its formula, one in every dtype, blind to nothing but -0.0 and what a NaN holds."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import finepoint
from conftest import random_batches, tiny_llama
from finepoint.adapters import fingerprint as module
from finepoint.adapters.fingerprint import (
    Fingerprint,
    Moved,
    contents_of,
    fingerprint,
    is_fingerprint,
    one_in_for,
    part,
    shown,
    total_of,
    unlike,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDTH = (1 << 64) - 1


def splitmix(number):
    """The generator as its authors write it, in whole numbers; odd."""
    number = ((number + 1) * 0x9E3779B97F4A7C15) & WIDTH
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & WIDTH
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & WIDTH
    return (number ^ (number >> 31)) | 1


def formula(values):
    """The sum over float32 values, entry by entry."""
    drawn = dict.fromkeys((splitmix(i) >> 39) & (2**25 - 1) | 1 for i in range(1 << 14))
    table = [list(drawn)[6 * i : 6 * i + 6] for i in range(1024)]
    total = 0
    for i, value in enumerate(values.tolist()):
        low, high = struct.unpack("<hh", struct.pack("<f", value))
        total += splitmix(i // 1024) * (table[i % 1024][0] * low + table[i % 1024][1] * high)
    return total & WIDTH


def of(values):
    return shown(tuple(values.shape), total_of(values))


def test_it_equals_its_formula():
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)).masked_fill_(torch.arange(3000) % 7 == 0, 0)
    assert total_of(values) & WIDTH == formula(values)
    assert total_of(values.view(60, 50)) & WIDTH == formula(values)
    assert total_of(torch.empty(0)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_has_one_print_in_every_dtype_that_holds_it(dtype):
    values = torch.randn(70, 41, generator=torch.Generator().manual_seed(1)).to(dtype)
    wider = [wide for wide in DTYPES if torch.promote_types(dtype, wide) == wide]
    assert len({of(values.to(wide)) for wide in wider}) == 1
    rounded = torch.randn(70, 41, dtype=torch.float64)
    assert of(rounded) != of(rounded.to(dtype).double()) or dtype == torch.float64  # the control
    assert of(values.t().contiguous().t()) == of(values)  # whatever way it lies in memory
    assert of(values.reshape(41, 70)) != of(values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 5000), other=st.integers(0, 5000), up=st.booleans())
def test_one_ulp_anywhere_and_two_entries_that_change_places_are_seen(dtype, at, other, up):
    values = torch.randn(5001, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = of(values)
    one = values.clone()
    one[at] = torch.nextafter(one[at], one.new_tensor(torch.inf if up else -torch.inf))
    assert of(one) != before
    two = values.clone()
    two[[at, other]] = two[[other, at]]
    assert (of(two) == before) == torch.equal(two, values)
    flipped = values.clone()
    flipped[[at, other]] *= -1
    assert (of(flipped) == before) == torch.equal(flipped, values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_are_one_number_and_so_are_all_that_are_none(dtype):
    values = torch.randn(2000).to(dtype)
    values[[3, 1024, 1999]] = 0.0
    negative = torch.where(values == 0, -0.0, values)
    assert of(negative) == of(values)
    values[5] = torch.nan
    strange = values.clone()
    if dtype == torch.bfloat16:
        strange.view(torch.int16)[5] = -1
    elif dtype == torch.float32:
        strange.view(torch.int32)[5] = -4194303
    assert strange[5].isnan()
    assert of(strange) == of(values) == of(values.double())
    values[5] = torch.inf
    assert of(values) == of(values.double()) != of(strange)


def test_numbers_that_float32_does_not_hold_count():
    values = torch.tensor([1e300, -1e300, 1e-300, 1 + 2**-50, 1.0, torch.inf], dtype=torch.float64)
    every = {of(torch.roll(values, i)) for i in range(6)} | {of(values.float().double()), of(values)}
    assert len(every) == 7
    assert of(torch.tensor([1, 2, -3])) == of(torch.tensor([1.0, 2.0, -3.0]))


def test_it_adds_up_over_parts_and_what_has_moved_is_set_right():
    values = torch.randn(5000)
    halves = total_of(values[:1777]) + total_of(values[1777:], first=1777)
    assert (halves - total_of(values)) & WIDTH == 0
    at = torch.randperm(5000)[:300].sort().values
    for one_in in (1, 2):
        moved = values.clone()
        moved[at] += 1
        shift = part(at, values[at], one_in) - part(at, moved[at], one_in)
        assert (total_of(moved, one_in) + shift - total_of(values, one_in)) & WIDTH == 0


def test_a_model_under_a_tuner_tells_its_base():
    model = tiny_llama(torch.bfloat16)
    base = fingerprint(contents_of(model))
    indices = finepoint.select(model, rule="random", density=0.2, targets="all")
    with finepoint.SparseTuner(model, indices) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)
        model(**random_batches()[0]).loss.backward()
        optimizer.step()
        tuner.follow_()
        names = {name.replace("/", ".") for name in model.finepoint}
        assert {name for name, _ in unlike(base, fingerprint(contents_of(model)))} >= names  # the control
        moved = [one for entries in tuner.entries.values() for one in entries.moved()]
        assert fingerprint(contents_of(model), moved) == base
        assert Fingerprint.of_json(tuner.adapter().base["fingerprint"]) == base


def test_of_very_large_bases_a_sample_is_looked_at_and_every_weight_has_part_in_it(monkeypatch):
    assert one_in_for(0) == one_in_for(module.MOST) == 1
    assert one_in_for(module.MOST + 1) == 2
    monkeypatch.setattr(module, "CHUNK", 2048)
    monkeypatch.setattr(module, "MOST", 5000)
    weights = {"a": torch.randn(3000, 3), "b": torch.randn(10)}
    found = fingerprint(weights)
    assert found.one_in == 2
    seen, passed, small = ({name: weight.clone() for name, weight in weights.items()} for _ in range(3))
    seen["a"].view(-1)[2047] += 1
    passed["a"].view(-1)[2048] += 1
    small["b"][9] += 1
    assert unlike(found, fingerprint(seen)) == [("a", "values")]
    assert unlike(found, fingerprint(passed)) == []
    assert unlike(found, fingerprint(small)) == [("b", "values")]
    assert unlike(found, fingerprint(seen, [Moved("a", torch.tensor([2047]), weights["a"].view(-1)[2047:2048],
                                                  seen["a"].view(-1)[2047:2048])])) == []  # fmt: skip


def test_stored_buffers_are_part_of_it_and_constants_and_counters_are_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model.register_buffer("frequencies", torch.ones(3), persistent=False)
    names = {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    assert set(fingerprint(contents_of(model)).weights) == names


def test_tied_names_and_the_order_of_names_make_no_difference():
    tied = tiny_llama()
    found = fingerprint(contents_of(tied))
    assert found.weights["lm_head.weight"] == found.weights["model.embed_tokens.weight"]
    assert fingerprint(dict(reversed(contents_of(tied).items()))) == found
    left_out = found.without(["lm_head.weight"], [["lm_head.weight", "model.embed_tokens.weight"]])
    assert left_out.unknown == ["model.embed_tokens.weight", "lm_head.weight"]
    assert fingerprint(contents_of(tied), without=["lm_head.weight"]) == left_out
    assert unlike(found, left_out) == unlike(left_out, found) == []


def test_only_what_it_writes_is_taken_for_one():
    found = fingerprint({"a": torch.ones(3)}).as_json()
    assert is_fingerprint(found)
    for other in (None, [], {}, found | {"one_in": 0}, found | {"one_in": True}, found | {"weights": {"a": 3}},
                  found | {"weights": {"a": "0" * 15}}, found | {"weights": {"a": "x" * 16}}):  # fmt: skip
        assert not is_fingerprint(other)
