"""One suite over all rules: a rule is tested the day it is added."""

import copy
import math
import random
import shutil
import tempfile
from fnmatch import fnmatchcase
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import finepoint
from conftest import assert_same_bits, random_batches, snapshot, tiny_gemma, tiny_llama
from finepoint.errors import FinepointError
from finepoint.selection import warmup
from finepoint.selection.rules import ALIASES, OURS, RULES, by_row, low_rank, rule_named
from finepoint.selection.select import score, select
from finepoint.selection.statistics import stream_statistics
from finepoint.selection.targets import target_weights
from reference import TiedToy, mean_gradient, mean_squared_gradient

EVERY_RULE = sorted(RULES)


def toy(dtype):
    torch.manual_seed(0)
    return TiedToy(dtype=dtype)


def small_batches(**kwargs):
    """Batches whose tokens every model here knows."""
    return [{key: value.clamp(max=10) for key, value in batch.items()} for batch in random_batches(**kwargs)]


def targets_of(rule):
    """All weights, but for rules that ask for inputs, which norms, biases and stacked experts have not."""
    return ["*proj", "*embed*", "first", "head"] if "input_norm" in rule_named(rule).needs else ["all"]


def targets_in(model, rule):
    """Those of them that this model has, as patterns."""
    names = [name for name, _ in model.named_parameters()]
    owners = [name.removesuffix(".weight") for name in names]
    return [pattern for pattern in targets_of(rule)
            if pattern == "all" or any(fnmatchcase(owner, pattern) for owner in owners)]  # fmt: skip


def all_scores(model, rule, batches, seed=0, memory=1.0, **options):
    weights = target_weights(model, targets_in(model, rule))
    rule = rule_named(rule)
    return {
        name: score(rule, name, weights[name], statistics, seed, options)
        for name, statistics in stream_statistics(
            model, weights, batches, rule.needs, memory, rule.options | options, batches
        )
    }


