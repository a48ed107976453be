"""Rules written as formulas: the same scores as the rules they spell, and nothing else understood."""

import pytest
import torch

import finepoint
from conftest import random_batches, tiny_llama
from finepoint.errors import FinepointError
from finepoint.selection.rules import rule_named
from finepoint.selection.select import score
from finepoint.selection.statistics import stream_statistics
from finepoint.selection.targets import target_weights

SPELLED = {
    "gallop": "abs(g) / (abs(w) + 1e-8)", "gradient": "max(g, -g)", "snip": "abs(g*w)", "magnitude-low": "-abs(w)",
    "fisher": "f * 1", "magnitude-high": "sqrt(w**2)",
}  # fmt: skip


def scores_of(model, rule, batches, options=None):
    about, weights = rule_named(rule), target_weights(model, "linear")
    return {
        name: score(about, name, weights[name], found, 0, options or {})
        for name, found in stream_statistics(model, weights, batches, about.needs)
    }


@pytest.mark.parametrize(("rule", "text"), SPELLED.items())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_formula_scores_as_the_rule_it_spells(rule, text, dtype):
    model, batches = tiny_llama(dtype), random_batches()
    named, spelled = scores_of(model, rule, batches), scores_of(model, text, batches)
    for name in named:
        assert named[name].dtype == spelled[name].dtype
        torch.testing.assert_close(spelled[name], named[name], rtol=1e-6, atol=0)


def test_other_names_are_options():
    model, batches = tiny_llama(torch.float64), random_batches()
    swept = scores_of(model, "abs(g)**a / (abs(w) + eps)**b", batches, {"a": 1.0, "b": 1.0, "eps": 1e-8})
    gallop = scores_of(model, "gallop", batches)
    for name in gallop:
        torch.testing.assert_close(swept[name], gallop[name], rtol=1e-12, atol=0)
    with pytest.raises(FinepointError, match=r"leaves b open; give --rule-options b=\.\."):
        finepoint.select(model, batches, rule="abs(g)**a / abs(w)**b", rule_options={"a": 1.0})


def test_a_name_alone_is_a_formula_and_so_is_its_negative():
    model, kept = tiny_llama(torch.float64), random_batches(2)
    least, most = (finepoint.select(model, rule=rule, density=0.1, kept=kept) for rule in ("-k", "k"))
    plain = finepoint.select(model, rule="0 - k", density=0.1, kept=kept)
    assert all(torch.equal(least[name], plain[name]) for name in plain)
    assert any(not torch.equal(least[name], most[name]) for name in plain)
    with pytest.raises(FinepointError, match="unknown rule '-kk'"):
        rule_named("-kk")


def test_what_a_formula_looks_at_is_what_it_needs():
    assert rule_named("abs(w) - 1").needs_data is False
    assert rule_named("abs(g) / abs(w)").needs == ("gradient", "weight")
    chosen = finepoint.select(tiny_llama(), rule="abs(w) - 1", density=0.1)
    assert chosen.rule == "abs(w) - 1"


@pytest.mark.parametrize(
    "text",
    ["__import__('os').system('true')", "(lambda: 1)()", "w.data + 1", "[w for w in g] + 1", "w if g else 1*1",
     "abs(w, g)", "abs(w=1)", "open('x')", "w @ g + 1", "w + 'a'", "1 + 2", "w + True", "abs(w", "w + 1j",
     "exec('1') + w", "w[0] + 1", "f'{w}' + 1", "(" * 5000 + "w" + ")" * 5000, "w + abs"],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(FinepointError):
        finepoint.select(tiny_llama(), random_batches(), rule=text, density=0.1)


def test_a_formula_that_is_not_finite_names_the_weight():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 0
    with pytest.raises(FinepointError, match=r"not finite numbers for .*up_proj"):
        finepoint.select(model, rule="1 / w", density=0.1)
