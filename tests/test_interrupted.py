"""A run that is broken off: what it leaves is the last good step, says so, and goes on to the same bits."""

import json
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.alignment.align import align
from finepoint.alignment.settings import AlignConfig
from finepoint.cli import main
from finepoint.evaluation.evaluate import evaluate_config
from finepoint.evaluation.settings import EvalConfig
from finepoint.runtime.interruption import BrokenOff
from finepoint.training.callbacks import Watch, read_log
from finepoint.training.run import fit, train
from finepoint.training.settings import TrainConfig
from finepoint.training.trainer import SparseTrainer
from finepoint.tuner.tuner import SparseTuner

STEPS = 6


def pressed(signals=signal.SIGINT, at=4):
    """A function that calls another and has ctrl-C pressed before or after its so-manieth call."""
    calls = []

    def around(function, before=True):
        def called(*args, **kwargs):
            calls.append(1)
            if before and len(calls) == at:
                signal.raise_signal(signals)
            found = function(*args, **kwargs)
            if not before and len(calls) == at:
                signal.raise_signal(signals)
            return found

        return called

    return around


def in_a_pass(patch, number=signal.SIGINT):
    patch.setattr(SparseTrainer, "training_step", pressed(number)(SparseTrainer.training_step))


def after_a_pass(patch):
    patch.setattr(SparseTrainer, "training_step", pressed()(SparseTrainer.training_step, before=False))


def before_the_optimizer_moves(patch):
    patch.setattr(torch.optim.AdamW, "step", pressed(at=3)(torch.optim.AdamW.step))


def after_the_optimizer_moved(patch):
    patch.setattr(torch.optim.AdamW, "step", pressed(at=3)(torch.optim.AdamW.step, before=False))


def before_it_is_logged(patch):
    patch.setattr(Watch, "on_log", pressed(at=3)(Watch.on_log))


def by_a_plain_kill(patch):
    in_a_pass(patch, signal.SIGTERM)


MOMENTS = [in_a_pass, after_a_pass, before_the_optimizer_moves, after_the_optimizer_moved, before_it_is_logged,
           by_a_plain_kill]  # fmt: skip


@pytest.fixture
def words(model_folder, choice_file, tmp_path):
    return ["train", "--model", str(model_folder), "--data", choice_file, "--density", "0.05", "--lr", "0.01",
            "--rule", "magnitude-low", "--steps", str(STEPS), "--batch-size", "8"]  # fmt: skip


@pytest.fixture
def config(model_folder, choice_file, tmp_path):
    return TrainConfig(model=str(model_folder), data=choice_file, output=str(tmp_path / "run"), density=0.05, lr=1e-2,
                       rule="magnitude-low", steps=STEPS, batch_size=8)  # fmt: skip


def assert_same_numbers(a, b):
    assert set(a) == set(b)
    for name, change in a.changes.items():
        assert torch.equal(change.indices, b.changes[name].indices)
        assert torch.equal(change.numbers, b.changes[name].numbers), name


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("every", [None, 2])
def test_an_interrupted_run_leaves_its_last_good_step_and_goes_on(
    words, config, tmp_path, monkeypatch, capsys, ctrl_c, moment, every
):
    train(replace(config, output=str(tmp_path / "whole"), save_every=1))
    run = tmp_path / "broken"
    saving = [] if every is None else ["--save-every", str(every)]
    with monkeypatch.context() as patch:
        moment(patch)
        assert main([*words, "--output", str(run), "--overwrite", *saving]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    start = (
        f"finepoint train: interrupted after step 3 of {STEPS}; the adapter so far, marked as unfinished, is in {run}"
    )
    assert said.startswith(start)
    assert not (run / "run.json").exists()
    left = SparseAdapter.load(run)
    assert left.info["unfinished"] == f"step 3 of {STEPS}"
    assert "left at step 3 of 6" in (run / "README.md").read_text()
    command = shlex.split(said.partition("; go on with: ")[2])
    assert command == ["finepoint", *words, "--output", str(run), *saving, "--resume"]
    assert main(command[1:]) == 0
    whole, resumed = SparseAdapter.load(tmp_path / "whole"), SparseAdapter.load(run)
    assert_same_numbers(whole, resumed)
    assert "unfinished" not in resumed.info
    assert [row["step"] for row in read_log(run / "log.jsonl")] == [*range(1, STEPS + 1), STEPS]


def test_checkpoints_are_evaluated_like_adapters(config, choice_file, tmp_path, caplog, capsys):
    train(replace(config, save_every=2))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    earlier, last = (SparseAdapter.load(checkpoints / f"checkpoint-{step}") for step in (4, 6))
    assert_same_numbers(last, SparseAdapter.load(config.output))
    assert "unfinished" not in last.info
    assert earlier.info["unfinished"] == "step 4 of 6"
    assert any(not torch.equal(change.numbers, last.changes[name].numbers) for name, change in earlier.changes.items())
    caplog.clear()
    place = str(checkpoints / "checkpoint-4")
    found = evaluate_config(EvalConfig(model=config.model, adapter=[place], id=[f"x={choice_file}"], limit=8))
    assert found["adapters"][place]["unfinished"] == "step 4 of 6"
    assert [record.getMessage() for record in caplog.records] == [
        f"{place} is unfinished: its training was left at step 4 of 6",
        f"{place} has seen what it is measured on: 8 of 8 of id x; scores there say little of new examples",
    ]
    for command in (["inspect"], ["verify", "--model", config.model]):
        assert main([*command, place, "--json"]) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)["unfinished"] == "step 4 of 6"
        assert "is unfinished" in shown.err
    export = ["export", "--model", config.model, "--adapter", place, "--format", "merged", "--output"]
    assert main([*export, str(tmp_path / "merged")]) == 0
    assert "is unfinished" in capsys.readouterr().err


