import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import assert_same_tensors, write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.peft import load_merged
from finepoint.data.examples import read_examples, some
from finepoint.errors import FinepointError
from finepoint.evaluation.metrics import sequence_metrics
from finepoint.evaluation.scoring import accuracy, mean_nll
from finepoint.models.loading import load_model, load_tokenizer
from finepoint.reporting.report import write_report
from finepoint.runtime.files import read_record
from finepoint.studies import sequence
from finepoint.studies.sequence import run_sequence, values_of
from finepoint.studies.settings import ReportConfig, SequenceConfig
from finepoint.studies.ways import check
from finepoint.training.earlier import Apart, input_factors

LETTERS = "abcdefgh"


@pytest.fixture
def config(model_folder, tmp_path):
    def task(name, choices, rule):
        rows = [{"prompt": f"{a}{b}{name}", "choices": choices, "answer": rule(a, b)} for a in LETTERS for b in LETTERS]
        return write_lines(tmp_path / f"task{ord(name)}.jsonl", rows)

    files = {
        "first": task(":", [" yes", " no"], lambda a, b: int(a > b)),
        "second": task("?", [" a", " b", " c"], lambda a, b: ord(b) % 3),
        "third": task("!", [" d", " e"], lambda a, b: int(b in "abc")),
    }
    tasks = {name: {"train": file, "test": file} for name, file in files.items()}
    return SequenceConfig(model=str(model_folder), tasks=tasks, output=str(tmp_path / "s"), density=0.1, lr=1e-2,
                          rule="gallop", train={"steps": 6, "batch_size": 8, "scoring_examples": 16},
                          test_limit=24)  # fmt: skip


def adapters(config, way):
    folders = [f"{config.output}/{'first' if i == 0 else way}/{task}" for i, task in enumerate(config.tasks)]
    return [SparseAdapter.load(folder) for folder in folders]


def positions(adapter):
    return {(name, i) for name in adapter for i in adapter[name].tolist()}


def test_each_task_owns_its_entries_and_any_can_go(config):
    found = run_sequence(config)
    own, shared = found["exclude"], found["allow"]
    assert own["overlaps"][0][1] == own["overlaps"][1][2] == own["overlaps"][0][2] == 0
    assert max(shared["overlaps"][0][1:]) > 0  # else there was nothing to compare with
    assert own["removable"] == [True, True, True]
    assert shared["removable"] == [False, False, False]
    assert len(set(own["trained"])) == 1
    sets = [positions(adapter) for adapter in adapters(config, "exclude")]
    assert len(sets[0] | sets[1] | sets[2]) == sum(map(len, sets))


def test_random_choices_of_the_tasks_share_what_chance_gives(config):
    """Not all their entries, as choices from one seed would."""
    found = run_sequence(replace(config, rule="random", overlap="allow", train={"steps": 1}))["allow"]
    (count,) = set(found["trained"])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert found["overlaps"][a][b] == pytest.approx(0.1 * count, abs=5 * (0.1 * 0.9 * count) ** 0.5)


def test_the_matrix_is_that_of_adapters_applied_one_after_the_other(config):
    """Without the sequence's own code: load what it left, apply, score."""
    found = run_sequence(config)
    tokenizer = load_tokenizer(config.model)
    tests = {name: some(read_examples(files["test"]), 24) for name, files in config.tasks.items()}
    for way in ("exclude", "allow"):
        model = load_model(config.model)
        matrix = []
        for adapter in adapters(config, way):
            adapter.apply(model)
            matrix.append([accuracy(model, tokenizer, examples)["accuracy"] for examples in tests.values()])
        assert found[way]["matrix"] == matrix
    # Removing the first task from the disjoint ones leaves what the others alone would be.
    model, alone = load_model(config.model), load_model(config.model)
    one, two, three = adapters(config, "exclude")
    for adapter in (one, two, three):
        adapter.apply(model)
    one.revert(model)
    for adapter in (three, two):
        adapter.apply(alone)
    for (name, here), there in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(here, there), name


