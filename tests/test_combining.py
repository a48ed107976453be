"""Merging against its formulas over dense float64 tensors, bits where it is exact, and what is refused."""

import itertools
import math

import pytest
import torch

import finepoint
from conftest import assert_same_bits, snapshot, tiny_llama
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.bases import verify
from finepoint.adapters.change import Change
from finepoint.adapters.combining import METHODS, merge
from finepoint.adapters.entries import checksum, gather
from finepoint.adapters.union import aligned
from finepoint.errors import FinepointError
from test_adapter import assert_same_adapter, rewrite

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")


def make(model, seed, density=0.3, kind="delta", names=NAMES, among=None):
    """A random adapter; `among` (a share from, a share to) restricts its positions, e.g. to be disjoint of another."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name in names:
        weight = model.get_parameter(name)
        lowest, highest = (0, weight.numel()) if among is None else (int(s * weight.numel()) for s in among)
        k = max(1, round(density * (highest - lowest)))
        indices = (torch.randperm(highest - lowest, generator=generator)[:k] + lowest).sort().values
        base = gather(weight, indices)
        delta = torch.randn(k, generator=generator, dtype=torch.float64) * 0.1
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        numbers = delta.to(wide) if kind == "delta" else (base.double() + delta).to(weight.dtype)
        dtype = str(weight.dtype).removeprefix("torch.")
        changes[name] = Change(tuple(weight.shape), dtype, kind, indices, numbers, checksum(base))
    return SparseAdapter(changes, {"base_model": "tiny", "task": "causal", "rule": f"r{seed}"})


def applied(model, *adapters):
    """The bits with adapters on, one after the other; they are off again afterwards."""
    for adapter in adapters:
        adapter.apply(model)
    found = snapshot(model)
    for adapter in reversed(adapters):
        adapter.revert(model)
    return found


def dense(model, adapter, name):
    """(the delta, float64; where the adapter has an entry, bool), both of the weight's size."""
    weight = model.get_parameter(name)
    delta = torch.zeros(weight.numel(), dtype=torch.float64)
    held = torch.zeros(weight.numel(), dtype=torch.bool)
    if name in adapter:
        change = adapter.changes[name]
        numbers = change.numbers.double()
        if change.kind == "value":
            numbers = numbers - weight.detach().flatten()[change.indices].double()
        delta[change.indices], held[change.indices] = numbers, True
    return delta, held


def trimmed(delta, held, keep_from, keep_to):
    """Zero but for the held entries whose rank by size, 0 the largest, lies in [keep_from, keep_to)."""
    order = sorted(held.nonzero()[:, 0].tolist(), key=lambda i: (-abs(delta[i].item()), i))
    found = torch.zeros_like(delta)
    for i in order[keep_from:keep_to]:
        found[i] = delta[i]
    return found


def dense_sum(deltas, helds, weights):
    return sum(w * d for w, d in zip(weights, deltas, strict=True))


def dense_mean(deltas, helds, weights):
    return dense_sum(deltas, helds, weights) / sum(weights)


def dense_ties(deltas, helds, weights, density=1.0, scale=1.0):
    parts = []
    for delta, held, weight in zip(deltas, helds, weights, strict=True):
        keep = max(1, round(density * int(held.sum()))) if held.any() else 0
        parts.append(weight * trimmed(delta, held, 0, keep))
    found = torch.zeros_like(deltas[0])
    for i in range(len(found)):
        sign = 1 if sum(part[i].item() for part in parts) >= 0 else -1
        agree = [(p[i].item(), w) for p, w in zip(parts, weights, strict=True) if p[i].item() * sign > 0]
        if agree:
            found[i] = scale * sum(x for x, _ in agree) / sum(abs(w) for _, w in agree)
    return found


def dense_breadcrumbs(deltas, helds, weights, smallest, largest):
    found = torch.zeros_like(deltas[0])
    for delta, held, weight in zip(deltas, helds, weights, strict=True):
        k = int(held.sum())
        found += weight * trimmed(delta, held, round(largest * k), k - round(smallest * k))
    return found


