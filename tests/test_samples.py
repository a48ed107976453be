"""Texts that a model itself writes."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import finepoint
from conftest import assert_same_tensors, interrupted_at, make_tokenizer, tiny_llama, write_lines
from finepoint.cli import main
from finepoint.errors import FinepointError
from finepoint.runtime.files import read_record
from finepoint.studies.compare import compare
from finepoint.studies.sequence import run_sequence
from finepoint.studies.settings import CompareConfig, SequenceConfig
from finepoint.training import texts
from finepoint.training.run import train
from finepoint.training.samples import passes, texts_and_conversations
from finepoint.training.settings import TrainConfig
from finepoint.training.texts import Writer, examples_to_keep, rows_to_keep


def test_texts_and_conversations_are_written_and_the_model_and_the_random_state_stay(llama, tokenizer):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    state = torch.random.get_rng_state()
    texts = finepoint.samples(llama, tokenizer, 8, chat=False, tokens=6)
    talks = finepoint.samples(llama, tokenizer, 8, tokens=6)
    assert 4 <= len(texts) <= 8
    assert 4 <= len(talks) <= 8
    assert all(len(row["text"]) <= 6 and row["text"].strip() for row in texts)
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in talks)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert finepoint.samples(llama, tokenizer, 8, tokens=6) == talks
    assert finepoint.samples(llama, tokenizer, 8, tokens=6, seed=5) != talks


def test_without_a_chat_template_they_are_plain_texts(llama):
    plain = make_tokenizer()
    plain.chat_template = None
    assert all(list(row) == ["text"] for row in finepoint.samples(llama, plain, 4, tokens=4))
    with pytest.raises(FinepointError, match="conversations need a chat template"):
        finepoint.samples(llama, plain, chat=True)


@pytest.mark.parametrize("template", [
    "{% for turn in messages %}{{ turn['content'] }}{% endfor %}",  # nothing before a user's words
    "{{ raise_exception('begin with a system turn') }}",
    "{% for turn in",
])  # fmt: skip
def test_a_template_that_opens_no_turn_of_a_user_leaves_plain_texts(llama, template, caplog):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    found = texts_and_conversations(llama, tokenizer, 6, tokens=4)
    assert list(found) == ["texts"]
    assert len(found["texts"]) > 3
    assert ("no conversations are written" in caplog.text) == ("content" not in template)
    caplog.clear()
    passes(tokenizer, 6, 4)
    assert not caplog.text  # it is said once
    assert all(list(row) == ["text"] for row in finepoint.samples(llama, tokenizer, 2, tokens=4))
    with pytest.raises(FinepointError, match="give chat=False"):
        finepoint.samples(llama, tokenizer, 2, chat=True)


def test_first_tokens_are_drawn_as_often_as_the_model_says(llama, tokenizer):
    texts = [row["text"] for row in finepoint.samples(llama, tokenizer, 800, chat=False, tokens=1)]
    with torch.no_grad():
        # Nothing is put in front of a text by this tokenizer: it begins with the token that texts begin with.
        expected = llama(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].softmax(-1)
    letters = [token for token in range(4, len(tokenizer)) if tokenizer.decode([token]).strip()]
    shares = torch.tensor([texts.count(tokenizer.decode([token])) / 800 for token in letters])
    error = (expected[letters] * (1 - expected[letters]) / 800).sqrt()
    assert ((shares - expected[letters]).abs() < 5 * error + 1e-3).all()


def test_models_that_write_nothing_of_their_own_are_refused(tokenizer):
    model = T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(FinepointError, match="samples are what a causal language model writes"):
        finepoint.samples(model, tokenizer)


def test_the_command_writes_what_protect_reads(model_folder, tmp_path, choice_file, capsys):
    out = str(tmp_path / "own")
    assert main(["data", "samples", "--model", str(model_folder), "--examples", "6", "--output", out]) == 0
    files = [tmp_path / "own" / f"{name}.jsonl" for name in ("texts", "conversations")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert 2 < len(rows) <= 6
    train = ["train", "--model", str(model_folder), "--data", choice_file, "--steps", "2", "--density", "0.1"]
    kept = ["--protect", *map(str, files)]
    assert main([*train, *kept, "--output", str(tmp_path / "kept")]) == 0
    adapter = ["--model", str(model_folder), str(tmp_path / "kept"), *kept]
    assert main(["scale", *adapter, "--disturb-at-most", "1", "--output", str(tmp_path / "less")]) == 0
    assert main(["data", "samples", "--output", out]) == 2
    assert "finepoint data samples --model MODEL --output DIR" in capsys.readouterr().err
    assert main(["data", "samples", "--model", str(model_folder), "--output", f"{out}2", "--max-length", "5"]) == 2
    assert "does not look at --max-length" in capsys.readouterr().err
    assert main(["data", "arithmetic", "--model", str(model_folder), "--output", f"{out}2"]) == 2
    assert "does not look at --model" in capsys.readouterr().err


# As what is to be kept: --protect own


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Texts of a few tokens, in a cache of their own; how often a model has written."""
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(texts, "TOKENS", 6)
    monkeypatch.setattr(texts, "WRITTEN", 8)
    counts, write = [], texts.texts_and_conversations
    monkeypatch.setattr(texts, "texts_and_conversations", lambda *given: counts.append(given[2:]) or write(*given))
    return counts