def dense_formula(rule, model, batches):
    """Each rule once more, from dense gradients in the model's precision."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    mean, squared = mean_gradient(model, batches), mean_squared_gradient(model, batches)
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    examples = sum(len(batch["labels"]) for batch in batches)
    information = {name: found * examples / labels for name, found in squared.items()}  # of a token
    average = sum(found.sum() for found in information.values()) / sum(map(torch.numel, information.values()))
    formulas = {
        "gradient": lambda n: mean[n].abs(),
        "gallop": lambda n: mean[n].abs() / (weights[n].abs() + 1e-8),
        "magnitude-low": lambda n: -weights[n].abs(),
        "magnitude-high": lambda n: weights[n].abs(),
        "snip": lambda n: (weights[n] * mean[n]).abs(),
        "fisher": lambda n: squared[n],
        "gain": lambda n: mean[n] ** 2 / (information[n] + 0.1 * average),
        "lift": lambda n: weights[n].abs(),  # no matrix here has a rank above the rule's
        "neuroada": lambda n: places(weights[n].abs()),
        "gps": lambda n: places(mean[n].abs()),
    }
    if rule == "wanda":
        norms = input_norms(model, batches)
        formulas["wanda"] = lambda n: weights[n].abs() * norms[n]
        weights = {name: weight for name, weight in weights.items() if name in norms}
    if rule in ("movement", "lottery"):
        moved, changed = warm_up(model, batches, steps=50, lr=1e-5)
        formulas |= {"movement": moved.get, "lottery": lambda n: changed[n].abs()}
    return {name: formulas[rule](name) for name in weights}


def input_norms(model, batches):
    """By weight: the root of the summed squares of its inputs, from every real token of every example, one by one."""
    squares = {}

    def add(name, total):
        squares[name] = squares.get(name, 0) + total

    def watch(name, module):
        def hook(module, args, kwargs):
            x = (args or tuple(kwargs.values()))[0]
            if isinstance(module, torch.nn.Embedding):
                one_hot = torch.nn.functional.one_hot(x.reshape(-1), module.num_embeddings)
                add(name, one_hot.double().sum(0)[:, None].expand(module.weight.shape))
            else:
                add(name, x.reshape(-1, x.shape[-1]).double().square().sum(0)[None].expand(module.weight.shape))

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    first_names = {id(weight): name for name, weight in model.named_parameters()}
    handles = [watch(first_names[id(module.weight)], module) for module in model.modules()
               if isinstance(module, torch.nn.Linear | torch.nn.Embedding)]  # fmt: skip
    with torch.no_grad():
        for batch in batches:
            for row in batch["input_ids"]:
                model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}


def warm_up(model, batches, steps, lr):
    """Sums of -w g, and the change, of dense AdamW without decay, written out; on a copy of the model."""
    model = copy.deepcopy(model).eval()
    weights = dict(model.named_parameters())
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    first = {name: torch.zeros_like(value) for name, value in start.items()}
    second = copy.deepcopy(first)
    moved = copy.deepcopy(first)
    for step in range(1, steps + 1):
        model.zero_grad()
        model(**batches[(step - 1) % len(batches)]).loss.backward()
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = weight.grad
                moved[name] -= weight * gradient
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                mean, spread = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
                weight -= lr * mean / (spread.sqrt() + 1e-8)
    return moved, {name: weight.detach() - start[name] for name, weight in weights.items()}


def places(values):
    """Of every value, how many of its row are larger, negative; ties to the first; a fraction for the value itself:
    its exponent and mantissa, one after the other."""
    rows = values.reshape(-1, values.shape[-1])
    found = torch.empty_like(rows)
    for i, row in enumerate(rows.tolist()):
        for j, value in enumerate(row):
            larger = sum(other > value or (other == value and k < j) for k, other in enumerate(row))
            mantissa, exponent = math.frexp(value)
            found[i, j] = ((exponent + 1022 + 2 * mantissa - 1) / 2048 if value else 0) - larger
    return found.view_as(values)


@pytest.mark.parametrize("rule", [rule for rule in EVERY_RULE if rule != "random"])
@pytest.mark.parametrize("make", [toy, tiny_llama, tiny_gemma])
def test_the_formula_equals_plain_autograd_in_float64(rule, make):
    model, batches = make(torch.float64), small_batches()
    found = all_scores(model, rule, batches)
    expected = dense_formula(rule, model, batches)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # The norms and losses of transformers compute in float32 whatever the model's dtype; the toy does not.
        rtol, atol = (1e-10, 1e-14) if make is toy else (1e-3, 1e-6)
        torch.testing.assert_close(found[name], values, rtol=rtol, atol=atol * values.abs().max().item())


@pytest.mark.parametrize("rule", EVERY_RULE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_have_the_right_form_and_depend_on_the_seed_alone(rule, dtype):
    model, batches = tiny_llama(dtype), random_batches()
    first, again = all_scores(model, rule, batches, seed=3), all_scores(model, rule, batches, seed=3)
    weights = dict(model.named_parameters())
    for name in first:
        assert first[name].shape == weights[name].shape
        assert first[name].dtype in (torch.float32, torch.float64)
        assert torch.isfinite(first[name]).all()
        assert torch.equal(first[name], again[name])


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_less_scoring_memory_gives_the_same_bits(rule):
    model, batches = tiny_llama(), random_batches()
    whole = all_scores(model, rule, batches)
    for memory in (1e-6, *(["disk"] if rule in ("gradient", "fisher", "gain") else [])):
        pieces = all_scores(model, rule, batches, memory=memory)
        assert list(whole) == list(pieces)
        assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_sums_on_disk_are_made_in_one_pass_and_leave_nothing_behind(tmp_path, monkeypatch):
    """With a share of the gradients at a time there is a pass for each part; on disk one weight is held at a time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, batches = tiny_llama(), random_batches()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    stream = stream_statistics(model, target_weights(model), batches, ["gradient"], "disk")
    first, _ = next(stream)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == len(target_weights(model)) - 1
    assert sum(file.stat().st_size for file in files) == 4 * sum(
        weight.numel() for name, weight in target_weights(model).items() if name != first
    )
    list(stream)
    assert len(passes) == 1 + len(batches)  # one tells how the model counts labels
    assert list(tmp_path.iterdir()) == []


