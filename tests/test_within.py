"""`--within columns:SHARE`: single entries, all in a small share of each weight's columns."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import finepoint
from conftest import random_batches, tiny_gemma, tiny_llama
from finepoint.adapters.adapter import SparseAdapter
from finepoint.cli import main
from finepoint.errors import FinepointError
from finepoint.selection.rules import RULES
from finepoint.selection.structure import Tiling, confine, entries_within, places_within, share_within
from finepoint.selection.targets import target_weights
from finepoint.tuner.kernels import plain
from finepoint.tuner.kernels.groups import FEW, Confined, whole_groups
from reference import dense_top_k, mean_gradient, train_beside_dense


def columns_of(model, selection):
    return {name: (indices % model.get_parameter(name).shape[1]).unique() for name, indices in selection.items()}


@pytest.mark.parametrize("scope", ["global", "weight", "layer"])
@pytest.mark.parametrize("rule", ["random", "magnitude-high", "abs(w) + 1"])
def test_so_many_entries_lie_in_so_few_columns_under_every_rule_and_scope(rule, scope):
    model = tiny_llama()
    chosen = finepoint.select(model, rule=rule, density=0.05, scope=scope, within="columns:0.2")
    weights = target_weights(model)
    assert chosen.count == int(0.05 * sum(map(torch.Tensor.numel, weights.values())) + 0.5)
    assert chosen.statistics["within"] == "columns:0.2"
    for name, columns in columns_of(model, chosen).items():
        assert len(columns) <= max(1, round(0.2 * weights[name].shape[1]))


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_the_entries_are_the_best_of_the_best_columns(pooling, batches):
    model = tiny_llama(torch.float64)
    chosen = finepoint.select(model, batches, rule="gradient", density=0.03, within="columns:0.25", pooling=pooling)
    gradients = mean_gradient(copy.deepcopy(model), batches)
    scores = {}
    for name, weight in target_weights(model).items():
        found = gradients[name].abs()
        best = found.sum(0).argsort(descending=True, stable=True)[: round(0.25 * weight.shape[1])]
        scores[name] = torch.full_like(found, -torch.inf)
        scores[name][:, best] = found[:, best]
    expected = dense_top_k(scores, chosen.count)
    assert {name: indices.tolist() for name, indices in chosen.items()} == {
        name: indices.tolist() for name, indices in expected.items()
    }


def test_a_random_choice_draws_its_columns_and_then_its_entries_evenly():
    """Not the columns whose entries happen to score high: within them every entry is as likely as any other."""
    model, rows, columns = torch.nn.Linear(16, 8, bias=False), torch.zeros(8), torch.zeros(16)
    for seed in range(200):
        chosen = finepoint.select(model, rule="random", density=0.125, within="columns:0.25", targets="all", seed=seed)
        rows += torch.bincount(chosen["weight"] // 16, minlength=8)
        columns += torch.bincount(chosen["weight"] % 16, minlength=16)
    for counts in (rows, columns):
        expected = 200 * 16 / len(counts)
        assert (counts - expected).abs().max() < 6 * expected**0.5


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.data())
def test_places_in_kept_columns_and_entries_are_one_to_one(experts, out, features, data):
    shape = (experts, out, features) if experts > 1 else (out, features)
    columns = Tiling(shape, out, 1)
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, columns.count - 1), min_size=1))))
    scores = torch.arange(float(columns.matrix[0] * features))
    among = (confine(scores, columns, kept) > -torch.inf).nonzero().view(-1)
    assert torch.equal(entries_within(torch.arange(len(kept) * out), columns, kept), among)
    some = torch.tensor(sorted(data.draw(st.sets(st.integers(0, len(scores) - 1)))), dtype=torch.long)
    inside = places_within(some, columns, kept)
    assert (inside.diff() > 0).all()
    assert torch.equal(entries_within(inside, columns, kept), some[torch.isin(some, among)])


def test_a_random_choice_makes_no_score_and_leaves_out_what_is_excluded(monkeypatch):
    model = torch.nn.Linear(16, 8, bias=False)
    monkeypatch.setattr(RULES["random"].score, "__code__", (lambda weight, generator: 1 / 0).__code__)
    settings = {"rule": "random", "within": "columns:0.25", "targets": "all", "seed": 3}
    whole = finepoint.select(model, count=32, **settings)
    taken = {"weight": whole["weight"][::2]}
    rest = finepoint.select(model, count=16, exclude=[taken], **settings)
    assert torch.equal(rest["weight"], whole["weight"][1::2])
    with pytest.raises(FinepointError, match="17 entries are asked for, and 16 are left within columns:0.25"):
        finepoint.select(model, count=17, exclude=[taken], **settings)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
def test_training_is_dense_training_with_a_masked_gradient(make):
    batches, model = random_batches(), make(torch.float64)
    reference = copy.deepcopy(model)
    chosen = finepoint.select(model, rule="random", density=0.05, within="columns:0.2")
    tuner = finepoint.SparseTuner(model, chosen)
    assert {type(entries.groups) for entries in tuner.entries.values()} == {Confined}
    train_beside_dense(model, tuner, reference, chosen, batches)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(4, 40), st.data())
def test_few_columns_are_recognised_and_their_gradient_is_the_reference(out, features, data):
    few = data.draw(st.sets(st.integers(0, features - 1), min_size=1, max_size=max(1, int(FEW * features))))
    among = [row * features + column for row in range(out) for column in few]
    indices = torch.tensor(sorted(data.draw(st.sets(st.sampled_from(among), min_size=1))))
    found = whole_groups(indices, (out, features))
    assert found is not None
    dy, x = torch.randn(2, 5, out, dtype=torch.double), torch.randn(2, 5, features, dtype=torch.double)
    if isinstance(found, Confined):
        assert found.saved(x).shape[-1] <= len(few)
    torch.testing.assert_close(found.gradient(dy, found.saved(x)), plain.reference(dy, x, indices))


def test_only_these_columns_of_a_layers_input_are_kept():
    model, sizes = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False)), []
    chosen = finepoint.select(model, rule="random", count=12, within="columns:0.05", targets="all")
    finepoint.SparseTuner(model, chosen, audit=False)

    def keep(tensor):
        sizes.append(tensor.numel() if len(tensor) == 100 else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(100, 64))
    assert sum(sizes) <= 100 * 3


@pytest.mark.parametrize(
    "within", ["rows:0.1", "columns", "columns:0", "columns:1.5", "columns:nan", "columns:x", "0.1"]
)
def test_what_is_no_share_of_columns_is_refused(within):
    with pytest.raises(FinepointError, match="it is columns:SHARE"):
        share_within(within)


def test_what_does_not_fit_is_refused(llama):
    with pytest.raises(FinepointError, match="does not fit within 0.1 of the columns"):
        finepoint.select(llama, density=0.2, within="columns:0.1")
    with pytest.raises(FinepointError, match="chooses whole groups"):
        finepoint.select(llama, density=0.2, within="columns:0.5", structure="column")
    with pytest.raises(FinepointError, match="are left after exclude and within"):
        finepoint.select(llama, count=3000, within="columns:0.1")
    first = finepoint.select(llama, density=0.1, within="columns:0.1", seed=3)
    with pytest.raises(FinepointError, match="after exclude"):
        finepoint.select(llama, density=0.1, within="columns:0.1", seed=3, exclude=[first])
    other = finepoint.select(llama, density=0.03, within="columns:0.2", exclude=[first], seed=3)
    assert not any(torch.isin(other[name], first[name]).any() for name in other if name in first)


def test_a_run_is_chosen_trained_resumed_and_saved(choice_file, model_folder, tmp_path, capsys):
    given = ["--model", str(model_folder), "--data", choice_file, "--batch-size", "4", "--density", "0.05",
             "--within", "columns:0.2", "--rule", "gradient", "--scoring-examples", "8"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *given, "--steps", "4", "--output", str(whole)]) == 0
    assert main(["train", *given, "--steps", "2", "--save-every", "2", "--warmup", "0", "--output", str(parts)]) == 0
    assert main(["select", *given, "--output", str(tmp_path / "selected")]) == 0
    assert main(["train", *given, "--steps", "4", "--warmup", "0", "--resume", "--output", str(parts)]) == 0
    selected = SparseAdapter.load(tmp_path / "selected")
    for trained in map(SparseAdapter.load, (whole, parts)):
        assert {name: trained[name].tolist() for name in trained} == {
            name: selected[name].tolist() for name in selected
        }
    record = json.loads((whole / "run.json").read_text())
    assert record["selection"]["within"] == "columns:0.2"
    assert main(["train", *given, "--steps", "4", "--warmup", "0", "--refresh", "drop-grow:0.2", "--output",
                 str(tmp_path / "x")]) == 2  # fmt: skip
    assert "leave out --within" in capsys.readouterr().err


def test_a_plan_knows_that_fewer_inputs_are_kept(capsys):
    def activations(*more):
        given = ["--model", "smollm2", "--device", "cuda", "--tokens", "64", "--batch-size", "2", "--density", "0.01"]
        assert main(["plan", *given, *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["training"]["activations"]

    # 2 x 64 tokens through the linear layers of 30 blocks, with inputs of 576, 576, 576 and 1536 numbers of 2 bytes
    inputs = 30 * 2 * 64 * (3 * 576 + 1536) * 2
    assert activations("--within", "columns:0.03") < activations() - 0.7 * inputs
