import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_gemma, tiny_llama
from finepoint.data.batches import Collator
from finepoint.evaluation import shared_prompts
from finepoint.evaluation.scoring import token_log_likelihoods
from test_scoring import plain_log_likelihood

PLAIN = Collator(padding=0, positions=True, trims=True)


@pytest.fixture(scope="module", params=["llama", "gemma"])
def wide(request):
    return (tiny_llama if request.param == "llama" else tiny_gemma)(torch.float64).eval()


tokens = st.lists(st.integers(0, 40), min_size=1, max_size=7)
requests = st.lists(
    st.tuples(tokens, st.lists(tokens, min_size=1, max_size=4)).map(lambda p: [(p[0], c) for c in p[1]]),
    min_size=1, max_size=4,
).map(lambda groups: [pair for group in groups for pair in group])  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(requests, st.sampled_from([5, 11, 64]))
def test_shared_rows_score_as_one_plain_pass_each(wide, tokenizer, pairs, limit):
    found = token_log_likelihoods(wide, tokenizer, pairs, limit)
    for (prompt, continuation), values in zip(pairs, found, strict=True):
        ids = (prompt + continuation)[-limit - 1 :]
        count = min(len(continuation), len(ids) - 1)
        expected = plain_log_likelihood(wide, ids, len(ids) - count)
        torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(requests, st.booleans())
def test_every_token_is_scored_once_and_none_of_a_prompt_computed_twice(pairs, branching):
    rows = shared_prompts.shared_rows(pairs, 64, branching)
    scored = [(request, token) for request, _, _, token in shared_prompts.spots(rows)]
    assert sorted(request for request, _ in scored) == sorted(i for i, (_, c) in enumerate(pairs) for _ in c)
    for i, (_, continuation) in enumerate(pairs):
        assert [token for request, token in scored if request == i] == continuation
    if branching:
        assert len(rows) == len({tuple(prompt) for prompt, _ in pairs})


def test_without_the_mask_continuations_would_see_each_other(tokenizer, monkeypatch):
    wide = tiny_llama(torch.float64).eval()
    assert shared_prompts.branches_apart(wide, PLAIN)
    pairs = [([1, 2, 3], [4, 5, 6]), ([1, 2, 3], [7, 8, 9])]
    right = token_log_likelihoods(wide, tokenizer, pairs, 64)
    monkeypatch.setattr(
        shared_prompts, "branch_mask", lambda segments, dtype: torch.ones(len(segments), segments.shape[1])
    )
    wrong = token_log_likelihoods(wide, tokenizer, pairs, 64)
    torch.testing.assert_close(wrong[0], right[0])
    assert (wrong[1] - right[1]).abs().max() > 1e-3


def test_models_that_cannot_branch_are_found_out():
    model = tiny_llama().eval()
    assert shared_prompts.branches_apart(model, PLAIN)
    assert not shared_prompts.branches_apart(model, Collator(padding=0, positions=False, trims=True))
    windowed = tiny_llama().eval()
    windowed.config.sliding_window = 4
    assert not shared_prompts.branches_apart(windowed, PLAIN)
    leaky = tiny_llama().eval()
    leaky.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )
    assert not shared_prompts.branches_apart(leaky, PLAIN)


def test_a_row_has_its_widest(monkeypatch):
    monkeypatch.setattr(shared_prompts, "WIDEST", 8)
    pairs = [([1, 2, 3], [4, 5, 6])] * 5
    assert [len(row) for row in shared_prompts.shared_rows(pairs, 64, True)] == [7, 7, 5]
