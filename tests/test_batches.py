from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, MambaConfig

from conftest import make_tokenizer, tiny_llama
from finepoint.data.batches import (
    IGNORED,
    Collator,
    Row,
    by_length,
    chat_text,
    context_length,
    encode,
    encode_all,
    learned,
)  # fmt: skip
from finepoint.data.examples import Chat, Choices, Completion, Labelled, Text
from finepoint.errors import FinepointError


def shown(tokenizer, row):
    """The tokens and, of those that are learned, the text."""
    return tokenizer.decode(row.ids), tokenizer.decode([label for label in row.labels if label != IGNORED])


def test_only_what_should_be_learned_has_labels(tokenizer):
    assert shown(tokenizer, encode(tokenizer, Completion("ab:", " cd"))) == ("ab: cd</s>", " cd</s>")
    assert shown(tokenizer, encode(tokenizer, Choices("ab:", (" x", " yz"), 1))) == ("ab: yz", " yz")
    assert shown(tokenizer, encode(tokenizer, Text("abc"))) == ("abc", "bc")  # nothing predicts the first token
    assert encode(tokenizer, Labelled("ab", "no"), ["no", "yes"]) == Row(tokenizer("ab")["input_ids"], 0)
    chat = Chat((("user", "hi"), ("assistant", "ho"), ("user", "so"), ("assistant", "go")))
    whole, taught = shown(tokenizer, encode(tokenizer, chat))
    assert whole == chat_text(tokenizer, chat.messages) == "user: hi\nassistant: ho\nuser: so\nassistant: go\n"
    assert taught == "ho\ngo\n"


def test_bad_examples_are_refused(tokenizer):
    with pytest.raises(FinepointError, match="label 'x' is not among the model's classes: a, b"):
        encode(tokenizer, Labelled("t", "x"), ["a", "b"])
    with pytest.raises(FinepointError, match="every label is ignored"):
        encode_all(tokenizer, [Text("a")], 64)
    without_template = make_tokenizer()
    without_template.chat_template = None
    with pytest.raises(FinepointError, match="no chat template"):
        encode(without_template, Chat((("user", "a"), ("assistant", "b"))))


def test_long_examples_lose_their_beginning_with_one_warning_that_counts(tokenizer, caplog):
    examples = [Completion("abcdefghij" * 3, " x"), Completion("ab", " x"), Completion("abcdefghij" * 2, " y")]
    rows = encode_all(tokenizer, examples, 12, what="training example")
    assert [len(row.ids) for row in rows] == [12, 5, 12]
    assert shown(tokenizer, rows[0])[1] == " x</s>"
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 training examples are longer than 12 tokens and lost their beginning: 52% of all tokens"
    ]


def test_trimmed_logits_give_the_same_loss(tokenizer):
    model = tiny_llama()
    rows = [encode(tokenizer, Completion("ab" * n, " cd"[: 1 + n % 3])) for n in (1, 5, 3)]
    trimming = Collator.of(model, tokenizer)
    assert trimming.trims
    assert trimming.positions
    whole = Collator(trimming.padding, trimming.positions, trims=False)
    short, long = trimming(rows), whole(rows)
    assert short["labels"].shape[1] == short["logits_to_keep"] < long["labels"].shape[1]
    torch.testing.assert_close(model(**short).loss, model(**long).loss)
    # Left padding changes nothing either: each row alone, weighted by its labels.
    alone = sum(model(**whole([row])).loss * learned(row) for row in rows) / sum(map(learned, rows))
    torch.testing.assert_close(model(**short).loss, alone)


def test_by_length_keeps_to_the_budget_and_loses_nothing():
    sizes = [5, 1, 9, 9, 2, 30, 7]
    batches = by_length(sizes, 18)
    assert sorted(place for batch in batches for place in batch) == list(range(len(sizes)))
    assert all(len(batch) == 1 or len(batch) * max(sizes[i] for i in batch) <= 18 for batch in batches)


def test_the_context_of_a_model_of_several_parts_is_that_of_the_one_that_reads():
    text = {"max_position_embeddings": 77, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    composite = SimpleNamespace(config=LlavaConfig(text_config=LlamaConfig(**text)))
    assert context_length(composite, None) == 77
    assert context_length(composite, 9) == 9
    assert context_length(composite, 99) == 77
    assert context_length(tiny_llama(), None) == 64
    assert context_length(SimpleNamespace(config=MambaConfig()), None) == 1 << 30  # it has no end
