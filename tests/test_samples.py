"""Texts that a model itself writes."""

import json

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import finepoint
from conftest import make_tokenizer
from finepoint.cli import main
from finepoint.errors import FinepointError


def test_texts_and_conversations_are_written_and_the_model_and_the_random_state_stay(llama, tokenizer):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    state = torch.random.get_rng_state()
    texts = finepoint.samples(llama, tokenizer, 8, chat=False, tokens=6)
    talks = finepoint.samples(llama, tokenizer, 8, tokens=6)
    assert 4 <= len(texts) <= 8
    assert 4 <= len(talks) <= 8
    assert all(len(row["text"]) <= 6 and row["text"].strip() for row in texts)
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in talks)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert finepoint.samples(llama, tokenizer, 8, tokens=6) == talks
    assert finepoint.samples(llama, tokenizer, 8, tokens=6, seed=5) != talks


def test_without_a_chat_template_they_are_plain_texts(llama):
    plain = make_tokenizer()
    plain.chat_template = None
    assert all(list(row) == ["text"] for row in finepoint.samples(llama, plain, 4, tokens=4))
    with pytest.raises(FinepointError, match="conversations need a chat template"):
        finepoint.samples(llama, plain, chat=True)


def test_first_tokens_are_drawn_as_often_as_the_model_says(llama, tokenizer):
    texts = [row["text"] for row in finepoint.samples(llama, tokenizer, 800, chat=False, tokens=1)]
    with torch.no_grad():
        # Nothing is put in front of a text by this tokenizer: it begins with the token that texts begin with.
        expected = llama(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].softmax(-1)
    letters = [token for token in range(4, len(tokenizer)) if tokenizer.decode([token]).strip()]
    shares = torch.tensor([texts.count(tokenizer.decode([token])) / 800 for token in letters])
    error = (expected[letters] * (1 - expected[letters]) / 800).sqrt()
    assert ((shares - expected[letters]).abs() < 5 * error + 1e-3).all()


def test_models_that_write_nothing_of_their_own_are_refused(tokenizer):
    model = T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(FinepointError, match="samples are what a causal language model writes"):
        finepoint.samples(model, tokenizer)


def test_the_command_writes_what_protect_reads(model_folder, tmp_path, choice_file, capsys):
    out = str(tmp_path / "own")
    assert main(["data", "samples", "--model", str(model_folder), "--examples", "6", "--output", out]) == 0
    files = [tmp_path / "own" / f"{name}.jsonl" for name in ("texts", "conversations")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert 2 < len(rows) <= 6
    train = ["train", "--model", str(model_folder), "--data", choice_file, "--steps", "2", "--density", "0.1"]
    kept = ["--protect", *map(str, files)]
    assert main([*train, *kept, "--output", str(tmp_path / "kept")]) == 0
    adapter = ["--model", str(model_folder), str(tmp_path / "kept"), *kept]
    assert main(["scale", *adapter, "--disturb-at-most", "1", "--output", str(tmp_path / "less")]) == 0
    assert main(["data", "samples", "--output", out]) == 2
    assert "finepoint data samples --model MODEL --output DIR" in capsys.readouterr().err