@pytest.fixture
def config(model_folder, choice_file, tmp_path):
    return TrainConfig(model=str(model_folder), data=choice_file, output=str(tmp_path / "run"), density=0.2, lr=2e-2,
                       steps=4, batch_size=8, protect="own", dtype="float32")  # fmt: skip


def test_the_base_writes_once_what_is_kept_and_holds_as_its_files_would(short, config, llama, tokenizer, tmp_path):
    record = train(config)
    own = record["protection"]["own"]
    rows = texts_and_conversations(llama, tokenizer, 8, tokens=6)
    found = {name: [json.loads(line) for line in (Path(own["folder"]) / f"{name}.jsonl").read_text().splitlines()]
             for name in rows}  # fmt: skip
    assert found == rows
    assert own["texts"] + own["conversations"] == sum(map(len, rows.values())) >= 6
    assert own["seconds"] > 0
    files = [str(Path(own["folder"]) / f"{name}.jsonl") for name in rows]
    train(replace(config, protect=files, protect_examples=8, protect_read=8, output=str(tmp_path / "files")))
    assert_same_tensors(tmp_path / "run", tmp_path / "files")
    train(replace(config, output=str(tmp_path / "again")))
    assert_same_tensors(tmp_path / "run", tmp_path / "again")
    assert short == [(8, 0, 6)]  # the second run finds it


def test_it_may_stand_beside_files_and_is_written_anew_for_another_base_number_or_dtype(short, config, tmp_path):
    lines = write_lines(tmp_path / "mine.jsonl", [{"text": "abc"}] * 9)
    other = tiny_llama(seed=1)
    writer = Writer(tiny_llama(), make_tokenizer())
    mixed = examples_to_keep(["own", lines], 10, writer)
    assert sum(example.where.startswith(lines) for example in mixed) == 5
    plain = make_tokenizer()
    plain.chat_template = None
    for another in (Writer(other, make_tokenizer()), Writer(tiny_llama(torch.bfloat16), make_tokenizer()),
                    Writer(tiny_llama(), plain), Writer(tiny_llama(), make_tokenizer(), seed=1)):  # fmt: skip
        examples_to_keep("own", 5, another)
    assert [made[:2] for made in short] == [(5, 0)] * 4 + [(5, 1)]
    examples_to_keep("own", None, writer)
    assert short[5] == (8, 0, 6)
    held = finepoint.sparsify(tiny_llama(), density=0.2, protect=["own", lines], tokenizer=make_tokenizer())
    assert finepoint.tuner_of(held).count


