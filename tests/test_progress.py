"""A long wait says how far it is: in a terminal, in a notebook, in a log; and keeps quiet where it is told to."""

import io
import json
import logging
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import nbformat
import pytest
from nbclient import NotebookClient
from rich.console import Console
from transformers import TrainerCallback

from conftest import write_lines
from finepoint.cli import main
from finepoint.runtime import progress
from finepoint.training.callbacks import UNDER_WAY
from finepoint.training.run import train
from finepoint.training.settings import TrainConfig
from finepoint.training.watching import _left, standing


@pytest.mark.parametrize(("pause", "said"), [(0.0, ["scores: 2 of 5", "scores: 4 of 5"]), (1000.0, [])])
def test_without_a_terminal_a_line_stands_for_the_bar(pause, said, monkeypatch, caplog):
    monkeypatch.setattr(progress, "PAUSE", pause)
    monkeypatch.setattr(progress.console, "_force_terminal", False)
    monkeypatch.setattr(logging.getLogger("finepoint"), "propagate", True)
    with caplog.at_level("INFO", "finepoint"), progress.progress("scores", 5) as advance:
        for done in (2, 2, 1):
            advance(done)
    assert caplog.messages == said


class DrawnAtOnce(progress.Progress):
    """A bar that is drawn at each step, not ten times a second."""

    def update(self, *args, **kwargs):
        super().update(*args, **kwargs)
        self.refresh()


@pytest.fixture
def terminal(monkeypatch):
    """What is written to a terminal."""
    # Numba's colours would keep the stdout that a bar puts before ours, to the end of the process.
    monkeypatch.setattr(progress, "Progress", partial(DrawnAtOnce, redirect_stdout=False, redirect_stderr=False))
    written = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=written, force_terminal=True, width=160))
    return written


@pytest.fixture
def run(model_folder, tmp_path):
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "ad", "completion": "e"}]
    data, other = write_lines(tmp_path / "d.jsonl", rows[:1]), write_lines(tmp_path / "v.jsonl", rows[1:])
    return TrainConfig(model=str(model_folder), data=data, output=str(tmp_path / "a"), count=20, steps=3, lr=0.01,
                       validation=other, eval_every=3, overwrite=True, no_audit=True)  # fmt: skip


def test_training_in_python_shows_loss_rate_speed_and_time_left(run, terminal, capfd):
    train(run)
    shown = terminal.getvalue()
    assert re.search(r"training.*1/3.*loss \d\.\d+, rate 0\.01, [\d,]+ tokens/s, \d:\d\d left", shown)
    assert re.search(r"3/3.*loss \d\.\d+, .*\d:\d\d in all", shown.rpartition("training")[2])
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("how", ["logging", "TQDM_DISABLE", "transformers"])
def test_progress_keeps_quiet_where_it_is_told_to(how, run, terminal, monkeypatch):
    import transformers

    if how == "logging":
        monkeypatch.setattr(logging.getLogger("finepoint"), "level", logging.WARNING)
    elif how == "transformers":
        transformers.utils.logging.disable_progress_bar()
    else:
        monkeypatch.setenv("TQDM_DISABLE", "1")
    try:
        with progress.progress("training", 2) as bar:
            bar(1)
            bar.tell("loss 1")
        assert terminal.getvalue() == ""
    finally:
        transformers.utils.logging.enable_progress_bar()


def test_a_resumed_bar_tells_the_time_of_what_is_left_alone(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Bar("training", 100, lambda bar: None)
    bar.start(90)
    assert bar.left() == ""
    now[0] += 4
    bar(2)
    assert bar.left() == "0:16"
    assert [progress.clock(seconds) for seconds in (0, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]


def test_what_a_notebook_is_shown_is_escaped_and_drawn():
    bar = progress.Bar("<a>", 3, lambda bar: None)
    bar(1)
    bar.tell("loss <1>", 2.0)
    assert "<svg" not in progress._drawn(bar)
    bar.tell("loss", 1.0)
    bar.note({"step": 1, "validation loss": "0.5"})
    found = progress._drawn(bar)
    assert "<svg" in found
    assert "2 to 1" in found
    assert "<td>0.5</td>" in found
    assert "&lt;a&gt;: 1 of 3, loss" in found
    many = progress._curve([float(i % 7) for i in range(100_000)])
    assert len(many) < 20_000


def test_a_notebook_shows_the_training(run):
    code = f"import finepoint, logging\nrecord = finepoint.train(finepoint.{run})"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [output.data["text/html"] for output in notebook.cells[0].outputs if "text/html" in output.get("data", {})]
    (training,) = [html for html in shown if "training" in html]
    assert "3 of 3" in training
    assert "<svg" in training
    assert "<th>validation loss</th>" in training
    assert [output for output in notebook.cells[0].outputs if output.output_type == "stream"] == []


NOISY = """
import logging, warnings
import finepoint
{}
logging.getLogger("torchao").warning("Failed to load %s", "a kernel")
logging.getLogger("torchao").warning("something that is the user's business")
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to quantise")
warnings.warn("mine")
"""


@pytest.mark.parametrize("others", ["pass", "import peft, torchao, bitsandbytes, finepoint.models"])
def test_no_line_is_about_missing_kernels_of_other_packages_and_no_other_line_is_lost(others):
    done = subprocess.run([sys.executable, "-c", NOISY.format(others)], capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith("  ")]
    assert len(said) == 3, said
    assert [said[0], said[1]] == ["something that is the user's business", "Failed to quantise"]
    assert said[2].endswith("UserWarning: mine")


def test_a_run_is_watched_while_it_trains_when_it_was_left_and_when_it_is_done(run, tmp_path, monkeypatch, capsys):
    folder, seen = tmp_path / "a", []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen.append(standing(folder))

    monkeypatch.setattr("finepoint.training.run.tracked", lambda *_: nullcontext(({"report_to": []}, [Look()])))
    record = train(run)
    assert [found["state"] for found in seen] == ["training"] * 3
    assert [(found["step"], found["steps"]) for found in seen] == [(0, 3), (1, 3), (2, 3)]
    assert "seconds_left" in seen[2]
    found = standing(folder)
    assert (found["state"], found["step"], found["steps"]) == ("done", 3, 3)
    assert found["loss"] == record["last_loss"]
    assert found["validation_loss"] == record["validation_loss"]
    assert not (folder / UNDER_WAY).exists()
    assert main(["watch", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["watch", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("done: step 3 of 3, loss ")
    (folder / "run.json").rename(folder / "gone")
    (folder / UNDER_WAY).write_text('{"steps": 9, "from": 0}')
    assert (standing(folder)["state"], standing(folder)["steps"]) == ("left", 9)
    assert main(["watch", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_time_left_is_told_by_the_pace_of_the_last_steps_since_the_run_went_on():
    line = [{"step": n, "seconds": 100.0 * n} for n in range(4)]
    line += [{"step": n, "seconds": n - 3.0} for n in range(4, 9)]
    assert _left(line, 18) == 10.0
    assert _left(line[:1], 18) is None
    assert _left(line, None) is None
