import pytest
import torch

import finepoint
from conftest import assert_same_bits, snapshot, tiny_llama
from finepoint.errors import FinepointError
from test_adapter import trained


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def three(request):
    """A model at its base, with the trained bits of three adapters; b shares entries with a, c with neither."""
    model = tiny_llama(request.param)
    a, a_bits = trained(model, targets="mlp")
    b, b_bits = trained(model, "value", seed=1, targets="mlp")
    c, c_bits = trained(model, targets="attention")
    assert any(torch.isin(a[name], b[name]).any() for name in a), "a and b have to overlap for the test to say anything"
    return model, {"a": a, "b": b, "c": c}, {"a": a_bits, "b": b_bits, "c": c_bits}


def held(model, adapters):
    switch = finepoint.AdapterSet(model)
    for name, adapter in adapters.items():
        switch.add(name, adapter)
    return switch


def test_every_switch_gives_the_trained_bits(three):
    model, adapters, expected = three
    base = snapshot(model)
    switch = held(model, adapters)
    assert_same_bits(base, snapshot(model))
    for name in ["a", "b", "a", "c", "b", "b", "c"]:
        switch.set(name)
        assert switch.active == (name,)
        assert_same_bits(expected[name], snapshot(model))
    switch.disable()
    assert_same_bits(base, snapshot(model))


def test_adapters_without_common_entries_can_be_on_together(three):
    model, adapters, _ = three
    base = snapshot(model)
    switch = held(model, adapters)
    switch.set(["a", "c"])
    together = snapshot(model)
    switch.disable()
    adapters["a"].apply(model)
    adapters["c"].apply(model)
    assert_same_bits(together, snapshot(model))
    adapters["c"].revert(model)
    adapters["a"].revert(model)
    assert_same_bits(base, snapshot(model))


def test_a_thousand_switches_leave_no_trace(three):
    model, adapters, _ = three
    base = snapshot(model)
    switch = held(model, adapters)
    for i in range(1000):
        switch.set([["a"], ["b"], ["a", "c"], [], ["c", "b"]][i % 5])
    switch.disable()
    assert_same_bits(base, snapshot(model))


def test_an_adapter_added_while_another_is_on_is_checked_against_the_base(three):
    model, adapters, expected = three
    switch = held(model, {"a": adapters["a"]})
    switch.set("a")
    switch.add("b", adapters["b"])
    assert_same_bits(expected["a"], snapshot(model))
    switch.set("b")
    assert_same_bits(expected["b"], snapshot(model))
    switch.remove("b")
    assert switch.active == ()
    assert "b" not in switch
    assert len(switch) == 1


def test_what_cannot_be_is_refused_and_changes_nothing(three):
    model, adapters, expected = three
    switch = held(model, adapters)
    switch.set("c")
    with pytest.raises(FinepointError, match="cannot both be on"):
        switch.set(["a", "b"])
    with pytest.raises(FinepointError, match="no adapter 'd'; there are: a, b, c"):
        switch.set("d")
    with pytest.raises(FinepointError, match="already"):
        switch.add("a", adapters["a"])
    other = tiny_llama(model.dtype, seed=7)
    with pytest.raises(FinepointError, match="does not fit"):
        finepoint.AdapterSet(other).add("a", adapters["a"])
    assert switch.active == ("c",)
    assert_same_bits(expected["c"], snapshot(model))
