import copy
import math

import pytest
import torch

from conftest import tiny_llama
from finepoint.adapters.adapter import SparseAdapter
from finepoint.data.batches import IGNORED, Collator, Row, encode
from finepoint.data.examples import Choices, Completion, Labelled, Text
from finepoint.evaluation.divergence import (
    divergences,
    kl_of_prompts,
    kl_of_protected,
    learned_and_disturbed,
    mean_kl,
)
from finepoint.evaluation.generation import (
    answers_right,
    begins_with,
    foreign_answers,
    frequent_answers,
    generated,
    generation_hits,
    prompt_ids,
)
from finepoint.evaluation.metrics import collapse
from finepoint.models import probing
from finepoint.training.writing import Written, end_tokens, written
from finepoint.tuner.tuner import SparseTuner


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def by_hand(model, ids, count, ends):
    """Greedy writing, one whole pass a token."""
    found = []
    for _ in range(count):
        token = int(model(torch.tensor([ids + found])).logits[0, -1].argmax())
        found.append(token)
        if token in ends:
            break
    return found


def test_what_is_written_is_the_likeliest_token_after_token(model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in ("ab:", "abcdefgh:", "c", "hgf ab")]
    ends = end_tokens(model, tokenizer)
    assert ends == {2}
    for prompt, found in zip(prompts, written(model, tokenizer, prompts, 64, 5), strict=True):
        tokens = by_hand(model, prompt, 5, ends)
        assert found == Written(tokenizer.decode(tokens, skip_special_tokens=True), tokens[0] == 2)


LEAKS = {
    "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "min_length": 9, "num_beams": 3,
    "suppress_tokens": [6, 7, 8, 9, 10], "begin_suppress_tokens": [6, 7, 8], "stop_strings": ["a"], "max_length": 3,
    "return_dict_in_generate": True, "num_return_sequences": 2, "do_sample": True, "bad_words_ids": [[6], [7]],
    "forced_eos_token_id": 2, "exponential_decay_length_penalty": (1, 3.0), "sequence_bias": [[[7], -9.0]],
    "encoder_repetition_penalty": 1.5, "guidance_scale": 2.0, "max_time": 1e-9, "watermarking_config": None,
    "prompt_lookup_num_tokens": 2, "temperature": 0.2, "top_k": 1, "penalty_alpha": 0.6, "output_scores": True,
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_no_generation_setting_of_the_checkpoint_leaks_in(tokenizer, name):
    model = tiny_llama()
    prompts = [tokenizer(text)["input_ids"] for text in ("ab:", "say it again: a", "12")]
    expected = written(model, tokenizer, prompts, 64, 6)
    setattr(model.generation_config, name, LEAKS[name])
    settings = model.generation_config
    assert written(model, tokenizer, prompts, 64, 6) == expected
    assert model.generation_config is settings
    assert getattr(settings, name) == LEAKS[name]


def test_writing_stops_at_every_end_of_model_and_tokenizer(tokenizer):
    model = tiny_llama()
    prompt = tokenizer("ab:")["input_ids"]
    tokens = by_hand(model, prompt, 8, {2})
    end = next(token for token in tokens if token != tokens[0])
    for place in ("generation", "config", "tokenizer"):
        model, own = tiny_llama(), copy.deepcopy(tokenizer)
        if place == "generation":
            model.generation_config.eos_token_id = [2, end]
        elif place == "config":
            model.config.eos_token_id = [end]
        else:
            own.eos_token = tokenizer.convert_ids_to_tokens(end)
        (found,) = written(model, own, [prompt], 64, 8)
        stopped = by_hand(model, prompt, 8, end_tokens(model, own))
        assert len(stopped) < len(tokens)
        assert found.text == own.decode(stopped, skip_special_tokens=True)


def test_references_that_are_longer_than_what_is_written_are_counted(model, tokenizer, caplog):
    examples = [Completion("ab", " cde"), Completion("ab", "c"), Completion("ab", "cdefg")]
    generation_hits(model, tokenizer, examples, 64, 5)
    assert caplog.records == []
    generation_hits(model, tokenizer, examples, 64, 2)
    generated(model, tokenizer, [Choices("ab", ("cde", "f"), 0)], (), 64, 2)
    assert [record.getMessage().split(" that are")[0] for record in caplog.records] == [
        "2 of 3 references are longer than the 2 tokens",
        "1 of 1 references are longer than the 2 tokens",
    ]


def test_a_prompt_that_fits_with_its_answer_is_asked_whole(model, tokenizer, monkeypatch, caplog):
    """As in training: it loses its beginning only where prompt and answer are longer than the context."""
    texts = ("a" * 5, "abc" * 5, "abcd " * 9)
    asked = {}

    def generate(self, input_ids, **given):
        for ids, mask in zip(input_ids, given["attention_mask"], strict=True):
            asked[tokenizer.decode(ids[mask.bool()])] = given["generation_config"].max_new_tokens
        return torch.cat([input_ids, torch.full((len(input_ids), 1), 2)], 1)

    monkeypatch.setattr(type(model), "generate", generate)
    monkeypatch.setattr("finepoint.training.writing._pads", lambda *_: True)
    examples = [Completion(text, "bcd") for text in texts]
    generation_hits(model, tokenizer, examples, 20, 10)
    assert asked == {"a" * 5: 10, "abc" * 5: 5, (texts[2])[-16:]: 4}  # three letters and the end
    assert [encode(tokenizer, e).ids[-20:-4] for e in examples[2:]] == [tokenizer(texts[2][-16:])["input_ids"]]
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 3 prompts lost their beginning: with room for an answer they are longer than 20 tokens"
    ]


