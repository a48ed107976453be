"""Stock trainers on a model made ready by `sparsify`: transformers' Trainer, TRL's SFT, DPO and GRPO."""

import copy
import gc
import warnings

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import finepoint
from conftest import assert_same_bits, bits, random_batches, snapshot, tiny_llama
from finepoint.errors import FinepointError
from finepoint.training.run import CHECKPOINTING
from reference import dense_masked_training

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
BATCHES = random_batches(4)
ROWS = [{key: value[i] for key, value in batch.items()} for batch in BATCHES for i in range(4)]
PLAIN = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1,
         "dataloader_pin_memory": False, "lr_scheduler_type": "constant"}  # fmt: skip
PAIRS = [{"prompt": f"a{c}:", "chosen": " yes", "rejected": " no"} for c in "abcdefgh"]
COMPLETIONS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


def sparse(model=None, density=0.05, targets="linear"):
    return finepoint.sparsify(model or tiny_llama(), "random", density, targets=targets)


def stock(model, folder, rows=ROWS, **arguments):
    arguments = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | PLAIN | arguments
    return Trainer(model, TrainingArguments(str(folder), **arguments), train_dataset=rows)


def assert_only_chosen_moved(model, base):
    """All bits but those of chosen entries are the base's; of these, some moved."""
    tuner = finepoint.tuner_of(model)
    before = dict(base.named_parameters())
    for name, weight in model.named_parameters():
        if name in before:
            others = torch.ones(weight.numel(), dtype=torch.bool)
            if name in tuner.entries:
                others[tuner.entries[name].indices.long()] = False
            assert weight.dtype == before[name].dtype
            assert torch.equal(bits(weight.reshape(-1)[others]), bits(before[name].reshape(-1)[others])), name
            assert weight.grad is None
    assert tuner.changed() > tuner.count / 10
    for name, entries in tuner.entries.items():  # the weights hold base + delta
        weight, delta = before[name].reshape(-1)[entries.indices.long()], entries.delta
        expected = torch.where(delta == 0, weight, (weight.to(delta.dtype) + delta).to(weight.dtype))
        assert torch.equal(entries.weight.reshape(-1)[entries.indices.long()], expected)


VARIANTS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "bfloat16 weights": {"dtype": torch.bfloat16},
    "autocast": {"bf16": True},
    "checkpointing": {CHECKPOINTING: True},
    "reentrant checkpointing": {CHECKPOINTING: True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager", "targets": "all"},
}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "compiled"])  # below, with more to show
def test_a_stock_trainer_moves_the_chosen_entries_alone(variant, tmp_path):
    arguments = dict(VARIANTS[variant])
    dtype, targets = arguments.pop("dtype", torch.float32), arguments.pop("targets", "linear")
    model = sparse(tiny_llama(dtype), targets=targets)
    trainer = stock(model, tmp_path, **arguments)
    trainer.train()
    assert all(
        delta.grad is None or delta.grad.dtype == torch.float32 for delta in finepoint.tuner_of(model).parameters()
    )
    assert_only_chosen_moved(model, tiny_llama(dtype))


def final_deltas(model):
    return torch.cat([delta.detach() for delta in finepoint.tuner_of(model).parameters()])


@pytest.mark.parametrize("variant", ["checkpointing", "reentrant checkpointing", "compiled"])
def test_what_saves_memory_or_time_changes_nothing_else(variant, tmp_path):
    found = []
    for arguments in ({}, {k: v for k, v in VARIANTS[variant].items() if k != "targets"}):
        model = sparse(tiny_llama(torch.float64, layers=1), targets="all")
        stock(model, tmp_path, **arguments).train()
        found.append(final_deltas(model))
        assert_only_chosen_moved(model, tiny_llama(torch.float64, layers=1))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    assert found[0].abs().min() > 0


def test_it_equals_dense_training_with_a_masked_gradient(tmp_path):
    model = sparse(tiny_llama(torch.float64), targets="all")
    indices = {name: entries.indices.long() for name, entries in finepoint.tuner_of(model).entries.items()}
    trainer = stock(model, tmp_path, max_grad_norm=0.0, weight_decay=0.0, optim="adamw_torch_fused")
    loader = list(trainer.get_train_dataloader())[:3]
    trainer.train()
    dense = dense_masked_training(
        tiny_llama(torch.float64), indices, [[batch] for batch in loader],
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
    )  # fmt: skip
    for (name, expected), found in zip(dense.named_parameters(), model.parameters(), strict=False):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, msg=name)


def test_clipping_acts_on_the_deltas(tmp_path):
    model = sparse(tiny_llama(torch.float64))
    trainer = stock(model, tmp_path, max_steps=1, max_grad_norm=0.05, optim="sgd", learning_rate=1.0)
    trainer.train()
    assert final_deltas(model).norm().item() == pytest.approx(0.05, rel=1e-4)
    free = sparse(tiny_llama(torch.float64))
    stock(free, tmp_path, max_steps=1, max_grad_norm=0.0, optim="sgd", learning_rate=1.0).train()
    norm = final_deltas(free).norm().item()
    assert norm > 0.1  # negative control: clipping had something to do
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)


