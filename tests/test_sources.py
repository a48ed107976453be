import csv
import gzip
import json
import pickle
import sys
from copy import deepcopy

import pytest

from conftest import write_lines
from finepoint.data.examples import Choices, Completion, Labelled, Text, as_examples, read_examples
from finepoint.data.picked import count_of, picked
from finepoint.data.sources import SOURCES, Given, ending_of, of_memory, place_or_rows, rows_of
from finepoint.errors import FinepointError
from finepoint.models.packages import digest
from finepoint.studies.compare import contents_at
from finepoint.training.settings import TrainConfig

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ROWS = [{"prompt": "2+2=", "completion": "4", "n": 1}, {"prompt": "NA\n", "completion": 'null\u2028,"x"', "n": 2}]
EXPECTED = [Completion(row["prompt"], row["completion"]) for row in ROWS]


def write(path, rows=ROWS):
    """The same rows, by the file's ending."""
    kind = ending_of(path)
    pack = gzip.open if path.suffix == ".gz" else open
    if kind in (".csv", ".tsv"):
        with pack(path, "wt", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=",\t"[kind == ".tsv"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == ".arrow":
        datasets.Dataset.from_list(rows).save_to_disk(path.parent / "saved")
        (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
    else:
        with pack(path, "wt", encoding="utf-8") as file:
            file.write(json.dumps(rows) if kind == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "ending", [*(ending for ending in SOURCES if ending != ".md"), ".jsonl.gz", ".json.gz", ".csv.gz", ".JSONL"]
)
def test_a_file_of_any_type_holds_the_same_texts(tmp_path, ending):
    path = write(tmp_path / f"d{ending}")
    assert read_examples(path) == EXPECTED
    assert str(path) in read_examples(path)[1].where
    numbered = [(number, *row) for number, row in enumerate(rows_of(path))]
    assert count_of(path) == len(numbered) == 2
    for wanted in ([], [0], [1], [0, 1]):
        assert list(picked(path, wanted)) == [numbered[at] for at in wanted]


def test_json_may_be_lines_or_an_object_with_one_list(tmp_path):
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read_examples(tmp_path / "a.json") == read_examples(tmp_path / "b.json") == EXPECTED
    (tmp_path / "c.json").write_text("3")
    (tmp_path / "d.json").write_text("[1,")
    (tmp_path / "e.jsonl").write_text('[{"text":\n"a"}]')
    for name, message in (("c", "holds a int"), ("d", "not JSON"), ("e", "list is to be called .json")):
        with pytest.raises(FinepointError, match=message):
            read_examples(next(tmp_path.glob(f"{name}.json*")))


def test_choices_and_turns_in_a_table_are_json(tmp_path):
    rows = [{"prompt": "sky is", "choices": '[" blue", " red"]', "answer": 1}]
    assert read_examples(write(tmp_path / "d.csv", rows)) == [Choices("sky is", (" blue", " red"), 1)]
    assert read_examples(write(tmp_path / "l.csv", [{"text": "a", "label": 1}])) == [Labelled("a", "1")]


BAD_TABLES = {
    "cells": ("text,label\na\n", "line 2: 1 cells under 2 names"),
    "names": ("text,text\na,b\n", "two columns of one name"),
    "quotes": ('text,label\n"a"b,c\n', "line 2: not a table"),
    "empty": ("text\n\n\n", "holds no example"),
    "list": ("prompt,choices,answer\na,b,0\n", "'choices' must be a list, written as JSON"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_malformed_table_is_named(tmp_path, name):
    text, message = BAD_TABLES[name]
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(FinepointError, match=f"d.csv.*{message}"):
        read_examples(tmp_path / "d.csv")


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".jsonl.gz"])
def test_what_is_no_such_file_is_one_line(tmp_path, ending):
    (tmp_path / f"d{ending}").write_text("nonsense")
    with pytest.raises(FinepointError, match=f"cannot read .*d{ending}"):
        read_examples(tmp_path / f"d{ending}")


def test_every_line_of_a_text_file_is_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("first\r\n\n  second\u2028 line\nthird".encode())
    assert read_examples(tmp_path / "a.txt") == [Text("first"), Text("  second\u2028 line"), Text("third")]
    assert len(read_examples(tmp_path)) == 3
    write_lines(tmp_path / "data.jsonl", [{"text": "a"}])  # beside which the other says what they are
    assert read_examples(tmp_path) == [Text("a")]


def test_a_document_is_one_text_and_beside_data_a_description(tmp_path):
    (tmp_path / "a.md").write_text("# Title\n\nOne\ntwo.\n")
    (tmp_path / "b.txt").write_text("three\n")
    (tmp_path / "empty.md").write_text("\n")
    assert read_examples(tmp_path) == [Text("# Title\n\nOne\ntwo.\n"), Text("three")]
    write(tmp_path / "c.jsonl")
    assert read_examples(tmp_path) == EXPECTED


def test_a_table_of_another_alphabet_is_told_the_way_out(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\ncaf\u00e9,1\n".encode("latin-1"))
    with pytest.raises(
        FinepointError,
        match=r"is not UTF-8 text .*; save it as UTF-8, e.g. .*iconv -f CP1252 -t UTF-8 \S+ > \S+-utf8.csv$",
    ):
        read_examples(tmp_path / "a.csv")


def test_of_splits_in_memory_the_one_to_train_on_is_taken():
    one = datasets.Dataset.from_list([{"text": "a"}])
    other = datasets.Dataset.from_list([{"text": "b"}])
    for splits in ({"train": one}, {"test": one}, {"train": one, "test": other}):
        assert read_examples(datasets.DatasetDict(splits)) == [Text("a")]
        assert TrainConfig(model="m", output="o", data=datasets.DatasetDict(splits)).data.rows == one
    with pytest.raises(FinepointError, match="no split 'train'"):
        read_examples(datasets.DatasetDict({"test": one, "validation": other}))


def test_a_folder_is_its_files_of_one_split(tmp_path, caplog):
    caplog.set_level("INFO")
    for name, text in (("train-0.jsonl", "a"), ("train-1.jsonl", "b"), ("test.csv", "c"), (".hidden.jsonl", "d")):
        write(tmp_path / name, [{"text": text}])
    (tmp_path / "README.md").write_text("none")
    assert read_examples(tmp_path) == [Text("a"), Text("b")]
    assert caplog.messages == [f"taking the split train of {tmp_path}, which has test, train"]
    assert count_of(tmp_path) == 2
    assert list(picked(tmp_path, [1])) == [(1, f"{tmp_path}/train-1.jsonl, line 1", {"text": "b"})]
    assert read_examples(f"{tmp_path}:test") == [Text("c")]
    with pytest.raises(FinepointError, match=f"no split 'tset'; did you mean 'test'.*{tmp_path}:test"):
        read_examples(f"{tmp_path}:tset")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FinepointError, match="holds no data file"):
        read_examples(tmp_path / "empty")


def test_what_datasets_has_saved_is_read(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table.select([0]), "held": table.select([1])}).save_to_disk(tmp_path / "two")
    assert read_examples(tmp_path / "one") == EXPECTED
    assert read_examples(tmp_path / "two") == EXPECTED[:1]
    assert read_examples(f"{tmp_path}/two:held") == EXPECTED[1:]
    for name, count in (("one", 2), ("two", 1), ("two:held", 1)):
        assert count_of(f"{tmp_path}/{name}") == count
    assert list(picked(tmp_path / "one", [1])) == [(1, *list(rows_of(tmp_path / "one"))[1])]


HUB = {
    "org/name": ("org/name", None, None),
    "org/name:test": ("org/name", None, "test"),
    "org/name/config:train[:1]": ("org/name", "config", "train[:1]"),
    "org/na.me:train+test": ("org/na.me", None, "train+test"),
}


@pytest.mark.parametrize("name", HUB)
def test_a_data_set_of_the_hub_is_loaded(name, monkeypatch, tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return table if split else datasets.DatasetDict(train=table, test=table.select([0]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_examples(name) == EXPECTED
    assert asked == [HUB[name]]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    write(tmp_path / "org" / "name", ROWS[:1])
    if name == "org/name":  # what lies here comes first
        assert read_examples(name) == EXPECTED[:1]


def test_a_hub_that_cannot_be_reached_and_a_misspelt_file_are_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FinepointError, match=r"cannot load org/name: there is no such file.*the Hub \(offline\)$"):
        read_examples("org/name")
    for file in ("data/none.jsonl", "/data/none", "../none", "none", "data/none.csv.gz"):
        with pytest.raises(FinepointError, match=f"cannot read {file}: No such file"):
            read_examples(file)


def test_without_datasets_the_way_out_is_told(tmp_path, monkeypatch):
    path = write(tmp_path / "d.parquet")
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for data in (str(path), "org/name"):
        with pytest.raises(FinepointError, match=r"pip install 'finepoint\[data\]'"):
            read_examples(data)
    assert read_examples(write(tmp_path / "d.csv")) == EXPECTED


def test_several_sources_are_mixed_by_their_shares(tmp_path, caplog):
    caplog.set_level("INFO")
    a, b = (write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(n)])
            for name, n in (("a", 70), ("b", 10)))  # fmt: skip
    assert len(read_examples([a, b])) == 80
    mixed = read_examples([f"{a}=0.7", f"{b}=0.3"])
    assert sum(example.text[0] == "a" for example in mixed) == 23  # 7/3 of all ten of b
    assert len(mixed) == 33 == len(set(mixed))
    assert mixed == read_examples([f"{a}=7", f"{b}=3"]) != read_examples([f"{a}=7", f"{b}=3"], seed=1)
    assert f"mixing examples: 23 of 70 of {a}, 10 of 10 of {b}" in caplog.messages
    for data, message in (
        ([f"{a}=0.5"], "nothing to mix it with"), ([f"{a}=0.5", b], "b.jsonl has none"),
        ([f"{a}=0", f"{b}=1"], "above 0"), ([a, a], "is given twice"),
    ):  # fmt: skip
        with pytest.raises(FinepointError, match=message):
            read_examples(data)
    with pytest.raises(FinepointError, match=r"c.csv holds completion examples, and .*a.jsonl text examples"):
        read_examples([a, str(write(tmp_path / "c.csv"))])
    odd = write_lines(tmp_path / "run=3", [{"text": "odd"}])
    assert read_examples(odd) == [Text("odd")]  # the name of a file that is there is no share


def test_rows_that_python_holds_are_taken_where_a_file_is():
    frame = pytest.importorskip("pandas").DataFrame(ROWS)
    table = datasets.Dataset.from_list(ROWS)
    for rows in (ROWS, tuple(ROWS), frame, table, table.with_format("numpy"), EXPECTED, iter(ROWS)):
        held = place_or_rows(rows)
        assert isinstance(held, Given)
        assert held.endswith("of 2 rows in memory")
        assert read_examples(held) == read_examples(deepcopy(held)) == read_examples(pickle.loads(pickle.dumps(held)))
        assert read_examples(held) == EXPECTED
    assert read_examples(table) == EXPECTED
    gaps = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "input": "x"}]
    assert read_examples(type(frame)(gaps)) == [*read_examples(gaps[:1]), *read_examples(gaps[1:])]
    with pytest.raises(FinepointError, match="a dict with the keys rows; give rows"):
        read_examples({"rows": ROWS})
    with pytest.raises(FinepointError, match="data is a int"):
        read_examples(3)
    with pytest.raises(FinepointError, match="list of 0 rows in memory holds no example"):
        read_examples([])