def test_beneath_an_adapter_the_base_writes(short, llama, tokenizer):
    indices = finepoint.select(llama, rule="random", density=0.5)
    with finepoint.SparseTuner(llama, indices, audit=False) as tuner:
        tuner.put_({name: torch.ones_like(value) for name, value in tuner.trained().items()})
        adapter = tuner.adapter()
        tuner.revert_()
    plain = [str(example) for example in Writer(tiny_llama(), tokenizer).texts(4)]
    shutil.rmtree(short_cache())
    with adapter.applied(llama):
        before = {name: value.clone() for name, value in llama.state_dict().items()}
        assert [str(example) for example in Writer(llama, tokenizer).texts(4)] == plain
        assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert len(short) == 2


def short_cache():
    return texts.cache_folder() / "texts"


def test_a_resumed_run_keeps_the_texts_that_it_was_begun_with(short, config, tmp_path, monkeypatch):
    config = replace(config, save_every=2, steps=6)
    train(replace(config, output=str(tmp_path / "whole")))
    with interrupted_at(4):
        train(config)
    shutil.rmtree(short_cache())
    monkeypatch.setattr(texts, "TOKENS", 5)  # as if this machine wrote others
    resumed = train(replace(config, resume=True))
    assert_same_tensors(tmp_path / "run", tmp_path / "whole")
    assert resumed["protection"]["own"]["folder"] == str(tmp_path / "run" / "own-texts")
    assert len(short) == 1


def test_a_kill_while_it_writes_leaves_nothing_and_others_wait_for_who_writes(short, llama, tokenizer, monkeypatch):
    write = texts.texts_and_conversations

    def broken(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(texts, "texts_and_conversations", broken)
    with pytest.raises(KeyboardInterrupt):
        Writer(llama, tokenizer).texts(4)
    assert not list(short_cache().rglob("*.json*"))

    def slow(*given):
        time.sleep(0.2)
        return write(*given)

    monkeypatch.setattr(texts, "texts_and_conversations", slow)
    # Locks are of open files, so that threads exclude each other as processes do.
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda model: Writer(model, tokenizer).texts(4), [tiny_llama(), tiny_llama()])
    assert [str(example) for example in one] == [str(example) for example in other]
    assert len(short) == 1


def test_what_writes_nothing_is_told_in_a_line(short, llama, tokenizer, config, tmp_path, monkeypatch):
    def failing(*given):
        raise RuntimeError("no cache here")

    monkeypatch.setattr(texts, "texts_and_conversations", failing)
    with pytest.raises(FinepointError, match=r"LlamaForCausalLM writes no text \(no cache here\); give text of yours"):
        train(config)
    monkeypatch.setattr(texts, "texts_and_conversations", lambda *given: {"texts": [], "conversations": []})
    with pytest.raises(FinepointError, match="has written nothing but ends of text"):
        train(replace(config, overwrite=True))
    labels = write_lines(tmp_path / "labels.jsonl", [{"text": "ab", "label": "x"}, {"text": "cd", "label": "y"}])
    with pytest.raises(FinepointError, match="classifiers write nothing"):
        train(replace(config, data=labels, overwrite=True))
    with pytest.raises(FinepointError, match="give tokenizer=.. as well"):
        finepoint.sparsify(llama, density=0.1, protect="own")
    with pytest.raises(FinepointError, match="there is no file onw; did you mean 'own'"):
        train(replace(config, protect="onw", overwrite=True))


def test_own_counts_once_and_texts_too_short_are_named(config, tmp_path):
    with pytest.raises(FinepointError, match="--protect names own twice; give it once"):
        train(replace(config, protect=["own", "own"]))
    one = write_lines(tmp_path / "one.jsonl", [{"text": "a"}])
    with pytest.raises(FinepointError, match=r"one.jsonl.*no token to keep .* give longer ones to --protect"):
        train(replace(config, protect=one, overwrite=True))