def test_sums_on_disk_need_room_there_and_whole_float_weights(monkeypatch):
    model, batches = tiny_llama(), random_batches()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(FinepointError, match="has 0.0; set TMPDIR to another folder, or give --scoring-memory 0.25"):
        select(model, batches, rule="gradient", density=0.1, scoring_memory="disk")
    with pytest.raises(FinepointError, match="scoring_memory is 'dsik'; it is a share of the weights, in .* or disk"):
        select(model, batches, rule="gradient", density=0.1, scoring_memory="dsik")


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_scoring_leaves_the_model_exactly_as_found(rule):
    model, batches = tiny_llama(), random_batches()
    model.train()
    model.model.layers[0].eval()
    model.config._attn_implementation = "eager"
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        if i % 3 == 0:
            parameter.grad = torch.full_like(parameter, 7.0)
    hook_calls = []
    model.register_forward_hook(lambda *_: hook_calls.append(1))
    before = snapshot(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    grads = [parameter.grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()

    finepoint.select(model, batches, rule=rule, density=0.1, targets=targets_in(model, rule), kept=batches)

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(old is new.grad for old, new in zip(grads, model.parameters(), strict=True))
    assert all(grad is None or bool((grad == 7).all()) for grad in grads)
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == numpy.random.get_state()[1]).all()


def test_an_exception_while_scoring_leaves_the_model_as_found(llama):
    flags = [parameter.requires_grad for parameter in llama.parameters()]
    llama.train()
    with pytest.raises(FinepointError, match="every label of the scoring examples is ignored"):
        finepoint.select(
            llama, [{"input_ids": torch.ones(1, 3).long(), "labels": torch.full((1, 3), -100)}], rule="saft"
        )
    with pytest.raises(ValueError, match="input_ids"):
        finepoint.select(llama, [{"nonsense": 1, "labels": torch.ones(1, 3).long()}], rule="saft")
    assert flags == [parameter.requires_grad for parameter in llama.parameters()]
    assert llama.training
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_the_mean_is_signed_and_over_labels_not_batches():
    # Opposite gradients cancel before the absolute value: with equal batches of opposite loss the score is zero.
    model = torch.nn.Linear(2, 1, bias=False)

    class Opposed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model

        def forward(self, x, labels):
            out = type("Out", (), {})()
            out.loss = (self.layer(x)[:, 0] * labels[:, 1]).mean()
            return out

    x = torch.tensor([[1.0, 3.0]])
    opposed = [{"x": x, "labels": torch.tensor([[0, 1]])}, {"x": x, "labels": torch.tensor([[0, -1]])}]
    scores = all_scores(Opposed(), "gradient", opposed)
    assert torch.equal(scores["layer.weight"], torch.zeros(1, 2))
    assert all_scores(Opposed(), "fisher", opposed)["layer.weight"].tolist() == [[1.0, 9.0]]  # negative control


def test_batching_does_not_change_the_mean_gradient():
    model = toy(torch.float64)
    batch = small_batches(count=1, rows=6)[0]
    parts = [{key: value[:1] for key, value in batch.items()}, {key: value[1:] for key, value in batch.items()}]
    whole, split = all_scores(model, "gradient", [batch]), all_scores(model, "gradient", parts)
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], rtol=1e-10, atol=1e-15)