def test_a_study_knows_data_by_content(tmp_path):
    file = write(tmp_path / "d.jsonl")
    assert contents_at(str(file)) == digest(file)
    folder = tmp_path / "folder"
    folder.mkdir()
    columns = {"prompt": "q", "completion": "a"}
    write(folder / "d.csv", [{"q": "x", "a": "y", "more": i} for i in range(2)])
    before = contents_at(str(folder), columns)
    write(folder / "d.csv", [{"q": "x", "a": "y", "more": 7} for _ in range(2)])
    assert contents_at(str(folder), columns) == before  # what is not read does not count
    write(folder / "d.csv", [{"q": "x", "a": "z"} for _ in range(2)])
    assert contents_at(str(folder), columns) != before


MADE_UP = {
    "crlf.jsonl": "".join(json.dumps(row) + "\r\n" for row in ROWS).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "blank.jsonl": ("\n" + "\n\n".join(map(json.dumps, ROWS)) + "\n\n").encode(),
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode(),
    "pandas.json": json.dumps({key: {str(at): row[key] for at, row in enumerate(ROWS)} for key in ROWS[0]}).encode(),
    "semicolon.csv": b'prompt;completion;n\r\n2+2=;4;1\r\n"NA\n";"null\xe2\x80\xa8,""x""";2\r\n',
    "excel.csv": b'\xef\xbb\xbfsep=;\r\nprompt;completion\r\n2+2=;4\r\n"NA\n";"null\xe2\x80\xa8,""x"""\r\n',
    "pipes.csv": b'prompt|completion\n2+2=|4\n"NA\n"|"null\xe2\x80\xa8,""x"""\n',
    "beside.json": json.dumps({"data": ROWS, "tags": ["x", "y"], "about": {"by": "me"}}).encode(),
    "splits.json": json.dumps({"test": ROWS[:1], "train": ROWS}).encode(),
    "tabs.csv": b'\xef\xbb\xbfprompt\tcompletion\n2+2=\t4\n"NA\n"\t"null\xe2\x80\xa8,""x"""\n',
}


