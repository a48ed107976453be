"""The whole path on a device that is not the CPU: a GPU where there is one (`make gpu`), else a device made up for this
(fake_device/), on which operators are the CPU's and tensors of two devices do not mix.

What is trained is compared with dense masked training on the same device; the adapter with the same on the CPU.
"""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import finepoint
from conftest import (
    assert_same_bits,
    bits,
    make_tokenizer,
    random_batches,
    snapshot,
    tiny_gemma,
    tiny_llama,
    write_lines,
)
from finepoint.data.examples import as_examples
from finepoint.selection.passes import undisturbed
from finepoint.tuner.kernels import plain, sampled_embedding_gradient, sampled_gradient
from reference import dense_masked_training

if torch.cuda.is_available():
    DEVICE = "cuda"
else:
    import fake_device

    if not fake_device.ready():
        pytest.skip("there is no GPU, and no C++ compiler to make up a device", allow_module_level=True)
    DEVICE = "fake"

on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
WIDEST = [torch.float64] if DEVICE == "cuda" else []  # the made-up device has none, as Apple's has not
BATCHES = random_batches(3)
RULES = ("gallop", "saft", "magnitude-low", "wanda", "random", "fisher", "gps", "neuroada", "lift", "movement", "gain")
STRUCTURES = ("entry", "row", "column", "block:4x4", "block:16x16")


