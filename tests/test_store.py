"""Large files in tokens are kept on disk: the same rows and lines of the log as out of memory, of the rows that a run
reads, in an order that does not depend on how many these are."""

import gzip
import json
import logging
import random
from dataclasses import replace
from itertools import islice, pairwise

import pytest

from conftest import assert_same_tensors, make_tokenizer, tiny_llama, write_lines
from finepoint.data import store
from finepoint.data.chats import learned_turns
from finepoint.data.examples import read_parts
from finepoint.data.leaks import TRAINED_ON, Seen
from finepoint.data.tokens import encode_all
from finepoint.errors import FinepointError
from finepoint.training import run
from finepoint.training.checkpoints import digest_of
from finepoint.training.context import prepare
from finepoint.training.run import train
from finepoint.training.settings import TrainConfig
from finepoint.training.trainer import Stretches

SAID = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"},
        {"role": "assistant", "content": "ef"}]  # fmt: skip
ROWS = {
    "completion": [{"prompt": "ab" * n, "completion": " c" * (n % 5 + 1), "id": n} for n in range(40)][1:],
    "text": [{"text": "play it " * n} for n in range(1, 20)] + [{"text": "a"}],  # one has nothing to learn
    "chat": [{"messages": SAID[: 2 + 2 * (n % 2)]} for n in range(9)],
    "labelled": [{"text": "ab " * n, "label": n % 3 * 5} for n in range(1, 30)],
}


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """All files are large, and the cache is empty."""
    monkeypatch.setattr(store, "LARGE", 0)
    monkeypatch.setattr(store, "PART", 7)
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def stored(files, limit=30, columns=None, turns="all", labels=None, reads=None):
    found = store.large_data(files, columns or {}, need=True)
    labels = found.labels if labels is None else labels
    return found, found.encoded(make_tokenizer(), limit, labels, "example", tiny_llama(), turns, reads)


@pytest.mark.parametrize("turns", ["all", "each"])
@pytest.mark.parametrize("form", ROWS)
def test_rows_on_disk_are_those_in_memory(kept, tmp_path, form, turns, caplog):
    caplog.set_level(logging.INFO)
    files = [str(write_lines(tmp_path / "a.jsonl", ROWS[form])), str(write_lines(tmp_path / "b.jsonl", ROWS[form][:5]))]
    parts = read_parts(files, need=True)
    examples = [example for part in parts for example in part.examples]
    caplog.clear()
    expected = encode_all(make_tokenizer(), learned_turns(examples, turns), 30, ["0", "5", "10"], "example")
    said = caplog.messages
    for _ in range(2):  # written, and found
        caplog.clear()
        found, rows = stored(files, turns=turns)
        assert list(rows) == expected
        assert rows[-1] == expected[-1]
        assert rows[2:5] == expected[2:5]
        assert (rows.seen, found.form) == (Seen.of(examples), form)
        assert found.labels == (["0", "5", "10"] if form == "labelled" else [])
        assert rows.told(found.sources) == [part.told() for part in parts]
        assert [line for line in said if line not in caplog.messages] == []
        learnable = store.learnable(expected)
        assert list(store.learnable(rows)) == learnable
        assert store.lengths(rows) == store.lengths(expected)
        assert digest_of(store.learnable(rows)) == digest_of(rows)
        assert digest_of(rows, expected[:2]) != digest_of(rows)
        order = list(Stretches(store.learnable(rows), 4, 0))
        assert sorted(order) == list(range(len(learnable)))


