import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from conftest import write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.errors import FinepointError
from finepoint.selection.settings import SelectConfig
from finepoint.studies import cells, sharing
from finepoint.studies import cells as cells_module
from finepoint.studies import compare as compare_module
from finepoint.studies.cells import Failure
from finepoint.studies.compare import StudyState, compare
from finepoint.studies.executors import LOST
from finepoint.studies.settings import CompareConfig
from finepoint.studies.study import Cell, make_study, planned, train_config
from finepoint.training.run import choose

LETTERS = "abcdefgh"


@pytest.fixture
def config(model_folder, choice_file, tmp_path):
    """Two tasks and a probe for a tiny model; one rule, one baseline."""
    other = [{"prompt": f"{a}{b}?", "choices": [" f", " g", " h"], "answer": i % 3}
             for i, (a, b) in enumerate((a, b) for a in LETTERS for b in LETTERS)]  # fmt: skip
    other_file = write_lines(tmp_path / "other.jsonl", other)
    text = write_lines(tmp_path / "text.jsonl", [{"text": "abc hgf. " * 3}, {"text": "dab. " * 5}])
    return CompareConfig(
        model=str(model_folder),
        tasks={"ends": {"train": choice_file, "validation": choice_file, "test": choice_file},
               "letters": {"test": other_file}},
        probes={"text": text},
        arms=[{"rule": "gallop", "density": 0.05, "lrs": [1e-3, 1e-2]}, {"baseline": "full", "lrs": [1e-4, 1e-3]}],
        train={"steps": 3, "batch_size": 8, "eval_every": 2, "scoring_examples": 16},
        seeds=[0, 1], validation_limit=16, test_limit=16, generate=4, output=str(tmp_path / "study"),
    )  # fmt: skip


def results(folder):
    """All results of a study without what differs from run to run: times and memory."""
    found = {}
    for path in sorted((folder / "cells").glob("*.json")):
        cell = json.loads(path.read_text())
        cell["cost"] = {k: v for k, v in cell["cost"].items() if k in ("trained", "changed", "adapter_bytes")}
        for point in cell["curve"]:
            for key in [key for key in point if "second" in key or key == "eval_runtime"]:
                del point[key]
        cell.pop("finished"), cell.pop("settings")
        found[cell["id"]] = cell
    return found


