import math

import pytest
import torch

from conftest import tiny_llama
from finepoint.adapters.adapter import Change, SparseAdapter
from finepoint.adapters.entries import checksum
from finepoint.data import Chat, Choices, Completion, Text
from finepoint.errors import FinepointError
from finepoint.measuring import scoring
from finepoint.measuring.evaluation import Evaluation, evaluate, read_sets
from finepoint.measuring.metrics import changes, forget_ratio
from finepoint.measuring.scoring import accuracy, mean_nll, token_log_likelihoods


def plain_log_likelihood(model, ids, start):
    """The definition: one unpadded forward pass, log-softmax, the tokens from `start` on."""
    log_probs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [log_probs[i - 1, ids[i]].item() for i in range(start, len(ids))]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


EXAMPLES = [
    Choices("abc:", (" a", " bcd", " bc"), 1),
    Choices("abcdefgh:", (" e", " f"), 0),
    Choices("a:", (" jjjj", " c"), 1),
]


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_likelihoods_equal_one_plain_pass_each(model, tokenizer, monkeypatch, budget):
    monkeypatch.setattr(scoring, "BATCH_TOKENS", budget)
    requests = [scoring.encode_pair(tokenizer, e.prompt, c) for e in EXAMPLES for c in e.choices]
    found = token_log_likelihoods(model, tokenizer, requests, 64)
    for (context, continuation), values in zip(requests, found, strict=True):
        expected = plain_log_likelihood(model, context + continuation, len(context))
        torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_choices_of_one_prompt_share_one_row(model, tokenizer):
    requests = [scoring.encode_pair(tokenizer, "ab", choice) for choice in "cdefg"]
    rows = []
    token_log_likelihoods(model, tokenizer, requests, 64, rows.append)
    assert sum(rows) == 1
    rows.clear()
    pairs = [("ab", "cd"), ("ab", "ce"), ("ab", "d"), ("abc", "d")]
    token_log_likelihoods(model, tokenizer, [scoring.encode_pair(tokenizer, *pair) for pair in pairs], 64, rows.append)
    assert sum(rows) == 2  # the last has a prompt of its own


def test_choice_accuracy_raw_and_normalised(model, tokenizer):
    raw = normalised = 0
    for e in EXAMPLES:
        sums = []
        for choice in e.choices:
            context, continuation = scoring.encode_pair(tokenizer, e.prompt, choice)
            sums.append(sum(plain_log_likelihood(model, context + continuation, len(context))))
        lengths = [len(choice.strip()) for choice in e.choices]
        raw += max(range(len(sums)), key=lambda i: sums[i]) == e.answer
        normalised += max(range(len(sums)), key=lambda i: sums[i] / lengths[i]) == e.answer
    found = accuracy(model, tokenizer, EXAMPLES)
    assert found["accuracy"] == raw / 3
    assert found["accuracy_normalised"] == normalised / 3
    assert found["stderr"] == pytest.approx(math.sqrt(raw / 3 * (1 - raw / 3) / 3))
    assert found["n"] == 3


def test_a_scorer_that_always_says_the_first_scores_its_share(model, tokenizer, monkeypatch):
    monkeypatch.setattr(scoring, "token_log_likelihoods", lambda m, t, requests, *_: [torch.zeros(1)] * len(requests))
    examples = [Choices("a:", (" b", " c"), i % 2) for i in range(10)]
    found = accuracy(model, tokenizer, examples)
    assert found["accuracy"] == 0.5
    assert found["most_frequent_answer"] == 1.0


def test_nll_of_texts_equals_the_definition_also_over_windows(model, tokenizer):
    texts = ["abcdefgh", "hello you", "x"]
    values = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        values += plain_log_likelihood(model, ids, 1)
    found = mean_nll(model, tokenizer, [Text(text) for text in texts])
    assert found["tokens"] == len(values)
    assert found["nll"] == pytest.approx(-sum(values) / len(values), rel=1e-5)
    ids = tokenizer("abcdefgh")["input_ids"]
    pieces = plain_log_likelihood(model, ids[:5], 1) + plain_log_likelihood(model, ids[5:], 1)
    windowed = mean_nll(model, tokenizer, [Text("abcdefgh")], max_length=5)
    assert windowed["nll"] == pytest.approx(-sum(pieces) / len(pieces), rel=1e-5)
    assert windowed["tokens"] == len(pieces)


def test_nll_of_completions_counts_only_what_follows_the_prompt(model, tokenizer):
    found = mean_nll(model, tokenizer, [Choices("abc:", (" de", " x"), 0)])
    ids = tokenizer("abc: de")["input_ids"]
    expected = plain_log_likelihood(model, ids, 4)
    assert found == {"nll": pytest.approx(-sum(expected) / 3, rel=1e-5), "tokens": 3}