def test_a_store_is_known_by_all_that_decides_its_rows(kept, tmp_path):
    file = tmp_path / "a.jsonl"
    write_lines(file, [{"q": "ab", "a": "c", "prompt": "d", "completion": "e"}] * 3)
    seen = set()

    def new(*args, **kwargs):
        folder = stored(*args, **kwargs)[1].folder
        added = folder not in seen
        seen.add(folder)
        return added

    assert new(file)
    assert not new(file)
    assert not new(write_lines(tmp_path / "same.jsonl", [json.loads(line) for line in file.read_text().splitlines()]))
    assert new(file, limit=4)
    assert new(file, columns={"prompt": "q", "completion": "a"})
    assert new(file, turns="each")
    write_lines(file, [{"prompt": "d", "completion": "f"}] * 3)
    assert new(file)
    tokenizer = make_tokenizer()
    tokenizer.chat_template += " "
    assert store.identity_of(tokenizer) != store.identity_of(make_tokenizer())
    with gzip.open(tmp_path / "p.jsonl.gz", "wb") as packed:
        packed.write(file.read_bytes())
    assert new(tmp_path / "p.jsonl.gz")
    assert list(stored(tmp_path / "p.jsonl.gz")[1]) == list(stored(file)[1])


@pytest.fixture
def many(tmp_path):
    """Rows of which some hold nothing to learn."""
    rows = [{"prompt": f"a{n} b", "completion": "" if n % 9 == 0 else " c" * (n % 5 + 1)} for n in range(600)]
    return write_lines(tmp_path / "many.jsonl", rows)


@pytest.mark.parametrize("reads", [3, 60, 350])
def test_what_a_run_reads_is_the_beginning_of_what_all_runs_read(kept, many, reads, caplog):
    caplog.set_level(logging.INFO)
    found, every = stored(many, reads=None)
    some = stored(many, reads=(5, reads))[1]
    every, some = every.learnable(), some.learnable()
    assert (len(some) < len(every)) == (reads < 100)
    assert "of 600 rows are read" in caplog.text or reads > 100
    assert len(some) >= reads
    begun = [[rows[at] for at in islice(rows.drawn(5), reads)] for rows in (every, some)]
    assert begun[0] == begun[1]
    assert digest_of(some) == digest_of(every)
    expected = [every[at] for at in dense_order(found, every, 5)]
    assert begun[0] == expected[:reads]
    assert some.told(found.sources)[0]["taken"] == len(some)
    assert list(some) == list(stored(many, reads=(5, reads))[1].learnable())


def dense_order(found, rows, seed):
    """All places, by a shuffle of the files' rows as textbooks have it."""
    order, draw = list(range(found.count)), random.Random(f"{seed}:0")
    for at in range(len(order)):
        other = draw.randrange(at, len(order))
        order[at], order[other] = order[other], order[at]
    lines = (rows.lines if rows.places is None else rows.lines[rows.places]).tolist()
    return [at for line in order for at in range(len(rows)) if lines[at] == line]


def test_a_run_that_reads_few_rows_trains_as_one_that_reads_all_and_is_gone_on_with(
    kept, model_folder, many, tmp_path, monkeypatch
):
    config = TrainConfig(model=str(model_folder), data=str(many), output=str(tmp_path / "few"), density=0.05,
                         rule="gallop", scoring_examples=6, steps=5, batch_size=1, save_every=3, schedule="constant",
                         warmup=0)  # fmt: skip
    few = train(config)
    assert few["sources"][0]["rows"] == 600
    assert few["sources"][0]["taken"] + few["sources"][0]["skipped"] < 300
    train(replace(config, output=str(tmp_path / "parted"), steps=3))
    with monkeypatch.context() as whole:
        whole.setattr(run, "rows_read", lambda config: None)
        assert train(replace(config, output=str(tmp_path / "all")))["sources"][0]["rows"] == 600 - 67
        train(replace(config, output=str(tmp_path / "parted"), resume=True))
    for folder in ("few", "all", "parted"):
        (tmp_path / folder / TRAINED_ON).unlink()  # which is another of all rows
        assert_same_tensors(tmp_path / "few", tmp_path / folder)
    monkeypatch.setattr(store, "encode_part_each", None)  # nothing is read or put in tokens again
    assert isinstance(prepare(config, run.rows_read(config)).rows, store.StoredRows)