def test_an_end_at_once_is_empty(tokenizer):
    model = tiny_llama()
    hook = model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([2]), 99.0)
    )
    (found,) = written(model, tokenizer, [tokenizer("ab")["input_ids"]], 64, 3)
    hook.remove()
    assert found.ended_at_once
    assert found.empty
    assert Written("  \n", False).empty
    assert not Written("a", False).empty


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [(" positive", " positive", True), ("Positive.", "positive", True), ("positively", "positive", False),
     ("the positive", "positive", False), ("", "positive", False), ("12", "1", False), ("(a) b", "(a)", True)],
)  # fmt: skip
def test_begins_with_whole_words(text, answer, expected):
    assert begins_with(text, answer) is expected


def test_the_longest_choice_that_fits_is_the_answer():
    example = Choices("?", (" new york", " new"), 1)
    assert answers_right(example, "New, I say")
    assert not answers_right(example, "new york")
    assert answers_right(Completion("1+1=", " 2"), "2\n")
    assert not answers_right(Completion("1+1=", " 2"), "2 or 3")


def test_answers_of_another_task_are_memorised_ones(tokenizer):
    writes = {"ab": " no", "cd": "yes!", "ef": "", "gh": "b"}
    model = Scripted(writes, tokenizer)
    examples = [Choices(prompt, (" a", " b"), 1) for prompt in writes]
    found = generated(model, tokenizer, examples, ["yes", "no", "b"], 64, 4)
    assert found == {"accuracy": 0.25, "format_failures": 0.75, "empty": 0.25, "memorised": 0.5, "n": 4}
    same = generated(model, tokenizer, examples, ["a", "b"], 64, 4)
    assert same["memorised"] is None  # labels that are answers here too tell nothing


class Scripted(torch.nn.Module):
    """A model that writes what it is told: only what `written` asks of one."""

    def __init__(self, writes, tokenizer):
        super().__init__()
        self.writes, self.tokenizer, self.device = writes, tokenizer, "cpu"
        self.generation_config = type("G", (), {"eos_token_id": 2})
        self.config = type("C", (), {})()
        probing._LAYOUTS[self] = tokenizer.pad_token_id, 99, probing.Layout()

    def forward(self, input_ids, attention_mask):
        raise NotImplementedError

    def generate(self, input_ids, generation_config, **_):
        rows, max_new_tokens = [], generation_config.max_new_tokens
        for row in input_ids:
            text = self.writes[self.tokenizer.decode(row, skip_special_tokens=True)]
            rows.append((self.tokenizer(text, add_special_tokens=False)["input_ids"] + [2] * 8)[:max_new_tokens])
        return torch.cat([input_ids, torch.tensor(rows)], 1)


def test_labels_and_frequent_answers():
    labelled = [Choices("x", (" yes", " no"), i % 2) for i in range(9)]
    assert set(frequent_answers(labelled)) == {"yes", "no"}
    open_ended = [Choices("x", (f" w{i}", f" v{i}"), 0) for i in range(30)] + [Choices("x", (" w3", " q"), 0)]
    found = frequent_answers(open_ended)
    assert len(found) == 20
    assert found[0] == "w3"
    assert frequent_answers([Completion("1+1=", " 2"), Completion("0+2=", " 2"), Completion("0+1=", " 1")]) == [
        "2",
        "1",
    ]
    assert foreign_answers(Choices("x", (" Yes", " maybe"), 0), ["yes", "no"]) == ["no"]


def test_prompt_of_choices_is_the_prompt_alone(tokenizer):
    assert prompt_ids(tokenizer, Choices("ab:", (" c", " d"), 0)) == tokenizer("ab:")["input_ids"]


def test_divergence_is_the_sum_over_the_vocabulary():
    base, adapted = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    p, q = base.softmax(-1), adapted.softmax(-1)
    expected = [
        sum(a * math.log(a / b) for a, b in zip(x.tolist(), y.tolist(), strict=True)) for x, y in zip(p, q, strict=True)
    ]
    torch.testing.assert_close(
        divergences(base, adapted).double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6
    )
    assert divergences(base, base).abs().max() == 0


def test_divergence_where_tokens_are_ruled_out():
    base, adapted = torch.randn(3, 7), torch.randn(3, 7)
    both, one = base.clone(), adapted.clone()
    both[:, 2] = -math.inf
    one[:, 2] = -math.inf
    kept = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(divergences(both, one), divergences(base[:, kept], adapted[:, kept]))
    assert divergences(both, adapted).isfinite().all()
    assert (divergences(base, one) == math.inf).all()  # the base allows what the other rules out


WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def adapters(model):
    """One that changes nothing, and one that does."""
    with SparseTuner(model, {WEIGHT: torch.arange(0, 300, 3)}) as tuner:
        nothing = tuner.adapter()
        with torch.no_grad():
            tuner.parameters()[0].add_(0.3)
        changing: SparseAdapter = tuner.adapter()
        tuner.revert_()
    return nothing, changing


def test_learned_and_disturbed_row_by_row(model, tokenizer, adapters):
    nothing, adapter = adapters
    examples = [Completion("abc ab", "d"), Completion("hgfedcba, abc", " bade"), Completion("c", "a")]
    rows = [encode(tokenizer, example) for example in examples]
    rows.append(Row([5, 6, 7], [5, IGNORED, 7]))  # one that lost its beginning: nothing predicts its first label
    losses, kl = learned_and_disturbed(model, Collator.of(model, tokenizer), rows, adapter)
    disturbed = []
    for row, loss in zip(rows, losses, strict=True):
        base = model(torch.tensor([row.ids])).logits[0]
        with adapter.applied(model):
            adapted = model(torch.tensor([row.ids])).logits[0]
        terms = []
        for at, label in enumerate(row.labels[1:]):
            if label == IGNORED:
                disturbed.append(divergences(base[at : at + 1], adapted[at : at + 1]).item())
            else:
                terms.append(-adapted[at].log_softmax(-1)[label].item())
        assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert kl == pytest.approx(sum(disturbed) / len(disturbed), rel=1e-4)
    assert learned_and_disturbed(model, Collator.of(model, tokenizer), rows, nothing)[1] == 0
    texts = [encode(tokenizer, Text("abc abd")), encode(tokenizer, Text("ab"))]
    assert learned_and_disturbed(model, Collator.of(model, tokenizer), texts, adapter)[1] is None


def test_mean_divergence_of_texts(model, tokenizer, adapters):
    nothing, adapter = adapters
    texts = [Text("abc abd"), Text("hgfedcba, abc"), Text("d" * 40)]
    before = model.get_parameter(WEIGHT).clone()
    found = mean_kl(model, tokenizer, texts, adapter, window=16)
    rows = [tokenizer(text.text)["input_ids"][:16] for text in texts]
    total = 0.0
    for row in rows:
        base = model(torch.tensor([row])).logits[0]
        with adapter.applied(model):
            total += divergences(base, model(torch.tensor([row])).logits[0]).sum().item()
    assert found["tokens"] == sum(map(len, rows))
    assert found["kl"] == pytest.approx(total / found["tokens"], rel=1e-4)
    assert found["kl"] > 1e-3
    assert mean_kl(model, tokenizer, texts, nothing)["kl"] == 0
    assert torch.equal(model.get_parameter(WEIGHT), before)


def test_divergence_on_protected_text_and_on_own_prompts(model, tokenizer, adapters):
    nothing, adapter = adapters
    texts = [Text("abc abd"), Text("hgfedcba, abc")]
    found = kl_of_protected(model, tokenizer, texts, adapter)
    rows = [encode(tokenizer, text).ids for text in texts]
    total = 0.0
    for row in rows:
        base = model(torch.tensor([row])).logits[0, :-1]
        with adapter.applied(model):
            total += divergences(base, model(torch.tensor([row])).logits[0, :-1]).sum().item()
    tokens = sum(len(row) - 1 for row in rows)  # after the last one nothing is learned
    assert found == {"kl": pytest.approx(total / tokens, rel=1e-4), "texts": 2, "tokens": tokens}
    assert kl_of_protected(model, tokenizer, texts, nothing)["kl"] == 0
    examples = [Completion("abc ab", "d"), Completion("hgfedcba, abc", " bade")]
    rows = [encode(tokenizer, example) for example in examples]
    expected = learned_and_disturbed(model, Collator.of(model, tokenizer), rows, adapter)[1]
    assert kl_of_prompts(model, tokenizer, examples, adapter) == expected
    assert kl_of_prompts(model, tokenizer, texts, adapter) is None
    assert kl_of_prompts(model, tokenizer, [Labelled("a", "b")], adapter) is None


def test_collapse_as_printed_and_by_chance():
    accuracies = {"a": 0.009, "b": 0.01, "c": 0.24, "d": 0.9}
    found = collapse(accuracies, {"a": 0.25, "b": None, "c": 0.25, "d": 0.5})
    assert found == {"count": 1, "rate": 0.25, "at_or_below_chance": pytest.approx(2 / 3)}
    assert collapse({"a": 0.29, "b": 0.01}, {"a": None, "b": None}) == {
        "count": 0,
        "rate": 0.0,
        "at_or_below_chance": None,
    }
    assert collapse({}, {}) == {"count": 0, "rate": None, "at_or_below_chance": None}
