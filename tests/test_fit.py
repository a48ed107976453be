"""`--fit`: steps are divided so that they fit, and keep their examples; `plan` says what would."""

import json
from dataclasses import replace

import pytest

from conftest import assert_same_tensors, interrupted_at
from finepoint.cli import main
from finepoint.errors import FinepointError
from finepoint.memory import fit, plan
from finepoint.memory.fit import MARGIN, Fit, fitted, fitting
from finepoint.training.run import train
from finepoint.training.settings import PlanConfig, TrainConfig

GB = 10**9


@pytest.mark.parametrize("room", [0.5, 2, 4, 5, 9, 17, 40])
@pytest.mark.parametrize("each", [(1.0, 0.3), (1.0, 0.9)])
def test_what_is_chosen_fits_and_is_the_fastest_that_does(room, each, monkeypatch):
    """A made-up plan: 1 GB, and so much an example, with and without recomputing."""

    def peak(config):
        return int((1 + each[config.gradient_checkpointing] * config.batch_size) * GB)

    monkeypatch.setattr(fit, "peak_of", peak)
    found = fitting(PlanConfig(model="x"), 16, int(room * GB * MARGIN))
    ways = [(size, recompute) for size in (16, 8, 4, 2, 1) for recompute in (False, True)
            if 1 + each[recompute] * size <= room]  # fmt: skip
    if not ways:
        assert found is None
        return
    plain = max((size for size, recompute in ways if not recompute), default=0)
    recomputing = max(size for size, _ in ways)
    best = (plain, False) if plain >= 4 or plain == recomputing else (recomputing, True)
    assert (found.batch_size, found.gradient_checkpointing) == best
    assert found.batch_size * found.accumulation == 16
    assert found.peak == int((1 + each[best[1]] * best[0]) * GB)


@pytest.fixture
def config(model_folder, choice_file, tmp_path):
    return TrainConfig(model=str(model_folder), data=choice_file, output=str(tmp_path / "run"), density=0.2, lr=1e-2,
                       steps=4, batch_size=8, dtype="float32", fit=True)  # fmt: skip


def test_a_run_that_fits_stays_as_it_is_and_one_that_does_not_keeps_its_examples(config, monkeypatch, caplog):
    caplog.set_level("INFO")
    whole = fitted(config)
    assert whole == replace(config, fit=False)
    monkeypatch.setattr(fit, "peak_of", lambda asked: asked.batch_size * GB)
    monkeypatch.setattr(fit, "room_bytes", lambda device: int(2.5 * GB))
    divided = fitted(config)
    assert (divided.batch_size, divided.accumulation, divided.gradient_checkpointing) == (2, 4, False)
    assert "fits with --batch-size 2 --accumulation 4: 8 examples a step" in caplog.text
    monkeypatch.setattr(fit, "room_bytes", lambda device: GB // 2)
    with pytest.raises(FinepointError, match="one example of .* tokens at a time does not fit"):
        fitted(config)


def test_a_resumed_run_goes_on_as_it_was_begun(config, monkeypatch, tmp_path):
    monkeypatch.setattr(fit, "peak_of", lambda asked: asked.batch_size * GB)
    monkeypatch.setattr(fit, "room_bytes", lambda device: int(2.5 * GB))
    config = replace(config, save_every=2)
    train(replace(fitted(config), output=str(tmp_path / "whole")))
    with interrupted_at(13):
        train(fitted(config))
    monkeypatch.setattr(fit, "room_bytes", lambda device: 99 * GB)
    train(fitted(replace(config, resume=True)))
    assert_same_tensors(config.output, tmp_path / "whole")


def test_what_cannot_be_planned_is_refused(config, tmp_path):
    for changes, message in (
        ({"baseline": "lora", "density": None}, "leave it out, or --baseline"), ({"data": None}, "give --data"),
        ({"density": "auto"}, "leave it out, or --density auto"),
    ):  # fmt: skip
        with pytest.raises(FinepointError, match=message):
            fitted(replace(config, **changes))
    with pytest.raises(FinepointError, match="is of the command finepoint train"):
        train(config)


@pytest.mark.parametrize("room", [2**60, 2**20])
def test_plan_says_whether_it_fits_this_machine(config, room, monkeypatch, capsys):
    monkeypatch.setattr("finepoint.runtime.devices.room_bytes", lambda device: room)
    words = ["plan", "--model", config.model, "--tokens", "8", "--batch-size", "2", "--device", "cpu"]
    assert main(words) == 0
    assert ("It fits: " if room > GB else "and neither does one example; give shorter") in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] == (room > GB)


def test_a_plan_knows_what_protection_and_its_rule_hold(config):
    """Fisher information of k numbers; the states of texts; and a rule that looks at text can be planned."""
    asked = PlanConfig(model=config.model, rule="gain", density=0.5, tokens=16, batch_size=2, device="cpu")
    none = plan.plan(asked)
    assert none.selection is not None
    held = plan.plan(replace(asked, protect_by="anchor"))
    assert held.training["kept"] >= 4 * held.trained
    stepped = plan.plan(replace(asked, protect_by="anchor", protect_steps=True))
    assert stepped.training["kept"] >= held.training["kept"] + 4 * held.trained
    parts = [{**each.training, "process": 0} for each in (none, held)]
    assert sum(parts[0].values()) < sum(parts[1].values())
    states = plan.plan(replace(asked, protect_by="kl")).training["kept"]
    assert states >= 64 * 16 * 4 * 16


def test_a_way_of_dividing_reads_as_flags():
    assert str(Fit(2, 4, True, 0)) == "--batch-size 2 --accumulation 4 --gradient-checkpointing"
