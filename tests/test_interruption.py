"""Ctrl-C at an unlucky moment: in a function that C calls, in a finaliser, in a cell of a study."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from conftest import write_lines
from finepoint.cli import main
from finepoint.errors import FinepointError
from finepoint.runtime import interruption
from finepoint.runtime.progress import progress
from finepoint.studies import cells


class Pressed:
    """A sequence that ctrl-C is pressed in while it is read."""

    def __len__(self):
        return 1

    def __getitem__(self, position):
        signal.raise_signal(signal.SIGINT)
        return 1.0


class PressedAtTheEnd:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def forgotten(ctrl_c):
    yield
    interruption.check()  # nothing is left of it


def test_it_comes_out_of_torch_as_another_error():
    with pytest.raises(ValueError, match="could not determine the shape"):
        torch.asarray(Pressed())


def test_another_error_after_it_is_an_interruption():
    with pytest.raises(KeyboardInterrupt), interruption.noticed():
        torch.asarray(Pressed())


def test_errors_without_it_are_themselves():
    for error in (ValueError, FinepointError, SystemExit):
        with pytest.raises(error), interruption.noticed():
            raise error("something else")


def test_one_that_is_lost_is_felt_at_the_next_step(capfd):
    with interruption.noticed(), progress("steps", 2) as advance:
        advance(1)
        PressedAtTheEnd()
        with pytest.raises(KeyboardInterrupt):
            advance(1)
    assert capfd.readouterr().err == ""


def test_other_errors_of_finalisers_are_still_printed(capfd):
    class Failing:
        def __del__(self):
            raise ValueError("a finaliser failed")

    hook, sys.unraisablehook = sys.unraisablehook, sys.__unraisablehook__  # pytest has one of its own
    try:
        with interruption.noticed():
            Failing()
    finally:
        sys.unraisablehook = hook
    assert "a finaliser failed" in capfd.readouterr().err


def test_a_signal_that_somebody_else_handles_is_left_to_them():
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append(1))
    try:
        with interruption.noticed():
            signal.raise_signal(signal.SIGINT)
            interruption.check()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert came


@pytest.fixture
def study(model_folder, choice_file, tmp_path):
    rows = [json.loads(line) for line in Path(choice_file).read_text().splitlines()]
    few = write_lines(tmp_path / "few.jsonl", rows[:4])
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({
        "model": str(model_folder), "tasks": {"letters": {"train": choice_file, "validation": few, "test": few}},
        "arms": [{"rule": "random", "density": 0.05, "lrs": [1e-3]}], "seeds": [0, 1], "generate": 0,
        "train": {"steps": 2, "batch_size": 4}, "output": str(tmp_path / "out"),
    }))  # fmt: skip
    return ["compare", "--config", str(tmp_path / "study.yaml")]


def test_a_cell_that_it_breaks_has_not_failed(study, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as broken:
        broken.setattr(cells, "run_cell", lambda worker, cell: torch.asarray(Pressed()))
        assert main(study) == 130
    said = capfd.readouterr().err
    assert said.splitlines()[-1] == "finepoint compare: interrupted"
    assert "the same command goes on" in said
    assert not list((tmp_path / "out" / "cells").glob("*.json"))
    assert main([*study, "--json"]) == 0
    done = json.loads(capfd.readouterr().out)
    assert (done["done"], done["failed"]) == (2, {})


@pytest.fixture
def with_workers(study):
    """The study, run by two processes of which one at least is there already."""
    process = subprocess.Popen([sys.executable, "-m", "finepoint", *study, "--workers", "2"], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True, start_new_session=True)  # fmt: skip
    until = time.time() + 120
    while not workers(process.pid):
        assert process.poll() is None
        assert time.time() < until
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


def test_workers_do_not_hear_it(with_workers):
    """A terminal sends it to all processes of a command; their parent decides what becomes of those that run cells."""
    until = time.time() + 120
    while with_workers.poll() is None and time.time() < until:
        for worker in workers(with_workers.pid):
            with suppress(OSError):  # it may have ended by now
                assert blocked(worker) & 1 << signal.SIGINT - 1
                os.kill(worker, signal.SIGINT)
        time.sleep(0.1)
    _, said = with_workers.communicate(timeout=60)
    assert with_workers.returncode == 0, said
    assert "[2/2, " in said
    assert not any(word in said for word in ("Traceback", "killed", "failed"))


def test_workers_end_with_the_command(with_workers):
    hired = workers(with_workers.pid)
    os.killpg(with_workers.pid, signal.SIGINT)
    _, said = with_workers.communicate(timeout=60)
    assert with_workers.returncode == 130, said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "finepoint compare: interrupted"
    assert not any(os.path.exists(f"/proc/{worker}") for worker in hired)


def workers(parent):
    """The processes of a command's executor."""
    found = []
    with suppress(OSError):
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with suppress(OSError):
                if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                    found.append(int(child))
    return found


def blocked(process):
    """The signals that it does not hear, a bit each."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("SigBlk:")).split()[1], 16)
