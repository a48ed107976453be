"""The views of a study against hand computations, and against plain sets where entries are compared."""

import json
import random
from itertools import pairwise
from math import log10, sqrt
from statistics import mean, stdev

import numpy as np
import pytest
from safetensors.numpy import load_file

from finepoint.errors import FinepointError
from finepoint.reporting import overlap, views
from finepoint.reporting.views import ALL_TASKS, interval, t_quantile, t_within
from finepoint.studies.results import at_edge, best_lr, first_seed, read_results, tuned
from studies import SEEDS, TASKS, arm, put, write_study


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return read_results(write_study(tmp_path_factory.mktemp("study") / "s"))


def one(rows, **wanted):
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


# Reading


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(FinepointError, match=r"no study.*compare"):
        read_results(tmp_path)


def test_a_study_without_a_finished_run_is_refused_with_its_failure(tmp_path):
    folder = write_study(tmp_path / "s", arms=[arm("full", kind="baseline")], kept=lambda *_: False)
    with pytest.raises(FinepointError, match="no run"):
        read_results(folder)
    put(folder / "cells" / "a.error.json", {"task": "movies", "arm": "full", "lr": 1.0, "seed": 0, "error": "out of x"})
    with pytest.raises(FinepointError, match="out of x"):
        read_results(folder)


@pytest.mark.parametrize("text", ["{", "[1]", '{"task": "movies"}'])
def test_a_damaged_cell_is_named(tmp_path, text):
    folder = write_study(tmp_path / "s", arms=[arm("full", kind="baseline")])
    (folder / "cells" / "broken.json").write_text(text)
    with pytest.raises(FinepointError, match=r"broken\.json"):
        read_results(folder)


def test_a_cell_of_another_study_and_another_format_are_refused(tmp_path):
    folder = write_study(tmp_path / "s", arms=[arm("full", kind="baseline")])
    path = next((folder / "cells").iterdir())
    put(path, json.loads(path.read_text()) | {"arm": "stranger"})
    with pytest.raises(FinepointError, match="stranger"):
        read_results(folder)
    put(folder / "study.json", {"format": 9})
    with pytest.raises(FinepointError, match="format version 9"):
        read_results(folder)


def test_a_failure_that_was_tried_again_with_success_is_forgotten(tmp_path):
    folder = write_study(tmp_path / "s", arms=[arm("full", kind="baseline")])
    failed = {"task": "movies", "arm": "full", "lr": 1e-4, "seed": 0, "error": "once"}
    put(folder / "cells" / "x.error.json", failed)
    put(folder / "cells" / "y.error.json", failed | {"seed": 9})
    found = read_results(folder)
    assert [failure["seed"] for failure in found.failures] == [9]


# Tuning


def cell(lr, accuracy, loss):
    return {"lr": lr, "validation": {"accuracy": accuracy, "loss": loss}}


def test_the_best_rate_ties_to_the_lower_loss_then_to_the_smaller_rate():
    assert best_lr([cell(1, 0.5, 1.0), cell(2, 0.6, 9.0)]) == 2
    assert best_lr([cell(1, 0.5, 1.0), cell(2, 0.5, 0.9)]) == 2
    assert best_lr([cell(2, 0.5, 1.0), cell(1, 0.5, 1.0)]) == 1
    assert best_lr([cell(1, 0.5, float("nan")), cell(2, 0.5, 1.0)]) == 2
    assert best_lr([cell(1, 0.5, None), cell(2, 0.5, 1.0)]) == 2


def test_within_one_standard_error_the_smallest_rate_is_taken():
    cells = [cell(lr, accuracy, 1.0) for lr, accuracy in ((1, 0.5), (2, 0.81), (3, 0.79), (4, 0.9))]
    for found in cells:
        found["validation"]["stderr"] = 0.1
    assert best_lr(cells, "one-se") == 2
    assert best_lr(cells) == 4
    cells[3]["validation"]["stderr"] = 0.05
    assert best_lr(cells, "one-se") == 4


