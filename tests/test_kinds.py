"""Kinds of model: what a batch, a step and an adapter mean is the same for all of them, or they are refused."""

import json

import pytest
import torch
import transformers as t

from conftest import tiny_llama, write_lines
from finepoint.config import TrainConfig
from finepoint.training.loss import completion_loss
from finepoint.training.run import train
from test_loss import softcapped

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 140, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip


def built(config, factory=t.AutoModelForCausalLM, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return factory.from_config(config, **kwargs).to(dtype).eval()


def classifier(config, dtype=torch.float32):
    config.num_labels = 3
    return built(config, t.AutoModelForSequenceClassification, dtype)


@pytest.mark.parametrize("kind", ["llama", "gemma", "llama classifier", "bert classifier"])
def test_the_batches_of_a_step_weigh_by_their_labels_however_it_is_split(kind):
    """Models that take the number of labels of a step, and models that do not."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (8, 6), generator=generator)
    labels = torch.where(torch.rand(8, 6, generator=generator) < 0.5, ids, -100)
    if "classifier" in kind:
        config = t.LlamaConfig(**SMALL) if "llama" in kind else t.BertConfig(**SMALL)
        model, labels = classifier(config, torch.float64), ids[:, 0] % 3
        count = 8
    else:
        model = tiny_llama(torch.float64) if kind == "llama" else softcapped().double()
        count = int((labels[:, 1:] != -100).sum())
    expected = model(input_ids=ids, labels=labels).loss
    for sizes in ([8], [2, 2, 2, 2], [1] * 8, [5, 3]):
        parts = zip(ids.split(sizes), labels.split(sizes), strict=True)
        batches = [{"input_ids": ids, "labels": labels} for ids, labels in parts]
        found = sum(completion_loss(model, batch, count) for batch in batches if (batch["labels"] != -100).any())
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("baseline", [None, "full", "lora"])
def test_loss_and_gradient_of_a_classifiers_step_do_not_depend_on_accumulation(tmp_path, model_folder, baseline):
    rows = [{"text": f"{'ab' * n} {c}", "label": c} for n, c in enumerate("xyxyyxyx", 1)]
    data, found = write_lines(tmp_path / "rows.jsonl", rows), []
    for size, times in ((8, 1), (2, 4), (1, 8)):
        config = TrainConfig(model=str(model_folder), data=data, output=str(tmp_path / f"{size}"), baseline=baseline,
                             batch_size=size, accumulation=times, steps=1, warmup=0, dtype="float64")  # fmt: skip
        record = train(config)
        log = (tmp_path / f"{size}" / "log.jsonl").read_text().splitlines()
        found.append((record["loss"], next(row["grad_norm"] for row in map(json.loads, log) if "grad_norm" in row)))
    assert found[0][1] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)
