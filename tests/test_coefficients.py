"""The search for merging weights, on scores made up and on a real task."""

import pytest
import torch

from conftest import assert_same_bits, snapshot, tiny_llama
from finepoint.adapters.combining import merge
from finepoint.data.examples import Choices, Labelled, Text
from finepoint.errors import FinepointError
from finepoint.evaluation import combining_weights
from finepoint.evaluation.combining_weights import GRID, tuned_weights
from finepoint.evaluation.scoring import accuracy, mean_nll
from test_combining import NAMES, make

TEXTS = [Text("abcdefgh"), Text("hello you")]
CHOICES = [Choices(f"{a}{b}:", (" x", " yy", " z"), len(a + b) % 3) for a in "abcdefgh" for b in ("h", "gf", "e")]


def made_up(monkeypatch, score):
    """Scores by a formula of the weights alone; the weights are read off the merged adapter."""

    def measured(model, tokenizer, merged, examples, measure):
        parts = [0.0, 0.0] if merged is None else [part["weight"] for part in merged.info["merge"]["parts"]]
        return score(*parts)

    monkeypatch.setattr(combining_weights, "_measured", measured)


def test_the_search_finds_the_top_of_a_hill_without_measuring_twice(monkeypatch):
    model = tiny_llama()
    pair = [make(model, 1), make(model, 2)]
    seen = []

    def hill(a, b):
        seen.append((a, b))
        return -((a - 0.5) ** 2) - (b - 1.25) ** 2 - 0.3 * (a - 0.5) * (b - 1.25)

    made_up(monkeypatch, hill)
    found = tuned_weights(model, None, pair, CHOICES)
    assert found["weights"] == [0.5, 1.25]
    assert found["score"] == max(row["score"] for row in found["tried"]) == 0
    assert len(seen) == len(set(seen)) == len(found["tried"]) <= 3 * 2 * len(GRID)
    assert found["tried"][0]["weights"] == [1.0, 1.0]
    made_up(monkeypatch, lambda a, b: -hill(a, b))
    assert tuned_weights(model, None, pair, TEXTS)["weights"] == [0.5, 1.25]  # of a likelihood the lowest


def test_equal_scores_keep_the_weights_there_are(monkeypatch):
    model = tiny_llama()
    made_up(monkeypatch, lambda a, b: 0.5)
    pair = [make(model, 1), make(model, 2)]
    assert tuned_weights(model, None, pair, CHOICES)["weights"] == [1.0, 1.0]
    assert tuned_weights(model, None, pair, CHOICES, start=[0.25, 2])["weights"] == [0.25, 2.0]


def test_weights_that_cannot_be_merged_by_are_passed_over(monkeypatch):
    model = tiny_llama()
    made_up(monkeypatch, lambda a, b: -a)
    found = tuned_weights(model, None, [make(model, 1), make(model, 2)], CHOICES, "consensus", {"strictness": 0})
    assert found["weights"] == [0.25, 1.0]
    problems = {tuple(row["weights"]): row["problem"] for row in found["tried"] if "problem" in row}
    assert set(problems) == {(0.0, 1.0), (0.25, 0.0)}  # one of two alone is no consensus
    assert all("leaves no entry" in problem for problem in problems.values())


@pytest.mark.parametrize("kind", ["delta", "value"])
def test_the_scores_are_those_of_the_merged_model(tokenizer, kind):
    model = tiny_llama(torch.float64)
    base = snapshot(model)
    pair = [make(model, 1, kind=kind), make(model, 2, kind=kind)]
    by_accuracy = tuned_weights(model, tokenizer, pair, CHOICES, "ties", {"density": 0.5}, grid=[0, 0.5, 1])
    by_nll = tuned_weights(model, tokenizer, pair, TEXTS, grid=[0, 1])
    assert by_accuracy["measure"] == "accuracy"
    assert by_nll["measure"] == "nll"
    assert_same_bits(base, snapshot(model))
    for row in by_accuracy["tried"]:
        if any(row["weights"]):
            with merge(pair, row["weights"], "ties", model=model, density=0.5).applied(model):
                assert row["score"] == accuracy(model, tokenizer, CHOICES)["accuracy"]
    assert by_nll["score"] == min(row["score"] for row in by_nll["tried"])
    for row in by_nll["tried"]:
        if not any(row["weights"]):
            assert row["score"] == mean_nll(model, tokenizer, TEXTS)["nll"]


def test_what_cannot_be_tuned_is_refused(tokenizer):
    model = tiny_llama()
    pair = [make(model, 1), make(model, 2)]
    with pytest.raises(FinepointError, match="whose head cannot be merged"):
        tuned_weights(model, tokenizer, pair, [Labelled("a", "b")])
    with pytest.raises(FinepointError, match="plain text has no accuracy; tune by nll"):
        tuned_weights(model, tokenizer, pair, TEXTS, measure="accuracy")
    with pytest.raises(FinepointError, match="tiez"):
        tuned_weights(model, tokenizer, pair, TEXTS, "tiez")
    with pytest.raises(FinepointError, match="1 weights for 2 adapters"):
        tuned_weights(model, tokenizer, pair, TEXTS, start=[1])
    wrong = tiny_llama()
    with torch.no_grad():
        wrong.get_parameter(NAMES[0]).add_(1)
    with pytest.raises(FinepointError, match="adapter 1: the adapter does not fit"):
        tuned_weights(wrong, tokenizer, pair, TEXTS)