def dense_consensus(deltas, helds, weights, least=2, strictness=0.4, same_sign=0):
    total = dense_sum(deltas, helds, weights)
    count = torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        part = weight * delta
        matters = part.abs() > strictness * (total - part).abs()
        if same_sign:
            matters &= part * total > 0
        count += matters
    return torch.where(count >= least, total, 0.0)


def dense_first(deltas, helds, weights):
    found, taken = torch.zeros_like(deltas[0]), torch.zeros_like(helds[0])
    for delta, held, weight in zip(deltas, helds, weights, strict=True):
        found[held & ~taken] = weight * delta[held & ~taken]
        taken |= held
    return found


def dense_last(deltas, helds, weights):
    return dense_first(deltas[::-1], helds[::-1], weights[::-1])


CASES = [
    ("sum", dense_sum, {}), ("mean", dense_mean, {}),
    ("ties", dense_ties, {}), ("ties", dense_ties, {"density": 0.4, "scale": 0.7}),
    ("breadcrumbs", dense_breadcrumbs, {"smallest": 0.5, "largest": 0.1}),
    ("breadcrumbs", dense_breadcrumbs, {"smallest": 0.0, "largest": 0.0}),
    ("consensus", dense_consensus, {}), ("consensus", dense_consensus, {"least": 3, "strictness": 0.0}),
    ("consensus", dense_consensus, {"strictness": 0.1, "same_sign": 1}),
    ("first", dense_first, {}), ("last", dense_last, {}),
]  # fmt: skip


def three(model, kind="delta"):
    """Three adapters of different densities, one of which leaves a weight alone."""
    return [
        make(model, 1, 0.5, kind),
        make(model, 2, 0.3, kind),
        make(model, 3, 0.7, kind, names=(NAMES[0], NAMES[2])),
    ]


@pytest.mark.parametrize("weights", [None, [0.3, 1.2, 0.5], [1.0, -0.5, 2.0]])
@pytest.mark.parametrize(("how", "formula", "options"), CASES)
@pytest.mark.parametrize("kind", ["delta", "value"])
def test_every_method_equals_its_dense_formula(how, formula, options, weights, kind):
    model = tiny_llama(torch.float64)
    adapters, base = three(model, kind), snapshot(model)
    merged = merge(adapters, weights, how, model=model, **options)
    assert_same_bits(base, snapshot(model))
    with merged.applied(model):
        found = snapshot(model)
    for name in NAMES:
        deltas, helds = zip(*(dense(model, adapter, name) for adapter in adapters), strict=True)
        expected = base[name].flatten() + formula(list(deltas), list(helds), weights or [1.0] * 3, **options)
        torch.testing.assert_close(found[name].flatten(), expected, rtol=0, atol=1e-12)
        if kind == "delta":
            given = dense(model, merged, name)[0]
            torch.testing.assert_close(base[name].flatten() + given, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["delta", "value"])
def test_sums_are_rounded_once(dtype, kind):
    model = tiny_llama(dtype)
    adapters = three(model, kind)
    found = applied(model, merge(adapters, [0.5, 1.0, -2.0], model=model))
    for name in NAMES:
        base = model.get_parameter(name).detach().flatten()
        exact = dense_sum([dense(model, a, name)[0] for a in adapters], None, [0.5, 1.0, -2.0])
        expected = (base.float() + exact.float() if kind == "delta" else base.double() + exact).to(dtype)
        assert torch.equal(found[name].flatten(), expected)


