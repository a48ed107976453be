"""Every baseline against its formula, written plainly, and through a whole run like any rule."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import transformers

import finepoint
from conftest import assert_same_bits, interrupted_at, random_batches, snapshot, tiny_llama, write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.peft import load_merged
from finepoint.baselines.dense import DenseTuner
from finepoint.baselines.registry import BASELINES, BaselineContext, baseline_named, half_of_matrices, options_of
from finepoint.errors import FinepointError
from finepoint.evaluation.evaluate import evaluate_config
from finepoint.evaluation.settings import EvalConfig
from finepoint.exchange.formats import export
from finepoint.models.loading import load_model
from finepoint.training.context import prepare
from finepoint.training.resolve import resolve
from finepoint.training.run import fit, train
from finepoint.training.settings import TrainConfig
from finepoint.training.trainer import LengthBuckets, SparseTrainer
from finepoint.tuner.optimizers import MoFOAdamW, scale_steps_
from reference import TiedToy, mean_squared_gradient
from test_adapter import assert_same_adapter

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make(name, model, seed=0, head=(), batches=(), lr=1e-2, indices=None, **options):
    baseline = baseline_named(name)
    setting = BaselineContext(model, head, options_of(baseline, options), "linear", seed, lr, 0.0, batches)
    return baseline.make(replace(setting, indices=indices or {}))


def steps(method, batches, optimizer=None):
    optimizer = method.optimizer or optimizer or torch.optim.AdamW(method.tuner.trained().values(), 1e-2,
                                                                   weight_decay=0.0)  # fmt: skip
    for batch in batches:
        method.tuner.model(**batch).loss.backward()
        if method.penalty:
            method.penalty.add_(0)
        optimizer.step()
        method.tuner.model.zero_grad()


def plain_steps(model, parameters, batches, extra=lambda: 0.0):
    """Textbook training: freeze all, unfreeze some, AdamW on the loss and whatever is added to it."""
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.0)
    for batch in batches:
        (model(**batch).loss + extra()).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_close(model, other, tolerance=1e-10):
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=name)


def toy_batches(count):
    return [{"input_ids": torch.randint(1, 11, (2, 5)), "labels": torch.randint(1, 11, (2, 5))} for _ in range(count)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("name", "trains"),
    [
        ("full", lambda name: True),
        ("head", lambda name: "lm_head" in name),
        ("bitfit", lambda name: "norm" in name),
        ("random-half", None),
    ],
)
def test_dense_baselines_equal_textbook_training(name, trains, tied, batches):
    model, other = tiny_llama(torch.float64, tied), tiny_llama(torch.float64, tied)
    before = snapshot(model)
    chosen = half_of_matrices(other, 0)
    parameters = {id(parameter): parameter for name, parameter in other.named_parameters(remove_duplicate=False)
                  if (trains(name) if trains else name in chosen)}  # fmt: skip
    plain_steps(other, list(parameters.values()), batches)
    method = make(name, model)
    assert method.tuner.count == sum(parameter.numel() for parameter in parameters.values())
    steps(method, batches)
    assert_close(model, other)
    moved = [(a.detach() - before[n]).double().norm() ** 2 for n, a in other.named_parameters()]
    assert method.tuner.norm() == pytest.approx(float(sum(moved)) ** 0.5, rel=1e-12)
    assert method.tuner.changed() == sum(int((a != before[n]).sum()) for n, a in other.named_parameters())

    adapter = method.tuner.adapter()
    method.tuner.revert_()
    method.tuner.close()
    method.tuner.close()
    assert_same_bits(before, snapshot(model))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with adapter.applied(model):
        assert_close(model, other)
    assert_same_bits(before, snapshot(model))


def test_a_tied_head_moves_the_embedding_with_it(batches):
    model = tiny_llama(torch.float64)
    method = make("head", model)
    assert list(method.tuner.trained()) == ["model.embed_tokens.weight"]
    method.tuner.close()


def test_biases_and_norms_and_stacked_weights_train_too():
    torch.manual_seed(0)
    model = TiedToy()
    other = copy.deepcopy(model)
    batches = toy_batches(3)
    plain_steps(other, [other.first.bias, other.norm.weight, other.norm.bias], batches)
    method = make("bitfit", model)
    steps(method, batches)
    assert_close(model, other)
    method.tuner.close()


def test_half_of_the_matrices_of_every_block_and_category():
    model = tiny_llama(layers=4)
    chosen = half_of_matrices(model, 0)
    assert chosen == half_of_matrices(model, 0)
    assert chosen != half_of_matrices(model, 1)
    assert len(set(chosen)) == len(chosen)
    mlp = []
    for block in range(4):
        names = [name for name in chosen if f"layers.{block}." in name]
        assert sum("self_attn" in name for name in names) == 2
        mlp.append(sum("mlp" in name for name in names))
    assert sorted(mlp) == [1, 1, 2, 2]
    assert all(any(matrix in name for matrix in MATRICES) for name in chosen)


def test_ewc_equals_the_loss_with_its_penalty():
    torch.manual_seed(0)
    model = TiedToy()  # whose loss is float64 throughout
    other, unanchored = copy.deepcopy(model), copy.deepcopy(model)
    batches, old = toy_batches(6), toy_batches(2)
    fisher = mean_squared_gradient(copy.deepcopy(other), old)
    start = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}

    def penalty():
        return 25.0 / 2 * sum((fisher[n] * (p - start[n]) ** 2).sum() for n, p in other.named_parameters())

    plain_steps(other, list(other.parameters()), batches, penalty)
    method = make("ewc", model, batches=old, strength=25.0)
    steps(method, batches)
    assert_close(model, other)
    plain_steps(unanchored, list(unanchored.parameters()), batches)
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), unanchored.parameters(), strict=True)) > 1e-3
    method.tuner.close()


def test_mofo_moves_the_largest_momentum_of_each_tensor_only(batches):
    model, other = tiny_llama(torch.float64), tiny_llama(torch.float64)
    method = make("mofo", model, share=0.1)
    steps(method, batches)
    m = {name: torch.zeros_like(parameter) for name, parameter in other.named_parameters()}
    v = {name: torch.zeros_like(parameter) for name, parameter in other.named_parameters()}
    for t, batch in enumerate(batches, 1):
        other.zero_grad()
        other(**batch).loss.backward()
        with torch.no_grad():
            for name, w in other.named_parameters():
                m[name] = 0.9 * m[name] + 0.1 * w.grad
                v[name] = 0.999 * v[name] + 0.001 * w.grad**2
                step = 1e-2 * m[name] / (1 - 0.9**t) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
                k = max(1, int(0.1 * w.numel()))
                edge = m[name].abs().flatten().sort(descending=True).values[k - 1]
                w -= step * (m[name].abs() >= edge)
    assert_close(model, other)
    method.tuner.close()


def test_mofo_with_all_entries_is_adamw():
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    b = torch.nn.Parameter(a.detach().clone())
    ours, theirs = MoFOAdamW([a], 1.0, 1e-2, weight_decay=0.1), torch.optim.AdamW([b], 1e-2, weight_decay=0.1)
    for _ in range(5):
        a.grad = torch.randn(5, 4, dtype=torch.float64)
        b.grad = a.grad.clone()
        ours.step(), theirs.step()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_orthogonal_steps_leave_the_largest_directions_of_each_matrix(batches, shared):
    """U^T (W - W0) and (W - W0) V are 0, by numpy's decomposition, whatever share of each step is taken; the steps are
    AdamW's where nothing is frozen."""
    base, model, other = (tiny_llama(torch.float64) for _ in range(3))
    method = make("orthogonal", model, frozen=0.25)
    if shared:
        shares = {name: torch.rand_like(value) * 2 for name, value in method.tuner.trained().items()}
        scale_steps_(method.optimizer, method.tuner.trained(), shares)
    steps(method, batches)
    moved = 0
    for name, weight in model.named_parameters():
        change = (weight.detach() - base.get_parameter(name).detach()).numpy()
        if not name.endswith("_proj.weight"):
            assert not change.any(), name
            continue
        left, _, right = numpy.linalg.svd(base.get_parameter(name).detach().numpy(), full_matrices=False)
        count = round(0.25 * len(right))
        assert numpy.abs(left[:, :count].T @ change).max() < 1e-12
        assert numpy.abs(change @ right[:count].T).max() < 1e-12
        moved += bool(numpy.abs(change).max() > 1e-3)
    assert moved == len(method.tuner.trained())
    method.tuner.close()

    method = make("orthogonal", other, frozen=0.0)
    steps(method, batches)
    plain = tiny_llama(torch.float64)
    plain_steps(plain, [w for name, w in plain.named_parameters() if name.endswith("_proj.weight")], batches)
    assert_close(other, plain)
    method.tuner.close()


