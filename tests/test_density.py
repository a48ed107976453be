import json
from dataclasses import replace

import pytest

from finepoint.adapters.adapter import SparseAdapter
from finepoint.cli.train import print_search
from finepoint.config import TrainConfig
from finepoint.errors import FinepointError
from finepoint.studies import density
from finepoint.studies.density import best, train_auto
from finepoint.training.finite import TrainingFailedError
from finepoint.training.run import train


@pytest.fixture
def config(model_folder, choice_file, tmp_path, monkeypatch):
    monkeypatch.setattr(density, "DENSITIES", (0.01, 0.05, 0.2))
    return TrainConfig(model=str(model_folder), data=choice_file, validation=choice_file, validation_limit=32, steps=8,
                       output=str(tmp_path / "run"), rule="gallop", density="auto", batch_size=8,
                       scoring_examples=16)  # fmt: skip


def test_each_rung_is_longer_and_keeps_the_best(config, tmp_path):
    record = train_auto(config)
    trials = record["search"]
    rungs = {steps: [trial for trial in trials if trial["steps"] == steps] for steps in (2, 4, 8)}
    assert [len(rung) for rung in rungs.values()] == [12, 4, 1]
    for shorter, longer in ((2, 4), (4, 8)):
        kept = sorted(rungs[shorter], key=lambda trial: trial["validation_loss"])[: len(rungs[longer])]
        assert {(t["density"], t["lr"]) for t in kept} == {(t["density"], t["lr"]) for t in rungs[longer]}
    (winner,) = rungs[8]
    assert record["validation_loss"] == winner["validation_loss"]
    assert record["config"]["lr"] == winner["lr"]
    assert SparseAdapter.load(tmp_path / "run").count == winner["trained"]
    assert all(trial["overfit"] >= 0 for trial in trials)


def test_the_winner_is_the_run_one_would_get_without_the_search(config, tmp_path):
    found = train_auto(config)
    winner = found["config"]
    plain = train(replace(config, density=winner["density"], lr=winner["lr"], keep="best", output=str(tmp_path / "p")))
    assert plain["update_norm"] == found["update_norm"]
    assert plain["validation_loss"] == found["validation_loss"]


def test_finished_trials_are_not_run_again(config, tmp_path, monkeypatch):
    one, runs = density.train, []

    def tired(run, place):
        runs.append((run.density, run.lr, run.steps))
        if len(runs) == 14:
            raise KeyboardInterrupt
        return one(run, place)

    monkeypatch.setattr(density, "train", tired)
    with pytest.raises(KeyboardInterrupt):
        train_auto(config)
    with pytest.raises(FinepointError, match="not empty"):
        train_auto(config)
    record = train_auto(replace(config, resume=True))
    assert len(runs) == 17 + 1  # the interrupted one twice
    assert len(set(runs)) == 17
    whole = train_auto(replace(config, output=str(tmp_path / "whole")))
    assert whole["search"] == record["search"]
    with pytest.raises(FinepointError, match="is done"):
        train_auto(replace(config, resume=True))


def test_a_trial_that_diverges_is_out_and_the_search_goes_on(config, tmp_path, monkeypatch, capsys):
    one = density.train

    def fragile(run, place):
        if run.lr > 1e-3:
            raise TrainingFailedError("the loss became nan")
        return one(run, place)

    monkeypatch.setattr(density, "train", fragile)
    record = train_auto(config)
    assert record["config"]["lr"] <= 1e-3
    broken = [trial for trial in record["search"] if trial["lr"] > 1e-3]
    assert broken
    assert all(trial["error"] == "the loss became nan" for trial in broken)
    json.dumps(record, allow_nan=False)
    print_search(record["search"])
    assert len(capsys.readouterr().out.splitlines()) == len(record["search"]) + 1


def test_a_full_disk_ends_the_search_and_the_trial_is_done_again(config, monkeypatch):
    one, calls = density.train, []

    def full(run, place):
        calls.append(run)
        if len(calls) == 2:
            raise FinepointError("cannot write: No space left on device")
        return one(run, place)

    whole = train_auto(replace(config, output=f"{config.output}-whole"))
    monkeypatch.setattr(density, "train", full)
    with pytest.raises(FinepointError, match="No space left"):
        train_auto(config)
    again = train_auto(replace(config, resume=True))
    assert again["search"] == whole["search"]


@pytest.mark.parametrize(("changes", "message"), [({"validation": None}, "--validation"), ({"count": 5}, "--count"),
                                                  ({"baseline": "full"}, "--baseline")])  # fmt: skip
def test_what_cannot_be_searched_is_refused(config, changes, message):
    with pytest.raises(FinepointError, match=message):
        train_auto(replace(config, **changes))
    with pytest.raises(FinepointError, match="train_auto"):
        train(config)


def test_ties_go_to_fewer_entries():
    trials = [{"validation_loss": 1.0, "density": d, "lr": lr} for d in (0.1, 0.01) for lr in (2, 1)]
    assert best(trials, 1) == [{"validation_loss": 1.0, "density": 0.01, "lr": 1}]