def test_gallop_is_computed_in_float32_whatever_the_weights_dtype():
    model = tiny_llama(torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    with torch.no_grad():
        weight.view(-1)[:2] = torch.tensor([0.0, 1e-9])
    gradient = torch.ones(weight.shape)
    scores = RULES["gallop"].score(weight, gradient)
    assert scores.dtype == torch.float32
    assert scores.view(-1)[0] == pytest.approx(1e8)
    assert scores.view(-1)[1] == pytest.approx(1 / 1.1e-8, rel=1e-2)
    coarser = RULES["gallop"].score(weight, gradient, epsilon=1e-4)
    assert coarser.view(-1)[0] == pytest.approx(1e4)


def test_same_shape_layers_do_not_share_random_indices():
    model = tiny_llama(layers=2)
    chosen = finepoint.select(model, rule="random", density=0.3, scope="weight")
    a, b = (chosen[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(2))
    assert len(a) == len(b)
    assert not torch.equal(a, b)
    other_seed = finepoint.select(model, rule="random", density=0.3, scope="weight", seed=1)
    assert not torch.equal(a, other_seed["model.layers.0.mlp.up_proj.weight"])


def test_random_is_reproducible_from_the_seed_alone():
    torch.manual_seed(5)
    first = finepoint.select(tiny_llama(seed=0), rule="random", count=101)
    torch.manual_seed(6)
    second = finepoint.select(copy.deepcopy(tiny_llama(seed=9)), rule="random", count=101)
    assert first.count == second.count == 101
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_aliases_name_the_rule_itself():
    assert {alias: rule_named(alias).name for alias in ALIASES} == {"sparta": "random", "saft": "gradient"}
    assert all(rule.formula and rule.source for rule in RULES.values() if rule.package == OURS)


def test_an_unknown_rule_or_option_is_refused_by_name(llama):
    with pytest.raises(FinepointError, match=r"unknown rule 'galop'; did you mean 'gallop'\?"):
        rule_named("galop")
    with pytest.raises(FinepointError, match="cannot import rule 'nowhere:f'"):
        rule_named("nowhere:f")
    with pytest.raises(FinepointError, match=r"rule 'gallop' has no option 'epsilom'; its options: epsilon=1e-08"):
        finepoint.select(llama, random_batches(), rule="gallop", rule_options={"epsilom": 1})
    with pytest.raises(FinepointError, match="needs data"):
        finepoint.select(llama, rule="gallop")


def cubic(weight, gradient, power=3.0):
    """|g|^power"""
    return gradient.abs() ** power


def shapeless(weight):
    return torch.zeros(3)


def infinite(weight):
    return torch.full(weight.shape, float("inf"))


def test_a_users_own_rule_is_one_line_or_an_import_path(llama, batches, monkeypatch):
    finepoint.register("cubic", cubic)
    monkeypatch.setitem(RULES, "cubic", RULES["cubic"])
    named = finepoint.select(llama, batches, rule="cubic", density=0.01)
    imported = finepoint.select(llama, batches, rule="test_rules:cubic", density=0.01)
    saft = finepoint.select(llama, batches, rule="saft", density=0.01)
    for other in (imported, saft):
        assert all(torch.equal(named[name], other[name]) for name in saft)
    assert RULES["cubic"].options == {"power": 3.0}
    RULES.pop("test_rules:cubic")


def itself(weight):
    return weight


def test_excluding_entries_never_writes_into_the_model(llama):
    before = snapshot(llama)
    first = finepoint.select(llama, rule="test_rules:itself", density=0.1)
    finepoint.select(llama, rule="test_rules:itself", density=0.1, exclude=[first])
    assert_same_bits(before, snapshot(llama))
    RULES.pop("test_rules:itself")


def test_batches_without_labels_are_refused(llama):
    for rule in ("gallop", "fisher"):
        with pytest.raises(FinepointError, match="returns no loss for a scoring batch of input_ids; add labels"):
            finepoint.select(llama, [{"input_ids": torch.ones(1, 3).long()}], rule=rule)


def test_a_rule_that_breaks_its_contract_is_refused(llama):
    with pytest.raises(FinepointError, match=r"gave scores of shape \(3,\)"):
        finepoint.select(llama, rule="test_rules:shapeless")
    with pytest.raises(FinepointError, match="not finite"):
        finepoint.select(llama, rule="test_rules:infinite")
    with pytest.raises(FinepointError, match="asks for 'temperature'"):
        finepoint.register("bad", lambda weight, temperature: weight)
    for name in ("test_rules:shapeless", "test_rules:infinite"):
        RULES.pop(name)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (3, 50, 40)])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_low_rank_is_nearly_the_best(shape, decay):
    torch.manual_seed(0)
    left, sizes, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    sizes = sizes * torch.exp(-decay * torch.arange(sizes.shape[-1]))
    matrix = left @ (sizes[..., None, :, None].squeeze(-3) * right)
    best = (left[..., :8] * sizes[..., None, :8]) @ right[..., :8, :]
    found = low_rank(matrix, 8, torch.Generator().manual_seed(0))
    assert torch.linalg.matrix_rank(found).max() == 8
    assert (found - matrix).norm() <= 1.005 * (best - matrix).norm()
    assert torch.equal(found, low_rank(matrix, 8, torch.Generator().manual_seed(0)))
    once = low_rank(matrix, 8, torch.Generator().manual_seed(0), oversampling=0, rounds=0)
    assert (once - matrix).norm() > 1.05 * (best - matrix).norm()  # without the rounds it is not


def test_lift_scores_the_low_rank_part():
    torch.manual_seed(0)
    weight = torch.randn(50, 40)
    rule = rule_named("lift")
    found = rule.score(weight=weight, generator=torch.Generator().manual_seed(0), rank=4)
    left, sizes, right = torch.linalg.svd(weight)
    best = ((left[:, :4] * sizes[:4]) @ right[:4]).abs()
    assert (found - best).norm() < 0.1 * best.norm() < (weight.abs() - best).norm()
    with pytest.raises(FinepointError, match="rank is 0"):
        rule.score(weight=weight, generator=torch.Generator(), rank=0)