def test_two_halves_are_one_batch(tmp_path):
    found = []
    for size, halves in ((4, 1), (2, 2)):
        model = sparse(tiny_llama(torch.float64))
        stock(model, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=halves).train()
        found.append(final_deltas(model))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


# Checkpoints.


def test_a_checkpoint_holds_the_deltas_and_not_the_model(tmp_path):
    model = sparse(tiny_llama(layers=8), density=0.001)
    trainer = stock(model, tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    count = finepoint.tuner_of(model).count
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            keys = set(file.keys()) - {"finepoint.fingerprint"}  # a few bytes for each weight of the model
            assert sum(file.get_tensor(key).numel() for key in keys) == 2 * count
        assert not (folder / "config.json").exists()
        with pytest.raises(ValueError, match="model"):  # it is no model, and is not taken for one
            AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert sum(state["exp_avg"].numel() for state in optimizer.values()) == count
    fresh = finepoint.load(tiny_llama(layers=8), tmp_path / "final")
    assert_same_bits(snapshot(finepoint.unload(model)), snapshot(fresh))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(dtype, tmp_path, caplog):
    arguments = {"max_steps": 6, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2,
                 "attention_dropout": 0.1}  # fmt: skip
    dropout = arguments.pop("attention_dropout")

    def make():
        model = tiny_llama(dtype)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout  # so that random state matters
        return sparse(model)

    whole = make()
    stock(whole, tmp_path / "whole", **arguments).train()
    again = make()
    stock(again, tmp_path / "again", **arguments).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_bits(snapshot(whole), snapshot(again))
    assert "missing keys" not in caplog.text
    other = make()
    stock(other, tmp_path / "other", **arguments | {"max_steps": 4}).train()
    assert any(not torch.equal(a, b) for a, b in zip(snapshot(other).values(), snapshot(whole).values(), strict=True))


def test_a_checkpoint_of_other_entries_is_refused(tmp_path):
    stock(sparse(), tmp_path, save_strategy="steps", save_steps=2).train()
    other = finepoint.sparsify(tiny_llama(), "random", 0.05, seed=1)
    with pytest.raises(FinepointError, match="belong to other entries"):
        stock(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_model_comes_back(tmp_path):
    model = sparse()
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=0.3,
                          eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
                          **PLAIN | {"save_strategy": "steps"}),
        train_dataset=ROWS, eval_dataset=ROWS[:4],
    )  # fmt: skip
    trainer.train()
    best = finepoint.load(tiny_llama(), trainer.state.best_model_checkpoint)
    assert_same_bits(snapshot(best), snapshot(finepoint.unload(model)))


# TRL.


@pytest.fixture
def policy(model_folder):
    """A model that knows where it came from, as TRL's own copies need."""
    return lambda **kwargs: AutoModelForCausalLM.from_pretrained(model_folder, **kwargs)


