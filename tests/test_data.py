import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import write_lines
from finepoint.data import examples as module
from finepoint.data.examples import (
    Chat,
    Choices,
    Completion,
    Labelled,
    Text,
    label_names,
    read_examples,
    refuse_other_task,
)
from finepoint.errors import FinepointError

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
    "another tool's keys": ('{"conversations": []}', r"write conversations as \{\"messages\": "),
    "a typo": ('{"text": "a", "lable": 1}', "line 2: an object with the keys"),
    "empty": ('{"prompt": "", "completion": "b"}', "line 2: 'prompt' must be a string that is not empty"),
    "number": ('{"prompt": 3, "completion": "b"}', "'prompt' must be a string"),
    "one choice": ('{"prompt": "a", "choices": ["b"], "answer": 0}', "'choices' must be two or more different"),
    "same choices": ('{"prompt": "a", "choices": ["b", "b"], "answer": 0}', "'choices' must be two or more different"),
    "answer": ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "'answer' must be the index of a choice, 0 to 1"),
    "truth": ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "'answer' must be the index"),
    "no turns": ('{"messages": []}', "'messages' is no list of turns"),
    "turn": ('{"messages": [{"role": "user"}]}', "a turn is"),
    "last turn": ('{"messages": [{"role": "user", "content": "a"}]}', "end with the assistant"),
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


def test_a_form_and_a_type_of_file_are_one_function_each(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMS", dict(module.FORMS))
    monkeypatch.setattr(module, "SOURCES", dict(module.SOURCES))
    (tmp_path / "d.tsv").write_text("q\ta\n2+2=\t4\nsky is\t\n")
    with pytest.raises(FinepointError, match="line 1: not JSON"):
        read_examples(tmp_path / "d.tsv")  # an unknown type is taken for JSON Lines

    @module.source(".tsv")
    def table(path):
        header, *lines = (line.split("\t") for line in path.read_text().splitlines())
        yield from ((f"{path}, line {i}", dict(zip(header, line, strict=True))) for i, line in enumerate(lines, 2))

    with pytest.raises(FinepointError, match=r"line 2: an object with the keys \['a', 'q'\]; expected \{\"prompt"):
        read_examples(tmp_path / "d.tsv")

    @module.form("q", "a")
    def question(where, row):
        return Completion(module.string(where, row, "q"), module.string(where, row, "a"), where=where)

    with pytest.raises(FinepointError, match="d.tsv, line 3: 'a' must be a string that is not empty"):
        read_examples(tmp_path / "d.tsv")
    assert module.as_examples([{"q": "2+2=", "a": "4", "id": 7}]) == [Completion("2+2=", "4")]
    with pytest.raises(FinepointError, match=r'\{"text"\} or \{"q", "a"\}, with "id"'):
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