def test_generation_counts_exact_matches(model, tokenizer):
    prompt = "abcd"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    written = tokenizer.decode(
        model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True
    )
    examples = [Completion(prompt, written), Completion("ab", "definitely not this")]
    assert accuracy(model, tokenizer, examples, new_tokens=6)["accuracy"] == 0.5
    text = "user: hi\nassistant: "
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    reply = tokenizer.decode(
        model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True
    )
    chats = [Chat((("user", "hi"), ("assistant", reply))), Chat((("user", "hi"), ("assistant", "nope")))]
    assert accuracy(model, tokenizer, chats, new_tokens=6)["accuracy"] == 0.5


def test_long_prompts_lose_their_beginning_with_one_warning_that_counts(model, tokenizer, caplog):
    examples = [Choices("abcdefghij:", (" a", " b"), 0), Choices("ab:", (" a", " b"), 0)]
    short = accuracy(model, tokenizer, [Choices("hij:", (" a", " b"), 0), examples[1]], max_length=5)
    assert caplog.records == []
    assert accuracy(model, tokenizer, examples, max_length=5) == short
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 prompts are longer than 5 tokens and lost their beginning"
    ]


def test_forget_ratio_is_gallops():
    assert forget_ratio(0.8, 0.6) == pytest.approx(0.25)
    assert forget_ratio(0.8, 0.9) == 0.0
    assert forget_ratio(0.0, 0.5) is None


def test_changes_are_signed():
    def scores(id_, ood, nll):
        return {"id": {"a": {"accuracy": id_}}, "ood": {"b": {"accuracy": ood}, "c": {"accuracy": 0.5}},
                "probe": {"p": {"nll": nll}}}  # fmt: skip

    found = changes(scores(0.5, 0.8, 3.0), scores(0.9, 0.6, 3.25))
    assert found["id_change"] == {"a": pytest.approx(0.4)}
    assert found["ood_change"] == {"b": pytest.approx(-0.2), "c": 0.0}
    assert found["forget_ratio"] == {"b": pytest.approx(0.25), "c": 0.0}
    assert found["probe_change"] == {"p": 0.25}
    assert found["ood_mean"]["change"] == pytest.approx(-0.1)


def test_evaluate_measures_the_base_with_adapters_off(model, tokenizer):
    name = "model.layers.0.mlp.down_proj.weight"
    weight = model.get_parameter(name).detach()
    change = Change(tuple(weight.shape), "float32", "delta", torch.arange(50), torch.full((50,), 3.0),
                    checksum(weight.reshape(-1)[:50]))  # fmt: skip
    sets = Evaluation(id={"t": EXAMPLES}, probe={"p": [Text("hello you")]})
    before = sets.scores(model, tokenizer)
    found = evaluate(model, tokenizer, sets, {"x": SparseAdapter({name: change})})
    assert found["base"] == before == sets.scores(model, tokenizer)
    assert found["adapters"]["x"]["probe"]["p"]["nll"] != before["probe"]["p"]["nll"]
    assert found["adapters"]["x"]["probe_change"]["p"] == pytest.approx(
        found["adapters"]["x"]["probe"]["p"]["nll"] - before["probe"]["p"]["nll"]
    )


def test_bad_sets_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "abc"}\n')
    for texts, message in (
        (["no-equals"], "expected NAME=FILE"),
        (["=x"], "expected NAME=FILE"),
        ([f"a={path}"], "plain text has no accuracy; give it as --probe"),
    ):
        with pytest.raises(FinepointError, match=message):
            read_sets(texts, "id")
    with pytest.raises(FinepointError, match="twice"):
        read_sets([f"a={path}", f"a={path}"], "probe")


def test_eval_answers_by_generation_and_measures_divergence(model_folder, choice_file, tmp_path, capsys):
    from finepoint.cli import main

    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "abc hgf"}\n')
    run = ["train", "--model", str(model_folder), "--data", choice_file, "--density", "0.05", "--steps", "2",
           "--output", str(tmp_path / "a")]  # fmt: skip
    assert main(run) == 0
    sets = ["--id", f"t={choice_file}", "--probe", f"p={text}", "--generate", "3", "--limit", "8"]
    assert main(["eval", "--model", str(model_folder), "--adapter", str(tmp_path / "a"), *sets]) == 0
    shown = capsys.readouterr().out
    assert "KL to the base" in shown
    assert "generated: format failures" in shown