def test_every_neuron_gets_as_many_inputs():
    model = tiny_llama()
    sizes = {weight.shape[1] for weight in target_weights(model, "linear").values()}
    chosen = finepoint.select(model, rule="neuroada", density=2 / min(sizes), scope="weight", targets="attention")
    for name, indices in chosen.items():
        out, features = model.get_parameter(name).shape
        counts = torch.bincount(indices // features, minlength=out)
        assert counts.max() - counts.min() <= 1
        if features == min(sizes):
            assert counts.tolist() == [2] * out
            best = model.get_parameter(name).abs().topk(2).indices.sort().values
            assert torch.equal(indices.view(out, 2) % features, best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_of_one_place_are_ordered_by_value_however_small_they_are(dtype):
    torch.manual_seed(0)
    values = torch.rand(40, 300, dtype=dtype) * 10.0 ** torch.randint(-37, 3, (40, 1))
    scores = by_row(values)
    assert scores.isfinite().all()
    for row, found in zip(values, scores, strict=True):
        assert torch.equal(row.argsort(descending=True, stable=True), found.argsort(descending=True, stable=True))
    by_place = values.sort(dim=1, descending=True).values
    found = scores.sort(dim=1, descending=True).values
    for place in (0, 1, 150, 299):
        assert torch.equal(by_place[:, place].argsort(stable=True), found[:, place].argsort(stable=True))
    assert (found[:, :-1].min(0).values > found[:, 1:].max(0).values).all()
    values[3, 5] = math.nan
    assert by_row(values).isnan().sum() == 1  # which is refused
    values[3, 5] = math.inf
    assert by_row(values).isnan().sum() == 1


# --- inputs


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tied=False)])
def test_the_norms_of_inputs_do_not_depend_on_batches_or_padding(make):
    model = make()
    rows = [torch.randint(3, 60, (length,)) for length in (3, 7, 9, 5)]
    alone = [{"input_ids": row[None], "labels": row[None]} for row in rows]
    width = 9
    padded = {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows]),
        "attention_mask": torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long(),
    }
    padded["labels"] = padded["input_ids"]
    padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    padded["logits_to_keep"] = 4
    weights = target_weights(model, ["linear", "*embed_tokens"])
    first, second = (dict(stream_statistics(model, weights, given, ["input_norm"])) for given in (alone, [padded]))
    for name in weights:
        assert torch.equal(first[name].input_norm, second[name].input_norm), name
    unmasked = {key: value for key, value in padded.items() if key != "attention_mask"}
    third = dict(stream_statistics(model, weights, [unmasked], ["input_norm"]))
    assert any(not torch.equal(first[name].input_norm, third[name].input_norm) for name in weights)  # the control


def test_weights_without_inputs_are_refused_by_name():
    with pytest.raises(FinepointError, match="input_layernorm.weight belongs to LlamaRMSNorm, no linear"):
        finepoint.select(tiny_llama(), random_batches(), rule="wanda", targets="all")
    with pytest.raises(FinepointError, match="experts belongs to TiedToy, no linear layer"):
        finepoint.select(toy(torch.float32), small_batches(), rule="wanda", targets="experts*", density=0.1)
    with pytest.raises(FinepointError, match="first.bias belongs to Linear, no linear layer or"):
        finepoint.select(toy(torch.float32), small_batches(), rule="wanda", targets="*.bias", density=0.1)
    idle = toy(torch.float32)
    idle.unused = torch.nn.Linear(2, 2)
    with pytest.raises(FinepointError, match="the layer of unused.weight did not run"):
        finepoint.select(idle, small_batches(), rule="wanda", targets="unused", density=0.5)
    with pytest.raises(FinepointError, match="needs data"):
        finepoint.select(tiny_llama(), rule="wanda")


def test_a_conv1d_has_its_inputs_along_its_rows():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    seen = []
    layer = model.transformer.h[0].mlp.c_fc
    weights = target_weights(model, "*.mlp.c_fc")
    ((name, found),) = stream_statistics(model, weights, random_batches(), ["input_norm"])
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().reshape(-1, 16)))
    for batch in random_batches():
        model(input_ids=batch["input_ids"])
    assert found.input_norm.shape == (16, 1)
    torch.testing.assert_close(found.input_norm[:, 0], torch.cat(seen).norm(dim=0))
    assert score(rule_named("wanda"), name, weights[name], found, 0, {}).shape == (16, 64)


