"""What trackers were told, read back from what they wrote."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest

from finepoint.errors import FinepointError
from finepoint.training.run import train
from finepoint.training.settings import TrainConfig
from finepoint.training.trainer import SparseTrainer


@pytest.fixture
def config(model_folder, choice_file, tmp_path):
    return {"model": str(model_folder), "data": choice_file, "output": str(tmp_path / "movies"), "density": 0.05,
            "rule": "gallop", "steps": 6, "save_every": 2, "batch_size": 8}  # fmt: skip


def break_at(monkeypatch, step):
    """Training dies in this step, as by ctrl-C."""
    taken = []
    original = SparseTrainer.training_step

    def breaking(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SparseTrainer, "training_step", breaking)


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's
def test_tensorboard_has_every_step_once_also_after_a_resume(config, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config["report_to"] = ["tensorboard"]
    break_at(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**config))
    monkeypatch.undo()
    name = json.loads((tmp_path / "movies" / "tracking.json").read_text())["name"]
    assert name.startswith("movies-")
    before = dict(os.environ)
    train(TrainConfig(**config, resume=True))
    assert dict(os.environ) == before
    assert json.loads((tmp_path / "movies" / "tracking.json").read_text())["name"] == name
    events = EventAccumulator(str(tmp_path / "movies" / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert sorted(found) == [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    for row in logged(tmp_path / "movies"):
        if "loss" in row:
            assert found[row["step"]] == pytest.approx(row["loss"], rel=1e-6)
    facts = events.Tensors("finepoint/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"rule": "gallop"' in facts
    assert capsys.readouterr().out == ""
    # A fresh run in the same folder leaves nothing of the first one.
    config["steps"] = 2
    train(TrainConfig(**config, overwrite=True))
    events = EventAccumulator(str(tmp_path / "movies" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


SCRIPT = """
import json, sys
import pytest
from finepoint.training.settings import TrainConfig
from finepoint.training.run import train
from test_tracking import break_at

config = json.loads(sys.argv[1])
with pytest.MonkeyPatch.context() as patch:
    break_at(patch, 6)
    try:
        train(TrainConfig(**config))
    except KeyboardInterrupt:
        pass
print(train(TrainConfig(**config, resume=True))["steps"])
print(train(TrainConfig(**config | {"output": config["output"] + "-2", "steps": 2}))["steps"])
"""


def test_trackio_keeps_a_run_in_its_local_database(config, tmp_path):
    pytest.importorskip("trackio")
    config["report_to"] = ["trackio"]
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(config)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "6\n2\n"  # what trackio says goes to stderr
    database = sqlite3.connect(tmp_path / "trackio" / "finepoint.db")
    told: dict[str, list] = {}
    for run, text in database.execute("select run_name, metrics from metrics order by id"):
        metrics = json.loads(text)
        if "train/loss" in metrics:
            told.setdefault(run, []).append((metrics["train/global_step"], metrics["train/loss"]))
    first, second = told
    assert first == json.loads((tmp_path / "movies" / "tracking.json").read_text())["name"]
    assert second.startswith("movies-2-")
    # The run that was broken off in step 6 left a checkpoint of step 5, its last good one: no step happened twice.
    assert [step for step, _ in told[first]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in told[second]] == [1, 2]
    losses = {row["step"]: row["loss"] for row in logged(tmp_path / "movies") if "loss" in row}
    assert all(loss == pytest.approx(losses[step], rel=1e-6) for step, loss in told[first])
    settings = {run: json.loads(text) for run, text in database.execute("select run_name, config from configs")}
    assert settings[first]["finepoint/rule"] == "gallop"
    assert settings[first]["finepoint/density"] == 0.05


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_a_missing_tracker_is_named_before_any_work(config, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    extra = "tracking" if tracker in ("tensorboard", "trackio") else tracker
    message = rf"^--report-to {tracker} needs the package {tracker}: pip install 'finepoint\[{extra}\]'$"
    with pytest.raises(FinepointError, match=message):
        train(TrainConfig(**config | {"model": "/no/such"}, report_to=[tracker]))
