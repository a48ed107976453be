"""Examples longer than the context: texts become several rows, prompts lose their beginning, the log says it all."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_tokenizer, tiny_llama
from finepoint.data.examples import Chat, Completion, Labelled, Text
from finepoint.data.tokens import IGNORED, encode, encode_all, room_of_prompt
from finepoint.evaluation.scoring import mean_nll
from finepoint.training.context import rows_to_keep
from tongues import tongue


def learned(row):
    return [label for label in row.labels if label != IGNORED]


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 40), limit=st.integers(2, 20), name=st.sampled_from(["gpt2", "llama3", "wordpiece"]))
def test_every_token_of_a_long_text_is_learned_once_behind_what_it_follows(length, limit, name):
    tokenizer = tongue(name)
    text = Text("play " * length)
    whole = encode(tokenizer, text)
    rows = encode_all(tokenizer, [text], limit)
    assert [label for row in rows for label in learned(row)] == whole.ids[1:]
    front = (
        whole.ids[:1] if tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"] else []
    )
    at = 0
    for number, row in enumerate(rows):
        assert len(row.ids) <= limit
        assert all(label in (token, IGNORED) for token, label in zip(row.ids, row.labels, strict=True))
        context = row.ids[: len(row.ids) - len(learned(row))]
        if number:  # behind the last token of the row before, and behind what begins every text where there is room
            assert context == ([*front, whole.ids[at]] if limit > len(front) + 1 else [whole.ids[at]])
        at += len(learned(row))


def test_texts_are_scored_to_the_last_token_whatever_the_context():
    model, tokenizer = tiny_llama(), make_tokenizer()
    for limit in (2, 3, 7, 30):
        assert mean_nll(model, tokenizer, [Text("abc def gh"), Text("xy")], max_length=limit)["tokens"] == 9 + 1


@settings(max_examples=60, deadline=None)
@given(prompt=st.integers(1, 30), answer=st.integers(1, 30), limit=st.integers(4, 24))
def test_a_prompt_loses_its_beginning_and_an_answer_that_fills_the_row_its_end(prompt, answer, limit):
    tokenizer = make_tokenizer()
    example = Completion("ab" * prompt, " " + "x" * answer)
    (row,), whole = encode_all(tokenizer, [example], limit), encode(tokenizer, example)
    context, learnt = len(whole.ids) - len(learned(whole)), len(learned(whole))
    if len(whole.ids) <= limit:
        assert row == whole
        return
    kept = min(context, max(limit - learnt, limit // 4, 1))
    assert row.ids == whole.ids[context - kept : context] + whole.ids[context : context + limit - kept]
    assert learned(row) == whole.ids[context : context + limit - kept]
    assert len(row.ids) == limit
    assert room_of_prompt(limit, learnt) >= kept > 0


def test_a_long_conversation_keeps_its_last_answer():
    tokenizer = make_tokenizer()
    chat = Chat((("user", "abc" * 9), ("assistant", "def"), ("user", "ghi"), ("assistant", "jkl")))
    (row,) = encode_all(tokenizer, [chat], 20)
    assert tokenizer.decode(row.ids) == "r: ghi\nassistant: jkl\n"[-20:]
    assert tokenizer.decode(learned(row)) == "jkl\n"


@pytest.mark.parametrize(("count", "level"), [(1, "WARNING"), (200, "INFO")])
def test_the_log_says_which_share_of_the_tokens_is_lost_and_warns_of_much(count, level, caplog):
    tokenizer = make_tokenizer()
    caplog.set_level(logging.INFO)
    short = [Completion("ab", " x")] * count
    encode_all(tokenizer, [Completion("a" * 20, " xyz"), *short], 12, what="training example")
    encode_all(tokenizer, [Completion("ab", " " + "x" * 20), *short], 12)
    encode_all(tokenizer, [Labelled("a" * 20, "no"), *[Labelled("ab", "yes")] * count * 3], 12, ["no", "yes"])
    total = [25 + 5 * count, 24 + 5 * count, 20 + 6 * count]
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    n = count + 1
    assert said == [
        (level, f"1 of {n} training examples are longer than 12 tokens and lost their beginning: "
                f"{100 * 13 / total[0]:.2g}% of all tokens"),
        (level, f"1 of {n} examples are longer than 12 tokens and lost the end of their answer: "
                f"{100 * 12 / total[1]:.2g}% of all tokens"),
        (level, f"1 of {3 * count + 1} examples are longer than 12 tokens and lost their beginning: "
                f"{100 * 8 / total[2]:.2g}% of all tokens"),
    ]  # fmt: skip
    caplog.clear()
    encode_all(tokenizer, [Text("ab" * 20), Text("ab")], 12)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 2 examples are longer than 12 tokens and are taken in several rows, 4 in all"
    ]


@pytest.mark.parametrize(("folder", "text", "said"), [
    ("mine", "abc " * 100, True), ("mine", "abc", False), ("cache", "abc " * 100, False),
])  # fmt: skip
def test_of_protected_texts_it_is_told_where_users_lose_much_of_their_own(
    folder, text, said, caplog, tmp_path, monkeypatch
):
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO)
    rows_to_keep([Text(text, where=f"{tmp_path / folder}/news.jsonl, line 1")], tiny_llama(), make_tokenizer())
    assert ("lost their beginning" in caplog.text) == said
