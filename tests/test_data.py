import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import write_lines
from finepoint.data import examples as module
from finepoint.data.examples import (
    Chat,
    ChatPair,
    Choices,
    Completion,
    Labelled,
    Pair,
    Text,
    as_examples,
    label_names,
    read_examples,
    read_pairs,
    refuse_other_task,
)
from finepoint.errors import FinepointError

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CHAT = Chat((("user", "hi"), ("assistant", "ho")))
ROWS = {
    Completion: {"prompt": "2+2=", "completion": "4"},
    Choices: {"prompt": "sky is", "choices": [" blue", " red"], "answer": 0},
    Chat: {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    Text: {"text": "once"},
    Labelled: {"text": "good", "label": "pos"},
}


@pytest.mark.parametrize("form", ROWS)
def test_each_form_is_read(tmp_path, form):
    path = write_lines(tmp_path / "f.jsonl", [ROWS[form], {**ROWS[form], "group": "a", "id": 3}])
    examples = read_examples(path)
    assert [type(example) for example in examples] == [form, form]
    assert examples[0] == examples[1]


@given(st.text(min_size=1))
def test_any_text_survives(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("data") / "f.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False).replace("\n", "") + "\n\n", encoding="utf-8")
    assert read_examples(path) == [Text(text)] if text else True


BAD_LINES = {
    "not json": ("{", "line 2: not JSON"),
    "a list": ("[1]", "line 2: a list; expected"),
    "other keys": ('{"prompt": "a", "response": "b"}', r"line 2: an object with the keys \['prompt', 'response'\]"),
    "no form's keys": ('{"q": "a", "a": "b"}', r"expected \{\"prompt\".*name your columns with --columns"),
    "a typo": (
        '{"text": "a", "lable": 1}',
        r"line 2: there is 'lable'; did you mean 'label'\? .* --columns label=lable",
    ),
    "another typo": ('{"prompt": "a", "completon": "b"}', "there is 'completon'; did you mean 'completion'"),
    "another case": ('{"Prompt": "a", "completion": "b"}', "there is 'Prompt'; did you mean 'prompt'"),
    "another number": ('{"text": "a", "labels": "b"}', "did you mean 'label'.*if not, --columns text=text"),
    "an optional key": ('{"instruction": "a", "output": "b", "inputs": "c"}', "'inputs'; did you mean 'input'"),
    "another form": ('{"question": "a", "answer": "b"}', r"a row of \{\"question\", \"answer\"\} in a file that began"),
    "a mixed chat": (
        '{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}',
        "a chat example in a file that",
    ),
    "blank, of other keys": ('{"messages": []}', r"line 2: a row of \{\"messages\"\} in a file that began"),
    "number": ('{"prompt": 3, "completion": "b"}', "'prompt' must be a string"),
    "one choice": ('{"prompt": "a", "choices": ["b"], "answer": 0}', "'choices' must be two or more different"),
    "same choices": ('{"prompt": "a", "choices": ["b", "b"], "answer": 0}', "'choices' must be two or more different"),
    "answer": ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "'answer' must be the index of a choice, 0 to 1"),
    "truth": ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "'answer' must be the index"),
    "label": ('{"text": "a", "label": 0.5}', "'label' must be a string or an integer"),
    "mixed": ('{"text": "a"}', "a text example in a file that began with completion examples"),
    "deep": ("[" * 100_000, "line 2: not JSON"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_malformed_line_is_named(tmp_path, bad):
    line, message = BAD_LINES[bad]
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(ROWS[Completion]) + "\n" + line + "\n")
    with pytest.raises(FinepointError, match=message):
        read_examples(path)


NAN = float("nan")
SYSTEM = {"role": "system", "content": ""}
BLANK = {
    "text": ({"text": "a"}, {"text": ""}),
    "missing": ({"text": "a"}, {"text": None}),
    "completion": ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}),
    "prompt": ({"prompt": "a", "completion": "b"}, {"prompt": NAN, "completion": "b"}),
    "class": ({"text": "a", "label": 1}, {"text": "a", "label": " "}),
    "no class": ({"text": "a", "label": 1}, {"text": "a", "label": NAN}),
    "choices": ({"prompt": "a", "choices": ["b", "c"], "answer": 0}, {"prompt": "a", "choices": [], "answer": 0}),
    "alpaca": ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}),
    "question": ({"question": "a", "answer": "b"}, {"question": "a", "answer": ""}),
    "no turns": ({"messages": [USER, REPLY]}, {"messages": []}),
    "no answer": ({"messages": [SYSTEM, USER, REPLY]}, {"messages": [USER, {**REPLY, "content": ""}]}),
    "a question alone": ({"messages": [USER, REPLY]}, {"messages": [USER]}),
    "an answer alone": ({"messages": [USER, REPLY]}, {"messages": [REPLY]}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
    ),
    "no conversation": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": []},
    ),
    "turns": ({"prompt": [USER], "completion": [REPLY]}, {"prompt": [USER], "completion": []}),
    "pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": ""}),
    "equal pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}),
}


