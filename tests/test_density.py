import json
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.cli.runs import print_search
from finepoint.errors import FinepointError
from finepoint.selection.settings import SelectConfig
from finepoint.studies import density
from finepoint.studies.density import Trial, best, train_auto
from finepoint.training.run import choose, train
from finepoint.training.settings import TrainConfig
from finepoint.tuner.finite import TrainingFailedError


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
        judged = [
            json.loads((tmp_path / "run" / "search" / f"{Trial(t['density'], t['lr'], shorter).id}.json").read_text())
            for t in rungs[shorter]
        ]
        kept = best(judged, len(rungs[longer]))
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
    one, runs = density.fit, []

    def tired(run, place):
        runs.append((run.density, run.lr, run.steps))
        if len(runs) == 14:
            raise KeyboardInterrupt
        return one(run, place)

    monkeypatch.setattr(density, "fit", tired)
    with pytest.raises(KeyboardInterrupt):
        train_auto(config)
    with pytest.raises(FinepointError, match="not empty"):
        train_auto(config)
    old = next((tmp_path / "run" / "search").glob("d0.01-*.json"))  # as if written before the search looked at prompts
    old.write_text(json.dumps({name: fact for name, fact in json.loads(old.read_text()).items() if name != "kl"}))
    record = train_auto(replace(config, resume=True))
    assert len(runs) == 17 + 2  # the interrupted one twice, and the old one
    assert len(set(runs)) == 17
    whole = train_auto(replace(config, output=str(tmp_path / "whole")))
    assert whole["search"] == record["search"]
    with pytest.raises(FinepointError, match="is done"):
        train_auto(replace(config, resume=True))


@pytest.mark.parametrize("change", ["data", "validation", "rule", "seed", "steps", "exclude"])
def test_a_search_goes_on_with_the_same_data_and_settings_alone(config, tmp_path, monkeypatch, choice_file, change):
    def tired(run, place):
        raise KeyboardInterrupt

    config = replace(config, rule="magnitude-low")
    fit = density.fit
    monkeypatch.setattr(density, "fit", tired)
    with pytest.raises(KeyboardInterrupt):
        train_auto(config)
    monkeypatch.setattr(density, "fit", fit)
    rows = [json.loads(line) for line in Path(choice_file).read_text().splitlines()]
    other = write_lines(tmp_path / "other.jsonl", [row | {"answer": 1 - row["answer"]} for row in rows])
    excluded = str(tmp_path / "excluded")
    choose(SelectConfig(model=config.model, output=excluded, rule="random", count=5))
    changed = {"data": other, "validation": other, "rule": "magnitude-high", "seed": 1, "steps": 9,
               "exclude": [excluded]}[change]  # fmt: skip
    with pytest.raises(FinepointError, match="was trained with .*; give the same .*again, or start afresh"):
        train_auto(replace(config, resume=True, **{change: changed}))
    same = write_lines(tmp_path / "same.jsonl", rows)  # by another name
    monkeypatch.setattr(density, "fit", tired)
    with pytest.raises(KeyboardInterrupt):
        train_auto(replace(config, resume=True, data=same, validation=same))


def test_a_trial_that_diverges_is_out_and_the_search_goes_on(config, tmp_path, monkeypatch, capsys):
    one = density.fit

    def fragile(run, place):
        if run.lr > 1e-3:
            raise TrainingFailedError("the loss became nan")
        return one(run, place)

    monkeypatch.setattr(density, "fit", fragile)
    record = train_auto(config)
    assert record["config"]["lr"] <= 1e-3
    broken = [trial for trial in record["search"] if trial["lr"] > 1e-3]
    assert broken
    assert all(trial["error"] == "the loss became nan" for trial in broken)
    json.dumps(record, allow_nan=False)
    print_search(record["search"])
    assert len(capsys.readouterr().out.splitlines()) == len(record["search"]) + 1


@pytest.mark.slow
def test_a_full_disk_ends_the_search_and_the_trial_is_done_again(config, monkeypatch):
    one, calls = density.fit, []

    def full(run, place):
        calls.append(run)
        if len(calls) == 2:
            raise FinepointError("cannot write: No space left on device")
        return one(run, place)

    whole = train_auto(replace(config, output=f"{config.output}-whole"))
    monkeypatch.setattr(density, "fit", full)
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


LOSSES = [0.1, 0.9, 0.2, 0.8, 0.5]


def trial(density=0.01, lr=0.1, losses=LOSSES, kl=0.5):
    return {"density": density, "lr": lr, "losses": losses, "kl": kl, "validation_loss": sum(losses) / len(losses)}


def test_ties_go_to_fewer_entries():
    trials = [trial(density, lr) for density in (0.1, 0.01) for lr in (2, 1)]
    assert best(trials, 1) == [trial(0.01, 1)]


def test_of_trials_that_learned_alike_the_one_that_disturbed_least_is_first():
    slightly = [loss + more for loss, more in zip(LOSSES, (0.03, -0.02, 0.02, 0.01, -0.03), strict=True)]
    clearly = [loss + 0.01 for loss in LOSSES]  # a small difference, which every example shows
    lowest, alike, worse = trial(), trial(losses=slightly, kl=0.1), trial(losses=clearly, kl=0.001)
    error = trial() | {"validation_loss": None, "kl": None, "error": "the loss became nan"}
    assert best([worse, error, lowest, alike], 4) == [alike, lowest, worse]
    assert lowest["validation_loss"] < alike["validation_loss"] < worse["validation_loss"]
    # Without prompts, and where one example cannot tell, it is the loss.
    trials = [found | {"kl": None} for found in (worse, alike, lowest)]
    assert best(trials, 3) == trials[::-1]
    single = [trial(losses=[0.5]), trial(losses=[0.51], kl=0.1), trial(losses=[0.5], kl=0.4)]
    assert best(single, 3) == [single[2], single[0], single[1]]


def test_a_classifier_is_searched_by_its_loss(config, tmp_path):
    rows = [{"text": f"{a}{b}", "label": "pos" if a < "e" else "neg"} for a in "abcdefgh" for b in "abcd"]
    labelled = write_lines(tmp_path / "labels.jsonl", rows)
    record = train_auto(replace(config, data=labelled, validation=labelled))
    assert {trial["kl"] for trial in record["search"]} == {None}
    assert record["validation_loss"] == min(t["validation_loss"] for t in record["search"] if t["steps"] == 8)
