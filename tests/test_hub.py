"""The hub's benchmarks on rows of the hub's form, made by hand: no hub is asked."""

import json
import sys
import types

import pytest

from finepoint.data.examples import read_examples
from finepoint.data.recipes import hub
from finepoint.data.recipes.hub import TASKS, examples
from finepoint.data.recipes.table import recipe
from finepoint.errors import FinepointError

SAID = {"text": ["ice", "fire", "air"], "label": ["A", "B", "C"]}
# A row of the hub, and prompt, right choice and group of ours.
CASES = {
    "boolq": (
        {"question": "is snow cold", "passage": "Snow is ice.", "answer": True},
        "Snow is ice.\nQuestion: is snow cold?\nAnswer:", " yes", "Snow is ice.",
    ),
    "piqa": (
        {"goal": "Warm up", "sol1": "Sit down", "sol2": "Light a fire", "label": 1},
        "Question: Warm up\nAnswer:", " Light a fire", "Warm up",
    ),
    "siqa": (
        {"context": "Ann ran.", "question": "Why?", "answerA": "fun", "answerB": "late", "answerC": "no", "label": "2"},
        "Question: Ann ran. Why?\nAnswer:", " late", "Ann ran.",
    ),
    "hellaswag": (
        {"activity_label": "Food", "ctx_a": "How to boil [header] Egg [title] Boil it.", "ctx_b": "she", "label": "2",
         "source_id": "w~1", "endings": ["sings.", "sleeps.", "[step] eats  it.", "flies."], "ind": 4, "ctx": "-"},
        "Food: How to boil Egg. Boil it. She", " eats it.", "w~1",
    ),
    "winogrande": (
        {"sentence": "Ann beat Sue because _ was fast.", "option1": "Sue", "option2": "Ann", "answer": "2"},
        "Sentence: Ann beat Sue because", " Ann was fast.", "Ann | Sue",
    ),
    "arc-e": (
        {"id": "1", "question": "What is cold?", "choices": SAID, "answerKey": "A"},
        "Question: What is cold?\nAnswer:", " ice", None,
    ),
    "arc-c": (
        {"id": "1", "question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"},
        "Question: Hot?\nAnswer:", " fire", None,
    ),
    "obqa": (
        {"id": "1", "question_stem": "A thing that burns is", "choices": SAID, "answerKey": "B"},
        "A thing that burns is", " fire", None,
    ),
    "mmlu": (
        {"question": "Which?", "subject": "law", "choices": ["p", "q", "r", "s"], "answer": 3},
        "Which?\nA. p\nB. q\nC. r\nD. s\nAnswer:", " D", "law",
    ),
    "sst2": ({"sentence": "a joy ", "label": 1, "idx": 0}, "Text: a joy\nSentiment:", " positive", None),
    "cola": (
        {"sentence": "Him runs.", "label": 0, "idx": 0},
        "Him runs.\nQuestion: Is this sentence grammatical?\nAnswer:", " no", None,
    ),
    "mrpc": (
        {"sentence1": "One.", "sentence2": "Two.", "label": 1, "idx": 0},
        "One.\nTwo.\nQuestion: Do both sentences mean the same?\nAnswer:", " yes", None,
    ),
    "qqp": (
        {"question1": "Who?", "question2": "Where?", "label": 0, "idx": 0},
        "Who?\nWhere?\nQuestion: Do both questions ask the same?\nAnswer:", " no", "Who?",
    ),
    "rte": (
        {"sentence1": "One.", "sentence2": "Two.", "label": 0, "idx": 0},
        "One.\nTwo.\nQuestion: Does the second text follow from the first?\nAnswer:", " yes", "One.",
    ),
    "qnli": (
        {"question": "Who?", "sentence": "It rains.", "label": 1, "idx": 0},
        "Who?\nIt rains.\nQuestion: Does the sentence answer the question?\nAnswer:", " no", "It rains.",
    ),
    "mnli": (
        {"premise": "One.", "hypothesis": "Two.", "label": 1, "idx": 0},
        "One.\nTwo.\nQuestion: Does the second text follow from the first?\nAnswer:", " maybe", "One.",
    ),
}  # fmt: skip


