import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, Lfm2Config

from conftest import VOCABULARY, interrupted_at, tiny_gemma, tiny_llama, write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.data.batches import IGNORED, Collator, Packer, Row, learned, packed_rows, real_tokens
from finepoint.errors import FinepointError
from finepoint.models.probing import keeps_apart
from finepoint.training.context import TrainingContext, packer_for
from finepoint.training.loss import completion_loss
from finepoint.training.run import train
from finepoint.training.settings import TrainConfig


def eager_llama(dtype):
    model = tiny_llama(dtype)
    model.set_attn_implementation("eager")
    return model


# Gemma alternates attention over the whole row with that over a sliding window of 8 tokens.
MODELS = {"sdpa": tiny_llama, "eager": eager_llama, "gemma": tiny_gemma}
# transformers computes the softmax of eager attention and Gemma's norms in float32, whatever the model's dtype.
PRECISION = {"sdpa": 1e-12, "eager": 1e-7, "gemma": 1e-7}


def random_rows(count=7, seed=0):
    """Rows of 2 to 24 tokens; where something is learned is random, and the first token's label may be set."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, VOCABULARY, (2 + (i * 9) % 23,), generator=generator).tolist()
        dropped = torch.rand(len(ids), generator=generator) < 0.4
        labels = [IGNORED if drop else token for token, drop in zip(ids, dropped.tolist(), strict=True)]
        rows.append(Row(ids, [*labels[:-1], ids[-1]]))
    return rows


def packer(model):
    return Packer(Collator(0, positions=True, trims=True), width=model.config.hidden_size)


def alone(model, rows):
    """The definition: every example in a pass of its own, one mean over all learned tokens."""
    total = 0
    for row in rows:
        logits = model(torch.tensor([row.ids])).logits[0, :-1]
        total += cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=IGNORED, reduction="sum")
    return total / sum(map(learned, rows))


@pytest.mark.parametrize("name", MODELS)
def test_packed_examples_have_the_loss_and_gradients_they_have_alone(name):
    model, rows = MODELS[name](torch.float64), random_rows()
    batch = packer(model)(rows)
    assert 1 < len(batch["input_ids"]) < len(rows)
    parameters = list(model.parameters())
    expected = alone(model, rows)
    gradients = torch.autograd.grad(expected, parameters)
    own = model(**batch).loss  # computed in float32
    for loss, tolerance in ((completion_loss(model, batch), PRECISION[name]), (own, 1e-5)):
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
        for found, gradient in zip(torch.autograd.grad(loss, parameters), gradients, strict=True):
            torch.testing.assert_close(found, gradient, rtol=tolerance * 100, atol=tolerance)
    # Negative controls: without the boundaries, and with a cache, which makes models overlook them.
    straight = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    assert abs(completion_loss(model, batch | {"position_ids": straight}) - expected) > 1e-3
    assert abs(model(**batch | {"use_cache": True}).loss - expected) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_no_token_sees_another_example(name):
    model, rows = MODELS[name](torch.float64), random_rows()
    batch = packer(model)(rows)
    first, *others = packed_rows([len(row.ids) for row in rows], model.config.hidden_size)[0]
    assert others
    start = batch["input_ids"].shape[1] - sum(len(rows[i].ids) for i in (first, *others))
    changed = batch["input_ids"].clone()
    changed[0, start] = 60 - changed[0, start]  # the first example's first token
    inputs = {key: batch[key] for key in ("position_ids", "use_cache")}
    with torch.no_grad():
        before = model(input_ids=batch["input_ids"], **inputs).logits
        after = model(input_ids=changed, **inputs).logits
    moved = ((before - after).abs().amax(-1)[0] > 0).nonzero()[:, 0].tolist()
    assert moved[0] == start
    assert moved[-1] < start + len(rows[first].ids)


def test_rows_are_shared_so_that_least_is_computed():
    sizes = [(i * 7919) % 60 + 2 for i in range(16)]
    for width in (4, 576, 10**6):
        rows = packed_rows(sizes, width)
        assert sorted(place for row in rows for place in row) == list(range(16))

        def cost(rows, width=width):
            longest = max(sum(sizes[i] for i in row) for row in rows)
            return len(rows) * (24 * width**2 * longest + 4 * width * longest**2)

        assert cost(rows) <= cost([[i] for i in range(16)])
        assert cost(rows) <= cost([list(range(16))])
    # Where attention costs nothing beside the linear layers, padding is all there is to save; examples of one length
    # leave nothing to save.
    assert len(packed_rows(sizes, 10**6)) == 1
    assert len(packed_rows([9] * 16, 576)) == 16


def test_real_tokens_are_counted_with_and_without_packing():
    model = tiny_llama()
    collator = packer(model).collator
    for seed in range(5):
        rows = random_rows(count=3 + seed, seed=seed)
        expected = sum(len(row.ids) for row in rows)
        packed, padded = packer(model)(rows), collator(rows)
        assert real_tokens(packed) == real_tokens(padded) == expected
        assert packed["input_ids"].numel() < padded["input_ids"].numel()


@pytest.mark.parametrize("name", MODELS)
def test_models_that_keep_examples_apart_are_known(name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert keeps_apart(MODELS[name](dtype))


def test_a_convolution_along_the_row_is_found_out():
    torch.manual_seed(0)
    config = Lfm2Config(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
                        initializer_range=0.2)  # fmt: skip
    assert not keeps_apart(AutoModelForCausalLM.from_config(config).eval())


def place(model, labels=(), positions=True):
    return TrainingContext(model, None, list(labels), [], Collator(0, positions, trims=True))


def test_what_cannot_be_packed_is_refused(monkeypatch):
    model = tiny_llama()
    assert packer_for(place(model)).width == 16
    with pytest.raises(FinepointError, match="these have class labels; train without --packing"):
        packer_for(place(model, labels=["a", "b"]))
    with pytest.raises(FinepointError, match="position_ids, which LlamaForCausalLM does not take"):
        packer_for(place(model, positions=False))
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(FinepointError, match="with flash_attention_2 attention .* not kept apart; train without"):
        packer_for(place(model))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    assert packer_for(place(AutoModelForCausalLM.from_config(config).eval())).width == 16


@pytest.fixture
def config(model_folder, tmp_path):
    letters = "abcdefgh"
    rows = [{"prompt": letters[: 1 + i % 8] * (1 + i % 3) + ":", "completion": " " + letters[i % 5] * (1 + i % 4)}
            for i in range(120)]  # fmt: skip
    return TrainConfig(model=str(model_folder), data=write_lines(tmp_path / "d.jsonl", rows), steps=9, batch_size=8,
                       output=str(tmp_path / "run"), rule="gallop", density=0.05, lr=1e-2, packing=True,
                       dtype="float64")  # fmt: skip


def test_packed_training_logs_its_tokens_and_equals_training_without_packing(config, tmp_path):
    record = train(config)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [row for row in log if "loss" in row]
    assert all(row["tokens_per_second"] > 0 and 0 <= row["padding"] < 0.3 for row in steps)
    assert record["tokens_per_second"] > 0
    assert min(row["padding"] for row in steps) <= record["padding"] <= max(row["padding"] for row in steps)

    unpacked = train(replace(config, packing=False, output=str(tmp_path / "unpacked")))
    assert unpacked["padding"] > record["padding"]
    assert unpacked["first_loss"] == pytest.approx(record["first_loss"], rel=1e-9)
    a, b = SparseAdapter.load(config.output), SparseAdapter.load(tmp_path / "unpacked")
    for name, change in a.changes.items():
        torch.testing.assert_close(change.numbers, b.changes[name].numbers, rtol=1e-5, atol=1e-7)


def test_resume_with_packing_equals_the_uninterrupted_run_bit_for_bit(config, tmp_path):

    config = replace(config, save_every=3, validation=config.data, eval_every=3)
    whole = train(replace(config, output=str(tmp_path / "whole")))
    with interrupted_at(8):
        train(config)
    resumed = train(replace(config, resume=True))
    assert resumed["validation_loss"] == whole["validation_loss"]
    a, b = SparseAdapter.load(tmp_path / "whole"), SparseAdapter.load(Path(config.output))
    for name, change in a.changes.items():
        assert torch.equal(change.numbers, b.changes[name].numbers)


def test_classification_is_refused_with_packing(config, tmp_path):
    rows = [{"text": f"{a} is", "label": "pos" if a < "e" else "neg"} for a in "abcdefgh"]
    with pytest.raises(FinepointError, match="class labels; train without --packing"):
        train(replace(config, data=write_lines(tmp_path / "labels.jsonl", rows)))