def test_tuned_runs_share_the_rate_of_the_first_seed(results):
    for name in results.arms:
        runs = tuned(results, "movies", name)
        assert [run["seed"] for run in runs] == list(SEEDS)
        assert {run["lr"] for run in runs} == {best_lr(first_seed(results, "movies", name))}


def test_a_rate_at_the_edge_of_its_grid_is_told(results):
    rates = results.arm("lora")["lrs"]
    for name in results.arms:
        lr = tuned(results, "movies", name)[0]["lr"]
        assert at_edge(results, "movies", name) == (lr in (min(rates), max(rates)))
    assert {at_edge(results, "movies", name) for name in results.arms} == {True, False}  # the study has both


# Intervals


def test_t_quantiles_are_those_of_the_tables():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 10: 2.2281, 30: 2.0423, 120: 1.9799}
    for freedom, value in table.items():
        assert t_quantile(freedom) == pytest.approx(value, abs=5e-5)
        assert t_within(value, freedom) == pytest.approx(0.95, abs=1e-5)


def test_the_interval_is_t_times_the_standard_error():
    values = [0.81, 0.84, 0.87]
    found = interval(values)
    half = 4.302653 * 0.03 / sqrt(3)
    assert found["mean"] == pytest.approx(0.84)
    assert found["sd"] == pytest.approx(0.03)
    assert (found["low"], found["high"]) == pytest.approx((0.84 - half, 0.84 + half), abs=1e-6)
    assert interval([0.5]) == {"mean": 0.5, "sd": None, "low": None, "high": None, "n": 1}


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draw = random.Random(0)
    found = [interval([draw.gauss(0, 1) for _ in range(3)]) for _ in range(4000)]
    covered = mean(one["low"] <= 0 <= one["high"] for one in found)
    assert covered == pytest.approx(0.95, abs=0.015)


# Summary and comparisons


def test_the_summary_is_mean_and_spread_over_the_seeds(results):
    row = one(views.summary(results), task="movies", arm="lora")
    runs = tuned(results, "movies", "lora")
    scores = [run["scores"]["id"]["movies"]["accuracy"] for run in runs]
    ood = [mean(score["accuracy"] for score in run["scores"]["ood"].values()) for run in runs]
    assert row["id"] == pytest.approx(mean(scores))
    assert row["id_sd"] == pytest.approx(stdev(scores))
    assert row["id_high"] - row["id"] == pytest.approx(4.302653 * stdev(scores) / sqrt(3), rel=1e-6)
    assert row["ood"] == pytest.approx(mean(ood))
    assert row["nll_change"] == pytest.approx(mean(run["changes"]["probe_change"]["text"] for run in runs))
    assert row["effective_share"] == pytest.approx((704 - 3) / 704)
    assert row["seeds"] == 3


def test_all_tasks_are_averaged_seed_by_seed(results):
    row = one(views.summary(results), task=ALL_TASKS, arm="full")
    by_seed = [
        mean(one_run["scores"]["id"][task]["accuracy"] for task in TASKS for one_run in tuned(results, task, "full")
             if one_run["seed"] == seed)
        for seed in SEEDS
    ]  # fmt: skip
    assert row["id"] == pytest.approx(mean(by_seed))
    assert row["id_sd"] == pytest.approx(stdev(by_seed))


def test_a_diverged_number_is_no_number():
    assert [views.number(value) for value in (1, 2.5, float("nan"), float("inf"), True, None, "3")] == [
        1, 2.5, None, None, None, None, None,
    ]  # fmt: skip


def test_signed_changes_are_by_test(results):
    row = one(views.ood_changes(results), task="movies", arm="lora", test="news")
    runs = tuned(results, "movies", "lora")
    base = results.base["tests"]["news"]["accuracy"]
    assert row["mean"] == pytest.approx(mean(run["scores"]["ood"]["news"]["accuracy"] - base for run in runs))