def test_texts_longer_than_the_context_are_all_read_and_their_rows_drawn_one_by_one(kept, tmp_path):
    files = write_lines(tmp_path / "a.jsonl", [{"text": "play it " * 100}] * 5)
    _, rows = stored(files, reads=(0, 1))
    assert len(rows) > 50
    order = list(rows.learnable().drawn(0))
    assert sorted(order) == list(range(len(rows.learnable())))
    assert order != sorted(order)
    assert max(abs(b - a) for a, b in pairwise(order)) > len(rows) // 5


def test_a_row_that_no_step_draws_is_not_refused(kept, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 300
    drawn = set(islice(store.shuffled(300, random.Random("0:0")), 20))
    for bad in (min(drawn), min({*range(1, 300)} - drawn)):
        path = write_lines(tmp_path / "bad.jsonl", [*rows[:bad], {"prompt": "a", "completion": 3}, *rows[bad + 1 :]])
        if bad in drawn:
            with pytest.raises(FinepointError, match=f"line {bad + 1}: 'completion' must be"):
                stored(path, reads=(0, 20))
        else:
            assert len(stored(path, reads=(0, 20))[1]) == 20


def test_what_cannot_be_read_is_named_and_leaves_nothing(kept, tmp_path):
    good = {"prompt": "a", "completion": "b"}
    cases = {"line 20: 'completion' must be": [good] * 19 + [{"prompt": "a", "completion": 3}],
             "no example has a token to learn": [{"text": "a"}] * 3}  # fmt: skip
    for message, rows in cases.items():
        with pytest.raises(FinepointError, match=message):
            stored(write_lines(tmp_path / "bad.jsonl", rows))
    assert not any(path.name == "ids.bin" for path in kept.rglob("*"))
    other = [str(write_lines(tmp_path / f"{n}.jsonl", rows)) for n, rows in enumerate(([good], [{"text": "ab"}]))]
    with pytest.raises(FinepointError, match="must be of one form"):
        stored(other)
    with pytest.raises(FinepointError, match="there is no column 'q'"):
        stored(other[0], columns={"text": "q"})


def test_shares_rows_in_memory_and_a_cache_that_cannot_be_written_to_stay_in_memory(kept, tmp_path, monkeypatch):
    files = [str(write_lines(tmp_path / f"{n}.jsonl", ROWS["completion"])) for n in range(2)]
    assert store.large_data([f"{file}=0.5" for file in files], {}, True) is None
    assert store.large_data(ROWS["completion"], {}, True) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path / "file"))
    assert store.large_data(files, {}, True) is None


def test_stores_that_were_not_used_for_longest_give_way(kept, tmp_path):
    import os

    folders = []
    for number in range(3):
        found, rows = stored(write_lines(tmp_path / "a.jsonl", [{"prompt": "a" * (number + 1), "completion": "b"}]))
        folders.append(rows.folder)
        os.utime(rows.folder / store.FACTS, (number + 1, number + 1))
        os.utime(found.folder / store.FACTS, (number + 0.5, number + 0.5))
    store.tidy(kept, sum(file.stat().st_size for file in folders[-1].iterdir()) + 1)
    assert folders[2].is_dir()
    assert not folders[0].exists()
    assert not folders[1].exists()


@pytest.mark.parametrize("file", ["ids.bin", "mask.bin", "ends.npy"])
def test_a_store_that_is_damaged_is_made_anew(kept, tmp_path, file, caplog):
    path = write_lines(tmp_path / "a.jsonl", ROWS["completion"])
    _, rows = stored([path])
    expected = list(rows)
    damaged = rows.folder / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    for broken in (bytes(content), bytes(content[: len(content) // 2])):
        damaged.write_bytes(broken)
        caplog.clear()
        assert list(stored([path])[1]) == expected
        assert "are damaged, and are made anew" in caplog.text
    caplog.clear()
    assert list(stored([path])[1]) == expected
    assert "damaged" not in caplog.text