def alike(one, other):
    """Equal but for the last bits: a process that compiles the kernel and one that reads it from the cache, or another
    number of threads, add up in another order."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return other == (pytest.approx(one, rel=1e-3, abs=1e-5) if isinstance(one, float) else one)


# The plan


def fake(cell, accuracy):
    return {"id": cell.id, "task": cell.task, "arm": cell.arm, "lr": cell.lr, "seed": cell.seed,
            "validation": {"accuracy": accuracy, "loss": 1.0}}  # fmt: skip


def test_rates_are_tuned_at_the_first_seed_and_the_best_goes_to_the_others(config):
    study = make_study(replace(config, seeds=[5, 6, 7]))
    first = planned(study, [], [])
    assert [cell.id for cell in first] == [
        f"ends.{arm}.lr{lr}.s5" for arm, lr in
        (("gallop-0.05", "0.001"), ("gallop-0.05", "0.01"), ("full", "0.0001"), ("full", "0.001"))
    ]  # fmt: skip
    assert study.size == 8
    half = [fake(first[0], 0.9), fake(first[2], 0.2)]
    assert planned(study, half, []) == first  # nothing is known of the other rates
    done = [*half, fake(first[1], 0.8), fake(first[3], 0.3)]
    assert planned(study, done, [])[4:] == [
        Cell("ends", "gallop-0.05", 1e-3, 6), Cell("ends", "gallop-0.05", 1e-3, 7),
        Cell("ends", "full", 1e-3, 6), Cell("ends", "full", 1e-3, 7),
    ]  # fmt: skip
    # A rate that failed is out; an arm of which all failed has no more cells.
    failed = [{"id": first[1].id}, {"id": first[2].id}, {"id": first[3].id}]
    assert planned(study, half[:1], failed)[4:] == [Cell("ends", "gallop-0.05", 1e-3, s) for s in (6, 7)]


def test_arms_are_named_by_what_they_are(config):
    arms = [{"rule": "saft", "density": [0.01, 0.1]}, {"rule": "gallop", "options": {"epsilon": 1e-4}},
            {"baseline": "lora", "options": {"rank": 4}, "name": "small"},
            {"baseline": "rosa", "rule": "fisher", "density": 0.006}]  # fmt: skip
    study = make_study(replace(config, arms=arms))
    found = study.arms
    names = ["gradient-0.01", "gradient-0.1", "gallop-0.001-epsilon=0.0001", "small", "rosa-0.006"]
    assert [arm.name for arm in found] == names
    rosa = train_config(study, Cell("ends", "rosa-0.006", 1e-3, 0), "out")
    assert (rosa.baseline, rosa.rule, rosa.density) == ("rosa", "fisher", 0.006)
    assert len({len(arm.lrs) for arm in found}) == 1  # as many trials for each
    assert "2407.03036" in found[0].source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": []}, "no arms"),
        ({"arms": [{"rule": "gallop"}, {"rule": "gallop"}]}, "two arms are called 'gallop-0.001'"),
        ({"arms": [{"rule": "galop"}]}, "did you mean 'gallop'"),
        ({"arms": [{"baseline": "lorra"}]}, "lora"),
        ({"arms": [{"rule": "gallop", "baseline": "full"}]}, "either a rule or a baseline"),
        ({"arms": [{"rule": "gallop", "densty": 0.1}]}, "no setting 'densty'"),
        ({"arms": [{"baseline": "full", "density": 0.1}]}, "has no density"),
        ({"arms": [{"rule": "gallop", "lrs": [0.1, 0.1]}]}, "different ones above 0"),
        ({"arms": [{"rule": "gallop", "name": "../x"}]}, "cannot name files"),
        ({"train": {"lr": 1}}, "sets for every cell by itself"),
        ({"train": {"stepz": 1}}, "no setting of finepoint train"),
        ({"train": {"steps": "ten"}}, "gives steps 'ten'; it is a whole number"),
        ({"train": {"steps": 0}}, "arm 'gallop-0.05': steps is 0; give at least 1"),
        ({"arms": [{"rule": "gallop", "train": {"scope": "row"}}]}, "scope 'row'; it is global or weight or layer"),
        ({"arms": [{"rule": "gallop", "train": {"structure": "blocks"}}]}, "arm 'gallop-0.001': structure is 'blocks'"),
        ({"arms": [{"rule": "gallop", "train": {"refresh": "often"}}]}, "arm 'gallop-0.001': "),
        ({"train_on": ["letters"]}, "'letters' cannot be trained on"),
        ({"train_on": ["nothing"]}, "'nothing' cannot be trained on"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"workers": 0}, "at least 1"),
        ({"address": "1.2.3.4:5"}, "--executor ray"),
    ],
)
def test_a_bad_study_is_refused_by_name(config, changes, message):
    with pytest.raises(FinepointError, match=message):
        compare(replace(config, **changes))
    assert not list(Path(config.output).glob("cells/*"))


def test_a_bad_file_is_found_before_hours_of_work(config, tmp_path):
    text = write_lines(tmp_path / "plain.jsonl", [{"text": "abc"}])
    with pytest.raises(FinepointError, match="test of task 'letters' is plain text"):
        compare(replace(config, tasks=config.tasks | {"letters": {"test": text}}))
    labelled = write_lines(tmp_path / "labelled.jsonl", [{"text": "abc", "label": "a"}])
    with pytest.raises(FinepointError, match='"choices"'):
        compare(replace(config, tasks=config.tasks | {"letters": {"test": labelled}}))


# Running


def test_a_study_runs_to_its_end_and_never_runs_a_cell_twice(config, tmp_path, monkeypatch):
    found = compare(config)
    assert (found["cells"], found["done"], found["failed"]) == (6, 6, {})
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "study" / "cells").iterdir()}
    monkeypatch.setattr(cells, "run_cell", None)
    assert compare(config)["done"] == 6
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "study" / "cells").iterdir()}
    assert not list((tmp_path / "study").glob("adapters/*"))
    grown = replace(config, seeds=[0, 1, 2], arms=[*config.arms, {"rule": "random", "density": 0.05}])
    outlook = compare(replace(grown, dry_run=True))
    assert outlook["done"] == 6
    assert len(outlook["todo"]) == 4 + 2
    assert outlook["later"] == 2
    assert outlook["estimated_from"] == "finished cells"


def test_a_cell_holds_what_the_report_needs(config, tmp_path):
    compare(config)
    cell = results(tmp_path / "study")["ends.gallop-0.05.lr0.01.s0"]
    base = json.loads((tmp_path / "study" / "base.json").read_text())
    assert base["tests"]["ends"]["chance"] == 0.5
    assert base["tests"]["letters"]["chance"] == pytest.approx(1 / 3)
    assert set(cell["scores"]["id"]) == {"ends"}
    assert set(cell["scores"]["ood"]) == {"letters"}
    for kind, name in (("id", "ends"), ("ood", "letters")):
        change = cell["changes"][f"{kind}_change"][name]
        assert change == cell["scores"][kind][name]["accuracy"] - base["tests"][name]["accuracy"]
    assert cell["scores"]["ood"]["letters"]["generated"]["n"] == 4
    assert cell["scores"]["probe"]["text"]["kl"] > 0
    assert cell["changes"]["probe_change"]["text"] != 0
    assert set(cell["validation"]) >= {"accuracy", "loss", "n"}
    assert [point["step"] for point in cell["curve"] if "eval_loss" in point] == [2, 3]
    assert cell["update_norm"] > 0
    chosen = SparseAdapter.load((tmp_path / "study" / cell["indices"]).parent)
    assert chosen.count == cell["cost"]["trained"] == sum(w["chosen"] for w in cell["selection"]["weights"].values())
    assert results(tmp_path / "study")["ends.full.lr0.001.s0"]["selection"] is None


def test_a_cell_is_what_train_and_eval_would_give(config, tmp_path):
    """The same run through the public functions, without anything shared."""
    from finepoint.evaluation.evaluate import evaluate_config
    from finepoint.evaluation.settings import EvalConfig
    from finepoint.training.run import train

    compare(config)
    cell = Cell("ends", "gallop-0.05", 1e-2, 0)
    found = results(tmp_path / "study")[cell.id]
    plain = train_config(make_study(config), cell, str(tmp_path / "plain"))
    record = train(plain)
    assert record["update_norm"] == found["update_norm"]
    assert record["validation_loss"] == found["validation"]["loss"]
    files = config.tasks
    scores = evaluate_config(EvalConfig(
        model=config.model, adapter=[plain.output], id=[f"ends={files['ends']['test']}"], limit=16,
        ood=[f"letters={files['letters']['test']}"], probe=[f"text={config.probes['text']}"],
    ))["adapters"][plain.output]  # fmt: skip
    assert scores["ood_change"] == found["changes"]["ood_change"]
    assert scores["id_change"] == found["changes"]["id_change"]
    assert scores["probe_change"] == found["changes"]["probe_change"]


def test_scoring_is_done_once_for_cells_that_share_it(config, tmp_path, monkeypatch):
    passes = []
    stream = sharing.stream_statistics
    monkeypatch.setattr(sharing, "stream_statistics", lambda *a: passes.append(a[3]) or stream(*a))
    arms = [{"rule": rule, "density": [0.02, 0.05], "lrs": [1e-3, 1e-2]} for rule in ("gallop", "gradient", "snip")]
    compare(replace(config, arms=[*arms, {"rule": "random", "lrs": [1e-2]}], seeds=[0, 1]))
    assert len([needs for needs in passes if "gradient" in needs]) == 2  # one a seed
    cell = results(tmp_path / "study")["ends.snip-0.05.lr0.01.s1"]
    mine = choose(SelectConfig(model=config.model, data=config.tasks["ends"]["train"], output=str(tmp_path / "mine"),
                               rule="snip", density=0.05, batch_size=8, scoring_examples=16, seed=1))  # fmt: skip
    shared = SparseAdapter.load((tmp_path / "study" / cell["indices"]).parent)
    assert {name: indices.tolist() for name, indices in mine.items()} == {n: shared[n].tolist() for n in shared}


def test_a_failed_cell_stops_no_other_and_is_tried_again(config, tmp_path, monkeypatch):
    fit = cells_module.fit

    def failing(run, place):
        if run.baseline and run.lr == 1e-3:
            raise RuntimeError("out of luck")
        return fit(run, place)

    monkeypatch.setattr(cells_module, "fit", failing)
    found = compare(config)
    assert found["failed"] == {"ends.full.lr0.001.s0": "RuntimeError: out of luck"}
    assert found["done"] == 5  # the other rate goes on to the second seed
    mishap = tmp_path / "study" / "cells" / "ends.full.lr0.001.s0.error.json"
    assert "out of luck" in json.loads(mishap.read_text())["traceback"]
    monkeypatch.setattr(cells_module, "fit", fit)
    again = compare(config)
    assert again["failed"] == {}
    assert not mishap.exists()


def test_other_settings_are_refused_and_more_arms_are_not(config, tmp_path):
    compare(replace(config, arms=config.arms[:1], seeds=[0]))
    clipped = {"rule": "gallop", "density": 0.05, "train": {"clip": 2.0}}
    for changes, what in (({"train": config.train | {"steps": 9}}, "another train"),
                          ({"test_limit": 3}, "test_limit"), ({"arms": [clipped]}, "arm gallop-0.05")):  # fmt: skip
        with pytest.raises(FinepointError, match=what):
            compare(replace(config, **changes))
    path = config.tasks["letters"]["test"]
    lines = Path(path).read_text()
    write_lines(tmp_path / "other.jsonl", [{"prompt": "x?", "choices": [" f", " g"], "answer": 0}])
    with pytest.raises(FinepointError, match=r"another .*other\.jsonl"):
        compare(config)
    Path(path).write_text(lines)
    assert compare(replace(config, arms=config.arms[1:], seeds=[0]))["done"] == 2
    names = [arm["name"] for arm in json.loads((tmp_path / "study" / "study.json").read_text())["arms"]]
    assert names == ["full", "gallop-0.05"]  # whose cells are still there


def test_an_arm_without_a_result_may_change(config, tmp_path):
    arm = {"rule": "random", "density": 0.05, "lrs": [1e-3]}
    config = replace(config, arms=[*config.arms[:1], arm | {"train": {"clip": 1.0}}], seeds=[0])
    compare(config)
    config.arms[1] = arm | {"train": {"clip": 2.0}}
    with pytest.raises(FinepointError, match=r"arm random-0\.05"):
        compare(config)
    (tmp_path / "study" / "cells" / "ends.random-0.05.lr0.001.s0.json").unlink()  # as if it had failed
    assert compare(config)["failed"] == {}
    arms = json.loads((tmp_path / "study" / "study.json").read_text())["arms"]
    assert [arm["train"] for arm in arms if arm["name"] == "random-0.05"] == [{"clip": 2.0}]


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.tex").write_text("x")
    with pytest.raises(FinepointError, match="holds no study"):
        compare(config)


def test_two_at_once_are_refused(config, tmp_path):
    with compare_module._alone(tmp_path / "study"), pytest.raises(FinepointError, match="at work in"):
        compare(config)


# Other executors


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_several_processes_give_the_same_results(config, tmp_path, executor, monkeypatch):
    if executor == "ray":
        pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have on two cores: sums depend on the number in their last bits
    compare(config)
    torch.set_num_threads(threads)
    many = replace(config, output=str(tmp_path / "many"), workers=os.cpu_count(), executor=executor)
    compare(many)
    assert alike(results(tmp_path / "many"), results(tmp_path / "study"))


class Unlucky:
    """A executor whose processes are killed when they run certain cells."""

    size = 2

    def __init__(self, deaths):
        self.deaths, self.jobs, self.given = dict(deaths), [], []

    def start(self, job):
        self.jobs.append(job)
        self.given.append(job[0].id if job[0] else "base")

    def wait(self):
        job = self.jobs.pop()
        name = job[0].id if job[0] else "base"
        if self.deaths.get(name, 0):
            self.deaths[name] -= 1
            return job, LOST
        if job[0] is None:
            return job, {"tests": {}}
        return job, fake(job[0], 0.5) | {"scores": {"id": {"ends": {"accuracy": 0.5}}}, "cost": {"seconds": 1.0},
                                         "changes": {"id_change": {"ends": 0}, "probe_change": {}}}  # fmt: skip

    def close(self):
        pass


def test_a_cell_whose_process_was_killed_is_run_again_exactly_once(config, tmp_path):
    study = make_study(config)
    once, twice = (cell.id for cell in planned(study, [], [])[:2])
    executor = Unlucky({once: 1, twice: 2, "base": 1})
    (tmp_path / "study" / "cells").mkdir(parents=True)
    state = StudyState.of(tmp_path / "study")
    compare_module._run(study, state, executor)
    assert [executor.given.count(name) for name in ("base", once, twice)] == [2, 2, 2]
    assert set(state.failures) == {twice}
    assert "killed, twice" in state.failures[twice]["error"]
    assert once in state.cells


def test_a_base_that_cannot_be_measured_ends_the_study(tmp_path):
    with pytest.raises(FinepointError, match="no luck"):
        StudyState(tmp_path).keep(None, Failure("no luck", ""))


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_killed_worker_costs_one_cell_at_most(config, tmp_path, executor):
    """Real processes: the one that has the first cell is killed as soon as the base is measured."""
    if executor == "ray":
        pytest.importorskip("ray")
    study = make_study(replace(config, workers=2, executor=executor))
    running = compare_module._executor(study)
    (tmp_path / "study" / "cells").mkdir(parents=True)
    state = StudyState.of(tmp_path / "study")
    killed = []
    start = running.start

    def start_and_kill(job):
        start(job)
        if job[0] is not None and not killed:
            killed.append(job[0].id)
            if executor == "local":
                process = next(process for process, given in running.busy.values() if given == job)
                os.kill(process.pid, signal.SIGKILL)
            else:
                actor = next(actor for actor, given in running.busy.values() if given == job)
                running.ray.kill(actor)

    running.start = start_and_kill
    try:
        compare_module._run(study, state, running)
    finally:
        running.close()
    assert killed
    assert not state.failures
    assert len(state.cells) == 6


# The command


def command(config, tmp_path, *arguments):
    file = tmp_path / "study.yaml"
    keys = ("model", "tasks", "probes", "arms", "train", "seeds", "validation_limit", "test_limit", "generate")
    file.write_text(yaml.safe_dump({key: getattr(config, key) for key in keys}))
    return [sys.executable, "-m", "finepoint", "compare", "--config", str(file), *arguments]


def test_dry_run_prints_cells_and_an_estimate_and_writes_nothing(config, tmp_path):
    done = subprocess.run(
        command(config, tmp_path, "--output", config.output, "--dry-run"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ends.gallop-0.05.lr0.001.s0\n")
    assert "4 cells to run and 2 at the best rates" in done.stdout
    assert "arithmetic" in done.stdout
    assert not (tmp_path / "study").exists()


def test_kill_9_loses_at_most_the_cell_in_hand(config, tmp_path):
    compare(replace(config, output=str(tmp_path / "whole")))
    whole = results(tmp_path / "whole")
    line = command(config, tmp_path, "--output", config.output, "--json")
    folder = tmp_path / "study" / "cells"
    for wanted in (1, 3):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        until = time.time() + 120
        while len(list(folder.glob("[!.]*.json"))) < wanted and process.poll() is None and time.time() < until:
            time.sleep(0.05)
        process.kill()
        process.communicate()
        kept = results(tmp_path / "study")
        assert len(kept) >= wanted
        assert all(alike(kept[name], whole[name]) for name in kept)
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["done"] == 6
    assert alike(results(tmp_path / "study"), whole)


def test_ctrl_c_says_how_to_go_on(config, tmp_path, ctrl_c):
    process = subprocess.Popen(command(config, tmp_path, "--output", config.output), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    until = time.time() + 120
    while not list((tmp_path / "study" / "cells").glob("[!.]*.json")) and time.time() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert "Traceback" not in said