def test_what_a_killed_run_has_left_says_so(config, monkeypatch):
    def killed(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(SparseTrainer, "training_step", killed)
        with pytest.raises(SystemExit):
            train(replace(config, save_every=2))
    assert SparseAdapter.load(config.output).info["unfinished"] == "step 0 of 6"


def test_before_the_first_step_nothing_is_left(config, monkeypatch, ctrl_c):
    with monkeypatch.context() as patch:
        patch.setattr(SparseTrainer, "training_step", pressed(at=1)(SparseTrainer.training_step))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not list(Path(config.output).rglob("*.safetensors"))


@pytest.mark.parametrize("baseline", ["lora", "rosa", "bitfit"])
def test_checkpoints_of_baselines_are_evaluated_like_adapters(config, baseline, choice_file, caplog):
    density = {"density": 0.05} if baseline == "rosa" else {"density": None, "rule": "random"}
    train(replace(config, baseline=baseline, lr=None, save_every=4, **density))
    place = f"{config.output}/checkpoints/checkpoint-4"
    found = evaluate_config(EvalConfig(model=config.model, adapter=[place], probe=[f"x={choice_file}"], limit=8))
    assert found["adapters"][place]["unfinished"] == "step 4 of 6"
    assert found["adapters"][place]["probe_change"]["x"] != 0
    assert f"{place} is unfinished: its training was left at step 4 of 6" in caplog.text


@pytest.mark.parametrize("baseline", ["lora", "bitfit"])
def test_baselines_too(config, baseline, tmp_path, monkeypatch, ctrl_c):
    config = replace(config, baseline=baseline, density=None, rule="random", lr=None)
    _, whole = fit(replace(config, output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        in_a_pass(patch)
        with pytest.raises(BrokenOff, match=f"after step 3 of {STEPS}") as caught:
            train(config)
    assert caught.value.resumable
    assert json.loads((tmp_path / "run" / "finepoint_config.json").read_text())["info"]["unfinished"] == "step 3 of 6"
    _, resumed = fit(replace(config, resume=True))
    assert_same_numbers(whole, resumed)


@pytest.mark.parametrize("before", [True, False])
def test_around_a_choice_of_other_entries_too(config, tmp_path, monkeypatch, ctrl_c, before):
    """Pressed as the last choice is made: it waits for the step that trains it, or the next run would choose again."""
    config = replace(config, rule="gradient", refresh="every:2", accumulation=2, batch_size=4)
    train(replace(config, output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        patch.setattr(SparseTuner, "choose_", pressed(at=2)(SparseTuner.choose_, before))
        with pytest.raises(BrokenOff, match=f"after step 5 of {STEPS}"):
            train(config)
    train(replace(config, resume=True))
    assert_same_numbers(SparseAdapter.load(tmp_path / "whole"), SparseAdapter.load(config.output))


def test_a_cell_of_a_study_that_is_broken_off_leaves_nothing(config, monkeypatch, ctrl_c):
    with monkeypatch.context() as patch:
        in_a_pass(patch)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    assert not (Path(config.output) / "finepoint.safetensors").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_align_leaves_its_last_good_step_and_goes_on(model_folder, tmp_path, monkeypatch, capsys, ctrl_c):
    from trl import DPOTrainer

    rows = [{"prompt": f"a{c}:", "chosen": " yes", "rejected": " no"} for c in "abcdefgh"]
    config = AlignConfig(model=str(model_folder), data=write_lines(tmp_path / "p.jsonl", rows), method="dpo", steps=5,
                         batch_size=4, density=0.1, lr=1e-2, output=str(tmp_path / "whole"))  # fmt: skip
    align(config)
    words = ["align", "--model", config.model, "--data", config.data, "--method", "dpo", "--steps", "5",
             "--batch-size", "4", "--density", "0.1", "--lr", "0.01", "--output", str(tmp_path / "run")]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "training_step", pressed(at=3)(DPOTrainer.training_step))
        assert main(words) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("finepoint align: interrupted after step 2 of 5; the adapter so far, marked as unfinished")
    assert SparseAdapter.load(tmp_path / "run").info["unfinished"] == "step 2 of 5"
    assert main(shlex.split(said.partition("; go on with: ")[2])[1:]) == 0
    assert_same_numbers(SparseAdapter.load(tmp_path / "whole"), SparseAdapter.load(tmp_path / "run"))
