from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import finepoint
from conftest import assert_same_bits, snapshot, tiny_llama
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.change import Change
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


def test_scale_gives_the_base_plus_so_much_of_the_change(three):
    model, adapters, expected = three
    base = snapshot(model)
    switch = held(model, adapters)
    switch.set(["a", "c"])
    switch.scale("a", 0.5)
    switch.set("a")
    half = snapshot(model)
    switch.disable()
    assert_same_bits(base, snapshot(model))
    with finepoint.wise_ft(adapters["a"], model, 0.5).applied(model):
        assert_same_bits(half, snapshot(model))
    switch.set("a")
    assert_same_bits(half, snapshot(model))  # over switches too
    switch.scale("a", 0)
    assert_same_bits(base, snapshot(model))
    switch.scale("a", 1)
    assert_same_bits(expected["a"], snapshot(model))
    for factor in (0.3, -2.0, 1.7):
        switch.scale("a", factor)
    switch.disable()
    assert_same_bits(base, snapshot(model))


def test_the_scale_of_one_leaves_the_others(three):
    model, adapters, _ = three
    switch = held(model, adapters)
    switch.set(["c", "a"])
    together = snapshot(model)
    switch.scale("a", 3.0)
    assert switch.active == ("c", "a")
    assert any(not torch.equal(value, together[name]) for name, value in snapshot(model).items())
    switch.scale("a", 1.0)
    assert_same_bits(together, snapshot(model))
    with pytest.raises(FinepointError, match="no adapter 'd'"):
        switch.scale("d", 1.0)
    with pytest.raises(FinepointError, match="the scale of 'a' is nan; expected a finite number"):
        switch.scale("a", float("nan"))
    assert_same_bits(together, snapshot(model))


def test_a_new_head_is_not_scaled():
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=4, num_labels=3, pad_token_id=0)  # fmt: skip
    model = LlamaForSequenceClassification(config)
    adapter = SparseAdapter({name: Change.whole(weight + 1) for name, weight in model.named_parameters()},
                            {"task": "classification"})  # fmt: skip
    switch = held(model, {"a": adapter})
    switch.set("a")
    switch.scale("a", 0.5)
    found = snapshot(model)
    switch.disable()
    base = snapshot(model)
    assert torch.equal(found["score.weight"], base["score.weight"] + 1)
    torch.testing.assert_close(found["model.norm.weight"], base["model.norm.weight"] + 0.5)
    with finepoint.wise_ft(adapter, model, 0.5).applied(model):
        assert_same_bits(found, snapshot(model))


def test_using_puts_back_what_was_on_also_after_an_exception(three):
    model, adapters, expected = three
    switch = held(model, adapters)
    switch.set("a")
    with switch.using("b") as same:
        assert same is model
        assert_same_bits(expected["b"], snapshot(model))
    assert_same_bits(expected["a"], snapshot(model))
    with pytest.raises(KeyError), switch.using("c"):
        raise KeyError
    assert_same_bits(expected["a"], snapshot(model))


def test_a_switch_inside_using_is_an_error_and_changes_nothing(three):
    model, adapters, expected = three
    switch = held(model, adapters)
    with switch.using("b"):
        for change in (
            lambda: switch.set("a"), switch.disable, lambda: switch.scale("b", 2.0), lambda: switch.remove("b"),
            lambda: switch.add("e", adapters["a"]), lambda: switch.using("a").__enter__(),
        ):  # fmt: skip
            with pytest.raises(FinepointError, match="in use by this thread; leave its `using` block first"):
                change()
        assert_same_bits(expected["b"], snapshot(model))
    switch.set("a")
    with pytest.raises(FinepointError, match="cannot both be on"), switch.using(["a", "b"]):
        pass
    assert_same_bits(expected["a"], snapshot(model))


def test_threads_that_generate_see_their_own_adapter_only(three):
    model, adapters, _ = three
    base = snapshot(model)
    switch = held(model, adapters)
    for name in adapters:
        switch.scale(name, 8.0)  # or all of them would write the same
    prompt = torch.tensor([[5, 6, 7, 8]])

    def written(name):
        with switch.using(name):
            return model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)

    alone = {name: written(name) for name in adapters}
    assert len({tuple(tokens[0].tolist()) for tokens in alone.values()}) == 3
    with ThreadPoolExecutor(4) as threads:
        turns = list(adapters) * 6
        for name, tokens in zip(turns, threads.map(written, turns), strict=True):
            assert torch.equal(tokens, alone[name])
    assert_same_bits(base, snapshot(model))


def test_a_switch_waits_for_another_threads_using(three):
    model, adapters, expected = three
    switch = held(model, adapters)
    with ThreadPoolExecutor(1) as threads:
        with switch.using("a"):
            waiting = threads.submit(switch.set, "b")
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            assert_same_bits(expected["a"], snapshot(model))
        waiting.result(timeout=10)
    assert_same_bits(expected["b"], snapshot(model))