def test_every_task_has_a_case():
    assert set(CASES) == set(TASKS)


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_the_hub_becomes_one_of_ours(name):
    row, prompt, right, group = CASES[name]
    (found,) = examples(TASKS[name], [row])
    assert found["prompt"] == prompt
    assert found["choices"][found["answer"]] == right
    assert found.get("group") == group


def test_rows_without_an_answer_or_with_equal_choices_are_dropped():
    row = CASES["piqa"][0]
    assert examples(TASKS["piqa"], [row | {"label": -1}, row | {"sol1": " Light a fire"}, row | {"sol1": ""}]) == []
    row = CASES["hellaswag"][0]
    assert examples(TASKS["hellaswag"], [row | {"label": ""}]) == []
    assert examples(TASKS["hellaswag"], [row | {"label": 0}])[0]["answer"] == 0
    assert examples(TASKS["siqa"], [CASES["siqa"][0] | {"label": ""}]) == []
    assert examples(TASKS["winogrande"], [CASES["winogrande"][0] | {"answer": ""}]) == []
    assert examples(TASKS["arc-e"], [CASES["arc-e"][0] | {"answerKey": ""}]) == []


def test_an_option_may_begin_the_sentence_or_follow_a_quote():
    row = CASES["winogrande"][0]
    (first,) = examples(TASKS["winogrande"], [row | {"sentence": "_ won."}])
    assert (first["prompt"], first["choices"][1]) == ("Sentence:", " Ann won.")
    (quoted,) = examples(TASKS["winogrande"], [row | {"sentence": 'She said "_ won".'}])
    assert (quoted["prompt"], quoted["choices"][1]) == ('Sentence: She said "', 'Ann won".')


@pytest.fixture
def stand_in(monkeypatch):
    """A module `datasets` that hands out hand-made rows."""
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        if split == "broken":
            raise ConnectionError("no\nroute")
        row = next(row for task, (row, *_) in CASES.items() if (TASKS[task].hub, TASKS[task].config) == (path, name))
        text = next(column for column in ("passage", "premise", "question") if column in row)
        return [row | {text: f"{row[text]} {split} {i // 2}"} for i in range(60)]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_validation_is_drawn_from_train_where_the_test_is_secret(stand_in, tmp_path):
    counts = recipe("boolq").write(tmp_path)
    assert stand_in == [("google/boolq", None, "train"), ("google/boolq", None, "validation")]
    assert counts == {"boolq-train": 54, "boolq-validation": 6, "boolq-test": 60, "dropped": 0}
    train, validation = (rows_of(tmp_path / f"boolq-{part}.jsonl") for part in ("train", "validation"))
    assert not {row["group"] for row in train} & {row["group"] for row in validation}
    assert all("validation" in row["prompt"] for row in rows_of(tmp_path / "boolq-test.jsonl"))
    assert len(read_examples(tmp_path / "boolq-train.jsonl")) == 54


def test_parts_are_as_on_the_hub_where_they_are_open(stand_in, tmp_path):
    assert set(recipe("arc-c").write(tmp_path / "a")) == {"arc-c-train", "arc-c-validation", "arc-c-test", "dropped"}
    assert set(recipe("mmlu").write(tmp_path / "b")) == {"mmlu-dev", "mmlu-validation", "mmlu-test", "dropped"}
    assert "mnli-test-mismatched" in recipe("mnli").write(tmp_path / "c")
    assert TASKS["mnli"].written == ["train", "validation", "test", "test-mismatched"]


def test_what_goes_wrong_is_said_in_a_line(stand_in, monkeypatch, tmp_path):
    with pytest.raises(
        FinepointError, match=r"cannot load google/boolq \(broken\) from the hub: no route; .*HF_ENDPOINT"
    ):
        hub.load(TASKS["boolq"], "broken")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FinepointError, match=r"pip install 'finepoint\[hub\]'"):
        recipe("boolq").write(tmp_path)
