"""The report before merging, against plain sets and dense tensors."""

import csv
import json

import pytest
import torch

from conftest import tiny_llama
from finepoint.adapters.interference import interference
from finepoint.cli import main
from finepoint.errors import FinepointError
from test_combining import NAMES, dense, make, three

COUNTS = {"entries_a", "entries_b", "shared", "jaccard", "by_chance", "jaccard_by_chance"}
OF_DELTAS = {"sign_conflicts", "conflict_share", "cosine", "energy_a", "energy_b"}
SCOPES = {"all": NAMES, "layer 0": NAMES[1:2], "module up_proj": NAMES[1:2], "layer model.norm": NAMES[2:]}


@pytest.mark.parametrize("kind", ["delta", "value"])
def test_rows_equal_plain_sets_and_dense_tensors(kind):
    model = tiny_llama(torch.float64)
    a, b, _ = three(model, kind)
    rows = {row["scope"]: row for row in interference({"a": a, "b": b}, model)}
    assert set(SCOPES) <= set(rows)
    for scope, names in SCOPES.items():
        row = rows[scope]
        assert (row["a"], row["b"]) == ("a", "b")
        ones = {(name, i) for name in names for i in a[name].tolist()}
        others = {(name, i) for name in names for i in b[name].tolist()}
        sizes = {name: model.get_parameter(name).numel() for name in names}
        chance = sum(len(a[name]) * len(b[name]) / sizes[name] for name in names)
        assert (row["entries_a"], row["entries_b"], row["shared"]) == (len(ones), len(others), len(ones & others))
        assert row["jaccard"] == len(ones & others) / len(ones | others)
        assert row["by_chance"] == pytest.approx(chance, rel=1e-12)
        assert row["jaccard_by_chance"] == pytest.approx(chance / (len(ones) + len(others) - chance), rel=1e-12)
        x = torch.cat([dense(model, a, name)[0] for name in names])
        y = torch.cat([dense(model, b, name)[0] for name in names])
        both = torch.cat([dense(model, a, name)[1] & dense(model, b, name)[1] for name in names])
        conflicts = sum(p * q < 0 for p, q in zip(x.tolist(), y.tolist(), strict=True))
        assert row["sign_conflicts"] == conflicts
        assert row["conflict_share"] == conflicts / row["shared"]
        assert row["cosine"] == pytest.approx((x @ y / x.norm() / y.norm()).item(), rel=1e-10)
        assert row["energy_a"] == pytest.approx((x[both].norm() ** 2 / x.norm() ** 2).item(), rel=1e-10)
        assert row["energy_b"] == pytest.approx((y[both].norm() ** 2 / y.norm() ** 2).item(), rel=1e-10)


def test_every_pair_is_there_and_the_rows_are_json():
    model = tiny_llama()
    a, b, c = three(model)
    rows = interference({"a": a, "b": b, "c": c})
    assert [(row["a"], row["b"]) for row in rows if row["scope"] == "all"] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    itself = interference({"a": a, "again": a})[0]
    assert itself["cosine"] == pytest.approx(1)
    assert (itself["jaccard"], itself["energy_a"], itself["sign_conflicts"]) == (1, 1, 0)


def test_disjoint_adapters_share_nothing():
    model = tiny_llama()
    row = interference({"a": make(model, 1, among=(0, 0.5)), "b": make(model, 2, among=(0.5, 1))})[0]
    assert (row["shared"], row["jaccard"], row["cosine"], row["energy_a"]) == (0, 0, 0, 0)
    assert row["conflict_share"] is None


def test_random_choices_overlap_as_chance_says():
    model = tiny_llama()
    pairs = [interference({"a": make(model, 2 * s), "b": make(model, 2 * s + 1)})[0] for s in range(20)]
    mean = sum(row["shared"] for row in pairs) / len(pairs)
    assert mean == pytest.approx(pairs[0]["by_chance"], rel=0.03)


def test_exact_values_without_the_base_have_counts_only():
    model = tiny_llama(torch.bfloat16)
    pair = {"a": make(model, 1, kind="value"), "b": make(model, 2)}
    without, within = interference(pair)[0], interference(pair, model)[0]
    assert all(without[key] is None and within[key] is not None for key in OF_DELTAS)
    assert all(without[key] == within[key] for key in COUNTS)


def test_another_base_is_refused():
    a, b = make(tiny_llama(), 1), make(tiny_llama(seed=3), 2)
    with pytest.raises(FinepointError, match="adapter b does not fit this model: .*embed_tokens"):
        interference({"a": a, "b": b}, tiny_llama())


def test_the_report_draws_what_the_dry_run_prints(tmp_path, capsys):
    model = tiny_llama()
    for name, adapter in zip("abc", three(model), strict=True):
        adapter.save(tmp_path / name)
    folders = [str(tmp_path / name) for name in "abc"]
    assert main(["report", *folders]) == 2
    assert "--output is required" in capsys.readouterr().err
    assert main(["report", *folders, "--output", str(tmp_path / "r"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"] == ["jaccard", "layers"]
    with (tmp_path / "r" / "data" / "interference.csv").open() as file:
        drawn = [(row["a"], row["b"], row["scope"], int(row["shared"])) for row in csv.DictReader(file)]
    rows = interference(dict(zip("abc", three(model), strict=True)))
    assert drawn == [(row["a"], row["b"], row["scope"], row["shared"]) for row in rows]
    most = max((row for row in rows if row["scope"] == "all"), key=lambda row: row["jaccard"])
    assert f"{most['a']} and {most['b']} share most: {most['shared']:,}" in (tmp_path / "r" / "index.html").read_text()
    assert main(["report", folders[0], folders[0], "--output", str(tmp_path / "s")]) == 2
    assert "given twice" in capsys.readouterr().err
