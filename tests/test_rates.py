"""The learning rate where none is given, and what is said of one that moves nothing."""

import json
from dataclasses import replace

import pytest
import torch

import finepoint
from conftest import random_batches, tiny_llama
from finepoint.selection.rates import MEASURED, usual_rate
from finepoint.selection.rules import rule_named
from finepoint.training.resolve import rate_of, resolve
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
    assert rate_of(replace(config, indices=str(chosen), density=None)) == 3e-4
    told = {"info": {"rule": "gain", "density": 0.01, "structure": "column"}}
    (chosen / "finepoint_config.json").write_text(json.dumps(told))
    assert rate_of(replace(config, indices=str(chosen), density=None)) == pytest.approx(3e-3)


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