def test_it_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    whole = run_sequence(replace(config, output=str(tmp_path / "whole")))
    fit, runs = sequence.fit, []

    def tired(settings, *more):
        runs.append(settings.output)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return fit(settings, *more)

    monkeypatch.setattr(sequence, "fit", tired)
    with pytest.raises(KeyboardInterrupt):
        run_sequence(config)
    again = run_sequence(config)
    assert len(runs) == 5 + 1
    for way in ("exclude", "allow"):
        assert again[way]["matrix"] == whole[way]["matrix"]
    run_sequence(config)
    assert len(runs) == 6
    assert json.loads((tmp_path / "s" / "result.json").read_text())["exclude"]["matrix"] == whole["exclude"]["matrix"]


def test_the_model_is_the_base_again_between_ways(config, monkeypatch):
    seen = []
    load = sequence.load_model

    def keep(*arguments):
        seen.append(load(*arguments))
        return seen[-1]

    monkeypatch.setattr(sequence, "load_model", keep)
    run_sequence(config)
    fresh = load(config.model)
    assert all(torch.equal(a, b) for a, b in zip(seen[0].parameters(), fresh.parameters(), strict=True))
    assert values_of(fresh, adapters(config, "allow")[0])


def test_what_no_way_looks_at_is_told(config, caplog):
    check(replace(config, ways=["exclude", "lora-apart"], earlier_strength=5.0, apart_strength=1.0))
    assert "no way here looks at earlier_strength, which is 5.0" in caplog.text
    assert "apart_strength" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tasks": {"a": {"train": "x", "test": "x"}}}, "two tasks or more"), ({"train": {"lr": 1}}, "'lr'"),
     ({"tasks": {"a": {"train": "x"}, "b": {"train": "x", "test": "x"}}}, "give train and test"),
     ({"rule": "galop"}, "did you mean"), ({"train": {"stepz": 1}}, "'stepz'"),
     ({"ways": ["anchord"]}, "did you mean 'anchored'"), ({"rates": {"lora2": 1}}, "unknown way 'lora2'"),
     ({"ways": ["allow"], "overlap": "allow"}, "leave out one of them"),
     ({"ways": ["allow", "lora", "allow"]}, "names allow twice"),
     ({"ways": ["anchored"], "train": {"refresh": "every:2"}}, "leave out refresh"),
     ({"ways": ["lora"], "train": {"protect": "news"}}, "way lora: --protect-by anchor holds weights")],
)  # fmt: skip
def test_mistakes_are_named(config, changes, message):
    with pytest.raises(FinepointError, match=message):
        run_sequence(replace(config, **changes))