def test_layers_that_peft_does_not_wrap_are_told_and_the_model_left_plain():
    model = transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4,
                                                                   vocab_size=64))  # fmt: skip
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(FinepointError, match="PEFT cannot put factors there: .*'out_proj' is incompatible"):
        make("lora", model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_low_rank_baselines_equal_their_formula(name, batches):
    model, other = tiny_llama(torch.float64), tiny_llama(torch.float64)
    before, modules = snapshot(model), list(model.modules())
    attributes = set(vars(model))
    method = make(name, model, rank=4, alpha=12, seed=3)
    tuner = method.tuner
    start = {key: parameter.detach().clone() for key, parameter in tuner.trained().items()}
    steps(method, batches * 2)

    # By hand: the same factors as leaves, whole weights made of them, textbook AdamW.
    leaves = {key: torch.nn.Parameter(value) for key, value in start.items()}
    base = {key: parameter.detach().clone() for key, parameter in other.named_parameters()}

    def made():
        found = {}
        for layer in {key.partition(".lora_")[0] for key in leaves}:
            of = {kind: leaves.get(f"{layer}.lora_{kind}") for kind in
                  ("A.default.weight", "B.default.weight", "magnitude_vector.default.weight")}  # fmt: skip
            a, b, magnitude = of.values()
            new = base[f"{layer}.weight"] + 12 / 4 * b @ a
            if magnitude is not None:  # the norm is a constant to the gradient, as in DoRA's section 4.3
                new = new * (magnitude / new.detach().norm(dim=1))[:, None]
            found[f"{layer}.weight"] = new
        return found

    optimizer = torch.optim.AdamW(leaves.values(), 1e-2, weight_decay=0.0)
    for batch in batches * 2:
        torch.func.functional_call(other, base | made(), kwargs=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected = made()
    assert len(expected) == 14
    adapter = tuner.adapter()
    assert set(adapter.changes) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(adapter.changes[key].numbers, value, rtol=0, atol=1e-10)
    total = sum(((value - base[key]) ** 2).sum() for key, value in expected.items())
    assert tuner.norm() == pytest.approx(float(total) ** 0.5, rel=1e-9)

    with torch.no_grad():
        outputs = model(**batches[0]).logits
    tuner.revert_()
    tuner.close()
    tuner.close()
    assert_same_bits(before, snapshot(model))
    assert list(model.modules()) == modules
    assert set(vars(model)) == attributes
    assert all(parameter.requires_grad for parameter in model.parameters())
    with adapter.applied(model), torch.no_grad():
        torch.testing.assert_close(model(**batches[0]).logits, outputs, rtol=0, atol=1e-10)


def test_bfloat16_masters_accumulate_what_in_place_training_loses(batches):
    def trained(masters):
        model = tiny_llama(torch.bfloat16)
        tuner = DenseTuner(model, [name for name, _ in model.named_parameters()])
        parameters = list(tuner.trained().values())
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        assert all(weight.dtype == torch.bfloat16 for weight in tuner.weights.values())
        if not masters:  # the negative control: the same model, its own weights stepped in bfloat16
            tuner.close()
            parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, 1e-5, weight_decay=0.0)
        before = snapshot(model)
        for _ in range(60):
            model(**batches[0]).loss.backward()
            assert not masters or all(weight.grad is None for weight in tuner.weights.values())
            optimizer.step()
            model.zero_grad()
        after = {name: value for name, value in snapshot(model).items() if name in before}
        tuner.close()
        return sum(int((after[name] != value).sum()) for name, value in before.items() if "embed" not in name)

    assert trained(masters=True) > 4 * trained(masters=False)


def test_masters_add_up_gradients_in_float32_and_follow_each_step(batches):
    model = tiny_llama(torch.bfloat16)
    tuner = DenseTuner(model, ["model.norm.weight"])
    for batch in batches[:2]:
        model(**batch).loss.backward()
    (master,) = tuner.trained().values()
    assert master.grad.dtype == torch.float32
    torch.optim.SGD([master], 1e-1).step()
    assert torch.equal(model.model.norm.weight, master.bfloat16())
    tuner.close()
    assert not hasattr(model, "finepoint")


@pytest.fixture
def config(model_folder, choice_file, tmp_path):
    return TrainConfig(model=str(model_folder), data=choice_file, output=str(tmp_path / "run"), lr=1e-2, steps=4,
                       batch_size=8, baseline="full")  # fmt: skip


def fisher(name, file):
    return {"fisher_data": file, "scoring_examples": 16} if name == "ewc" else {}


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_run_of_every_baseline(config, name, tmp_path, choice_file):
    config = replace(config, baseline=name, validation=choice_file, **fisher(name, choice_file))
    place = prepare(config)
    before = snapshot(place.model)
    record, adapter = fit(config, place)
    assert_same_bits(before, snapshot(place.model))
    assert record["baseline"] == name
    assert 0 < record["changed"] <= adapter.count
    files = [file for file in (tmp_path / "run").rglob("*.safetensors") if "best" not in file.name]
    theirs, ours = "adapter_model.safetensors", "finepoint.safetensors"
    methods = {"lora": {theirs}, "dora": {theirs}, "rosa": {theirs, ours}}
    assert {file.name for file in files} == methods.get(name, {ours})
    assert record["adapter_bytes"] == sum(file.stat().st_size for file in files)
    assert record["step_seconds"] > 0
    assert record["update_norm"] > 0
    assert record["validation_loss"] > 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["baseline"] == name

    with adapter.applied(place.model):
        change = [value.double() - before[key].double() for key, value in place.model.state_dict().items()
                  if key != "lm_head.weight"]  # tied  # fmt: skip
    assert torch.cat([part.flatten() for part in change]).norm().item() == pytest.approx(record["update_norm"], 1e-4)
    assert_same_bits(before, snapshot(place.model))

    torch.manual_seed(99)
    _, again = fit(replace(config, output=str(tmp_path / "again")), place)
    assert_same_adapter(adapter, again)
    found = evaluate_config(EvalConfig(model=config.model, adapter=[config.output], id=[f"x={choice_file}"], limit=20))
    assert "x" in found["adapters"][config.output]["id"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_peft_reads_what_a_run_writes(config, name, batches):
    from peft import PeftModel

    _, adapter = fit(replace(config, baseline=name, baseline_options={"rank": 2}))
    written = json.loads((Path(config.output) / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (2, 4)
    assert written["base_model_name_or_path"] == config.model
    model = load_model(config.model)
    assert_same_adapter(adapter, load_merged(config.output, model))
    theirs = PeftModel.from_pretrained(load_model(config.model), config.output)
    with torch.no_grad(), adapter.applied(model):
        torch.testing.assert_close(model(**batches[0]).logits, theirs(**batches[0]).logits, rtol=1e-4, atol=1e-5)
    merged = theirs.merge_and_unload()
    for key, change in adapter.changes.items():
        torch.testing.assert_close(change.numbers, merged.get_parameter(key).data, rtol=1e-5, atol=1e-6)


def test_an_unknown_kind_of_peft_adapter_is_refused(config):
    train(replace(config, baseline="lora"))
    path = Path(config.output) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_replication": [[0, 1]]}))
    with pytest.raises(FinepointError, match="layer_replication is .* not computed here as PEFT does"):
        load_merged(config.output, load_model(config.model))


def test_rosa_equals_its_formula(batches):
    """Factors and entries as leaves of one product, textbook AdamW with a rate for each; other entries stay."""
    model, other = tiny_llama(torch.float64), tiny_llama(torch.float64)
    before = snapshot(model)
    indices = dict(finepoint.select(model, rule="random", density=0.05))
    method = make("rosa", model, rank=4, alpha=12, seed=3, ratio=0.5, indices=indices)
    tuner = method.tuner
    start = {key: parameter.detach().clone() for key, parameter in tuner.trained().items() if ".lora_" in key}
    assert tuner.count == sum(map(len, indices.values())) + sum(factor.numel() for factor in start.values())
    steps(method, batches * 2)

    factors = {key: torch.nn.Parameter(value) for key, value in start.items()}
    base = {key: parameter.detach().clone() for key, parameter in other.named_parameters()}
    sparse = {name: torch.nn.Parameter(torch.zeros_like(base[name])) for name in indices}
    masks = {name: torch.zeros(base[name].numel()).index_fill(0, chosen, 1).view(base[name].shape)
             for name, chosen in indices.items()}  # fmt: skip

    def made():
        found = {}
        for name in {f"{key.partition('.lora_')[0]}.weight" for key in factors}:
            a, b = (factors[f"{name.removesuffix('.weight')}.lora_{kind}.default.weight"] for kind in "AB")
            found[name] = base[name] + 12 / 4 * b @ a
            if name in sparse:
                found[name] = found[name] + masks[name] * sparse[name]
        return found

    optimizer = torch.optim.AdamW([{"params": factors.values()}, {"params": sparse.values(), "lr": 5e-3}], 1e-2,
                                  weight_decay=0.0)  # fmt: skip
    for batch in batches * 2:
        torch.func.functional_call(other, base | made(), kwargs=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected = made()
    adapter = tuner.adapter()
    assert set(adapter.changes) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(adapter.changes[key].numbers, value, rtol=0, atol=1e-10)
    total = sum(((value - base[key]) ** 2).sum() for key, value in expected.items())
    assert tuner.norm() == pytest.approx(float(total) ** 0.5, rel=1e-9)
    changed = sum(int((change.numbers != base[name]).sum()) for name, change in adapter.changes.items())
    assert tuner.changed() == changed > 0.9 * sum(value.numel() for value in expected.values())

    tuner.revert_()
    tuner.close()
    tuner.close()
    assert_same_bits(before, snapshot(model))
    assert not hasattr(model, "finepoint")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's own
def test_both_halves_of_rosa_are_saved_loaded_and_exported(config, tmp_path, batches):
    from peft import PeftModel

    settings = {"baseline": "rosa", "baseline_options": {"rank": 2}, "density": 0.05, "rule": "fisher"}
    record, adapter = fit(replace(config, **settings, scoring_examples=16))
    half = SparseAdapter.load(tmp_path / "run" / "sparse")
    assert half.count == round(0.05 * 3840) < record["trained"]
    assert half.info["rule"] == "fisher"
    assert any(change.numbers.any() for change in half.changes.values())
    model = load_model(config.model)
    before = snapshot(model)
    assert_same_adapter(adapter, load_merged(config.output, model))
    assert_same_bits(before, snapshot(model))

    theirs = finepoint.load(load_model(config.model), f"{config.output}/sparse")
    theirs = PeftModel.from_pretrained(theirs, config.output)
    with torch.no_grad(), adapter.applied(model):
        torch.testing.assert_close(model(**batches[0]).logits, theirs(**batches[0]).logits, rtol=1e-4, atol=1e-5)
    export(config.model, config.output, "merged", str(tmp_path / "merged"))
    with adapter.applied(model):
        assert_same_bits(snapshot(model), snapshot(load_model(str(tmp_path / "merged"))))

    # A run of one half over it leaves nothing of the other.
    for baseline, density in (("lora", None), (None, 0.05)):
        fit(replace(config, baseline=baseline, density=density, overwrite=True))
        assert not (tmp_path / "run" / "sparse" / "finepoint.safetensors").exists()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_rosa_resumes_bit_for_bit(config, tmp_path):
    config = replace(config, baseline="rosa", density=0.05, save_every=2, steps=6)
    _, whole = fit(replace(config, output=str(tmp_path / "whole")))
    with interrupted_at(4):
        fit(config)
    _, resumed = fit(replace(config, resume=True))
    assert_same_adapter(replace(whole, info={}), replace(resumed, info={}))


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_transposed_layers_are_merged_too(name):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=2, n_head=2)).double().eval()
    batches = random_batches(2)
    method = make(name, gpt, rank=2)
    steps(method, batches)
    adapter = method.tuner.adapter()
    with torch.no_grad():
        outputs = gpt(**batches[0]).logits
    method.tuner.close()
    with adapter.applied(gpt), torch.no_grad():
        torch.testing.assert_close(gpt(**batches[0]).logits, outputs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_gradient_checkpointing_gives_the_same(config, tmp_path, name):
    config = replace(config, baseline=name, dtype="float64")
    _, a = fit(config)
    _, b = fit(replace(config, gradient_checkpointing=True, output=str(tmp_path / "b")))
    for key, change in a.changes.items():
        torch.testing.assert_close(change.numbers, b.changes[key].numbers, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["full", "lora", "rosa", "ewc", "mofo", "orthogonal"])
def test_half_precision_runs(config, name, choice_file):
    record, adapter = fit(replace(config, baseline=name, dtype="bfloat16", **fisher(name, choice_file)))
    assert {change.numbers.dtype for change in adapter.changes.values()} == {torch.bfloat16}
    assert record["update_norm"] > 0


def test_strengths_are_measured_too(config, choice_file):
    fit(replace(config, baseline="lora"))
    name = config.output
    found = evaluate_config(EvalConfig(model=config.model, adapter=[name], id=[f"x={choice_file}"], limit=20,
                                       scale=[0.0, 1.0]))["adapters"]  # fmt: skip
    assert list(found) == [name, f"{name} x 0", f"{name} x 1"]
    assert found[f"{name} x 0"]["id_change"]["x"] == 0
    assert found[f"{name} x 1"] == found[name]


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_new_head_is_trained_by_every_baseline(config, tmp_path, name):
    rows = [{"text": f"{a}{b} is {'good' if a < 'e' else 'bad'}", "label": "pos" if a < "e" else "neg"}
            for a in "abcdefgh" for b in "abcdefgh"]  # fmt: skip
    path = write_lines(tmp_path / "labels.jsonl", rows)
    config = replace(config, data=path, baseline=name, steps=40, **fisher(name, path))
    place = prepare(config)
    before = snapshot(place.model)
    record, adapter = fit(config, place)
    assert_same_bits(before, snapshot(place.model))
    assert not torch.equal(adapter.changes["score.weight"].numbers, before["score.weight"])
    assert (record["update_norm"] == 0) == (name == "head")
    found = evaluate_config(EvalConfig(model=config.model, adapter=[config.output], id=[f"x={path}"]))
    assert found["adapters"][config.output]["id"]["x"]["accuracy"] > (0.55 if name in ("head", "bitfit") else 0.9)


def test_ewc_penalty_counts_once_a_step_however_many_batches_it_has(config, tmp_path, choice_file, monkeypatch):
    import finepoint.training.trainer as trainer_module

    class InOrder(LengthBuckets):
        def __iter__(self):
            return iter(range(len(self)))

    monkeypatch.setattr(trainer_module, "LengthBuckets", InOrder)
    config = replace(config, baseline="ewc", dtype="float64", baseline_options={"strength": 50.0}, warmup=0.0, clip=0.0,
                     fisher_data=choice_file, scoring_examples=16)  # fmt: skip
    _, whole = fit(replace(config, batch_size=16))
    _, halves = fit(replace(config, accumulation=2, output=str(tmp_path / "b")))
    for name, change in whole.changes.items():
        torch.testing.assert_close(change.numbers, halves.changes[name].numbers, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["full", "mofo", "lora", "orthogonal"])
def test_a_baseline_resumes_bit_for_bit(config, tmp_path, name, choice_file):
    config = replace(config, baseline=name, steps=6, save_every=2, validation=choice_file, eval_every=1, keep="best")
    record, whole = fit(replace(config, output=str(tmp_path / "whole")))
    with interrupted_at(6):
        fit(config)
    resumed_record, resumed = fit(replace(config, resume=True))
    assert_same_changes(whole, resumed)
    assert resumed_record["best_step"] == record["best_step"]
    assert resumed_record["validation_loss"] == record["validation_loss"]


def assert_same_changes(a, b):
    for name, change in a.changes.items():
        assert torch.equal(change.numbers, b.changes[name].numbers), name


@pytest.mark.parametrize("method", [{"baseline": "full"}, {"baseline": "lora"}, {"baseline": None, "density": 0.1}])
def test_the_best_evaluation_is_kept_and_patience_stops(config, tmp_path, choice_file, monkeypatch, method):
    config = replace(config, steps=12, validation=choice_file, eval_every=2, schedule="constant", warmup=0.0, **method)
    first = replace(config, output=str(tmp_path / "first"), steps=4)
    _, expected = fit(first)
    losses = iter([3.0, 2.0, 2.5, 2.0, 0.1, 0.1])  # a tie is no improvement; the last two are never reached
    monkeypatch.setattr(SparseTrainer, "_validation_sums", lambda self: (next(losses), 1))
    record, kept = fit(replace(config, keep="best", patience=2))
    assert record["stopped_early"]
    assert (record["steps"], record["best_step"], record["validation_loss"]) == (8, 4, 2.0)
    assert_same_changes(expected, kept)
    assert not list((tmp_path / "run").glob(".best*"))
    losses = iter([3.0, 2.0, 2.5, 2.2, 2.1, 2.3])
    record, last = fit(replace(config, overwrite=True))
    assert not record["stopped_early"]
    assert (record["steps"], record["best_step"], record["validation_loss"]) == (12, 4, 2.3)
    assert any(not torch.equal(change.numbers, last.changes[name].numbers) for name, change in kept.changes.items())


def patient(monkeypatch, **losses):
    """The validation loss of each step, as if it were so."""
    known = {int(step[1:]): loss for step, loss in losses.items()}
    monkeypatch.setattr(SparseTrainer, "_validation_sums", lambda self: (known[self.state.global_step], 1))


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_that_patience_has_ended_is_at_its_end(config, tmp_path, choice_file, monkeypatch, keep):
    """Killed before its record it ends there again, to the bit; once it is recorded, more patience goes on with it."""
    patient(monkeypatch, _2=3.0, _4=2.0, _6=2.5, _8=2.2, _10=2.1, _12=2.3)
    config = replace(config, steps=12, validation=choice_file, eval_every=2, save_every=2, keep=keep)
    _, whole = fit(replace(config, patience=3, output=str(tmp_path / "whole")))
    config = replace(config, patience=2)
    record, stopped = fit(config)
    assert (record["steps"], record["stopped_early"]) == (8, True)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for patience in (1, 2):
        with pytest.raises(FinepointError, match="has stopped early, after 8 steps; give a larger --patience than 2"):
            fit(replace(config, resume=True, patience=patience))
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "run" / "run.json").unlink()
    again, resumed = fit(replace(config, resume=True))
    assert [again[name] for name in ("steps", "stopped_early", "validation_loss")] == [
        record[name] for name in ("steps", "stopped_early", "validation_loss")
    ]
    assert_same_changes(stopped, resumed)
    more, further = fit(replace(config, resume=True, patience=3))
    assert (more["steps"], more["best_step"]) == (10, 4)
    assert_same_changes(whole, further)


def test_what_the_best_evaluation_needs_is_asked_for_before_anything_is_trained(config, tmp_path, choice_file):
    config = replace(config, steps=4, validation=choice_file, eval_every=2, save_every=2)
    fit(replace(config, keep="last"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(FinepointError, match="not there; train afresh, or go on with --keep last"):
        fit(replace(config, steps=6, keep="best", resume=True))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_parameters_that_were_not_evaluated_last_are_evaluated_at_the_end(config, choice_file):
    record, _ = fit(replace(config, steps=5, validation=choice_file, eval_every=2))
    log = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "eval_loss" in row] == [2, 4, 5]
    assert record["validation_loss"] == [row["eval_loss"] for row in log if "eval_loss" in row][-1]


def test_a_folder_holds_the_adapter_of_its_last_run_alone(config):
    train(replace(config, baseline="lora"))
    train(replace(config, baseline="bitfit", overwrite=True))
    assert not list(Path(config.output).glob("adapter_*"))
    SparseAdapter.load(config.output)
    train(replace(config, baseline="lora", overwrite=True))
    assert not list(Path(config.output).glob("finepoint.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "lorra"}, "unknown baseline 'lorra'; did you mean 'lora'"),
        ({"density": 0.1}, "density is for choosing entries, which baseline 'full' does not do"),
        ({"count": 7}, "leave out --count or --baseline"),
        ({"indices": "x"}, "leave out --indices"),
        ({"rule": "gallop"}, "leave out --rule"),
        ({"targets": "attention"}, "leave out --targets"),
        ({"threshold": "sampled"}, "threshold is for choosing entries, which baseline 'full' does not do"),
        ({"baseline": "lora", "scoring_examples": 3}, "leave out --scoring-examples"),
        ({"baseline": "lora", "scoring_memory": 0.2}, "leave out --scoring-memory"),
        ({"baseline": "ewc", "fisher_data": "x", "threshold": "sampled"}, "leave out --threshold"),
        ({"baseline_options": {"rank": 3}}, "baseline 'full' has no option 'rank'; its options: none"),
        ({"baseline": "lora", "baseline_options": {"rank": 0.5}}, "rank is 0.5; it is a whole number from 1"),
        ({"baseline": "mofo", "baseline_options": {"share": 2}}, "share is 2; it is a share"),
        ({"baseline": "orthogonal", "baseline_options": {"frozen": 1}}, "frozen is 1; it is a share"),
        ({"baseline": "lora", "targets": "all"}, "is no linear layer's weight, which LoRA needs"),
        ({"baseline": "ewc"}, "--fisher-data"),
        ({"fisher_data": "x"}, "--baseline ewc"),
        ({"baseline": None, "baseline_options": {"rank": 3}}, "without a baseline"),
        ({"keep": "best"}, "keep=best is given without examples; give --validation"),
        ({"patience": 2}, "patience is given without examples"),
        ({"patience": 0}, "patience is 0"),
    ],
)
def test_bad_configurations_are_refused(config, changes, message):
    with pytest.raises(FinepointError, match=message):
        train(replace(config, **changes))


def test_dense_tuner_refuses_what_it_cannot_train():
    model = tiny_llama()
    with pytest.raises(FinepointError, match="no weight 'x'"):
        DenseTuner(model, ["x"])
    with pytest.raises(FinepointError, match="no weight to train"):
        DenseTuner(model, [])
    tuner = DenseTuner(model, ["model.norm.weight"])
    with pytest.raises(FinepointError, match="has a tuner already"):
        DenseTuner(model, ["model.norm.weight"])
    with pytest.raises(FinepointError, match="is being trained"):
        tuner.adapter().apply(model)
    tuner.close()


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_a_tuner_refuses_in_a_line_what_it_cannot_do(name):
    """Who drives it asks no tuner for its class."""
    baseline = BASELINES[name]
    weight = "model.layers.0.self_attn.q_proj.weight"
    indices = {weight: torch.arange(5)} if baseline.chooses else {}
    given = BaselineContext(tiny_llama(), [], options_of(baseline, {}), "linear", 0, 1e-3, 0.0, random_batches(1),
                            indices=indices)  # fmt: skip
    tuner = baseline.make(given).tuner
    assert tuner.count == sum(parameter.numel() for parameter in tuner.trained().values())
    for ask in (tuner.train_together, tuner.average_, tuner.places, lambda: tuner.place_({})):
        with pytest.raises(FinepointError, match=f"{type(tuner).__name__} cannot .*; train chosen entries instead"):
            ask()
    for able, ask in (
        (not baseline.low_rank, lambda: tuner.round_(torch.bfloat16)),
        (name in ("lora", "dora"), tuner.as_it_is),
    ):
        if able:
            ask()
        else:
            with pytest.raises(FinepointError, match="cannot"):
                ask()
    tuner.close()


def test_factors_without_peft_are_refused_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for baseline in ("lora", "dora", "rosa"):
        with pytest.raises(FinepointError, match="needs the package peft: pip install"):
            resolve(TrainConfig(model="none", data="none.jsonl", output="none", baseline=baseline))