def test_paired_differences_are_seed_by_seed_at_one_density(results):
    row = one(views.paired(results, "random"), task="movies", arm="gallop-0.1")
    assert row["reference"] == "random-0.1"
    ours, theirs = (tuned(results, "movies", name) for name in ("gallop-0.1", "random-0.1"))
    gaps = [a["scores"]["id"]["movies"]["accuracy"] - b["scores"]["id"]["movies"]["accuracy"]
            for a, b in zip(ours, theirs, strict=True)]  # fmt: skip
    assert row["id"] == pytest.approx(mean(gaps))
    assert row["id_sd"] == pytest.approx(stdev(gaps))
    assert {row["arm"] for row in views.paired(results, "lora")} == set(results.arms) - {"lora"}
    assert not any(row["arm"] in ("lora", "full") for row in views.paired(results, "random"))  # which density's?


def test_the_front_holds_what_nothing_beats(results):
    rows = [row for row in views.pareto(results) if row["task"] == "movies"]
    for row in rows:
        beaten = any(
            other["id"] >= row["id"] and other["ood"] >= row["ood"]
            and (other["id"], other["ood"]) != (row["id"], row["ood"])
            for other in rows
        )  # fmt: skip
        assert row["front"] == (not beaten)
    assert any(row["front"] for row in rows)


def test_budgets_group_within_ten_per_cent():
    rows = [{"trained": trained} for trained in (100, 109, 111, 120, 1000)]
    assert [[row["trained"] for row in group] for group in views.budgets(rows)] == [[100, 109], [111, 120]]


def test_interpolation_is_linear_between_runs_and_takes_the_first_crossing():
    path = [{"x": 0.0, "y": 0.0, "z": None}, {"x": 1.0, "y": 10.0, "z": 1.0}, {"x": 0.0, "y": 20.0, "z": 1.0}]
    assert views.interpolated(path, "x", 0.25, ["y", "z"]) == {"y": 2.5, "z": None}
    assert views.interpolated(path, "x", 1.0, ["y"]) == {"y": 10.0}
    assert views.interpolated(path, "x", 1.01, ["y"]) == {"y": None}
    assert views.interpolated(path, "x", -0.1, ["y"]) == {"y": None}
    assert views.interpolated([], "x", 1.0, ["y"]) == {"y": None}
    path = [{"x": 1.0, "y": 0.0}, {"x": 100.0, "y": 2.0}]
    assert views.interpolated(path, "x", 10.0, ["y"], log10)["y"] == pytest.approx(1.0)


def test_equal_accuracy_starts_at_the_base_model(results):
    rows = [row for row in views.equal_accuracy(results) if row["task"] == "movies"]
    base = results.base["tests"]["movies"]["accuracy"]
    best = max(row["id"] for row in views.paths(results) if row["task"] == "movies")
    assert sorted({row["id"] for row in rows}) == pytest.approx(
        [base + share * (best - base) for share in (0.5, 0.75, 0.9)]
    )
    row = one(rows, arm="lora", share_of_best_gain=0.5)
    path = [(base, 0.0)] + [
        (run["scores"]["id"]["movies"]["accuracy"], run["changes"]["probe_change"]["text"])
        for run in sorted(first_seed(results, "movies", "lora"), key=lambda run: run["lr"])
    ]
    for (x, y), (next_x, next_y) in pairwise(path):
        if x < row["id"] <= next_x:
            assert row["nll_change"] == pytest.approx(y + (row["id"] - x) / (next_x - x) * (next_y - y))
            break
    else:
        raise AssertionError("the path should reach half the gain")