@pytest.mark.parametrize("how", ["sum", "error", "first", "last", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kinds", list(itertools.product(["delta", "value"], repeat=2)), ids=str)
def test_disjoint_adapters_merge_to_the_bits_of_applying_one_after_the_other(how, dtype, kinds):
    model = tiny_llama(dtype)
    with torch.no_grad():
        model.model.norm.weight[:] = torch.tensor([-0.0, 1e4, 1e-3, 0.0] * 4).to(dtype)
    a = make(model, 1, 0.6, kinds[0], among=(0, 0.5))
    b = make(model, 2, 0.2, kinds[1], among=(0.5, 1))
    expected = applied(model, a, b)
    for order in ([a, b], [b, a]):
        assert_same_bits(expected, applied(model, merge(order, how=how, model=model)))
    if kinds[0] == kinds[1] and (how != "ties" or kinds[0] == "delta"):  # no base needed
        assert_same_bits(expected, applied(model, merge([a, b], how=how)))


def test_adding_and_subtracting_gives_the_first_back():
    model = tiny_llama(torch.float64)
    base = snapshot(model)
    a, b = make(model, 1, 0.5), make(model, 2, 0.5)
    assert_same_bits(base, applied(model, merge([a, a], [1, -1])))
    once = merge([merge([a, b]), b], [1, -1])
    for name, value in applied(model, once).items():
        torch.testing.assert_close(value, applied(model, a)[name], rtol=0, atol=1e-15)
    far = make(model, 3, 0.5, among=(0, 0.5)), make(model, 4, 0.5, among=(0.5, 1))
    assert_same_bits(applied(model, far[0]), applied(model, merge([merge(far), far[1]], [1, -1])))
    negated = merge([a], [-1])
    assert all(torch.equal(negated.changes[name].numbers, -a.changes[name].numbers) for name in a)
    assert_same_bits(base, snapshot(model))


def test_one_adapter_of_weight_one_stays_itself():
    model = tiny_llama(torch.bfloat16)
    for kind, how in itertools.product(("delta", "value"), ("sum", "mean", "first", "last", "error")):
        a = make(model, 1, kind=kind)
        merged = merge([a], how=how)
        assert_same_adapter(SparseAdapter(a.changes, merged.info), merged)


SYMMETRIC = {"ties": {"density": 0.5}, "dare": {"drop": 0.3}, "breadcrumbs": {"smallest": 0.2, "largest": 0.1},
             "consensus": {}, "sum": {}, "mean": {}}  # fmt: skip


@pytest.mark.parametrize("how", SYMMETRIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_of_the_adapters_makes_no_difference(how, dtype):
    model = tiny_llama(dtype)
    adapters, weights = three(model), [0.3, 1.1, 0.7]
    found = [
        merge([adapters[i] for i in order], [weights[i] for i in order], how, **SYMMETRIC[how])
        for order in itertools.permutations(range(3))
    ]
    for other in found[1:]:
        assert set(other) == set(found[0])
        for name, change in found[0].changes.items():
            assert torch.equal(change.indices, other.changes[name].indices)
            assert torch.equal(change.numbers, other.changes[name].numbers)
    again = merge(adapters, weights, how, **SYMMETRIC[how])
    assert_same_adapter(found[0], again)


def test_first_and_last_are_each_others_mirror():
    adapters = three(tiny_llama())
    ahead, behind = merge(adapters, how="first"), merge(adapters[::-1], how="last")
    for name in NAMES:
        assert torch.equal(ahead.changes[name].numbers, behind.changes[name].numbers)


def test_dare_keeps_the_mean_and_is_drawn_by_its_seed():
    model = tiny_llama(torch.float64)
    a, b = make(model, 1, 0.5), make(model, 2, 0.5)
    name = NAMES[1]
    dropped = [merge([a, b], how="dare", drop=0.4, seed=seed) for seed in range(400)]
    whole = dense(model, merge([a, b]), name)[0]
    stack = torch.stack([dense(model, one, name)[0] for one in dropped])
    spread = stack.std(0) / math.sqrt(len(stack))
    assert ((stack.mean(0) - whole).abs() <= 5 * spread + 1e-12).all()
    (da, ha), (db, hb) = dense(model, a, name), dense(model, b, name)
    for values in stack[:5]:  # every entry is one of the four that two draws can give
        ways = torch.stack([x * da / 0.6 + y * db / 0.6 for x in (0, 1) for y in (0, 1)])
        assert ((ways - values).abs().min(0).values < 1e-12).all()
    lone = ha & ~hb
    kept = (stack[:, lone] != 0).double().mean().item()
    assert abs(kept - 0.6) < 5 * math.sqrt(0.24 / stack[:, lone].numel())
    assert not torch.equal(stack[0], stack[1])
    for name in NAMES:
        assert torch.equal(
            dense(model, merge([a, b], how="dare", drop=0.0), name)[0], dense(model, merge([a, b]), name)[0]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("with_model", [False, True])
def test_a_merged_adapter_lives_on_as_any(tmp_path, dtype, compact, with_model):
    model = tiny_llama(dtype)
    base = snapshot(model)
    a, b, c = three(model)
    merged = merge([a, b], how="ties", density=0.5, model=model if with_model else None)
    merged.save(tmp_path / "m", compact=compact)
    back = SparseAdapter.load(tmp_path / "m")
    assert_same_adapter(merged, back)
    for change, other in zip(merged.changes.values(), back.changes.values(), strict=True):
        assert bool(change.parts) == bool(other.parts) == (not with_model)
        for (places, digest), (others, same) in zip(change.parts, other.parts, strict=True):
            assert torch.equal(places, others)
            assert digest == same
    assert verify(back, model)["reverted"]
    assert_same_bits(applied(model, merged), applied(model, back))
    further = merge([back, c], [0.5, 1.0])
    further.save(tmp_path / "n", compact=compact)
    assert verify(SparseAdapter.load(tmp_path / "n"), model)["entries"] == further.count
    assert_same_bits(base, snapshot(model))
    # A base that differs where any of the three was trained is refused by name, also where trimming left nothing.
    for adapter in (b, c) if not with_model else (c,):
        wrong = tiny_llama(dtype)
        with torch.no_grad():
            wrong.get_parameter(NAMES[0]).view(-1)[adapter[NAMES[0]][-1]] += 1
        with pytest.raises(FinepointError, match="embed_tokens.weight: its values are not those of the base model"):
            SparseAdapter.load(tmp_path / "n").apply(wrong)


def shifted(tensors, key, by):
    tensors[key] = tensors[key] + by


PART = f"{NAMES[0]}.parts.1.indices"
DAMAGED_PARTS = {
    "missing": (lambda t: t.pop(PART), None, "parts.1.indices is missing"),
    "outside": (lambda t: shifted(t, PART, 2000), None, "an index lies outside the weight"),
    "descending": (lambda t: t.update({PART: t[PART].flip(0)}), None, "ascending and unique"),
    "negative": (lambda t: shifted(t, PART, -2000), None, "an index lies outside the weight"),
    "one too many": (lambda t: t.update({PART.replace("1", "7"): t[PART].clone()}), None, "does not mention"),
    "floats": (lambda t: t.update({PART: t[PART].float()}), None, "not a list of integers"),
    "no checksums": (None, lambda c: c["weights"][NAMES[0]].update(part_checksums=[]), "checksum .* is missing"),
    "a number": (None, lambda c: c["weights"][NAMES[0]].update(part_checksums=[1, 2]), "checksum .* is missing"),
    "no list": (None, lambda c: c["weights"][NAMES[0]].update(part_checksums="ab"), "checksum .* is missing"),
    "one too few": (None, lambda c: c["weights"][NAMES[0]]["part_checksums"].pop(), "does not mention"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED_PARTS)
def test_damaged_parts_are_refused_by_name(tmp_path, damage):
    change_tensors, change_config, message = DAMAGED_PARTS[damage]
    model = tiny_llama()
    folder = merge([make(model, 1), make(model, 2)]).save(tmp_path / "m")
    rewrite(folder, change_tensors, change_config)
    with pytest.raises(FinepointError, match=f"embed_tokens.*{message}"):
        SparseAdapter.load(folder)


def test_the_same_entries_keep_one_checksum():
    model = tiny_llama()
    a = make(model, 1)
    b = SparseAdapter({
        n: Change(c.shape, c.dtype, c.kind, c.indices, c.numbers * 2, c.base) for n, c in a.changes.items()
    })  # fmt: skip
    merged = merge([a, b])
    assert all(change.base == a.changes[n].base and not change.parts for n, change in merged.changes.items())


def test_exact_values_need_the_base_only_where_their_deltas_matter():
    model = tiny_llama(torch.bfloat16)
    a, b = make(model, 1, kind="value"), make(model, 2, kind="value")
    merge([a, b], how="first")
    for how, weights in (("sum", None), ("ties", None), ("mean", None), ("first", [1, 0.5])):
        with pytest.raises(FinepointError, match=r"holds exact values.*give the base model \(model=.., --model M\)"):
            merge([a, b], weights, how)
        assert merge([a, b], weights, how, model=model).changes[NAMES[0]].kind == "value"
    mixed = make(model, 3, among=(0, 0.1)), make(model, 4, among=(0.5, 1), kind="value")
    with pytest.raises(FinepointError, match="give the base model"):
        merge(mixed)


def test_nothing_of_a_weights_size_is_made():
    size = 1 << 40  # a terabyte of entries: whatever is dense fails
    held = [torch.tensor([3, 1 << 35]), torch.tensor([3, 7, (1 << 40) - 1])]
    adapters = [
        SparseAdapter({"w": Change((size,), "float32", "delta", i, torch.ones(len(i)), str(n))})
        for n, i in enumerate(held)
    ]
    for how in METHODS:
        if how != "error":
            options = {"breadcrumbs": {"smallest": 0.1}, "dare": {"drop": 0.1}}.get(how, {})
            assert merge(adapters, how=how, **options).count <= 4


def broken(adapter, **facts):
    """The adapter with its first weight's change altered."""
    name, change = next(iter(adapter.changes.items()))
    return SparseAdapter(adapter.changes | {name: Change(**(change.__dict__ | facts))})


DEEP = "model.layers.2.mlp.up_proj.weight"


def refusals():
    model = tiny_llama()
    a, b = make(model, 1), make(model, 2)
    whole = broken(a, kind="full", indices=torch.empty(0, dtype=torch.long), numbers=torch.ones(64, 16), base="")
    return {
        "nothing": (lambda: merge([]), "nothing to merge"),
        "count": (lambda: merge([a, b], [1.0]), "1 weights for 2 adapters; give one for each"),
        "nan weight": (lambda: merge([a, b], [1.0, float("nan")]), "a weight is nan; expected a finite number"),
        "how": (lambda: merge([a, b], how="tiez"), r"'tiez'; did you mean 'ties'\? there are: sum, mean, ties"),
        "option": (lambda: merge([a, b], how="ties", drop=1), "ties has no option 'drop'; it has: density, scale"),
        "no options": (lambda: merge([a, b], drop=1), "sum has no option 'drop'; it has: none"),
        "option value": (lambda: merge([a, b], how="ties", density="x"), "ties: density is 'x'; expected a number"),
        "density": (lambda: merge([a, b], how="ties", density=0), r"density is 0; expected in \(0, 1\]"),
        "drop": (lambda: merge([a, b], how="dare", drop=1), r"drop is 1; expected in \[0, 1\)"),
        "crumbs": (lambda: merge([a, b], how="breadcrumbs", smallest=0.5, largest=0.5), "largest is 0.5; expected"),
        "least": (lambda: merge([a, b], how="consensus", least=3), "least is 3; expected 1 to 2"),
        "sign": (lambda: merge([a, b], how="consensus", same_sign=2), "same_sign is 2; expected 0 or 1"),
        "mean": (lambda: merge([a, b], [1, -1], "mean"), "add up to 0, so they have no mean"),
        "nan": (lambda: merge([a, broken(b, numbers=b.changes[NAMES[0]].numbers * math.nan)]),
                "embed_tokens.weight: a number of adapter 2 is not finite"),
        "shape": (lambda: merge([a, broken(b, shape=(32, 32))]),
                  r"float32 \(32, 32\) in adapter 2, float32 \(64, 16\)"),
        "dtype": (lambda: merge([a, make(tiny_llama(torch.bfloat16), 2)]), "bfloat16 .* in adapter 2, float32 .*"),
        "base": (lambda: merge([a, broken(a, base="another")]), "adapters 1 and 2 were trained on different bases"),
        "whole": (lambda: merge([b, whole]), "adapter 2 holds the whole weight"),
        "error": (lambda: merge([a, b], how="error"), "embed_tokens.weight: the adapters share .* entries"),
        "too large": (lambda: merge([a, b], [1e200, 1]), "embed_tokens.weight: the merged numbers do not fit"),
        "model": (lambda: merge([a, make(tiny_llama(seed=4), 2)], model=model), "adapter 2: the adapter does not fit"),
        "no such weight": (lambda: merge([a, make(tiny_llama(layers=3), 2, names=[DEEP])], model=model),
                           f"adapter 2: .* {DEEP}: the model has no such weight"),
        "nothing left": (lambda: merge([make(model, 1, among=(0, 0.5)), make(model, 2, among=(0.5, 1))],
                                       how="consensus"), "merging by 'consensus' leaves no entry"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refusals())
def test_what_does_not_go_together_is_refused_by_name(case):
    run, message = refusals()[case]
    with pytest.raises(FinepointError, match=message):
        run()


def test_the_base_must_be_bare():
    model = tiny_llama()
    a, b = make(model, 1), make(model, 2)
    with a.applied(model), pytest.raises(FinepointError, match="must be the base here; revert it first"):
        merge([a, b], model=model)


def test_a_merged_adapter_says_where_it_comes_from():
    merged = finepoint.merge([make(tiny_llama(), 1), make(tiny_llama(), 2)], [1, 0.5], "ties", density=0.5)
    assert merged.info["base_model"] == "tiny"
    assert "rule" not in merged.info
    first = make(tiny_llama(), 1)
    assert finepoint.merge([first, first]).info["rule"] == "r1"
    assert merged.info["merge"] == {
        "how": "ties", "options": {"density": 0.5, "scale": 1.0},
        "parts": [{"weight": 1.0, "base_model": "tiny", "rule": "r1"},
                  {"weight": 0.5, "base_model": "tiny", "rule": "r2"}],
    }  # fmt: skip


# Against mergekit's own code, where it is installed: dense adapters, since it knows no others.


@pytest.mark.parametrize(("how", "theirs", "options"), [
    ("sum", {"consensus": None, "sparsify": None}, {}),
    ("mean", {"consensus": None, "sparsify": None, "normalize": True}, {}),
    ("ties", {"consensus": "sum", "sparsify": "magnitude", "normalize": True}, {"density": 0.25}),
    ("ties", {"consensus": "sum", "sparsify": "magnitude", "normalize": True}, {"density": 0.5, "scale": 0.5}),
    ("breadcrumbs", {"consensus": None, "sparsify": "magnitude_outliers"}, {"smallest": 0.25, "largest": 0.125}),
    ("dare", {"consensus": None, "sparsify": "random"}, {"drop": 0.25}),
])  # fmt: skip
def test_mergekit_gives_the_same(how, theirs, options, monkeypatch):
    pytest.importorskip("mergekit.sparsify")
    from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod, get_mask
    from mergekit.sparsify import SparsificationMethod, sparsify

    model = tiny_llama(torch.float64)
    adapters, weights = [make(model, seed, 1.0) for seed in (1, 2, 3)], [0.5, 1.0, 1.5]
    merged = merge(adapters, weights, how, **options)
    for name in NAMES:
        stack = torch.stack([dense(model, adapter, name)[0] for adapter in adapters])
        density = {"breadcrumbs": 0.625, "dare": 0.75}.get(how, options.get("density"))
        if theirs["sparsify"]:
            if how == "dare":  # the draws are ours, what is made of them theirs
                ones = METHODS["dare"](aligned(name, adapters), torch.ones(3, 1), **options)
                draws = iter((ones != 0).double())
                monkeypatch.setattr(torch, "bernoulli", lambda *_, draws=draws: next(draws))
            method = SparsificationMethod(theirs["sparsify"])
            stack = torch.stack([sparsify(row, density, method, gamma=options.get("largest", 0)) for row in stack])
            monkeypatch.undo()
        factors = torch.tensor(weights, dtype=torch.float64)[:, None]
        stack = stack * factors
        mask = get_mask(stack, ConsensusMethod(theirs["consensus"])) if theirs["consensus"] else torch.ones_like(stack)
        expected = (stack * mask).sum(0)
        if theirs.get("normalize"):
            total = (factors * mask).sum(0)
            expected = expected / torch.where(total == 0, 1, total)
        expected = expected * options.get("scale", 1) / (0.75 if how == "dare" else 1)
        tolerance = 1e-7 if how == "dare" else 1e-12  # theirs drops in float32
        torch.testing.assert_close(dense(model, merged, name)[0], expected, rtol=0, atol=tolerance)