def test_texts_that_were_damaged_are_written_anew(short, llama, tokenizer):
    plain = [str(example) for example in Writer(llama, tokenizer).texts(6)]
    for damage in (lambda file: file.write_text(""), Path.unlink):
        for file in list(short_cache().rglob("*.json*")):
            damage(file)
            assert [str(example) for example in Writer(llama, tokenizer).texts(6)] == plain
    assert len(short) == 7


@pytest.mark.parametrize("setting", ["protect", "data", "validation"])
def test_a_run_takes_nothing_away_that_it_is_to_read(short, config, setting):
    train(config)
    file = Path(config.output) / "own-texts" / "texts.jsonl"
    kept = file.read_bytes()
    with pytest.raises(FinepointError, match=f"--{setting} .*texts.jsonl is of an earlier run, .* copy it elsewhere"):
        train(replace(config, overwrite=True, **{setting: str(file)}))
    assert file.read_bytes() == kept


def test_sparsify_and_quantised_and_half_precision_bases_are_held_by_it(short, config, llama, tokenizer):
    held = finepoint.sparsify(llama, density=0.1, protect="own", tokenizer=tokenizer)
    rows = rows_to_keep(Writer(tiny_llama(), tokenizer).texts(8), tiny_llama(), tokenizer)
    batches = [{"input_ids": torch.tensor([row.ids]), "labels": torch.tensor([row.labels])} for row in rows]
    same = finepoint.sparsify(tiny_llama(), density=0.1, protect=batches)
    pulls, given = (finepoint.tuner_of(model).entries for model in (held, same))
    assert all(torch.equal(entries.pull, given[name].pull) for name, entries in pulls.items())
    assert len(short) == 1
    for number, changes in enumerate(({"quantise": "int8"}, {"dtype": "bfloat16"}), 2):
        record = train(replace(config, steps=2, overwrite=True, **changes))
        assert record["protection"]["own"]["texts"] > 1
        assert len(short) == number


def test_every_command_takes_it(short, config, tmp_path, capsys):
    model, out = ["--model", config.model], str(tmp_path / "run")
    train(config)
    common = [*model, "--protect", "own"]
    capsys.readouterr()
    assert main(["eval", *common, "--adapter", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["scale", out, *common, "--disturb-at-most", "1", "--output", str(tmp_path / "less"), "--json"]) == 0
    scaled = json.loads(capsys.readouterr().out)
    assert scaled["kl_before"] == pytest.approx(told["adapters"][out]["protected"]["kl"])
    assert [made[1] for made in short] == [0, 1]  # what is measured on is other text than what was held
    assert main(["select", *common, "--data", config.data, "--rule", "gain", "--output", str(tmp_path / "chosen")]) == 0
    assert len(short) == 2


@pytest.mark.slow
def test_studies_and_sequences_have_the_base_write_once(short, config, tmp_path):
    """Tasks after the first are trained on a model that holds earlier adapters: it is the base beneath that writes."""
    sets = {"train": config.data, "test": config.data}
    asked = {"steps": 2, "batch_size": 8, "protect": "own"}
    run_sequence(SequenceConfig(model=config.model, tasks={"one": sets, "two": sets}, output=str(tmp_path / "s"),
                                density=0.1, ways=["allow"], train=asked, test_limit=2))  # fmt: skip
    told = [
        read_record(tmp_path / "s" / place / "run.json")["protection"]["own"] for place in ("first/one", "allow/two")
    ]
    assert told[0]["folder"] == told[1]["folder"]
    study = CompareConfig(model=config.model, tasks={"one": sets | {"validation": config.data}}, seeds=[0], generate=0,
                          arms=[{"rule": "random", "density": 0.1, "lrs": [1e-2]}], train=asked | {"eval_every": 2},
                          validation_limit=2, test_limit=2, output=str(tmp_path / "study"))  # fmt: skip
    assert compare(study)["failed"] == {}
    (cell,) = (json.loads(file.read_text()) for file in (tmp_path / "study" / "cells").glob("*.json"))
    assert cell["changes"]["protected"]["kl"] > 0
    assert [made[1] for made in short] == [0, 1]  # one to hold it by, one to measure on
