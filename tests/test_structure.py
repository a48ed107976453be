"""Whole rows, columns, blocks and heads, against loops over a dense matrix."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import finepoint
from conftest import random_batches, tiny_gemma, tiny_llama
from finepoint.errors import FinepointError
from finepoint.selection.rules import rule_named
from finepoint.selection.select import score
from finepoint.selection.statistics import stream_statistics
from finepoint.selection.structure import Tiling, tilings
from finepoint.selection.targets import target_weights
from finepoint.tuner.kernels import groups, plain
from finepoint.tuner.kernels.groups import FEW, LEAST, Blocks, Columns, Confined, Rows, every, whole_groups
from reference import train_beside_dense

STRUCTURES = ["row", "column", "block:4x4", "block:3x5", "block:1000x2"]


def groups_of(shape, height, width):
    """Every group's flat positions, by walking over the matrix."""
    rows, columns = shape
    found = {}
    for i in range(rows):
        for j in range(columns):
            found.setdefault((i // height, j // width), []).append(i * columns + j)
    return [found[place] for place in sorted(found)]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.data())
def test_pooling_and_coming_back_equal_a_walk_over_the_matrix(rows, columns, height, width, data):
    tiling = Tiling((rows, columns), height, width)
    groups = groups_of((rows, columns), height, width)
    assert tiling.count == len(groups)
    torch.manual_seed(0)
    scores = torch.randn(rows, columns, dtype=torch.float64)
    flat = scores.view(-1)
    for how in ("mean", "sum"):
        expected = torch.stack([getattr(flat[group], how)() for group in groups])
        torch.testing.assert_close(tiling.pooled(scores, how), expected, rtol=1e-12, atol=1e-14)
    chosen = data.draw(st.sets(st.integers(0, len(groups) - 1)))
    tiles = torch.tensor(sorted(chosen), dtype=torch.long)
    assert tiling.indices(tiles).tolist() == sorted(place for tile in chosen for place in groups[tile])
    some = data.draw(st.sets(st.integers(0, rows * columns - 1)))
    holding = [tile for tile, group in enumerate(groups) if some & set(group)]
    assert tiling.tiles(torch.tensor(sorted(some), dtype=torch.long)).tolist() == holding


def dense_groups(model, structure, rule, batches, count, pooling):
    """The groups with the best pooled scores over all weights, by one sort."""
    weights = target_weights(model, "linear")
    about = rule_named(rule)
    listed = []
    for name, statistics in stream_statistics(model, weights, batches, about.needs):
        scores = score(about, name, weights[name], statistics, 0, {}).view(-1)
        out, features = weights[name].shape
        if structure.startswith("block:"):
            height, width = map(int, structure[6:].split("x"))
        else:
            height, width = {"row": (1, features), "column": (out, 1)}[structure]
        for group in groups_of((out, features), height, width):
            listed.append((getattr(scores[group], pooling)().item(), name, group))
    listed.sort(key=lambda entry: -entry[0])
    found = {}
    for _, name, group in listed[:count]:
        found.setdefault(name, []).extend(group)
    return {name: sorted(places) for name, places in found.items()}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_the_best_groups_are_chosen_whole_and_exactly_so_many(structure, pooling):
    model, batches = tiny_llama(torch.float64), random_batches()
    chosen = finepoint.select(model, batches, rule="gradient", count=7, structure=structure, pooling=pooling)
    expected = dense_groups(model, structure, "gradient", batches, 7, pooling)
    assert {name: indices.tolist() for name, indices in chosen.items()} == expected
    assert (chosen.statistics["structure"], chosen.statistics["asked"]) == (structure, 7)
    assert chosen.statistics["chosen"] == chosen.count


def test_entries_are_what_they_were_without_a_structure(batches):
    model = tiny_llama()
    plain = finepoint.select(model, batches, rule="gallop", density=0.05)
    named = finepoint.select(model, batches, rule="gallop", density=0.05, structure="entry")
    blocks = finepoint.select(model, batches, rule="gallop", density=0.05, structure="block:1x1")
    assert all(torch.equal(plain[name], named[name]) and torch.equal(plain[name], blocks[name]) for name in plain)


def test_density_is_the_share_of_groups_in_every_weight(batches):
    model = tiny_llama()
    chosen = finepoint.select(model, rule="random", density=0.25, structure="column", scope="weight")
    for name, indices in chosen.items():
        weight = model.get_parameter(name)
        columns = indices % weight.shape[1]
        assert len(columns.unique()) == round(0.25 * weight.shape[1])
        assert len(indices) == len(columns.unique()) * weight.shape[0]


def test_a_group_with_an_excluded_entry_is_not_chosen():
    model = tiny_llama()
    first = finepoint.select(model, rule="magnitude-high", count=3, structure="row")
    one_each = {name: indices[:1] for name, indices in first.items()}
    second = finepoint.select(model, rule="magnitude-high", count=3, structure="row", exclude=[one_each])
    assert second.count
    for name in first:
        taken = set((first[name] // model.get_parameter(name).shape[1]).tolist())
        rows = set((second.indices.get(name, torch.tensor([])) // model.get_parameter(name).shape[1]).tolist())
        assert taken - rows  # the row with the excluded entry is gone


def test_heads_are_rows_of_queries_and_columns_of_outputs():
    model = tiny_llama()
    size = model.config.head_dim
    chosen = finepoint.select(model, rule="random", density=0.5, structure="head", targets="attention", scope="weight")
    for name, indices in chosen.items():
        out, features = model.get_parameter(name).shape
        lines = indices % features if "o_proj" in name else indices // features
        heads = (lines // size).unique()
        assert len(indices) == len(heads) * size * (out if "o_proj" in name else features)


def test_one_dimension_and_stacks_of_matrices():
    assert Tiling((5,), 1, 1).count == 5
    column = Tiling((2, 3, 4), 3, 1)  # two experts of three outputs: a column of one expert
    assert column.count == 8
    assert column.indices(torch.tensor([5])).tolist() == [13, 17, 21]


@pytest.mark.parametrize(
    ("structure", "message"),
    [("rows", "it is entry, row, column"), ("block:0x3", "it is entry"), ("block:3", "it is entry"),
     ("head", "--targets attention")],
)  # fmt: skip
def test_an_unknown_structure_is_refused(structure, message):
    with pytest.raises(FinepointError, match=message):
        finepoint.select(tiny_llama(), rule="random", density=0.5, structure=structure)


def test_a_sampled_threshold_takes_whole_groups_too():
    model = tiny_llama()
    chosen = finepoint.select(model, rule="random", density=0.3, structure="row", threshold="sampled")
    for name, indices in chosen.items():
        rows = (indices // model.get_parameter(name).shape[1]).unique()
        assert len(indices) == len(rows) * model.get_parameter(name).shape[1]


@pytest.mark.parametrize("structure", ["row", "column", "block:4x4", "block:8x4"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
def test_training_whole_groups_equals_dense_training_with_a_masked_gradient(structure, make, monkeypatch):
    monkeypatch.setattr(groups, "LEAST", 4)
    batches = random_batches()
    model = make(torch.float64)
    reference = copy.deepcopy(model)
    chosen = finepoint.select(model, rule="random", density=0.2, structure=structure)
    tuner = finepoint.SparseTuner(model, chosen)
    found = {type(entries.groups) for entries in tuner.entries.values()}
    kind = {"row": Rows, "column": Columns}.get(structure, Blocks)
    assert kind in found
    assert found <= {Rows, Columns, Blocks, Confined}  # of a small weight blocks may be all of its rows
    train_beside_dense(model, tuner, reference, chosen, batches)
    trained = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in reference.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(trained[name], parameter, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_whole_lines_are_recognised_and_nothing_else_is(out, features, data):
    places = sorted(data.draw(st.sets(st.integers(0, out * features - 1), min_size=1)))
    found = whole_groups(torch.tensor(places), (out, features))
    rows, columns = {place // features for place in places}, {place % features for place in places}
    if len(places) == len(rows) * features:
        assert isinstance(found, Rows)
        assert set(found.rows.tolist()) == rows
    elif len(places) == len(columns) * out:
        assert isinstance(found, Columns)
        assert set(found.columns.tolist()) == columns
    elif len(columns) <= FEW * features:
        assert isinstance(found, Confined)
        assert found.columns.tolist() == sorted(columns)
    else:
        assert found is None


@settings(deadline=None)
@given(st.sampled_from([(16, 16), (16, 32), (32, 16), (48, 16)]), st.integers(1, 3), st.integers(2, 4), st.data())
def test_whole_blocks_are_recognised_and_their_gradient_is_the_reference(size, down, across, data):
    shape = size[0] * down, size[1] * across
    tiling = Tiling(shape, *size)
    blocks = data.draw(st.sets(st.integers(0, tiling.count - 1), min_size=1))
    indices = tiling.indices(torch.tensor(sorted(blocks)))
    found = whole_groups(indices, shape)
    assert found is not None
    if isinstance(found, Blocks):  # blocks that lie together may be larger ones
        assert len(found.down) * found.size[0] * found.size[1] == len(indices)
    dy, x = torch.randn(2, 5, shape[0], dtype=torch.double), torch.randn(2, 5, shape[1], dtype=torch.double)
    torch.testing.assert_close(found.gradient(dy, found.saved(x)), plain.reference(dy, x, indices))
    lacking = indices[torch.arange(len(indices)) != data.draw(st.integers(0, len(indices) - 1))]
    assert isinstance(whole_groups(lacking, shape), Confined | None)


@pytest.mark.parametrize(
    ("size", "shape"),
    [((LEAST, LEAST // 2), (64, 64)), ((LEAST // 2, LEAST), (64, 64)), ((16, 16), (40, 64)), ((16, 16), (64, 40))],
)
def test_small_blocks_and_those_of_weights_they_do_not_tile_go_entry_by_entry(size, shape):
    indices = Tiling(shape, *size).indices(torch.tensor([0, 3, 6]))
    assert not isinstance(whole_groups(indices, shape), Blocks)


def test_moved_blocks_are_not_on_their_grid():
    block = every(torch.arange(16), torch.arange(16), 64)
    assert isinstance(whole_groups(block + 32 * 64 + 16, (64, 64)), Blocks)
    assert not isinstance(whole_groups(block + 1, (64, 64)), Blocks)
    assert not isinstance(whole_groups(block + 3 * 64, (64, 64)), Blocks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_groups_equal_the_reference(dtype):
    torch.manual_seed(0)
    dy, x = torch.randn(2, 7, 64, dtype=dtype), torch.randn(2, 7, 32, dtype=dtype)
    lines, sixteen = torch.tensor([1, 4]), torch.arange(16)
    blocks = [every(16 * i + sixteen, 16 * j + sixteen, 32) for i, j in ((0, 1), (3, 0))]
    chosen = {Rows: every(lines, torch.arange(32), 32), Columns: every(torch.arange(64), lines, 32),
              Blocks: torch.cat(blocks)}  # fmt: skip
    for kind, indices in chosen.items():
        found = whole_groups(indices, (64, 32))
        assert isinstance(found, kind)
        torch.testing.assert_close(found.gradient(dy, found.saved(x)), plain.reference(dy, x, indices))


def test_whole_columns_keep_their_own_inputs_only():
    def kept(structure):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"layer": torch.nn.Linear(64, 8, bias=False)})
        indices = {"column": every(torch.arange(8), torch.tensor([3, 9]), 64), "entry": torch.arange(32) * 5}
        finepoint.SparseTuner(model, {"layer.weight": indices[structure]})
        x, sizes = torch.randn(100, 64), []

        def keep(tensor):
            sizes.append(tensor.numel() if tensor.shape[0] == 100 else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model["layer"](x)
        return sum(sizes)

    assert kept("column") == 100 * 2
    assert kept("entry") == 100 * 64


@pytest.mark.parametrize("structure", ["row", "column", "block:2x3"])
def test_random_groups_are_drawn_whatever_their_size(structure):
    """Over many seeds every weight has its share of the groups, those of small groups no more than others."""
    model, chosen, all_of = tiny_llama(), Counter(), Counter()
    cut = tilings(model, target_weights(model), structure)
    for seed in range(60):
        selection = finepoint.select(model, rule="random", density=0.2, structure=structure, seed=seed)
        for name, tiling in cut.items():
            chosen[tiling.height * tiling.width] += len(tiling.tiles(selection[name])) if name in selection else 0
            all_of[tiling.height * tiling.width] += tiling.count
    for size, number in chosen.items():
        spread = (0.2 * 0.8 * all_of[size]) ** 0.5
        assert abs(number - 0.2 * all_of[size]) < 4 * spread, (size, number, all_of[size])