def test_equal_loss_is_where_an_arm_first_learns_what_a_baseline_does(results):
    rows = views.equal_loss(results)
    assert {row["reference"] for row in rows} == {"lora", "full"}
    reached = 0
    for row in (row for row in rows if row["task"] != views.MEDIAN):
        runs = {name: sorted(first_seed(results, row["task"], name), key=lambda run: run["lr"])
                for name in (row["arm"], row["reference"])}  # fmt: skip
        goal = min(runs[row["reference"]], key=lambda run: run["validation"]["loss"])
        assert row["validation_loss"] == goal["validation"]["loss"]
        assert row["reference_kl"] == goal["scores"]["probe"]["text"]["kl"]
        losses = [run["validation"]["loss"] for run in runs[row["arm"]]]
        kls = [run["scores"]["probe"]["text"]["kl"] for run in runs[row["arm"]]]
        along = np.linspace(0, len(losses) - 1, 200_001)  # a dense walk along the path
        walked, places = np.interp(along, range(len(losses)), losses), np.interp(along, range(len(kls)), np.log(kls))
        below = np.flatnonzero(walked <= row["validation_loss"])
        if not len(below):
            assert row["kl"] is None
            assert row["ratio"] is None
            continue
        reached += 1
        assert row["kl"] == pytest.approx(float(np.exp(places[below[0]])), rel=1e-3)
        assert row["ratio"] == pytest.approx(row["kl"] / row["reference_kl"])
    assert reached
    own = [row for row in rows if row["arm"] == row["reference"] and row["task"] != views.MEDIAN]
    assert all(row["ratio"] <= 1 + 1e-9 for row in own)
    for row in (row for row in rows if row["task"] == views.MEDIAN):
        parts = [other["ratio"] for other in rows if other["task"] in results.tasks
                 and (other["arm"], other["reference"]) == (row["arm"], row["reference"])]  # fmt: skip
        assert len(parts) == len(results.tasks)
        assert row["ratio"] == pytest.approx(float(np.median(parts)))


def test_equal_norm_is_of_rules_of_one_density(results):
    rows = views.equal_norm(results)
    assert {results.arm(row["arm"])["kind"] for row in rows} == {"rule"}
    assert all(results.arm(row["arm"])["density"] == row["density"] for row in rows)
    assert any(row["id"] is None for row in rows)
    assert any(row["id"] is not None for row in rows)


def test_arms_with_the_same_numbers_everywhere_are_said_to_be_equal(tmp_path):
    folder = write_study(tmp_path / "s", arms=[arm("gallop", 0.1), arm("random", 0.1), arm("lora", kind="baseline")])
    assert views.equal_arms(read_results(folder)) == []
    for file in (folder / "cells").glob("*random*"):
        file.unlink()
    for file in (folder / "cells").glob("*gallop*"):
        cell = json.loads(file.read_text())
        put(folder / "cells" / file.name.replace("gallop", "random"), cell | {"arm": "random-0.1"})
    found = read_results(folder)
    assert views.equal_arms(found) == [["gallop-0.1", "random-0.1"]]
    assert any(said.startswith("gallop-0.1 and random-0.1 gave the same") for said in views.warnings(found))
    cell = json.loads(file.read_text())
    put(file, cell | {"update_norm": cell["update_norm"] + 1e-9})
    assert views.equal_arms(read_results(folder)) == []


def test_runs_are_linked_where_the_folder_has_them(tmp_path):
    folder = write_study(tmp_path / "s", arms=[arm("random", 0.1)])
    rows = views.runs(read_results(folder))
    there = [row for row in rows if row["run"]]
    assert len(rows) == len(read_results(folder).cells)
    assert all((folder / row["run"]).is_file() for row in there)
    assert all(row["adapter"] is None for row in rows)


def test_warnings_name_what_is_wrong(tmp_path):
    arms = [arm("full", kind="baseline"), arm("gallop", 0.1)]
    arms[1]["lrs"] = [1e-4]
    folder = write_study(tmp_path / "s", arms=arms, kept=lambda task, name, lr, seed: name != "full" or seed < 2)
    put(folder / "cells" / "x.error.json", {"task": "movies", "arm": "full", "lr": 1e-2, "seed": 0, "error": "no"})
    found = read_results(folder)
    said = " ".join(views.warnings(found))
    assert "1 to 3 learning rates" in said
    assert "2 runs of the grid have not finished: full on movies, full on tweets" in said
    assert "1 runs failed: full on movies" in said
    assert {(row["arm"], row["seed"]) for row in views.missing(found)} == {("full", 2)}


# Overlap


