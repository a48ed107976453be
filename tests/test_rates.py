"""The learning rate where none is given, and what is said of one that moves nothing."""

import json
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import finepoint
from conftest import random_batches, tiny_llama
from finepoint.errors import FinepointError
from finepoint.selection.rates import MEASURED, usual_rate
from finepoint.selection.rules import rule_named
from finepoint.selection.targets import target_weights
from finepoint.training.resolve import resolve, spec_for, usual_of
from finepoint.training.run import train
from finepoint.training.settings import TrainConfig


@pytest.mark.parametrize(("rule", "kind"), [("random", "nothing"), ("gallop", "gradients"), ("gain", "text to keep")])
def test_what_was_measured_is_the_default_and_rates_fall_between(rule, kind):
    rule = rule_named(rule)
    for density, rate in MEASURED[kind].items():
        assert usual_rate(rule, density) == rate
    rates = [usual_rate(rule, density) for density in torch.logspace(-6, 0, 60, dtype=torch.float64).tolist()]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 3e-5
    assert usual_rate(rule, None) == usual_rate(rule, 1e-3)


def test_columns_by_what_is_kept_want_more_and_others_the_same():
    assert usual_rate(rule_named("gain"), 0.01, "column") == pytest.approx(3e-3)
    assert usual_rate(rule_named("random"), 0.01, "column") == 3e-3


def test_entries_that_are_held_back_want_more():
    random = rule_named("random")
    for density in (1e-4, 1e-3, 1e-2, 0.05, 0.5):
        assert usual_rate(random, density) <= usual_rate(random, density, held=True)
    assert usual_rate(random, 0.01, held=True) == 1e-2
    assert all(usual_rate(rule_named(name), 0.01, held=True) == usual_rate(rule_named(name), 0.01)
               for name in ("gallop", "gain"))  # fmt: skip


@pytest.fixture
def config(model_folder, choice_file, tmp_path):
    return TrainConfig(model=str(model_folder), data=choice_file, output=str(tmp_path / "run"), density=0.01, steps=1)


def test_a_run_takes_the_rate_of_its_rule_density_and_structure_or_that_given(config, tmp_path):
    for changes, rate in (
        ({}, 3e-3), ({"density": None}, 3e-2), ({"protect": "x"}, 1e-2), ({"protect_by": "l2"}, 1e-2),
        ({"protect": "x", "protect_strength": 0.0}, 3e-3), ({"rule": "gallop"}, 3e-4), ({"lr": 0.5}, 0.5),
        ({"rule": "gain", "structure": "column", "protect": "x"}, 3e-3), ({"density": None, "count": 9}, 3e-2),
        ({"density": None, "targets": {"*.q_proj.weight": 0.01}}, 3e-2),
        ({"baseline": "lora", "density": None}, 1e-3), ({"baseline": "full", "density": None}, 3e-5),
    ):  # fmt: skip
        assert resolve(replace(config, **changes)).lr == rate, changes
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    (chosen / "finepoint_config.json").write_text(json.dumps({"info": {"rule": "gallop", "density": 0.001}}))
    assert usual_of(replace(config, indices=str(chosen), density=None))[0] == 3e-4
    told = {"info": {"rule": "gain", "density": 0.01, "structure": "column"}}
    (chosen / "finepoint_config.json").write_text(json.dumps(told))
    assert usual_of(replace(config, indices=str(chosen), density=None))[0] == pytest.approx(3e-3)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["gallop", "abs(g)", "os:f"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5,
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(info=ANYTHING | st.fixed_dictionaries({}, optional=dict.fromkeys(("rule", "density", "structure"), ANYTHING)))
def test_whatever_a_folder_says_of_its_entries_gives_a_rate_or_is_refused(config, tmp_path, info):
    (tmp_path / "finepoint_config.json").write_text(json.dumps({"info": info}))
    asked = replace(config, indices=str(tmp_path), density=None)
    with suppress(FinepointError):  # a rule that is not known
        assert 0 < usual_of(asked)[0] <= 0.1
    assert 0 < usual_of(replace(asked, lr=0.5))[0] <= 0.1


def test_a_strangers_rule_is_not_imported_to_learn_its_rate(config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "finepoint_config.json").write_text(json.dumps({"info": {"rule": "evil:f", "density": 0.01}}))
    asked = replace(config, indices=str(tmp_path), density=None)
    with pytest.raises(FinepointError, match="rule 'evil:f', as .* has them, is not known here; give --lr"):
        resolve(asked)
    assert resolve(replace(asked, lr=0.5)).lr == 0.5
    assert "evil" not in sys.modules
    with pytest.raises(SystemExit, match="ran"):  # negative control
        rule_named("evil:f")


def test_the_rate_of_a_count_is_that_of_the_share_it_comes_to(config):
    model = tiny_llama()
    total = sum(weight.numel() for weight in target_weights(model, "linear").values())
    values = target_weights(model, "v")
    of_values = sum(weight.numel() for weight in values.values())
    for changes, share in (
        ({"count": round(total / 100)}, 0.01), ({"count": round(total / 2)}, 0.5),
        ({"targets": {"*v_proj.weight": 0.1}}, 0.1), ({"count": round(of_values / 10), "targets": "v"}, 0.1),
    ):  # fmt: skip
        asked = replace(config, **{"density": None} | changes)
        spec = spec_for(resolve(asked), model)
        assert spec.lr == pytest.approx(usual_rate(rule_named("random"), share), rel=0.2), changes
        assert f"{share:.2g}"[:3] in spec.usual_of
        assert spec_for(resolve(replace(asked, lr=0.5)), model).lr == 0.5
    spec = resolve(config)
    assert spec_for(spec, model) is spec


@pytest.mark.parametrize(("lr", "told"), [(2e-5, True), (1e-3, False), (None, False)])
def test_a_run_at_a_rate_for_whole_weights_says_so(config, lr, told, caplog):
    train(replace(config, lr=lr))
    assert ("as for whole weights" in caplog.text) == told


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize(("lr", "told"), [(2e-5, 1), (1e-3, 0)])
def test_the_first_step_of_any_optimizer_at_such_a_rate_says_so_once(lr, told, schedule, caplog):
    model = finepoint.sparsify(tiny_llama(), density=0.01, audit=False)
    optimizer = torch.optim.AdamW(finepoint.tuner_of(model).parameters(), lr=lr)
    if schedule:  # which begins at 0
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    for batch in random_batches(2):
        model(**batch).loss.backward()
        optimizer.step()
    assert caplog.text.count("chosen entries hardly move; those of rule random usually want about 0.003") == told
    finepoint.unload(model)