def test_a_formula_and_a_rule_of_ones_own_may_ask_for_the_new_statistics(llama, batches):
    formula = finepoint.select(llama, batches, rule="abs(w) * x", density=0.1)
    wanda = finepoint.select(llama, batches, rule="wanda", density=0.1)
    assert formula.indices.keys() == wanda.indices.keys()
    assert all(torch.equal(formula[name], wanda[name]) for name in wanda)

    def mine(weight, input_norm, gradient, change, steps=3, lr=1e-3):
        assert bool((change.abs() <= 3.1e-3).all())  # three steps of Adam, none longer than lr
        return change.abs() * gradient.abs() * input_norm

    finepoint.register("mine", mine)
    try:
        assert finepoint.select(llama, batches, rule="mine", density=0.1).count
    finally:
        del RULES["mine"]


# --- warm-ups


@pytest.mark.parametrize("rule", ["movement", "lottery"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_warm_up_leaves_the_base_bit_for_bit_also_after_an_exception(rule, dtype, batches):
    model = tiny_llama(dtype)
    before = snapshot(model)
    settings = {"steps": 5, "lr": 1e-2}
    finepoint.select(model, batches, rule=rule, density=0.1, targets="all", rule_options=settings)
    assert_same_bits(before, snapshot(model))
    weights = target_weights(model, "all")
    stream = stream_statistics(model, weights, batches, rule_named(rule).needs, 1.0, settings)
    for _ in stream:  # between two yields, too
        assert_same_bits(before, snapshot(model))
        assert all(parameter.grad is None for parameter in model.parameters())
    broken = [*batches[:2], {"nonsense": 1, "labels": torch.ones(1, 3).long()}]
    with pytest.raises(ValueError, match="input_ids"):
        finepoint.select(model, broken, rule=rule, density=0.1, rule_options=settings)
    assert_same_bits(before, snapshot(model))
    with pytest.raises(FinepointError, match="not finite at step .* of the warm-up; give a smaller --rule-options lr"):
        finepoint.select(model, batches, rule=rule, density=0.1, rule_options={"steps": 9, "lr": 1e30})
    assert_same_bits(before, snapshot(model))
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("kept", [0, 1])
def test_a_full_temporary_folder_is_told_and_leaves_the_base_as_it_was(batches, monkeypatch, kept):
    model = tiny_llama()
    before = snapshot(model)
    calls = []

    def write(tensors, file):
        calls.append(file)
        if len(calls) > kept:
            raise SafetensorError("No space left on device")
        save_file(tensors, file)

    monkeypatch.setattr(warmup, "save_file", write)
    with pytest.raises(FinepointError, match="cannot write .*safetensors: No space left"):
        finepoint.select(model, batches, rule="lottery", density=0.1, rule_options={"steps": 2})
    assert_same_bits(before, snapshot(model))


def test_a_warm_up_moves_bfloat16_weights_by_steps_that_bfloat16_would_lose(batches):
    model = tiny_llama(torch.bfloat16)
    weights = target_weights(model)
    found = dict(stream_statistics(model, weights, batches, ["change"], 1.0, {"steps": 4, "lr": 1e-6}))
    changes = torch.cat([statistics.change.view(-1) for statistics in found.values()])
    assert changes.dtype == torch.float32
    assert float((changes != 0).double().mean()) > 0.9
    assert float(changes.abs().max()) < 4.1e-6


def test_a_model_in_training_has_no_warm_up(llama, batches):
    with (
        finepoint.SparseTuner(llama, finepoint.select(llama, rule="random", density=0.1)),
        pytest.raises(FinepointError, match="cannot choose anew; leave out --refresh"),
    ):
        finepoint.select(llama, batches, rule="lottery")


@pytest.mark.parametrize(("options", "message"), [({"steps": 0}, "steps is 0"), ({"lr": -1.0}, "lr -1")])
def test_a_warm_up_needs_steps_and_a_rate(llama, batches, options, message):
    with pytest.raises(FinepointError, match=message):
        finepoint.select(llama, batches, rule="lottery", rule_options=options)
