"""Sparse training over a quantised base, against the same model with its dequantised weights as ordinary ones."""

import copy
import json
import shutil
import sys
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import finepoint
from conftest import assert_same_bits, make_tokenizer, random_batches, write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.bases import verify
from finepoint.alignment.align import align
from finepoint.alignment.settings import AlignConfig
from finepoint.cli import main
from finepoint.errors import FinepointError
from finepoint.evaluation.evaluate import evaluate_config
from finepoint.evaluation.settings import EvalConfig
from finepoint.huggingface.reference import Reference, as_it_is
from finepoint.models.loading import load_model
from finepoint.models.quantised import float_values, grid_at, is_quantised, quantised_layers
from finepoint.selection.settings import SelectConfig
from finepoint.studies.compare import compare
from finepoint.studies.settings import CompareConfig
from finepoint.training.context import prepare
from finepoint.training.run import choose, train
from finepoint.training.settings import TrainConfig
from reference import dense_masked_training, dense_top_k, four_bit_values, mean_gradient

pytest.importorskip("torchao")
NF4 = pytest.param("nf4", marks=pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes"))
BITS = ["int8", "int4", NF4]
CHECKPOINTS = {
    "bnb-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bnb-nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "bnb-fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "bnb-int8": {"load_in_8bit": True},
}
"""How transformers has bitsandbytes quantise a model."""


def wide_llama(seed=0, **more):
    """Rows of 32 and 64 entries, so that int4 can group them."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True, initializer_range=0.2, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("wide")
    wide_llama(attention_bias=True).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """A folder that transformers saved with weights of bitsandbytes, by its kind."""
    pytest.importorskip("bitsandbytes")

    @cache
    def make(kind):
        place = tmp_path_factory.mktemp(kind)
        settings = BitsAndBytesConfig(**CHECKPOINTS[kind])
        by_transformers(folder, quantization_config=settings).save_pretrained(place)
        make_tokenizer().save_pretrained(place)
        return str(place)

    return make


def by_transformers(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)


@pytest.fixture(params=[*BITS, *CHECKPOINTS])
def quantised(request, folder):
    if request.param in CHECKPOINTS:
        return load_model(request.getfixturevalue("checkpoint")(request.param))
    return load_model(folder, quantise=request.param)


@pytest.mark.skipif(sys.platform != "linux", reason="mapped files are not listed elsewhere")
def test_the_float_weights_leave_the_memory(folder):
    def is_mapped():
        return f"{folder}/model.safetensors" in Path("/proc/self/maps").read_text()

    plain = load_model(folder)
    assert is_mapped()
    del plain
    quantised = load_model(folder, quantise="int8")
    assert not is_mapped()
    assert quantised.lm_head.weight is quantised.model.embed_tokens.weight  # still tied


def as_plain(model):
    """A copy whose quantised weights are ordinary parameters with their float values."""
    twin = wide_llama(attention_bias=True)
    values = {name: float_values(parameter) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(values[name])
    return twin


def codes(model):
    """All bits of the model: integers, scales and plain weights."""
    found = {}
    for name, parameter in model.named_parameters():
        if is_quantised(parameter):
            inner, _ = parameter.__tensor_flatten__()
            found |= {f"{name}.{part}": getattr(parameter, part).clone() for part in inner}
        else:
            found[name] = parameter.detach().clone()
    return found


def some_indices(model, every=7):
    return {name: torch.arange(0, layer.weight.numel(), every) for name, layer in quantised_layers(model).items()}


def test_the_linear_layers_of_the_blocks_are_quantised_and_nothing_else(quantised):
    layers = quantised_layers(quantised)
    assert len(layers) == 14
    assert not is_quantised(quantised.lm_head.weight)
    original = wide_llama(attention_bias=True)
    for name, layer in layers.items():
        error = (float_values(layer.weight) - original.get_parameter(name)).abs().max()
        assert 0 < error < 0.15  # it is a quantisation, and one of this weight


def test_before_a_step_it_is_the_dequantised_model_bit_for_bit(quantised):
    batch = random_batches()[0]
    with torch.no_grad():
        expected = as_plain(quantised)(**batch).logits
        with finepoint.SparseTuner(quantised, some_indices(quantised)):
            assert torch.equal(quantised(**batch).logits, expected)
        torch.testing.assert_close(quantised(**batch).logits, expected, rtol=1e-3, atol=1e-3)  # its own kernels


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_equals_dense_training_of_the_dequantised_weights(quantised, checkpointing):
    indices = some_indices(quantised) | {"model.norm.weight": torch.arange(0, 32, 3)}
    steps = [random_batches(seed=seed) for seed in range(4)]
    before = codes(quantised)
    plain = as_plain(quantised)

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)

    dense = dense_masked_training(copy.deepcopy(plain), indices, steps, adamw)
    if checkpointing:
        getattr(quantised.train(), "activation_checkpointing_enable", quantised.gradient_checkpointing_enable)()
    tuner = finepoint.SparseTuner(quantised, indices)
    optimizer = adamw(tuner.parameters())
    for step in steps:
        for batch in step:
            quantised(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    quantised.eval()
    moved = tuner.adapter()
    wanted = dict(dense.named_parameters(remove_duplicate=False))
    for name, change in moved.changes.items():
        trained = plain.get_parameter(name).detach().view(-1)[change.indices] + change.numbers
        torch.testing.assert_close(trained, wanted[name].detach().view(-1)[change.indices], rtol=1e-4, atol=1e-5)
        assert change.numbers.abs().max() > 1e-3
    batch = random_batches(seed=9)[0]
    with torch.no_grad():
        trained = quantised(**batch).logits
        torch.testing.assert_close(trained, dense(**batch).logits, rtol=1e-3, atol=1e-4)
        tuner.revert_()
        tuner.close()
        assert_same_bits(before, codes(quantised))
        assert all("forward" not in vars(layer) for layer in quantised_layers(quantised).values())
        # The adapter computes what training computed, attached or on the dequantised model, bit for bit.
        with moved.applied(quantised):
            assert torch.equal(quantised(**batch).logits, trained)
        with moved.applied(plain):
            assert torch.equal(plain(**batch).logits, trained)
    assert_same_bits(before, codes(quantised))


def test_no_float_weight_is_kept_for_the_backward_pass(quantised):
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    batch = random_batches(rows=5)[0]  # so that no activation has a weight's shape
    shapes = {(32, 32), (16, 32), (32, 16)}  # of attention, either way round; those of the MLP are also the head's
    with finepoint.SparseTuner(quantised, some_indices(quantised)):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            quantised(**batch).loss.backward()
        assert kept
        assert not shapes & set(kept)
        assert all(parameter.grad is None for parameter in quantised_parameters(quantised))
    plain = as_plain(quantised)  # the control: ordinary layers do keep theirs
    kept.clear()
    with finepoint.SparseTuner(plain, some_indices(quantised)), \
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):  # fmt: skip
        plain(**batch).loss.backward()
    assert shapes & set(kept)


def quantised_parameters(model):
    return [layer.weight for layer in quantised_layers(model).values()]


@pytest.mark.parametrize("rule", ["gallop", "magnitude-high", "fisher", "random"])
def test_rules_see_the_dequantised_weights(quantised, rule):
    batches = random_batches()
    before = codes(quantised)
    for memory in (1.0, 0.2):
        found = finepoint.select(quantised, batches, rule=rule, density=0.02, scoring_memory=memory)
        expected = finepoint.select(as_plain(quantised), batches, rule=rule, density=0.02)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert found.statistics["abs_weight"] == expected.statistics["abs_weight"]
    assert_same_bits(before, codes(quantised))


def test_gallop_equals_its_formula_over_the_dequantised_weights(quantised):
    batches = random_batches()
    plain = as_plain(quantised)
    gradients = mean_gradient(plain, batches)
    weights = {name: plain.get_parameter(name).detach() for name in quantised_layers(quantised)}
    scores = {name: gradients[name].abs() / (weight.abs() + 1e-8) for name, weight in weights.items()}
    expected = dense_top_k(scores, round(0.02 * sum(score.numel() for score in scores.values())))
    found = finepoint.select(quantised, batches, rule="gallop", density=0.02)
    shared = sum(int(torch.isin(found[name], expected[name]).sum()) for name in set(found) & set(expected))
    assert shared >= found.count - 2  # float32 sums in another order may swap neighbours at the border


def trained_adapter(model):
    tuner = finepoint.SparseTuner(model, some_indices(model))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    model(**random_batches()[0]).loss.backward()
    optimizer.step()
    adapter = tuner.adapter(info={"quantise": "int8"})
    tuner.revert_()
    tuner.close()
    return adapter


def test_nothing_is_written_into_a_quantised_weight(quantised, tmp_path):
    adapter = trained_adapter(quantised)
    before = codes(quantised)
    for refused in (adapter.apply, lambda model: finepoint.AdapterSet(model).add("a", adapter)):
        with pytest.raises(FinepointError, match=r"is quantised: its entries share scales, .*adapter\.attach\(model\)"):
            refused(quantised)
    attached = adapter.attach(quantised)
    for second in (adapter.attach, lambda model: finepoint.SparseTuner(model, some_indices(model))):
        with pytest.raises(FinepointError, match="something is attached"):
            second(quantised)
    batch = random_batches()[0]
    with torch.no_grad():
        on = quantised(**batch).logits
        attached.remove()
        assert not torch.equal(quantised(**batch).logits, on)
    with pytest.raises(ZeroDivisionError), adapter.applied(quantised):
        raise ZeroDivisionError
    assert all("forward" not in vars(layer) for layer in quantised_layers(quantised).values())
    assert_same_bits(before, codes(quantised))
    saved = SparseAdapter.load(adapter.save(tmp_path / "a"))
    assert saved.problems(quantised) == []
    with pytest.raises(FinepointError, match="not those of the base .*it was quantised: --quantise int8"):
        saved.apply(wide_llama(attention_bias=True))
    with torch.no_grad(), saved.applied(quantised):
        assert torch.equal(quantised(**batch).logits, on)
    found = verify(saved, quantised)
    assert 0.9 * saved.count < found["changed"] <= found["entries"] == saved.count


def test_a_deep_copy_trains_on_its_own(quantised):
    with finepoint.SparseTuner(quantised, some_indices(quantised)):
        twin = copy.deepcopy(quantised)
        batch = random_batches()[0]
        with torch.no_grad():
            before = quantised(**batch).logits
            for entries in twin.finepoint.values():
                entries.delta.add_(0.05)
            assert torch.equal(quantised(**batch).logits, before)
            assert not torch.equal(twin(**batch).logits, before)


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"{a}{b}{c}:", "choices": [" yes", " no"], "answer": int(c > "d")}
            for a in "abcdefgh" for b in "abcd" for c in "abcdefgh"]  # fmt: skip
    return write_lines(tmp_path / "d.jsonl", rows)


@pytest.mark.parametrize("bits", BITS)
def test_train_and_eval_through_the_commands(folder, data, tmp_path, bits, capsys):
    adapter = str(tmp_path / "a")
    arguments = {"model": folder, "data": data, "quantise": bits, "steps": 6, "batch_size": 8, "lr": 1e-2,
                 "rule": "gallop", "density": 0.05}  # fmt: skip
    record = train(TrainConfig(**arguments, output=adapter, save_every=3))
    assert record["changed"] > 0
    assert record["last_loss"] < record["first_loss"]
    assert SparseAdapter.load(adapter).info["quantise"] == bits
    again = train(TrainConfig(**arguments | {"steps": 8}, output=adapter, save_every=3, resume=True))
    assert again["steps"] == 8
    sets = {"id": [f"own={data}"], "limit": 64}
    found = evaluate_config(EvalConfig(model=folder, adapter=[adapter], quantise=bits, probe=[f"p={data}"], **sets))
    assert found["adapters"][adapter]["probe"]["p"]["nll"] < found["base"]["probe"]["p"]["nll"]
    with pytest.raises(FinepointError, match=f"it was quantised: --quantise {bits}"):
        evaluate_config(EvalConfig(model=folder, adapter=[adapter], **sets))
    with pytest.raises(FinepointError, match="leave out quantise or the baseline"):
        train(TrainConfig(model=folder, data=data, quantise=bits, baseline="lora", output=str(tmp_path / "l")))
    selection = choose(SelectConfig(model=folder, data=data, quantise=bits, output=str(tmp_path / "s"), density=0.05))
    assert json.loads((tmp_path / "s" / "selection.json").read_text())["config"]["quantise"] == bits
    assert selection.count > 0
    assert main(["inspect", adapter]) == 0
    assert main(["verify", "--model", folder, adapter, "--quantise", bits]) == 0
    weaker = str(tmp_path / "weaker")
    assert main(["scale", adapter, "--model", folder, "--quantise", bits, "--protect", data, "--protect-examples", "8",
                 "--disturb-at-most", "1e-5", "--output", weaker]) == 0  # fmt: skip
    assert main(["verify", "--model", folder, weaker, "--quantise", bits]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("bits", ["int8", NF4])
def test_a_study_over_a_quantised_base(folder, data, tmp_path, bits):
    files = {"train": data, "validation": data, "test": data}
    config = CompareConfig(model=folder, quantise=bits, tasks={"own": files}, output=str(tmp_path / "study"),
                           arms=[{"rule": "gallop", "density": 0.05, "lrs": [1e-2]}], seeds=[0], generate=0,
                           train={"steps": 6, "batch_size": 8, "scoring_examples": 16}, test_limit=64)  # fmt: skip
    assert not compare(config)["failed"]
    (cell,) = [json.loads(path.read_text()) for path in (tmp_path / "study" / "cells").glob("*.json")]
    arguments = {"model": folder, "data": data, "validation": data, "keep": "best", "quantise": bits, "lr": 1e-2,
                 "rule": "gallop", "density": 0.05, "steps": 6, "batch_size": 8, "scoring_examples": 16}  # fmt: skip
    alone = train(TrainConfig(**arguments, output=str(tmp_path / "alone")))
    assert cell["update_norm"] == alone["update_norm"]
    assert cell["validation"]["loss"] == alone["validation_loss"]
    assert "quantise" in (tmp_path / "study" / "study.json").read_text()
    with pytest.raises(FinepointError, match="leave out quantise or the baseline"):
        compare(replace(config, arms=[{"baseline": "lora"}]))
    with pytest.raises(FinepointError, match="train gives 'quantise', which the study sets"):
        compare(replace(config, train={"quantise": bits}))


def letters(answer, reference):
    """A reward in which almost any two answers differ."""
    return float(sum(map(ord, answer)))


@pytest.mark.parametrize("bits", ["int8", NF4])
@pytest.mark.parametrize("method", ["dpo", "grpo"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_alignment_over_a_quantised_base(folder, tmp_path, method, bits):
    if method == "dpo":
        rows = [{"prompt": f"a{c}:", "chosen": " yes", "rejected": " no"} for c in "abcdefgh"]
    else:
        rows = [{"prompt": f"{c}:", "completion": f" {i}"} for i, c in enumerate("abcdefgh")]
    config = AlignConfig(
        model=folder, quantise=bits, method=method, data=write_lines(tmp_path / "rows.jsonl", rows), steps=3, lr=3e-2,
        batch_size=8, density=0.1, rule="random", new_tokens=4, beta=0.1, output=str(tmp_path / "out"),
        reward="test_quantised:letters", on_grid=bits == "nf4",
    )  # fmt: skip
    record = align(config)
    assert record["changed"] > 0
    again = align(replace(config, indices=str(tmp_path / "out"), output=str(tmp_path / "again")))
    assert [row["loss"] for row in again["log"]] == [row["loss"] for row in record["log"]], "the same entries"
    assert SparseAdapter.load(tmp_path / "out").info["quantise"] == bits
    assert SparseAdapter.load(tmp_path / "out").info.get("on_grid", False) == config.on_grid


def test_the_reference_over_a_quantised_base_is_that_base(quantised):
    batch = random_batches()[0]
    with torch.no_grad(), finepoint.SparseTuner(quantised, some_indices(quantised)) as tuner:
        expected = quantised(**batch).logits
        reference = Reference(quantised, as_it_is(tuner))
        for delta in tuner.parameters():
            delta.add_(0.05)
        moved = quantised(**batch).logits
        assert torch.equal(reference(**batch).logits, expected)
        assert torch.equal(quantised(**batch).logits, moved)
        assert not torch.equal(moved, expected)


def test_int4_needs_rows_that_groups_divide(model_folder):
    with pytest.raises(FinepointError, match=r"rows of model\.layers\.0.* cannot be divided so; give --quantise int8"):
        load_model(str(model_folder), quantise="int4")


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_checkpoint_that_torchao_quantised_is_trained_as_it_is(folder, data, tmp_path, bits):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    config = Int8WeightOnlyConfig() if bits == "int8" else IntxWeightOnlyConfig(torch.int4, PerGroup(32))
    saved = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(config))
    saved.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    assert len(quantised_layers(model)) == 14
    record = train(TrainConfig(model=str(tmp_path / "model"), data=data, output=str(tmp_path / "a"), steps=4,
                               batch_size=8, density=0.05))  # fmt: skip
    assert record["changed"] > 0
    with SparseAdapter.load(tmp_path / "a").applied(model):
        assert model(**random_batches()[0]).loss.isfinite()


def values_by_definition(model):
    """The float values of the weights of bitsandbytes' own layers."""
    found = {}
    for name, weight in model.named_parameters():
        if type(weight).__name__ == "Params4bit":
            found[name] = four_bit_values(weight.data, weight.quant_state)
        elif type(weight).__name__ == "Int8Params":
            found[name] = weight.data.float() * weight.SCB.view(-1, 1) / 127
    return found


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_values_of_a_checkpoint_are_those_that_its_codes_stand_for(folder, checkpoint, kind):
    values = values_by_definition(by_transformers(checkpoint(kind)))
    model = load_model(checkpoint(kind))
    layers = quantised_layers(model)
    assert set(values) == set(layers)
    assert len(values) == 14
    for name, layer in layers.items():
        assert type(layer) is nn.Linear
        assert not layer.weight.requires_grad
        assert layer.weight.shape == values[name].shape == (layer.out_features, layer.in_features)
        if kind == "bnb-int8":  # bitsandbytes multiplies by 1 / 127
            torch.testing.assert_close(float_values(layer.weight), values[name], rtol=3e-7, atol=0)
        else:
            assert torch.equal(float_values(layer.weight), values[name])
    if kind == "bnb-nf4":  # what --quantise nf4 makes of the float checkpoint
        ours = load_model(folder, quantise="nf4")
        assert_same_bits(codes(ours), codes(model))
    # A control: one scale of one weight that is a little larger is seen.
    with torch.no_grad():
        (layer := layers[name]).weight.parts["scales"].view(-1)[0].add_(1)
    assert not torch.allclose(float_values(layer.weight), values[name], rtol=1e-4)


@pytest.mark.parametrize("kind", ["bnb-nf4-double", "bnb-int8"])
def test_a_checkpoint_of_bitsandbytes_is_trained_as_it_is(checkpoint, data, tmp_path, kind, monkeypatch):
    arguments = {"model": checkpoint(kind), "data": data, "steps": 8, "batch_size": 8, "lr": 2e-2, "density": 0.05,
                 "rule": "random"}  # fmt: skip
    record = train(TrainConfig(**arguments, output=str(tmp_path / "a")))
    assert record["changed"] > 0
    assert record["last_loss"] < record["first_loss"]
    sets = {"id": [f"own={data}"], "limit": 64, "probe": [f"p={data}"]}
    found = evaluate_config(EvalConfig(model=checkpoint(kind), adapter=[str(tmp_path / "a")], **sets))
    assert found["adapters"][str(tmp_path / "a")]["probe"]["p"]["nll"] < found["base"]["probe"]["p"]["nll"]
    with pytest.raises(FinepointError, match="is quantised already; leave out --quantise"):
        train(TrainConfig(**arguments, quantise="nf4", output=str(tmp_path / "b")))
    for baseline in ("lora", "full"):
        refused = arguments | {"rule": None, "density": None, "baseline": baseline, "output": str(tmp_path / "c")}
        with pytest.raises(FinepointError, match="is quantised, and baselines train float weights"):
            train(TrainConfig(**{name: value for name, value in refused.items() if value is not None}))
    monkeypatch.setattr("finepoint.runtime.distributed.count", lambda: 2)
    with pytest.raises(FinepointError, match="trains in one process; give a float base"):
        prepare(TrainConfig(**arguments, output=str(tmp_path / "d")))
    monkeypatch.undo()
    # Another quantisation of the same model is another base, were its values ever so near.
    other = load_model(checkpoint("bnb-nf4"))
    with pytest.raises(FinepointError, match="not those of the base"):
        SparseAdapter.load(tmp_path / "a").attach(other)


def test_a_checkpoint_of_bitsandbytes_in_another_dtype_and_as_a_classifier(checkpoint):
    model = load_model(checkpoint("bnb-nf4-double"), "bfloat16")
    layers = quantised_layers(model)
    wide = quantised_layers(load_model(checkpoint("bnb-nf4-double")))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, layer in wide.items():
        assert torch.equal(float_values(layers[name].weight), float_values(layer.weight).bfloat16())
    batch = random_batches()[0]
    with finepoint.SparseTuner(model, some_indices(model)) as tuner:
        model(**batch).loss.backward()
        assert all(delta.grad.abs().sum() > 0 for delta in tuner.parameters())
    classifier = load_model(checkpoint("bnb-int8"), labels=["a", "b"])
    assert len(quantised_layers(classifier)) == 14
    assert classifier.score.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_model_that_transformers_loaded_with_bitsandbytes(checkpoint, tmp_path, kind):
    model = by_transformers(checkpoint(kind))
    batch = random_batches()[0]
    expected = load_model(checkpoint(kind))
    adapter = trained_adapter(expected)
    way_out = r"is in a layer of bitsandbytes, .* finepoint\.from_bitsandbytes_\(model\)"
    if kind == "bnb-int8":
        model(**batch)  # which moves the scales into the layer
    before = values_by_definition(by_transformers(checkpoint(kind)))
    for refused in (
        lambda: finepoint.select(model, rule="random", density=0.01),
        lambda: finepoint.SparseTuner(model, some_indices(expected)),
        lambda: adapter.apply(model),
        lambda: adapter.attach(model),
    ):
        with pytest.raises(FinepointError, match=way_out):
            refused()
    assert type(model.model.layers[0].self_attn.q_proj) is not nn.Linear, "nothing has changed the model"
    norms = {"model.norm.weight": torch.arange(4)}
    finepoint.SparseTuner(model, norms).close()  # ordinary weights beside such layers are as ever

    finepoint.sparsify(model, "random", 0.05, seed=3)
    finepoint.sparsify(expected, "random", 0.05, seed=3)
    assert set(quantised_layers(model)) == set(before)
    assert torch.equal(model(**batch).logits, expected(**batch).logits)
    rows = [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"].tolist()]
    arguments = TrainingArguments(tmp_path / "trainer", max_steps=2, learning_rate=1e-2, use_cpu=True, report_to=[],
                                  save_strategy="no", disable_tqdm=True)  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()  # which refuses quantised models that it knows for such
    finepoint.save(model, tmp_path / "a")
    finepoint.unload(model, revert=True)
    saved = SparseAdapter.load(tmp_path / "a")
    assert saved.problems(load_model(checkpoint(kind))) == []
    assert finepoint.from_bitsandbytes_(model) is model, "a second time it changes nothing"


def test_what_cannot_be_taken_over_from_bitsandbytes_is_said(folder, checkpoint):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    fresh = nn.Sequential(nn.Linear(4, 4), bitsandbytes.nn.Linear4bit(64, 64))
    wide = nn.Sequential(bitsandbytes.nn.Linear8bitLt(64, 64))
    repacked = by_transformers(checkpoint("bnb-nf4"))
    layer = repacked.model.layers[1].mlp.down_proj
    state = layer.weight.quant_state  # as on a CPU with bfloat16 arithmetic
    layer.weight.data, _ = bitsandbytes.functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    for model, why in ((fresh, "1, .* is not quantised yet"), (wide, "0, .* holds float weights"),
                       (repacked, "down_proj, .* was repacked for this CPU")):  # fmt: skip
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(FinepointError, match=why) as caught:
            finepoint.from_bitsandbytes_(model)
        assert "\n" not in str(caught.value)
        assert [type(module) for module in model.modules()] == kinds
    plain = wide_llama()
    assert finepoint.from_bitsandbytes_(plain) is plain


def test_other_quantisers_are_refused_by_name(folder, tmp_path):
    for method in ("gptq", "awq"):
        place = shutil.copytree(folder, tmp_path / method)
        settings = json.loads((place / "config.json").read_text())
        settings["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "zero_point": True}
        (place / "config.json").write_text(json.dumps(settings))
        with pytest.raises(FinepointError, match=f"is quantised by {method}; .* torchao's .* bitsandbytes' nf4"):
            load_model(str(place))


def test_a_plain_model_is_untouched_by_all_this():
    model = wide_llama()
    assert not quantised_layers(model)
    assert not any(is_quantised(parameter) for parameter in model.parameters())
    assert not is_quantised(nn.Parameter(torch.ones(2)))


# --- on the grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grid_holds_what_the_layer_stands_for_with_every_other_code(quantised, dtype):
    """The library's own dequantisation of codes that are written into its weight, against the grid's numbers."""
    table = pytest.importorskip("bitsandbytes").functional.get_4bit_type
    model = quantised.to(dtype)
    for name, layer in list(quantised_layers(model).items())[:4]:
        weight = copy.deepcopy(layer.weight)
        at = torch.arange(0, weight.numel(), 3)
        grid = grid_at(name, weight, at, float_values(weight).view(-1)[at])
        parts = weight.parts["codes"] if hasattr(weight, "parts") else weight.qdata
        for level in range(len(grid.levels)):
            packed = parts.dtype == torch.uint8
            order = table(weight.form.kind, device="cpu").sort(stable=True).indices if packed else None
            code = int(order[level]) * 17 if packed else int(grid.levels[level])  # the same in both halves of a byte
            parts.fill_(code)
            found = float_values(weight).view(-1)[at]
            assert torch.equal(grid.values(torch.full_like(grid.at, level)), found)
        # And an entry goes to the nearest of them.
        every = torch.stack([grid.values(torch.full_like(grid.at, level)) for level in range(len(grid.levels))]).float()
        base = grid.values(grid.at).float()
        step = (every[1:] - every[:-1]).abs().amax(0)
        delta = torch.randn(len(at), generator=torch.Generator().manual_seed(0)) * step * 4
        wanted = base + delta
        missed = (every - wanted).abs()
        found = grid.snapped(delta, weight.dtype)
        assert torch.equal(grid.snapped(torch.zeros_like(delta), weight.dtype).float(), base)
        if weight.dtype == torch.float32:  # else rounding decides between neighbours
            assert bool(((found - wanted).abs() <= missed.amin(0) + 1e-5 * step).all())


def test_rules_are_told_the_step_and_the_room_of_every_entry_of_a_quantised_layer(quantised, monkeypatch):
    """Against all numbers that the weight's codes can stand for, one code after the other."""
    seen = []

    def look(weight, gradient, grid_step, grid_room):
        seen.append((weight, gradient, grid_step, grid_room))
        return grid_step

    monkeypatch.setitem(finepoint.RULES, "look", finepoint.register("look", look))
    finepoint.select(quantised, random_batches(2), rule="look", density=0.1)
    layers = quantised_layers(quantised)
    assert len(seen) == len(layers)
    for (name, layer), (values, gradient, step, room) in zip(layers.items(), seen, strict=True):
        flat, g = values.reshape(-1), gradient.reshape(-1)
        grid = grid_at(name, layer.weight, torch.arange(len(flat)), flat)
        every = (
            torch.stack([grid.values(torch.full_like(grid.at, at)) for at in range(len(grid.levels))]).sort(0).values
        )
        below, above = (every.gather(0, (grid.at + way).clamp(0, len(every) - 1)[None])[0] for way in (-1, 1))
        ends = (grid.at == 0) | (grid.at == len(every) - 1)
        near = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(step.reshape(-1), (above - below) / torch.where(ends, 1, 2), **near)
        wanted = torch.where(g > 0, flat - every[0], every[-1] - flat) * (g != 0)
        torch.testing.assert_close(room.reshape(-1), wanted, **near)


def test_training_on_the_grid_of_quantised_layers_is_the_dense_formula_straight_through(quantised):
    batches, rate = random_batches(3), 0.5
    indices = some_indices(quantised, 31)
    plain, before = as_plain(quantised), codes(quantised)
    layers = quantised_layers(quantised)
    grids = {name: grid_at(name, layer.weight, indices[name], float_values(layer.weight).view(-1)[indices[name]])
             for name, layer in layers.items()}  # fmt: skip
    finepoint.sparsify(quantised, indices=indices, on_grid=True, audit=False)
    tuner = finepoint.tuner_of(quantised)
    optimizer = torch.optim.SGD(tuner.parameters(), rate)
    masters = {name: torch.zeros(len(at)) for name, at in indices.items()}
    weights = dict(plain.named_parameters())
    for batch in batches:
        assert torch.equal(quantised(**batch).logits, plain(**batch).logits)
        quantised(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.zero_grad()
        plain(**batch).loss.backward()
        for name, at in indices.items():
            masters[name] -= rate * weights[name].grad.view(-1)[at]
            with torch.no_grad():
                weights[name].view(-1)[at] = grids[name].snapped(masters[name], torch.float32)
    for name, delta in tuner.trained().items():
        assert torch.allclose(delta, masters[name], rtol=1e-3, atol=1e-5)
    adapter = tuner.adapter()
    assert 0 < tuner.changed() < sum(map(len, indices.values()))
    finepoint.unload(quantised, revert=True)
    assert_same_bits(codes(quantised), before)
    with adapter.applied(quantised):
        for name, change in adapter.changes.items():
            every = torch.stack([grids[name].values(torch.full_like(grids[name].at, at))
                                 for at in range(len(grids[name].levels))])  # fmt: skip
            assert bool((every == change.new_values(every[grids[name].at, torch.arange(every.shape[1])])).any(0).all())


def test_the_commands_train_on_the_grid_of_quantised_layers(folder, checkpoint, data, tmp_path):
    given = {"data": data, "steps": 2, "batch_size": 4, "density": 0.05, "rule": "random", "on_grid": True, "lr": 0.02,
             "no_audit": True}  # fmt: skip
    record = train(TrainConfig(**given, model=checkpoint("bnb-nf4"), output=str(tmp_path / "a")))
    assert record["changed"] > 0
    assert SparseAdapter.load(tmp_path / "a").info["on_grid"]
    with pytest.raises(FinepointError, match=r"has no grid: .* or --quantise int8"):
        train(TrainConfig(**given, model=folder, output=str(tmp_path / "c")))
    plain = load_model(folder, quantise="int8")
    with pytest.raises(FinepointError, match="embed_tokens.weight is float32, whose grid finepoint does not know"):
        finepoint.sparsify(plain, "random", targets="all", on_grid=True, audit=False)
    with pytest.raises(FinepointError, match=r"on_grid is 'x'; give the .gguf file"):
        finepoint.sparsify(plain, "random", on_grid="x")
    with pytest.raises(FinepointError, match="chosen once"):
        finepoint.sparsify(plain, "random", on_grid=True, refreshable=True)
    assert not hasattr(plain, "finepoint")
