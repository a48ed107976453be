import math

import pytest
import torch

from conftest import tiny_llama
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.change import Change
from finepoint.adapters.entries import checksum
from finepoint.data.batches import IGNORED, Collator, encode
from finepoint.data.examples import Chat, Choices, Completion, Text
from finepoint.data.tokens import encode_pair
from finepoint.errors import FinepointError
from finepoint.evaluation import scoring
from finepoint.evaluation.divergence import learned_and_disturbed, mean_kl
from finepoint.evaluation.evaluate import Evaluation, measured, read_sets
from finepoint.evaluation.generation import generated
from finepoint.evaluation.metrics import changes, forget_ratio
from finepoint.evaluation.scoring import accuracy, mean_nll, token_log_likelihoods


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
    requests = [encode_pair(tokenizer, e.prompt, c) for e in EXAMPLES for c in e.choices]
    found = token_log_likelihoods(model, tokenizer, requests, 64)
    for (context, continuation), values in zip(requests, found, strict=True):
        expected = plain_log_likelihood(model, context + continuation, len(context))
        torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_choices_of_one_prompt_share_one_row(model, tokenizer):
    requests = [encode_pair(tokenizer, "ab", choice) for choice in "cdefg"]
    rows = []
    token_log_likelihoods(model, tokenizer, requests, 64, rows.append)
    assert sum(rows) == 1
    rows.clear()
    pairs = [("ab", "cd"), ("ab", "ce"), ("ab", "d"), ("abc", "d")]
    token_log_likelihoods(model, tokenizer, [encode_pair(tokenizer, *pair) for pair in pairs], 64, rows.append)
    assert sum(rows) == 2  # the last has a prompt of its own


def test_choice_accuracy_raw_and_normalised(model, tokenizer):
    raw = normalised = 0
    right: list[float] = []
    for e in EXAMPLES:
        sums = []
        for choice in e.choices:
            context, continuation = encode_pair(tokenizer, e.prompt, choice)
            values = plain_log_likelihood(model, context + continuation, len(context))
            sums.append(sum(values))
            right += values if choice == e.choices[e.answer] else []
        lengths = [len(choice.strip()) for choice in e.choices]
        raw += max(range(len(sums)), key=lambda i: sums[i]) == e.answer
        normalised += max(range(len(sums)), key=lambda i: sums[i] / lengths[i]) == e.answer
    found = accuracy(model, tokenizer, EXAMPLES)
    assert found["accuracy"] == raw / 3
    assert found["accuracy_normalised"] == normalised / 3
    assert found["stderr"] == pytest.approx(math.sqrt(raw / 3 * (1 - raw / 3) / 3))
    assert found["n"] == 3
    assert found["loss"]["nll"] == pytest.approx(-sum(right) / len(right), rel=1e-5)
    assert found["loss"]["tokens"] == len(right)
    trained = mean_nll(model, tokenizer, EXAMPLES)  # counts what training would learn
    assert found["loss"] == {name: pytest.approx(value, rel=1e-5) for name, value in trained.items()}


def test_a_right_choice_of_probability_0_leaves_the_accuracy_without_a_loss(model, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(scoring, "token_log_likelihoods",
                        lambda m, t, requests, *_: [torch.tensor([-float("inf")])] * len(requests))  # fmt: skip
    found = accuracy(model, tokenizer, [Choices("a:", (" b", " c"), 0)])
    assert found["loss"] is None
    assert found["accuracy"] == 1
    assert "no loss beside the accuracy" in caplog.text


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
    pieces = plain_log_likelihood(model, ids[:6], 1) + plain_log_likelihood(model, ids[5:], 1)
    windowed = mean_nll(model, tokenizer, [Text("abcdefgh")], max_length=5)
    assert windowed["nll"] == pytest.approx(-sum(pieces) / len(pieces), rel=1e-5)
    assert windowed["tokens"] == len(pieces) == len(ids) - 1


def test_nll_of_completions_counts_only_what_follows_the_prompt(model, tokenizer):
    found = mean_nll(model, tokenizer, [Choices("abc:", (" de", " x"), 0)])
    ids = tokenizer("abc: de")["input_ids"]
    expected = plain_log_likelihood(model, ids, 4)
    assert found == {"nll": pytest.approx(-sum(expected) / 3, rel=1e-5), "stderr": None, "tokens": 3}


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
        "1 of 2 prompts are longer than 5 tokens and lost their beginning: 44% of all tokens"
    ]