@pytest.fixture(autouse=True)
def float32_without_tf32():
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def moved(thing):
    """A model or batches on the device; tied weights stay tied, which the made-up device does not see to."""
    if isinstance(thing, list):
        return [{key: value.to(DEVICE) for key, value in batch.items()} for batch in thing]
    thing = thing.to(DEVICE)
    thing.tie_weights()
    return thing


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [*WIDEST, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 40, 30), (256, 96, 64), (1000, 64, 512)])
def test_the_gradient_at_entries_equals_the_dense_one_in_float64(dtype, shape, monkeypatch):
    tokens, height, width = shape
    dy, x = torch.randn(height, tokens).T.to(DEVICE, dtype), torch.randn(tokens, width).to(DEVICE, dtype)
    expected = (dy.cpu().double().T @ x.cpu().double()).reshape(-1)
    for count in {1, height * width // 20 + 1, height * width}:
        indices = torch.randperm(height * width)[:count].sort().values
        for narrow in (torch.int32, torch.int64):
            for block in (plain.WIDE_BLOCK, 7 * width):
                monkeypatch.setattr(plain, "WIDE_BLOCK", block)
                found = sampled_gradient(dy, x, indices.to(DEVICE, narrow))
                assert found.device.type == DEVICE
                assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert relative(found.cpu(), expected[indices]) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_under_autocast_the_layers_input_is_rounded_as_the_layer_has_rounded_it():
    dy, x = torch.randn(65, 40).to(DEVICE, torch.bfloat16), torch.randn(65, 30).to(DEVICE)
    indices = torch.arange(0, 1200, 7)
    expected = (dy.cpu().double().T @ x.bfloat16().cpu().double()).reshape(-1)[indices]
    assert relative(sampled_gradient(dy, x, indices.to(DEVICE)).cpu(), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_an_embedding_equals_the_dense_one(dtype):
    dy, tokens = torch.randn(4, 9, 8).to(DEVICE, dtype), torch.randint(0, 20, (4, 9)).to(DEVICE)
    expected = torch.zeros(20, 8, dtype=torch.double)
    expected.index_add_(0, tokens.cpu().reshape(-1), dy.cpu().double().reshape(-1, 8))
    indices = torch.arange(0, 160, 3)
    found = sampled_embedding_gradient(dy, tokens, indices.to(DEVICE), None)
    torch.testing.assert_close(found.cpu().double(), expected.reshape(-1)[indices], rtol=1e-5, atol=1e-5)


MODELS = {
    "tied": (tiny_llama, "linear"),
    "tied, all": (tiny_llama, "all"),  # norms, the embedding that is the head too
    "untied, all": (lambda: tiny_llama(tied=False), "all"),
    "gemma, all": (tiny_gemma, "all"),  # an embedding with a forward of its own
}


@pytest.mark.parametrize(
    ("kind", "structure"), [("tied", structure) for structure in STRUCTURES] + [(kind, "entry") for kind in MODELS]
)
def test_training_equals_dense_masked_training(kind, structure):
    make, targets = MODELS[kind]
    model, twin = moved(make()), moved(make())
    base = snapshot(model)
    chosen = finepoint.select(model, rule="random", density=0.1, structure=structure, targets=targets)
    tuner = finepoint.SparseTuner(model, chosen)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
    batches = moved(BATCHES)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dense_masked_training(twin, dict(chosen), [[batch] for batch in batches], lambda ps: torch.optim.SGD(ps, lr=0.5))
    expected = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        if "finepoint" not in name:
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    assert tuner.changed() > tuner.count / 2
    assert tuner.norm() > 0
    tuner.revert_()
    tuner.close()
    assert_same_bits(base, snapshot(model))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_in_bfloat16_gradients_are_as_near_to_the_exact_ones_as_dense_ones(structure):
    model, twin, exact = (tiny_llama(torch.bfloat16) for _ in range(3))
    model, twin, exact = moved(model), moved(twin), exact.double()
    chosen = finepoint.select(model, rule="random", density=0.1, structure=structure)
    tuner = finepoint.SparseTuner(model, chosen)
    for one in (model, twin):
        one(**moved(BATCHES)[0]).loss.backward()
    exact(**BATCHES[0]).loss.backward()

    def dense(of, shift=0):
        weights = dict(of.named_parameters())
        parts = [weights[name].grad.reshape(-1).cpu()[positions.cpu() - shift] for name, positions in chosen.items()]
        return torch.cat(parts)

    found = torch.cat([tuner.entries[name].delta.grad.cpu() for name in chosen])
    assert found.dtype == torch.float32
    assert relative(found, dense(exact)) <= 1.02 * relative(dense(twin), dense(exact)) < 0.1
    assert relative(found, dense(exact, shift=1)) > 0.3  # the control: entries beside the chosen ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("there", ["trained on the device", "trained on the CPU"])
def test_an_adapter_made_on_one_device_is_used_on_the_other(dtype, there, tmp_path):
    def placed(model, trains):
        return moved(model) if trains == (there == "trained on the device") else model

    model = placed(tiny_llama(dtype), True)
    finepoint.sparsify(model, "random", 0.1)
    optimizer = torch.optim.AdamW(finepoint.tuner_of(model).parameters(), lr=0.05)
    for batch in random_batches(2):
        model(**{key: value.to(model.device) for key, value in batch.items()}).loss.backward()
        optimizer.step()
    finepoint.save(model, tmp_path / "adapter")
    finepoint.unload(model)
    trained = {name: value.cpu() for name, value in snapshot(model).items()}
    other = placed(tiny_llama(dtype), False)
    base = snapshot(other)
    adapter = finepoint.SparseAdapter.load(tmp_path / "adapter")
    with adapter.applied(other):
        for name, value in snapshot(other).items():
            if dtype == torch.bfloat16:  # exact values are stored
                assert torch.equal(bits(value.cpu()), bits(trained[name])), name
            else:
                torch.testing.assert_close(value.cpu(), trained[name], rtol=1e-6, atol=1e-7)
    assert_same_bits(base, snapshot(other))


@pytest.mark.parametrize("rule", RULES)
def test_rules_choose_on_the_device_what_they_choose_on_the_cpu(rule):
    def chosen(model, batches):
        found = finepoint.select(
            model, batches=None if rule == "random" else batches, rule=rule, density=0.05, kept=batches
        )
        return {(name, int(place)) for name, places in found.items() for place in places}

    here, there = chosen(tiny_llama(), BATCHES), chosen(moved(tiny_llama()), moved(BATCHES))
    assert len(here) == len(there)
    assert len(here & there) >= 0.99 * len(here)  # sums in another order may exchange two that are as good as alike


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant):
    def gradients(checkpointed):
        model = moved(tiny_llama()).train()
        chosen = finepoint.select(model, rule="random", density=0.1)
        if checkpointed:
            checkpointed = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            checkpointed({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        tuner = finepoint.SparseTuner(model, chosen)
        for entries in tuner.entries.values():  # as after loading a checkpoint: the first forward writes the weights
            entries.stale = True
        model(**moved(BATCHES)[0], use_cache=False).loss.backward()
        return torch.cat([parameter.grad for parameter in tuner.parameters()])

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-5, atol=1e-6)


def test_a_model_may_move_after_it_was_made_ready():
    chosen = finepoint.select(tiny_llama(tied=False), rule="random", density=0.1)
    gradients = []
    for late in (True, False):
        model = tiny_llama(tied=False) if late else moved(tiny_llama(tied=False))
        tuner = finepoint.SparseTuner(model, chosen)
        model.to(DEVICE)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)
        model(**moved(BATCHES)[0]).loss.backward()
        optimizer.step()
        gradients.append(torch.cat([parameter.grad for parameter in tuner.parameters()]))
        assert tuner.changed() > tuner.count / 2
    assert torch.equal(*gradients)


def test_adapters_are_switched_and_the_base_is_at_hand():
    model = moved(tiny_llama())
    base = snapshot(model)
    adapters = {}
    for seed, name in enumerate(("a", "b")):
        finepoint.sparsify(model, "random", 0.05, seed=seed)
        as_it_was = finepoint.reference(model)
        for delta in finepoint.tuner_of(model).parameters():
            delta.data.normal_(std=0.1)
        finepoint.tuner_of(model).follow_()
        with torch.no_grad():
            other = model(**moved(BATCHES)[0]).logits
            reference = as_it_was(**moved(BATCHES)[0]).logits
        adapters[name] = finepoint.tuner_of(model).adapter()
        finepoint.unload(model, revert=True)
        assert_same_bits(base, snapshot(model))
        with torch.no_grad():
            assert torch.equal(reference, model(**moved(BATCHES)[0]).logits)
        assert not torch.equal(reference, other)
    switches = finepoint.AdapterSet(model)
    for name, adapter in adapters.items():
        switches.add(name, adapter)
    for name in ("a", "b", "a"):
        with switches.using(name):
            assert not torch.equal(model(**moved(BATCHES)[0]).logits, reference)
    assert_same_bits(base, snapshot(model))


def test_measures_are_those_of_the_cpu():
    from finepoint.evaluation.scoring import choice_likelihoods, mean_nll
    from finepoint.training.writing import written

    tokenizer = make_tokenizer()
    examples = as_examples([{"prompt": f"{c}b:", "choices": [" yes", " no"], "answer": 1} for c in "abcde"])
    texts = as_examples([{"text": f"the cat {c} sat"} for c in "abc"])
    found = []
    for model in (tiny_llama(), moved(tiny_llama())):
        likelihoods = torch.tensor(choice_likelihoods(model, tokenizer, examples, 64))
        nll = mean_nll(model, tokenizer, texts)["nll"]
        texts_written = [one.text for one in written(model, tokenizer, [[5, 6, 7], [8, 9]], 64, 5)]
        found.append((likelihoods, nll, texts_written))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    assert found[0][2] == found[1][2]


def test_scoring_leaves_the_devices_random_state_as_it_was():
    model = moved(tiny_llama())
    state = getattr(torch, DEVICE).get_rng_state()
    with undisturbed(model):
        torch.rand(5, device=DEVICE)
        model(**moved(BATCHES)[0])
    assert torch.equal(state, getattr(torch, DEVICE).get_rng_state())


@pytest.mark.parametrize("variant", ["plain", "bf16 weights", "autocast", "fp16", "checkpointing", "compiled"])
@on_a_gpu
def test_a_stock_trainer_trains_on_a_gpu_and_resumes_to_the_same_bits(variant, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{key: value[i] for key, value in batch.items()} for batch in random_batches(6) for i in range(4)]
    more = {"autocast": {"bf16": True}, "fp16": {"fp16": True}, "checkpointing": {"gradient_checkpointing": True},
            "compiled": {"torch_compile": True}}.get(variant, {})  # fmt: skip

    def trained(folder, steps, resume=None):
        model = tiny_llama(torch.bfloat16 if variant == "bf16 weights" else torch.float32)
        finepoint.sparsify(model, "random", 0.05, targets="all")
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
            save_steps=2, logging_steps=1, disable_tqdm=True, lr_scheduler_type="constant", **more,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        assert model.device.type == "cuda"
        return model

    model = trained(tmp_path / "a", 4)
    tuner, base = finepoint.tuner_of(model), dict(tiny_llama(next(model.parameters()).dtype).named_parameters())
    assert tuner.changed() > tuner.count / 2
    for name, weight in model.named_parameters():
        if name in base:
            others = torch.ones(weight.numel(), dtype=torch.bool)
            if name in tuner.entries:
                others[tuner.entries[name].indices.long().cpu()] = False
            assert torch.equal(bits(weight.cpu().reshape(-1)[others]), bits(base[name].reshape(-1)[others])), name
    trained(tmp_path / "b", 2)
    again = trained(tmp_path / "b", 4, resume=str(tmp_path / "b" / "checkpoint-2"))
    if variant != "compiled":
        assert_same_bits(snapshot(model), snapshot(again))


@on_a_gpu
def test_a_compiled_model_has_the_gradients_of_an_eager_one():
    gradients = []
    for compiled in (False, True):
        model = moved(tiny_llama())
        tuner = finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=0.1, targets="all"))
        run = torch.compile(model) if compiled else model
        run(**moved(BATCHES)[0]).loss.backward()
        gradients.append(torch.cat([parameter.grad for parameter in tuner.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


FLAGS = (
    "--density 0.05 --packing",
    "--density 0.05 --rule gallop --refresh every:2",
    "--density 0.05 --dtype bfloat16 --gradient-checkpointing",
    "--density 0.05 --structure column --targets linear --save-every 2",
    "--density 0.05 --protect {data} --protect-examples 8",
    *(f"--baseline {name}" for name in ("full", "lora", "dora", "bitfit", "mofo", "rosa --density 0.05")),
)


@on_a_gpu
def test_the_command_line_trains_evaluates_and_exports_on_a_gpu(tmp_path, capfd):
    pytest.importorskip("jsonargparse")
    from finepoint.cli import main

    tiny_llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base, data = tmp_path / "base", tmp_path / "data.jsonl"
    write_lines(data, [{"prompt": f"{a}{b}:", "choices": [" yes", " no"], "answer": int(b > "b")} for a in "abcdefgh"
                       for b in "abcd"])  # fmt: skip
    pairs = tmp_path / "pairs.jsonl"
    write_lines(pairs, [{"prompt": f"{a}:", "chosen": " yes", "rejected": " no"} for a in "abcdefgh"])

    def run(*words):
        status = main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert status == 0, err
        return out

    for rule in ("random", "gallop"):
        run("train", "--model", base, "--data", data, "--density", "0.05", "--rule", rule, "--steps", 30, "--lr",
            "0.02", "--batch-size", 8, "--output", tmp_path / rule)  # fmt: skip
    found = json.loads(run("eval", "--model", base, "--adapter", tmp_path / "random", "--id", f"x={data}", "--json"))
    assert all(0 <= one["id"]["x"]["accuracy"] <= 1 for one in (found["base"], *found["adapters"].values()))
    losses = [row["loss"] for row in map(json.loads, (tmp_path / "gallop" / "log.jsonl").open()) if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    for i, more in enumerate(FLAGS):
        run("train", "--model", base, "--data", data, "--steps", 6, "--batch-size", 8, "--output", tmp_path / f"m{i}",
            *more.format(data=data).split())  # fmt: skip
    run("align", "--method", "dpo", "--model", base, "--data", pairs, "--density", "0.05", "--steps", 3, "--output",
        tmp_path / "dpo") if _has("trl") and _has("datasets") else None  # fmt: skip
    run("verify", tmp_path / "random", "--model", base)
    run("export", "--model", base, "--adapter", tmp_path / "random", "--format", "merged", "--output", tmp_path / "out")


@pytest.mark.parametrize("checkpointing", [False, True])
@on_a_gpu
def test_the_plan_for_a_gpu_holds_there(checkpointing, tmp_path):
    from finepoint.memory.plan import plan
    from finepoint.models.loading import load_model
    from finepoint.training.settings import PlanConfig
    from measured_peak import train

    config = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    settings = {"density": 0.01, "batch_size": 4, "tokens": 1024, "gradient_checkpointing": checkpointing}
    expected = sum(plan(PlanConfig(model=str(tmp_path), device="cuda", dtype="bfloat16", **settings)).training.values())
    model = load_model(str(tmp_path), "bfloat16")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - sum(parameter.nbytes for parameter in model.parameters())
    train(model, settings)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"planned {expected / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB")
    assert expected == pytest.approx(peak, rel=0.15)


def _has(package):
    from importlib.util import find_spec

    return find_spec(package) is not None


@pytest.mark.parametrize("sharded_after", [False, True])
@on_a_gpu
def test_shards_of_fsdp_on_a_gpu_train_as_the_whole_model_does(sharded_after, tmp_path):
    """One process and NCCL: what is special about shards is there; several processes are tested on the CPU."""
    from torch import distributed, nn
    from torch.distributed.fsdp import fully_shard

    def shard_(model):
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)

    def trained(sharded):
        model = moved(tiny_llama(tied=False))
        if sharded and not sharded_after:
            shard_(model)
        tuner = finepoint.SparseTuner(model, {name: torch.arange(0, 128, 3) for name in (
            "model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight")})  # fmt: skip
        if sharded and sharded_after:
            shard_(model)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        for batch in moved(BATCHES):
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(tuner.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
        adapter = tuner.adapter()
        tuner.close()
        return {name: change.numbers.cpu() for name, change in adapter.changes.items()}

    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        found, expected = trained(True), trained(False)
    finally:
        distributed.destroy_process_group()
    for name, numbers in expected.items():
        assert numbers.abs().max() > 0
        torch.testing.assert_close(found[name], numbers, rtol=1e-4, atol=1e-6)


@on_a_gpu
def test_a_deep_copy_trains_on_the_device_by_itself():
    model = moved(tiny_llama(tied=False))
    finepoint.sparsify(model, "random", 0.1)
    twin = copy.deepcopy(model)
    before = snapshot(model)
    optimizer = torch.optim.SGD(twin.finepoint.parameters(), lr=0.5)
    twin(**moved(BATCHES)[0]).loss.backward()
    optimizer.step()
    twin(**moved(BATCHES)[0])
    assert_same_bits(before, snapshot(model))