def dataset(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


TRL = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | PLAIN


def sft(model, tokenizer, folder, **arguments):
    return SFTTrainer(model, SFTConfig(str(folder), **TRL | arguments), train_dataset=dataset(COMPLETIONS),
                      processing_class=tokenizer)  # fmt: skip


def dpo(model, tokenizer, folder, ref_model=None, **arguments):
    return DPOTrainer(model, ref_model, DPOConfig(str(folder), beta=0.5, **TRL | arguments),
                      train_dataset=dataset(PAIRS), processing_class=tokenizer)  # fmt: skip


def shortness(completions, **_):
    """A reward that differs from sample to sample."""
    return [-float(len(text)) - text.count("a") for text in completions]


def grpo(model, tokenizer, folder, **arguments):
    rows = [{"prompt": row["prompt"]} for row in PAIRS]
    arguments = {"num_generations": 4, "max_completion_length": 6, "temperature": 1.0} | arguments
    return GRPOTrainer(model, shortness, GRPOConfig(str(folder), **TRL | arguments), train_dataset=dataset(rows),
                       processing_class=tokenizer)  # fmt: skip


MAKERS = {"sft": sft, "dpo": dpo, "grpo": grpo}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_trl_moves_the_chosen_entries_alone(kind, bf16, tmp_path, tokenizer, policy):
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = sparse(policy(dtype=dtype))
    base = copy.deepcopy(finepoint.unload(copy.deepcopy(model)))
    extra = {"ref_model": finepoint.reference(model)} if kind == "dpo" else {}
    trainer = MAKERS[kind](model, tokenizer, tmp_path, bf16=bf16, **extra)
    assert trainer.args.gradient_checkpointing  # TRL's default
    trainer.train()
    assert_only_chosen_moved(model, base)
    trainer.save_model(tmp_path / "final")
    again = finepoint.load(policy(dtype=dtype), tmp_path / "final")
    assert_same_bits(snapshot(finepoint.unload(model)), snapshot(again))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_entries_of_the_head_learn_though_trl_does_without_its_forward(kind, tmp_path, tokenizer, policy):
    """TRL multiplies by the head's weight itself; the gradient equals that of plain dense autograd."""
    gradients = []
    for dense in (True, False):
        model = policy(dtype=torch.float64)
        extra = {"ref_model": policy(dtype=torch.float64)} if kind == "dpo" else {}
        if not dense:
            finepoint.sparsify(model, "random", 0.5, targets="all", scope="weight")
        trainer = MAKERS[kind](model, tokenizer, tmp_path, **extra)
        batch = next(iter(trainer.get_train_dataloader()))
        model.train()
        trainer.compute_loss(model, batch, num_items_in_batch=None).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, sampled = gradients
    entries = finepoint.tuner_of(model).entries
    assert "model.embed_tokens.weight" in entries  # tied: it is the head as well
    for name, chosen in entries.items():
        expected = plain[name].reshape(-1)[chosen.indices.long()]
        torch.testing.assert_close(sampled[f"finepoint.{name.replace('.', '/')}.delta"], expected, rtol=1e-6, atol=1e-9)
        assert expected.any()


def models_in_memory():
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(type(thing) is LlamaForCausalLM for thing in gc.get_objects())


def test_the_reference_is_the_same_weights_and_equals_a_true_copy(policy):
    model = sparse(policy())
    batch = random_batches(1)[0]
    true_copy = policy().eval()
    before = models_in_memory()
    ref = finepoint.reference(model)
    assert models_in_memory() == before
    assert not list(ref.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = snapshot(model)
    model.train()
    assert torch.equal(ref(**batch).logits, true_copy(**batch).logits)
    assert not torch.equal(ref(**batch).logits, model(**batch).logits)  # negative control
    assert_same_bits(trained, snapshot(model))
    assert all(module.training for module in model.modules() if module is not model.finepoint)


def test_the_reference_runs_between_forward_and_backward(policy):
    """DPO's order: the graph has saved weights, the reference writes others, backward still sees the right ones."""
    batch = random_batches(1)[0]
    gradients = []
    for with_reference in (False, True):
        model = sparse(policy())
        ref = finepoint.reference(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = model(**batch).loss
        if with_reference:
            ref(**batch)
        loss.backward()
        gradients.append([delta.grad for delta in finepoint.tuner_of(model).parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_policy_is_back_after_an_exception_in_the_reference(policy):
    model = sparse(policy())
    ref = finepoint.reference(model)
    with torch.no_grad():
        for delta in finepoint.tuner_of(model).parameters():
            delta.fill_(0.1)
    finepoint.tuner_of(model).follow_()
    before = snapshot(model)
    with pytest.raises(ValueError, match="input_ids"):
        ref(nonsense=1)
    assert_same_bits(before, snapshot(model))


def test_dpo_with_the_reference_is_dpo_with_a_copy(tmp_path, tokenizer, policy):
    found, counts = [], []
    for shared in (True, False):
        model = sparse(policy())
        ref = finepoint.reference(model) if shared else None  # None: TRL loads a copy of its own
        before = models_in_memory()
        trainer = dpo(model, tokenizer, tmp_path, ref, max_steps=3, gradient_accumulation_steps=2)
        counts.append(models_in_memory() - before)
        trainer.train()
        found.append(final_deltas(model))
        del trainer, model, ref
    assert counts == [0, 1]
    assert torch.equal(*found)
    assert found[0].any()


def test_dpo_with_reference_values_made_beforehand_needs_no_second_model(tmp_path, tokenizer, policy):
    found = []
    for precomputed in (True, False):
        model = sparse(policy())
        ref = None if precomputed else finepoint.reference(model)
        trainer = dpo(model, tokenizer, tmp_path, ref, precompute_ref_log_probs=precomputed)
        trainer.train()
        found.append(final_deltas(model))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_grpo_with_the_reference_is_grpo_with_a_copy(tmp_path, tokenizer, policy):
    found, counts = [], []
    for shared in (True, False):
        model = sparse(policy())
        before = models_in_memory()
        trainer = grpo(model, tokenizer, tmp_path, max_steps=3, beta=0.0 if shared else 0.2)
        counts.append(models_in_memory() - before)
        if shared:
            trainer.beta, trainer.ref_model = 0.2, finepoint.reference(model)
        trainer.train()
        assert any(record.get("kl", 0) > 0 for record in trainer.state.log_history)
        found.append(final_deltas(model))
        del trainer, model
    assert counts == [0, 1]
    assert torch.equal(*found)


def test_trl_resumes_bit_for_bit(tmp_path, tokenizer, policy):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = sparse(policy())
    dpo(whole, tokenizer, tmp_path / "a", finepoint.reference(whole), **arguments).train()
    again = sparse(policy())
    trainer = dpo(again, tokenizer, tmp_path / "b", finepoint.reference(again), **arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(final_deltas(whole), final_deltas(again))
