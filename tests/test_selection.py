import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import finepoint
from conftest import random_batches, tiny_llama
from finepoint.alignment.settings import AlignConfig
from finepoint.errors import FinepointError
from finepoint.selection.select import Budget, TopK, allocate, exact, largest
from finepoint.selection.settings import SelectConfig
from finepoint.studies.settings import SequenceConfig
from finepoint.training.settings import PlanConfig, TrainConfig
from reference import dense_top_k


@st.composite
def score_sets(draw):
    """A few weights with few distinct scores, so that ties are everywhere, and a budget."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    values = [
        draw(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0]), min_size=size, max_size=size)) for size in sizes
    ]
    scores = {f"w{i}": torch.tensor(row) for i, row in enumerate(values)}
    return scores, draw(st.integers(1, sum(sizes)))


@given(score_sets())
def test_streamed_top_k_equals_one_sort_of_everything(case):
    scores, k = case
    stream = [(name, values, values * 10) for name, values in scores.items()]
    indices, carried = exact(lambda: stream, [Budget(tuple(scores), k)], scores, 0)
    found = {name: positions for name, positions in indices.items() if len(positions)}
    expected = dense_top_k(scores, k)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name])
        assert torch.equal(carried[name], scores[name][found[name]] * 10)
    assert sum(len(positions) for positions in found.values()) == k


@given(score_sets(), st.integers(1, 7))
def test_slices_do_not_change_the_answer(case, slice_size):
    scores, k = case
    import finepoint.selection.select as selection

    before = selection.SLICE
    selection.SLICE = slice_size
    try:
        pool = TopK(k)
        for source, values in enumerate(scores.values()):
            pool.add(source, values, None)
            assert pool.held < 2 * k + slice_size
        sources, positions, _ = pool.result()
    finally:
        selection.SLICE = before
    expected = dense_top_k(scores, k)
    for source, name in enumerate(scores):
        assert positions[sources == source].tolist() == expected.get(name, torch.tensor([])).tolist()


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.data())
def test_largest_breaks_ties_to_the_lower_position(values, data):
    k = data.draw(st.integers(0, len(values)))
    found = largest(torch.tensor(values, dtype=torch.float32), k)
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])
    assert found.tolist() == expected


@given(st.lists(st.tuples(st.integers(1, 10**12), st.integers(0, 100)), min_size=1, max_size=8), st.data())
def test_allocate_gives_exactly_k_and_never_more_than_is_free(groups, data):
    sizes = [size for size, _ in groups]
    free = [size * share // 100 for size, share in groups]
    k = data.draw(st.integers(0, sum(free)))
    counts = allocate(sizes, free, k)
    assert sum(counts) == k
    assert all(0 <= count <= room for count, room in zip(counts, free, strict=True))


def test_allocate_is_proportional():
    assert allocate([100, 300], [100, 300], 4) == [1, 3]
    assert allocate([1, 1, 1], [1, 1, 1], 2) == [1, 1, 0]
    assert allocate([10, 10], [1, 10], 6) == [1, 5]


@pytest.mark.parametrize("rule", ["gallop", "random", "magnitude-low", "saft"])
@pytest.mark.parametrize("scope", ["global", "weight", "layer"])
@pytest.mark.parametrize("density", [0.001, 0.0137, 0.5, 1.0])
def test_exactly_k_ascending_unique_in_range(llama, batches, rule, scope, density):
    weights = finepoint.target_weights(llama)
    total = sum(weight.numel() for weight in weights.values())
    chosen = finepoint.select(llama, batches, rule=rule, density=density, scope=scope)
    assert chosen.count == int(density * total + 0.5)
    for name, indices in chosen.items():
        assert indices.dtype == torch.int64
        assert bool((indices[1:] > indices[:-1]).all())
        assert 0 <= int(indices[0]) <= int(indices[-1]) < weights[name].numel()


@pytest.mark.parametrize("given", [{"scope": "row"}, {"pooling": "median"}, {"threshold": "rough"}])
def test_unknown_words_are_refused_with_the_known_ones(llama, given):
    with pytest.raises(FinepointError, match=f"{next(iter(given))} is .* it is .* or "):
        finepoint.select(llama, rule="random", density=0.01, **given)


def test_without_a_rule_entries_are_drawn_at_random(llama):
    drawn = finepoint.select(llama, rule="random", density=0.05, seed=3)
    given = finepoint.select(llama, density=0.05, seed=3)
    assert given.rule == "random"
    assert {name: at.tolist() for name, at in given.items()} == {name: at.tolist() for name, at in drawn.items()}
    for config in (SelectConfig, TrainConfig, PlanConfig, SequenceConfig, AlignConfig):
        assert config.__dataclass_fields__["rule"].default == "random"
    model = finepoint.sparsify(llama, density=0.05, seed=3)
    trained = finepoint.tuner_of(model).adapter()
    assert {name: trained[name].tolist() for name in trained} == {name: at.tolist() for name, at in drawn.items()}


def test_scopes_spread_the_budget_as_they_say(llama, batches):
    density = 0.1
    weights = finepoint.target_weights(llama)
    by_weight = finepoint.select(llama, batches, rule="gallop", density=density, scope="weight")
    for name, weight in weights.items():
        assert abs(len(by_weight[name]) - density * weight.numel()) <= 1
    by_layer = finepoint.select(llama, batches, rule="gallop", density=density, scope="layer")
    shares = [sum(len(by_layer[n]) for n in by_layer if f".{i}." in n) for i in range(2)]
    assert abs(shares[0] - shares[1]) <= 1
    everywhere = finepoint.select(llama, batches, rule="gallop", density=density, scope="global")
    assert {n: len(i) for n, i in everywhere.items()} != {n: len(i) for n, i in by_weight.items()}


def test_global_selection_equals_the_dense_reference():
    model, batches = tiny_llama(torch.float64), random_batches()
    from test_rules import dense_formula

    dense = {n: s for n, s in dense_formula("gallop", model, batches).items() if n in finepoint.target_weights(model)}
    k = 137
    found = finepoint.select(model, batches, rule="gallop", count=k)
    expected = dense_top_k(dense, k)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_density_for_each_pattern(llama):
    chosen = finepoint.select(llama, rule="random", targets={"*.v_proj": 0.25, "*.o_proj": 0.5})
    weights = finepoint.target_weights(llama, "v,o")
    for pattern, density in (("v_proj", 0.25), ("o_proj", 0.5)):
        names = [name for name in weights if pattern in name]
        assert sum(len(chosen[n]) for n in names) == density * sum(weights[n].numel() for n in names)
    with pytest.raises(FinepointError, match="leave out density"):
        finepoint.select(llama, rule="random", targets={"*.v_proj": 0.25}, density=0.1)


def test_entries_that_are_given_may_not_be_excluded(llama):
    own = {"model.embed_tokens.weight": torch.arange(9)}
    for wrong in ({"lm_head.weight": torch.tensor([8])}, {"model.embed_tokens.weight": torch.arange(8, 20)}):
        with pytest.raises(FinepointError, match="1 of the entries of model.embed_tokens.weight that are given are to"):
            finepoint.sparsify(llama, indices=own, exclude=[wrong])
    with pytest.raises(FinepointError, match="no weight 'x'"):
        finepoint.sparsify(llama, indices=own, exclude=[{"x": torch.tensor([8])}])
    finepoint.unload(finepoint.sparsify(llama, indices=own, exclude=[{"lm_head.weight": torch.tensor([9])}]))


def test_what_is_excluded_belongs_to_the_model(llama):
    embedding = torch.arange(0, 1024, 2)
    alone = finepoint.select(llama, rule="magnitude-high", count=512, targets="*embed_tokens",
                             exclude=[{"lm_head.weight": embedding}])  # fmt: skip
    assert torch.equal(alone["model.embed_tokens.weight"], embedding + 1)  # the head is tied to it
    norm = {"model.norm.weight": torch.arange(3)}  # no target, and none of the targets' entries
    assert finepoint.select(llama, rule="random", count=5, exclude=[norm]).count == 5
    for wrong, message in (
        ([{"model.norm": torch.arange(3)}], "no weight 'model.norm'"),
        ([{"model.norm.weight": torch.tensor([99])}], "lies outside model.norm.weight"),
        (norm, "exclude holds 'model.norm.weight'; give a list of adapters"),
        (["runs/first"], "exclude holds 'runs/first'; give a list of adapters"),
    ):
        with pytest.raises(FinepointError, match=message):
            finepoint.select(llama, rule="random", count=5, exclude=wrong)
        with pytest.raises(FinepointError, match=message):
            finepoint.sparsify(llama, rule="random", count=5, exclude=wrong)


def test_excluded_entries_are_never_chosen_and_the_count_stays_exact(llama, batches):
    first = finepoint.select(llama, batches, rule="gallop", density=0.3)
    second = finepoint.select(llama, batches, rule="gallop", density=0.3, exclude=[first])
    assert first.count == second.count
    for name in set(first) & set(second):
        assert not torch.isin(first[name], second[name]).any()
    third = finepoint.select(llama, batches, rule="gallop", density=0.4, exclude=[first, second])
    assert third.count + first.count + second.count == sum(w.numel() for w in finepoint.target_weights(llama).values())
    with pytest.raises(FinepointError, match="are left after exclude"):
        finepoint.select(llama, batches, rule="gallop", density=0.5, exclude=[first, second])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, r"density is 0.0; it is a share of the target entries, in \(0, 1\]"),
        ({"density": 1.5}, r"density is 1.5"),
        ({"density": float("nan")}, "density is nan"),
        ({"density": 1e-9}, r"density 1e-09 chooses none of \d+ entries; use at least"),
        ({"count": 0}, "count is 0"),
        ({"count": 10**9}, r"give 1 to \d+"),
        ({"count": 3, "density": 0.1}, "give one of them"),
        ({"scoring_memory": 0.0, "rule": "gallop"}, "scoring_memory is 0.0"),
    ],
)
def test_bad_budgets_are_refused(llama, batches, arguments, message):
    with pytest.raises(FinepointError, match=message):
        finepoint.select(llama, batches, **{"rule": "random", **arguments})


def test_sampled_threshold_reports_the_density_it_got(llama, batches):
    exact_choice = finepoint.select(llama, batches, rule="saft", density=0.2)
    lean = finepoint.select(llama, batches, rule="saft", density=0.2, threshold="sampled")
    assert lean.statistics["asked"] == exact_choice.count
    assert lean.statistics["chosen"] == lean.count
    assert lean.count == pytest.approx(exact_choice.count, rel=0.1)
    shared = sum(int(torch.isin(lean[n], exact_choice[n]).sum()) for n in set(lean) & set(exact_choice))
    assert shared == min(lean.count, exact_choice.count)  # both are a prefix of the same ranking


def test_statistics_describe_the_chosen_against_all(llama, batches):
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.view(-1)[:5] = 1e-6
    statistics = finepoint.select(llama, batches, rule="magnitude-low", count=10).statistics
    assert statistics["chosen"] == 10
    assert statistics["near_zero_share"] >= 0.5
    assert statistics["abs_weight"]["chosen"]["0.99"] <= statistics["abs_weight"]["all"]["0.5"]
    assert sum(row["chosen"] for row in statistics["weights"].values()) == 10
    by_gradient = finepoint.select(llama, batches, rule="saft", count=10).statistics
    assert by_gradient["abs_gradient"]["chosen"]["0.01"] > by_gradient["abs_gradient"]["all"]["0.75"]


def test_flat_positions_beyond_int32_survive():
    pool = TopK(2)
    pool.add(0, torch.tensor([1.0, 3.0]), None)
    _, positions, _ = pool.result()
    assert positions.dtype == torch.int64
    assert allocate([1 << 34], [1 << 34], (1 << 33) + 1) == [(1 << 33) + 1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.001, 1.0))
def test_random_counts_are_exact_for_any_seed_and_density(seed, density):
    model = tiny_llama()
    total = sum(weight.numel() for weight in finepoint.target_weights(model).values())
    assert finepoint.select(model, rule="random", density=density, seed=seed).count == int(density * total + 0.5)
