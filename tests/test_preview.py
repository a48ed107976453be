import json

import pytest

from conftest import write_lines
from finepoint.cli import main
from finepoint.data.examples import read_examples
from finepoint.data.preview import preview
from finepoint.data.tokens import encode_fitting
from finepoint.errors import FinepointError

TURNS = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
ROWS = {
    "completion": ({"prompt": "ab", "completion": "c", "n": 1}, [["ab", False], ["c", True]]),
    "choices": (
        {"prompt": "ab", "choices": [" c", " d"], "answer": 1},
        [["ab", False], [" d", True], [" (not:  c)", False]],
    ),
    "chat": (
        {"messages": TURNS},
        [["user: ", False], ["a b", False], ["\n", False], ["assistant: ", False], ["c", True], ["\n", False]],
    ),
    "text": ({"text": "ab c"}, [["ab c", True]]),
    "labelled": ({"text": "ab c", "label": "x"}, [["ab c -> ", False], ["x", True]]),
    "pair": ({"prompt": "ab", "chosen": "c", "rejected": "d"}, [["ab", False], ["c", True], [" (not: d)", False]]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_what_is_learned_is_marked_in_every_form(kind, tmp_path):
    row, pieces = ROWS[kind]
    (file,) = preview([write_lines(tmp_path / "d.jsonl", [row])])["files"]
    assert (file["kind"], file["rows"]) == (kind, 1)
    assert [list(piece) for piece in file["examples"][0]] == pieces
    assert file["ignored"] == (["n"] if "n" in row else [])


def test_with_a_model_it_is_the_tokens_that_are_trained(tokenizer, tmp_path):
    rows = [{"prompt": "a" * i, "completion": "bc"} for i in range(1, 11)]
    (file,) = preview([write_lines(tmp_path / "d.jsonl", rows)], None, tokenizer, limit=8, shown=1)["files"]
    ((prompt, answer),) = file["examples"]
    assert (set(prompt[0]), prompt[1], answer) == ({"a"}, False, ("bc</s>", True))
    assert file["tokens"] == {"median": 8, "most": 12, "longest": 13, "total": 85, "counted": 10, "learned": 30}
    assert file["longer"] == {"limit": 8, "examples": 5, "tokens": 15, "share": 15 / 85}
    (file,) = preview([[{"text": "ab", "label": 3}]], None, tokenizer)["files"]
    assert file["examples"] == [[("ab", False)]]


def test_long_texts_lose_nothing_and_prompts_do(tokenizer, tmp_path):
    texts = write_lines(tmp_path / "t.jsonl", [{"text": "abcde " * 5}, {"text": "ab"}, {"text": ""}])
    asked = write_lines(tmp_path / "p.jsonl", [{"prompt": "abcde " * 5, "completion": "a"}])
    text, prompt = preview([texts, asked], tokenizer=tokenizer, limit=10)["files"]
    (rows,) = encode_fitting(tokenizer, read_examples(texts)[:1], 10)
    assert text["longer"] == {"limit": 10, "examples": 1, "tokens": 0, "share": 0.0, "rows": len(rows)}
    assert text["skipped"] == 1
    assert prompt["longer"] == {"limit": 10, "examples": 1, "tokens": 22, "share": 22 / 32}


def test_doubles_classes_and_leaks_are_counted(tmp_path):
    labelled = [{"text": text, "label": label} for text, label in (("a", 1), ("a", 0), ("A!", 1), ("b", 1))]
    one = write_lines(tmp_path / "one.jsonl", labelled)
    two = write_lines(tmp_path / "two.jsonl", [{"text": "b"}, {"text": "c"}])
    found = preview([one, two])
    assert found["files"][0]["duplicates"] == {"exact": 1, "normalised": 2}
    assert found["files"][0]["classes"] == {"0": 1, "1": 3}
    assert found["leaks"] == {
        one: {two: {"exact": 1, "normalised": 0, "n": 2}}, two: {one: {"exact": 1, "normalised": 0, "n": 4}}
    }  # fmt: skip
    with pytest.raises(FinepointError, match="nothing to look at"):
        preview([])


def test_on_the_command_line(model_folder, tmp_path, capsys):
    data = write_lines(tmp_path / "d.jsonl", [{"q": "ab", "a": "\x1b[31mc", "n": 1}])
    given = ["data", "preview", data, "--columns", "prompt=q", "completion=a"]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert f"{data}: 1 completion examples by prompt, completion; ignored: n\n" in out
    assert "  | ab[[\\x1b[31mc]]\n" in out
    more = ["--model", str(model_folder), "--json", "--max-length", "3"]
    assert main(["data", "preview", str(tmp_path), *given[2:], *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"][0]["longer"]["limit"] == 3
    assert len(found["files"]) == 2
    for wrong, message in (
        (["data", "preview"], "nothing to look at"), (["data", "vader", "more"], "'more' belongs to no recipe"),
        (["data", "preview", "none.jsonl"], "cannot read none.jsonl"),
    ):  # fmt: skip
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