@pytest.mark.parametrize("kind", BLANK)
def test_rows_that_hold_nothing_to_learn_are_skipped_counted_and_said_once(tmp_path, kind, caplog):
    good, blank = BLANK[kind]
    forms = module.PAIRS if "chosen" in good else module.FORMS
    path = write_lines(tmp_path / "f.jsonl", [blank, good, blank, good, good])
    for _ in range(2):
        (part,) = module.read_parts(path, forms=forms)
        assert len(part.examples) == 3
        assert part.examples == module.read_parts(write_lines(tmp_path / "g", [good] * 3), forms=forms)[0].examples
        assert part.told()["skipped"] == 2
    said = [line for line in caplog.messages if "hold nothing to learn" in line]
    assert said == [f"2 of 5 rows of {path} hold nothing to learn: skipped (first: line 1)"]
    with pytest.raises(FinepointError, match=r"line 1: .*; none of the 2 rows holds anything to learn"):
        module.read_parts(write_lines(tmp_path / "f.jsonl", [blank, blank]), forms=forms)
    (tmp_path / "f.jsonl").write_text(json.dumps(blank) + "\n{\n")
    with pytest.raises(FinepointError, match="line 2: not JSON"):
        module.read_parts(path, forms=forms)


def test_a_frame_with_gaps_loses_the_rows_that_have_them():
    frame = pytest.importorskip("pandas").DataFrame({"text": ["a", None, "b", "c"], "label": [1, 0, NAN, True]})
    assert read_examples(frame) == [Labelled("a", "1"), Labelled("c", "True")]
    frame["label"] = [1.0, 0.0, NAN, 2.0]
    assert read_examples(frame) == [Labelled("a", "1"), Labelled("c", "2")]


def test_turns_of_which_nothing_can_be_learned_are_left_out_of_a_conversation_and_counted(tmp_path, caplog):
    rows = [[REPLY, USER, REPLY], [USER, REPLY, USER], [REPLY, REPLY, USER, REPLY, USER], [USER, REPLY]]
    path = write_lines(tmp_path / "f.jsonl", [{"messages": turns} for turns in rows])
    (part,) = module.read_parts(path)
    assert part.examples == [CHAT] * 4
    assert part.told()["trimmed"] == 3
    assert [line for line in caplog.messages if "are left out" in line] == [
        f"3 of 4 conversations of {path} begin with the assistant or do not end with it: those turns, of which nothing "
        "can be learned, are left out"
    ]