def test_arms_of_one_family_differ_in_density_alone(tmp_path):
    rounded = arm("gallop", 0.1) | {"name": "gallop-bf16", "train": {"round_to": "bfloat16"}}
    twin = arm("random", 0.1) | {"name": "again", "lrs": [1e-3]}
    folder = write_study(tmp_path / "s", arms=[arm("gallop", 0.01), arm("gallop", 0.1), arm("gallop", 0.1, epsilon=1.0),
                                               rounded, arm("random", 0.1), twin])  # fmt: skip
    found = {row["arm"]: row["family"] for row in views.by_density(read_results(folder))}
    assert found == {
        "gallop-0.01": "gallop", "gallop-0.1": "gallop", "gallop-0.1-epsilon1": "gallop (epsilon 1.0)",
        "gallop-bf16": "gallop (round_to bfloat16)", "random-0.1": "random-0.1", "again": "again",
    }  # fmt: skip


def test_overlap_is_that_of_plain_sets(results):
    rows = overlap.overlaps(results)
    assert {row["across"] for row in rows} == {"arms", "seeds", "tasks"}
    cells = {(run["task"], run["arm"], run["seed"]): run for run in results.cells}
    for row in rows:
        one_run, other = (
            cells[row["task"], row["arm"], row["seed"]],
            cells[row["other_task"], row["other_arm"], row["other_seed"]],
        )
        sets = [
            {
                (name, i)
                for name, indices in load_file(results.folder / run["indices"]).items()
                for i in indices.tolist()
            }
            for run in (one_run, other)
        ]
        assert row["shared"] == len(sets[0] & sets[1])
        assert row["jaccard"] == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))


def test_overlap_by_chance_is_what_random_sets_share():
    draw, size = random.Random(0), 20_000
    p, q = 0.1, 0.3
    one_set, other = (set(draw.sample(range(size), round(share * size))) for share in (p, q))
    assert overlap.by_chance(p, q) == pytest.approx(0.03 / 0.37)
    assert len(one_set & other) / len(one_set | other) == pytest.approx(overlap.by_chance(p, q), rel=0.05)


def test_chance_weight_by_weight_is_larger_where_both_prefer_a_weight():
    sizes = {"a": {"chosen": 50, "size": 100}, "b": {"chosen": 0, "size": 900}}
    found = overlap.expected(sizes, sizes)
    assert found["expected"] == pytest.approx(0.05 * 0.05 / (0.1 - 0.0025))
    assert found["expected_by_weight"] == pytest.approx(25 / 75)  # half of `a` twice: 25 shared of 75
    assert overlap.expected(sizes, {"c": {"chosen": 1, "size": 10}})["expected"] is None


def test_missing_selections_are_left_out_and_said(tmp_path):
    """An archive of the results alone is reported all the same."""
    folder = write_study(tmp_path / "s", arms=[arm("gallop", 0.1), arm("random", 0.1)])
    assert overlap.overlaps(read_results(folder))
    for path in (folder / "selections").iterdir():
        path.unlink()
    results = read_results(folder)
    assert overlap.overlaps(results) == []
    assert any("lacks the entries" in warning for warning in views.warnings(results))


def test_a_damaged_selection_is_named(tmp_path):
    folder = write_study(tmp_path / "s", arms=[arm("gallop", 0.1), arm("random", 0.1)])
    for path in (folder / "selections").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(FinepointError, match="selections"):
        overlap.overlaps(read_results(folder))


def test_the_map_counts_every_chosen_entry_once(results):
    rows = [row for row in overlap.allocation(results) if row["task"] == "movies" and row["arm"] == "gallop-0.1"]
    assert sum(row["size"] for row in rows) == 35_200
    assert sum(row["chosen"] for row in rows) == pytest.approx(3_520, abs=8)
    assert {row["module"] for row in rows} == {"q_proj", "v_proj", "up_proj", "down_proj"}
    assert {row["layer"] for row in rows} == {"0", "1", "2", "3"}
    assert not any(row["arm"] == "lora" for row in overlap.allocation(results))


def test_the_epsilon_sweep_holds_the_default_too(results):
    rows = overlap.epsilon_sweep(results, overlap.overlaps(results))
    found = [(row["density"], row["epsilon"]) for row in rows if row["task"] == "movies"]
    assert found == [(0.01, 1e-8), (0.1, 1e-8), (0.1, 0.01)]
    assert rows[1]["overlap_magnitude-low"] is not None
    assert rows[1]["overlap_gradient"] is None  # no such arm