@pytest.mark.parametrize("name", MADE_UP)
def test_what_other_programs_write_holds_the_same_texts(tmp_path, name):
    (tmp_path / name).write_bytes(MADE_UP[name])
    assert read_examples(tmp_path / name) == EXPECTED


def test_conversations_in_one_object_are_no_columns(tmp_path):
    turns = [[{"role": role, "content": "a"}] for role in ("user", "assistant")]
    (tmp_path / "a.json").write_text(json.dumps(dict(zip(("prompt", "completion"), turns, strict=True))))
    assert len(read_examples(tmp_path / "a.json")[0].messages) == 2


ANOTHER = {
    "packed.jsonl": (gzip.compress(b"{}"), "its name is to end in .gz"),
    "sheet.xlsx": (b"PK\x03\x04 0000", "a table saved as .csv"),
    "table.jsonl": (b"PAR1\x15\x00", "its name is to end in .parquet"),
    "windows.csv": ("prompt,completion\n".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
    "book.doc": (b"Once upon a time", ".doc is no type of data that is known"),
}


@pytest.mark.parametrize("name", ANOTHER)
def test_a_file_under_the_name_of_another_type_is_told_what_it_seems_to_be(tmp_path, name):
    (tmp_path / name).write_bytes(ANOTHER[name][0])
    with pytest.raises(FinepointError, match=ANOTHER[name][1]):
        read_examples(tmp_path / name)


@pytest.mark.parametrize(("row", "way_out"), [
    ({"Prompt": "a", " Completion": "b"}, "--columns prompt=Prompt 'completion= Completion'"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pairs are what finepoint align trains on"),
    ({"a": "b"}, "e.g. --columns prompt=question completion=answer"),
    ({"Frage": "a", "Antwort": "b"}, "e.g. --columns prompt=Frage completion=Antwort"),
    ({"system_prompt": "a", "question": "b", "response": "c"}, "e.g. --columns prompt=question completion=response"),
])  # fmt: skip
def test_the_way_out_of_unknown_keys_can_be_taken(tmp_path, row, way_out):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(FinepointError, match=way_out):
        read_examples(tmp_path / "a.jsonl")
    if "Prompt" in row:
        assert read_examples(tmp_path / "a.jsonl", {"prompt": "Prompt", "completion": " Completion"})


def test_arguments_of_other_rows_calls_are_none_of_a_call(tmp_path):
    """A table gives each row the keys of all: what was not there comes as nothing, at any depth."""
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "look", "arguments": arguments}}]}]}
        for arguments in ({"a": 1}, {"b": {"c": "x"}})]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "calls.parquet"))
    found = read_examples(str(tmp_path / "calls.parquet"))
    assert [json.loads(chat.more[1])["tool_calls"][0]["function"]["arguments"] for chat in found] == [
        {"a": 1}, {"b": {"c": "x"}}]  # fmt: skip


def test_a_frame_gives_conversations_and_numbers_as_a_file_does(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}] * 2
    frame = pandas.DataFrame(rows)
    frame.to_parquet(tmp_path / "chat.parquet")
    assert as_examples(of_memory(pandas.read_parquet(tmp_path / "chat.parquet"))) == as_examples(rows)
    labels = pandas.DataFrame({"text": ["a", "b"], "label": [0, 1]})
    assert [example.label for example in as_examples(of_memory(labels))] == ["0", "1"]