def test_another_setting_needs_another_folder(config, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("x")
    with pytest.raises(FinepointError, match="holds no sequence"):
        run_sequence(config)
    (tmp_path / "s" / "thesis.tex").unlink()
    run_sequence(replace(config, overlap="exclude"))
    with pytest.raises(FinepointError, match="begun with lr"):
        run_sequence(replace(config, lr=1e-3))
    assert "allow" in run_sequence(config)  # the other way may be added


def test_a_way_may_be_given_a_rate_until_it_has_begun_and_the_first_task_is_trained_at_it(config):
    config = only(config, "first", "second", ways=["allow"], earlier_examples=2)
    run_sequence(config)
    both = replace(config, ways=["allow", "anchored"], rates={"anchored": 1e-3})
    run_sequence(both)
    rates = [read_record(Path(config.output, folder, "run.json"))["lr"]
             for folder in ("first/first", "allow/second", "anchored/first", "anchored/second")]  # fmt: skip
    assert rates[0] == rates[1] != 1e-3
    assert rates[2:] == [1e-3, 1e-3]
    assert json.loads(Path(config.output, "sequence.json").read_text())["rates"] == {"anchored": 1e-3}
    run_sequence(replace(config, rates={}))  # who asks for the other way need not know
    for rates, told in (({}, "the usual one"), ({"anchored": 2e-3}, "0.002")):
        with pytest.raises(FinepointError, match=f"the way anchored at the rate 0.001, not {told}"):
            run_sequence(replace(both, rates=rates))
    with pytest.raises(FinepointError, match="the way allow at the rate the usual one, not 0.5"):
        run_sequence(replace(config, rates={"allow": 0.5}))


def numbers(config, way):
    return [{name: change.numbers for name, change in adapter.changes.items()} for adapter in adapters(config, way)]


def moved(change):
    return sum(float(part.square().sum()) for part in change.values())


def only(config, *tasks, **changes):
    """A shorter sequence, of these tasks."""
    tasks = {name: config.tasks[name] for name in tasks}
    return replace(config, tasks=tasks, train={"steps": 3, "batch_size": 8}, test_limit=4, rule="random", **changes)


def test_earlier_tasks_hold_the_later_ones(config, tmp_path):
    """Strength 0 is no anchor, bit for bit; much of it moves less; the first task has none to keep."""
    config, found = only(config, "first", "second", earlier_examples=8), {}
    ways = ["anchored", "exclude-anchored"]
    for strength in (0.0, 1e7):
        one = replace(config, output=str(tmp_path / f"s{strength}"), ways=ways, earlier_strength=strength)
        run_sequence(one)
        found |= {(way, strength): numbers(one, way) for way in ways}
    run_sequence(config)
    for plain, way in (("allow", "anchored"), ("exclude", "exclude-anchored")):
        free, held = found[way, 0.0], found[way, 1e7]
        for one_change, other in zip(numbers(config, plain), free, strict=True):
            assert all(torch.equal(one_change[name], other[name]) for name in one_change)
        assert all(torch.equal(free[0][name], held[0][name]) for name in free[0])
        assert moved(held[1]) < moved(free[1])
    told = adapters(one, "exclude-anchored")[1].info["earlier"]
    assert told["strength"] == 1e7
    assert {task: facts["examples"] for task, facts in told["tasks"].items()} == {"first": 8}


def test_a_held_sequence_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    """Beside text to keep, at the same bits."""
    text = write_lines(tmp_path / "text.jsonl", [{"text": "hello you " * 3}, {"text": "abc abc"}])
    config = replace(only(config, "first", "second", ways=["anchored"], earlier_examples=4), rule="gallop",
                     train={"steps": 3, "batch_size": 8, "scoring_examples": 8, "protect": text})  # fmt: skip
    run_sequence(replace(config, output=str(tmp_path / "whole")))
    fit, runs = sequence.fit, []

    def tired(*arguments):
        runs.append(arguments)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(sequence, "fit", tired)
    with pytest.raises(KeyboardInterrupt):
        run_sequence(config)
    run_sequence(config)
    assert len(runs) == 3
    for folder in ("first/first", "anchored/second"):
        assert_same_tensors(tmp_path / "s" / folder, tmp_path / "whole" / folder)
    Path(config.tasks["second"]["train"]).write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n')
    with pytest.raises(FinepointError, match="begun with another content of"):
        run_sequence(config)


def test_other_methods_take_the_same_way(config):
    """LoRA for each task, one trained on, every weight, and EWC on every weight."""
    ways = ["lora", "lora-on", "full", "full-anchored"]
    config = only(config, "first", "second", ways=ways, rates=dict.fromkeys(ways, 1e-3), earlier_examples=4,
                  earlier_strength=1e6)  # fmt: skip
    found = run_sequence(config)
    assert all(len(found[way]["matrix"]) == 2 for way in ways)
    assert found["full"]["matrix"][0] == found["full-anchored"]["matrix"][0]
    one, free, held = (SparseAdapter.load(f"{config.output}/{folder}").changes
                       for folder in ("first-full/first", "full/second", "full-anchored/second"))  # fmt: skip
    far, near = (moved({name: change.numbers - one[name].numbers for name, change in each.items()})
                 for each in (free, held))  # fmt: skip
    assert near < far
    begin, goes_on = (load_file(f"{config.output}/{folder}/adapter_model.safetensors")
                      for folder in ("first-lora/first", "lora-on/second"))  # fmt: skip
    # Each of the two steps that have a rate moves a factor by as much as that, or a little more.
    assert all((goes_on[name] - begin[name]).abs().max() < 3e-3 for name in begin)
    assert any(begin[name].abs().max() > 0 for name in begin if "lora_B" in name)
    model = load_model(config.model)
    one_lora = load_merged(f"{config.output}/lora-on/second", model)
    one_lora.apply(model)
    tests = {name: some(read_examples(files["test"]), 4) for name, files in config.tasks.items()}
    tokenizer = load_tokenizer(config.model)
    row = [accuracy(model, tokenizer, examples)["accuracy"] for examples in tests.values()]
    assert found["lora-on"]["matrix"][1] == row
    assert write_report(ReportConfig(folder=[config.output]))["figures"] == ["accuracies"]


def test_factors_are_kept_apart_from_those_of_earlier_tasks(config, tmp_path):
    """By the gradient of 0.5 x the sum of |A A_t^T|; at strength 0 it is LoRA for each task, to the bit."""
    config, found = only(config, "first", "second", ways=["lora", "lora-apart"]), {}
    config = replace(config, rates={"lora": 1e-2, "lora-apart": 1e-2})
    for strength in (0.0, 5.0):
        run_sequence(replace(config, output=str(tmp_path / f"s{strength}"), apart_strength=strength))
        found[strength] = [input_factors(tmp_path / f"s{strength}" / folder)
                           for folder in ("first-lora/first", "lora-apart/second")]  # fmt: skip
    plain = input_factors(tmp_path / "s0.0" / "lora/second")
    assert plain
    assert all(torch.equal(plain[name], found[0.0][1][name]) for name in plain)
    near, far = (sum(float((one[name] @ other[name].T).abs().sum()) for name in one) for one, other in found.values())
    assert far < near

    draw = torch.Generator().manual_seed(0)
    factor, before = (torch.randn(2, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    ours, theirs = torch.nn.Parameter(factor.clone()), torch.nn.Parameter(factor.clone())
    Apart(lambda: {"a": ours}, {"a": before}, 0.5).add_()
    (0.5 * (theirs @ before.T).abs().sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_losses_are_those_of_the_right_answers(config):
    """Beside the accuracies, of the model with the adapters one after the other."""
    config = only(config, "first", "second", ways=["exclude"])
    found, (one, two) = run_sequence(config), adapters(config, "exclude")
    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    tests = [some(read_examples(files["test"]), 4) for files in config.tasks.values()]
    rows = [[mean_nll(model, tokenizer, examples)["nll"] for examples in tests]]
    for adapter in (one, two):
        adapter.apply(model)
        rows.append([mean_nll(model, tokenizer, examples)["nll"] for examples in tests])
    base, *matrix = rows
    assert list(found["base_losses"].values()) == base
    assert found["exclude"]["losses"] == matrix
    assert found["exclude"]["loss_rise"] == matrix[1][0] - matrix[0][0]
    assert found["exclude"]["average_loss"] == pytest.approx(sum(matrix[1]) / 2)


def test_metrics_of_a_sequence_by_hand():
    matrix = [[0.9, 0.2, 0.1], [0.8, 0.7, 0.1], [0.5, 0.75, 0.6]]
    found = sequence_metrics(matrix)
    assert found["average_accuracy"] == pytest.approx((0.5 + 0.75 + 0.6) / 3)
    assert found["backward_transfer"] == pytest.approx(((0.5 - 0.9) + (0.75 - 0.7)) / 2)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.5) + (0.7 - 0.75)) / 2)


def test_the_report_shows_what_each_task_left_and_how_adapters_overlap(config):
    found = run_sequence(config)
    written = write_report(ReportConfig(folder=[config.output]))
    assert written["figures"] == ["accuracies", "jaccard-exclude", "layers-exclude", "jaccard-allow", "layers-allow"]
    folder = Path(config.output) / "report"
    with (folder / "data" / "accuracies.csv").open() as file:
        rows = list(csv.DictReader(file))
    after = {(row["way"], row["after"], row["task"]): float(row["accuracy"]) for row in rows}
    for way in ("exclude", "allow"):
        for i, first in enumerate(found["tasks"]):
            assert after[way, "base", first] == found["base"][first]
            for j, second in enumerate(found["tasks"]):
                assert after[way, first, second] == found[way]["matrix"][i][j]
    with (folder / "data" / "interference_allow.csv").open() as file:
        pairs = {(row["a"], row["b"]): int(row["shared"]) for row in csv.DictReader(file) if row["scope"] == "all"}
    a, b, c = found["tasks"]
    overlaps = found["allow"]["overlaps"]
    assert pairs == {(a, b): overlaps[0][1], (a, c): overlaps[0][2], (b, c): overlaps[1][2]}
    assert f"{found['allow']['average_accuracy']:.3f}" in (folder / "index.html").read_text()


def test_a_sequence_without_its_result_is_not_reported(config):
    run_sequence(config)
    (Path(config.output) / "result.json").unlink()
    with pytest.raises(FinepointError, match="not finished"):
        write_report(ReportConfig(folder=[config.output]))