def test_all_choices_of_an_example_are_compared_after_the_same_text(model, tokenizer):
    example = Choices("abcdefghij:", (" a", " jihgf", " bc"), 0)
    (found,) = scoring.choice_likelihoods(model, tokenizer, [example], 8)
    for choice, value in zip(example.choices, found, strict=True):
        # The longest, of 6 tokens, of which the last is given nothing, leaves room for three.
        ids = tokenizer("ij:" + choice)["input_ids"]
        assert value == pytest.approx(sum(plain_log_likelihood(model, ids, 3)), rel=1e-4)
    with pytest.raises(FinepointError, match="example 1 has a choice of 6 tokens, and the model is given 5"):
        scoring.choice_likelihoods(model, tokenizer, [example], 5)


def test_nll_of_chats_counts_what_is_learned_alone(model, tokenizer):
    turns = (("user", "ab"), ("assistant", "cde"), ("user", "fgh i"), ("assistant", "j"))
    row = encode(tokenizer, Chat(turns))
    log_probs = plain_log_likelihood(model, row.ids, 1)
    learned = [value for value, label in zip(log_probs, row.labels[1:], strict=True) if label != IGNORED]
    assert 0 < len(learned) < len(row.ids) - row.labels.index(next(x for x in row.labels if x != IGNORED))
    found = mean_nll(model, tokenizer, [Chat(turns)])
    assert found["nll"] == pytest.approx(-sum(learned) / len(learned), rel=1e-5)
    assert found["tokens"] == len(learned)
    # One that loses its beginning counts what is left of what is learned.
    limit = len(row.ids) - 8
    kept = plain_log_likelihood(model, row.ids[-limit - 1 :], 1)
    wanted = [value for value, label in zip(kept, row.labels[-limit:], strict=True) if label != IGNORED]
    assert mean_nll(model, tokenizer, [Chat(turns)], max_length=limit)["tokens"] == len(wanted)


def test_texts_of_one_token_have_no_likelihood(model, tokenizer):
    assert mean_nll(model, tokenizer, [Text("a"), Text("ab")])["tokens"] == 1
    with pytest.raises(FinepointError, match="no example has a token"):
        mean_nll(model, tokenizer, [Text("a")])


def ways_to_measure(model, tokenizer):
    """Everything that measures a causal model, by name."""
    texts, chats = [Text("abc def")], [Chat((("user", "ab"), ("assistant", "c")))]
    return {
        "choices": lambda: accuracy(model, tokenizer, EXAMPLES),
        "completions": lambda: accuracy(model, tokenizer, [Completion("ab", "c")], new_tokens=2),
        "chats": lambda: accuracy(model, tokenizer, chats, new_tokens=2),
        "nll": lambda: mean_nll(model, tokenizer, texts),
        "kl": lambda: mean_kl(model, tokenizer, texts, SparseAdapter({})),
        "learned": lambda: learned_and_disturbed(
            model, Collator.of(model, tokenizer), [encode(tokenizer, chats[0])], SparseAdapter({})
        ),
        "generated": lambda: generated(model, tokenizer, EXAMPLES, (), 64, 2),
    }


WAYS = ["choices", "completions", "chats", "nll", "kl", "learned", "generated"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_a_model_with_damaged_weights_is_not_measured(tokenizer, way, bad):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = bad
    with pytest.raises(FinepointError, match="NaN or infinite, so that nothing can be measured"):
        ways_to_measure(model, tokenizer)[way]()


@pytest.mark.parametrize("way", WAYS)
def test_measuring_gives_every_module_its_mode_back(tokenizer, way):
    model = tiny_llama()
    ways_to_measure(model, tokenizer)[way]()
    assert not any(module.training for module in model.modules())
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    ways_to_measure(model, tokenizer)[way]()
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_token_that_the_model_rules_out_has_no_likelihood(model, tokenizer):
    ruled_out = tokenizer("d")["input_ids"]
    hook = model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor(ruled_out), -math.inf)
    )
    try:
        assert math.isfinite(mean_nll(model, tokenizer, [Text("abc")])["nll"])
        assert accuracy(model, tokenizer, [Choices("ab", ("d", "c"), 1)])["accuracy"] == 1.0
        with pytest.raises(FinepointError, match="the probability 0"):
            mean_nll(model, tokenizer, [Text("abcd")])
        assert mean_kl(model, tokenizer, [Text("abc")], SparseAdapter({}))["kl"] == 0.0
    finally:
        hook.remove()


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
    found = measured(model, tokenizer, sets, {"x": SparseAdapter({name: change})})
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
    sets = ["--id", f"t={choice_file}", "--probe", f"p={text}", "--protect", str(text), "--generate", "3",
            "--limit", "8"]  # fmt: skip
    assert main(["eval", "--model", str(model_folder), "--adapter", str(tmp_path / "a"), *sets]) == 0
    shown = capsys.readouterr().out
    assert all(measure in shown for measure in ("KL to the base ", "KL to the base, prompts", "protected"))
    assert "generated: format failures" in shown