def test_a_form_and_a_type_of_file_are_one_function_each(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMS", dict(module.FORMS))
    monkeypatch.delitem(module.SOURCES, ".bar", raising=False)  # and again, afterwards
    (tmp_path / "d.bar").write_text("q|a\n2+2=|4\nsky is|?\n")
    with pytest.raises(FinepointError, match="line 1: not JSON"):
        read_examples(tmp_path / "d.bar")  # an unknown type is taken for JSON Lines

    @module.source(".bar")
    def table(path):
        header, *lines = (line.split("|") for line in path.read_text().splitlines())
        yield from ((f"{path}, line {i}", dict(zip(header, line, strict=True))) for i, line in enumerate(lines, 2))

    with pytest.raises(FinepointError, match=r"line 2: an object with the keys \['a', 'q'\]; expected \{\"prompt"):
        read_examples(tmp_path / "d.bar")

    @module.form("q", "a")
    def question(where, row):
        if row["a"] == "?":
            raise FinepointError(f"{where}: there is no text")
        return Completion(module.string(where, row, "q"), module.string(where, row, "a"), where=where)

    with pytest.raises(FinepointError, match="d.bar, line 3: there is no text"):
        read_examples(tmp_path / "d.bar")
    assert module.as_examples([{"q": "2+2=", "a": "4", "id": 7}]) == [Completion("2+2=", "4")]
    with pytest.raises(FinepointError, match=r'\{"text"\} or \{"q", "a"\}; name'):
        module.as_examples([{"x": 1}])


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(FinepointError, match="cannot read .*nowhere"):
        read_examples(tmp_path / "nowhere")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(FinepointError, match="holds no example"):
        read_examples(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(FinepointError, match="not UTF-8"):
        read_examples(tmp_path / "latin")


def test_labels_are_sorted_numbers_by_value():
    assert label_names([Labelled("a", "10"), Labelled("a", "9"), Labelled("a", "x")]) == ["9", "10", "x"]
    assert label_names([Text("a")]) == []


def test_half_a_character_is_one_line(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud83d"}]
    for row in ({"text": "a\ud800"}, {"prompt": "a", "choices": ["b", "\udc00"], "answer": 0}, {"messages": turns}):
        (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(FinepointError, match=r"d.jsonl, line 1: '\w+' holds half a character"):
            read_examples(tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "\U0001f642"}) + "\n")
    assert read_examples(tmp_path / "d.jsonl")[0].text == "\U0001f642"
    refuse_other_task("d.jsonl", read_examples(tmp_path / "d.jsonl"), [])
    with pytest.raises(FinepointError, match=r"d.jsonl holds text examples, and the model is a classifier"):
        refuse_other_task("d.jsonl", read_examples(tmp_path / "d.jsonl"), ["x", "y"])


ALPACA = "### Instruction:\nadd\n\n### Input:\n2 2\n\n### Response:\n"
READY = {
    "alpaca": ({"instruction": "add", "input": "2 2", "output": "4"}, Completion(ALPACA, "4")),
    "alpaca without input": (
        {"instruction": "add", "input": "", "output": "4"},
        Completion("### Instruction:\nadd\n\n### Response:\n", "4"),
    ),
    "dolly": ({"instruction": "add", "context": "2 2", "response": "4"}, Completion(ALPACA, "4")),
    "question": ({"question": "2+2?", "answer": "4"}, Completion("Question: 2+2?\nAnswer:", " 4")),
    "exam": (
        {"question": "2+2?", "choices": ["3", "4"], "answer": 1},
        Choices("Question: 2+2?\nAnswer:", (" 3", " 4"), 1),
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, CHAT),
    "sharegpt with system": (
        {"system": "s", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        Chat((("system", "s"), *CHAT.messages)),
    ),
    "exam of ARC": (
        {"question": "2+2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"},
        Choices("Question: 2+2?\nAnswer:", (" 3", " 4"), 1),
    ),
    "capital roles": ({"conversations": [{"from": "User", "value": "hi"}, {"from": "Assistant", "value": "ho"}]}, CHAT),
    "turns as JSON": ({"messages": json.dumps([USER, REPLY])}, CHAT),
    "conversations of roles": ({"conversations": [USER, REPLY]}, CHAT),
    "lists of turns": ({"prompt": [USER], "completion": [REPLY]}, CHAT),
    "a turn and a text": ({"prompt": [USER], "completion": "ho"}, CHAT),
}


@pytest.mark.parametrize("name", READY)
def test_ready_forms_are_read(name):
    row, expected = READY[name]
    assert as_examples([row]) == [expected]


def test_other_columns_are_ignored_and_named_once(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [{"prompt": "a", "completion": "b", "topic": 1, "url": "u", "id": 1}, {"prompt": "a", "completion": "b"}]
    path = write_lines(tmp_path / "d.jsonl", rows)
    assert read_examples(path) == read_examples(path) == [Completion("a", "b")] * 2
    told = f'ignoring the columns topic, url of {path}, which is read as {{"prompt", "completion"}}'
    assert caplog.messages == [told]


def test_of_several_forms_the_one_with_most_keys_is_read_and_named_columns_decide():
    row = {"text": "t", "label": "x", "prompt": "p", "completion": "c", "messages": [USER, REPLY]}
    assert as_examples([row]) == [Completion("p", "c")]  # the first of two with two keys
    assert as_examples([row], {"text": "text"}) == [Text("t")]
    assert as_examples([row], {"label": "prompt"}) == [Labelled("t", "p")]
    assert as_examples([row], {"text": "completion", "label": "label"}) == [Labelled("c", "x")]
    assert as_examples([row], {"messages": "messages"}) == [CHAT]
    assert as_examples([{"q": "p", "a": "c"}], {"prompt": "q", "completion": "a"}) == [Completion("p", "c")]
    assert as_examples([{"text": "t", "lable": 1}], {"text": "text"}) == [Text("t")]  # said so
    with pytest.raises(FinepointError, match="there is no column 'qq'; did you mean 'q'"):
        as_examples([{"q": "p", "a": "c"}], {"prompt": "qq", "completion": "a"})
    assert as_examples([{"text": "t"}], {"prompt": "q", "completion": "a"}) == [Text("t")]  # another file
    with pytest.raises(FinepointError, match="there is no column 'q'; there are text"):
        read_examples([{"text": "t"}], {"prompt": "q", "completion": "a"}, need=True)
    assert read_examples([{"prompt": "p", "completion": "c"}], {"prompt": "q", "completion": "a"}, need=True)
    with pytest.raises(FinepointError, match=r"the keys \['text'\]; expected"):
        as_examples([{"text": "t"}], {"nonsense": "text"})
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert as_examples([{"prompt": "p", "completion": "c"}], swapped) == [Completion("c", "p")]


PREFERENCES = {
    "texts": ({"prompt": "a:", "chosen": " y", "rejected": " n"}, Pair("a:", " y", " n")),
    "whole texts": ({"chosen": "Q: so? A: yes", "rejected": "Q: so? A: yet"}, Pair("Q: so? A:", " yes", " yet")),
    "one goes on": ({"chosen": "Q: so? A", "rejected": "Q: so?"}, None),
    "turns": ({"prompt": [USER], "chosen": [REPLY], "rejected": "no"}, "chats"),
    "a text and turns": ({"prompt": "hi", "chosen": [REPLY], "rejected": "no"}, "chats"),
    "whole turns": (
        {"chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "no"}]},
        "chats",
    ),
    "turns with their prompt, too": (
        {"prompt": "hi", "chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "no"}]},
        "chats",
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_pairs_are_texts_or_conversations(tmp_path, name):
    row, expected = PREFERENCES[name]
    path = write_lines(tmp_path / "pairs.jsonl", [row | {"score": 3}])
    if expected is None:
        with pytest.raises(FinepointError, match="'rejected' must be a string that is not empty"):
            read_pairs(path)
        return
    if expected == "chats":
        expected = ChatPair(CHAT, Chat((("user", "hi"), ("assistant", "no"))))
    assert read_pairs(path) == [expected]


BAD_PAIRS = {
    "no beginning": ({"chosen": "yes", "rejected": "no"}, "begin with nothing in common"),
    "the same": ({"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]}, "are the same conversation"),
    "another question": ({"chosen": [USER, REPLY], "rejected": [{**USER, "content": "ha"}, REPLY]}, "differ before"),
    "no answer": (
        {"prompt": [USER], "chosen": [REPLY, USER], "rejected": [REPLY, {**USER, "content": "a"}]},
        "end with",
    ),
    "a typo": ({"prompt": "a", "choosen": "b", "rejected": "c"}, "there is 'choosen'; did you mean 'chosen'"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_malformed_pairs_are_named(tmp_path, name):
    row, message = BAD_PAIRS[name]
    with pytest.raises(FinepointError, match=f"pairs.jsonl, line 1: .*{message}"):
        read_pairs(write_lines(tmp_path / "pairs.jsonl", [row]))


def test_of_a_prompt_of_several_turns_the_completion_alone_is_learned():
    (chat,) = as_examples([{"prompt": [USER, REPLY, USER], "completion": [REPLY], "tools": []}])
    assert chat.messages == (*CHAT.messages, *CHAT.messages)
    assert [bool(turn) for turn in chat.more] == [False, True, False, False]
    assert json.loads(chat.more[1]) == {"weight": 0}
