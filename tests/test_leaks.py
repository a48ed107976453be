"""Training data among what measures, however it is written: counted, said in one line, and in every record."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import finepoint
from conftest import write_lines
from finepoint.cli import main
from finepoint.config import AlignConfig, EvalConfig, TrainConfig
from finepoint.data import Chat, Choices, Completion, Labelled, Pair, Text
from finepoint.integrations.align import align
from finepoint.leaks import TRAINED_ON, Seen, leaks, normalised, text_of
from finepoint.measuring.evaluation import evaluate_config
from finepoint.training.run import train

TRAINED = ["abc: def", "a b c", "hello you", "Bad, Gad.", "12 34"]
SAME = ["abc: def", "12 34"]
ALIKE = ["ABC:  Def!", "bad gad", "Hello   you?"]
NEW = ["abc def g", "1 2 3 4", "", "helloyou", "!"]


def rows(texts):
    return [{"text": text} for text in texts if text]


def test_exact_and_normalised_matches_are_counted_apart():
    seen = Seen.of([Text(text) for text in TRAINED])
    assert seen.among([Text(text) for text in [*SAME, *ALIKE, *NEW]]) == {"exact": 2, "normalised": 3, "n": 10}
    assert leaks(seen, {"a": [Text("new")], "b": [Text("12 34")]}) == {"b": {"exact": 1, "normalised": 0, "n": 1}}
    assert Seen.of([Text("?!")]).among([Text("!!"), Text("?!")]) == {"exact": 1, "normalised": 0, "n": 2}


def test_the_form_of_an_example_does_not_hide_it():
    one = [Completion("Q: a\nA:", " yes"), Choices("Q: a\nA:", (" no", " yes"), 1), Text("Q: a\nA: yes"),
           Labelled("Q: a\nA: yes", "x"), Pair("Q: a\nA:", " yes", " no"),
           Chat((("user", "Q: a"), ("assistant", "A: yes")))]  # fmt: skip
    assert {text_of(example) for example in one} == {"Q: a\nA: yes"}
    assert Seen.of(one[:1]).among(one) == {"exact": 6, "normalised": 0, "n": 6}
    assert Seen.of(one[:1]).among([Completion("Q: a\nA:", " no")])["exact"] == 0  # another answer was not seen


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=6), st.lists(st.text(max_size=12), max_size=6))
def test_counts_are_those_of_plain_comparisons(trained, measured):
    found = Seen.of([Text(text) for text in trained]).among([Text(text) for text in measured])
    exact = [text in trained for text in measured]
    alike = [normalised(text) in {normalised(other) for other in trained} for text in measured]
    assert found == {"exact": sum(exact), "normalised": sum(alike) - sum(exact), "n": len(measured)}


@pytest.fixture
def config(model_folder, tmp_path):
    return TrainConfig(model=str(model_folder), data=write_lines(tmp_path / "train.jsonl", rows(TRAINED)), steps=2,
                       validation=write_lines(tmp_path / "val.jsonl", rows([*SAME, *ALIKE, *NEW])), density=0.1,
                       output=str(tmp_path / "run"), batch_size=2)  # fmt: skip


LEAK = {"exact": 2, "normalised": 3, "n": 9}
LINE = "has seen what it is measured on: 5 of 9 of {} (3 but for case, spaces and punctuation); scores there"


def test_train_and_eval_say_it_in_a_line_and_in_the_record(config, tmp_path, caplog):
    record = train(config)
    assert record["leaks"] == {"validation": LEAK}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["leaks"] == {"validation": LEAK}
    assert [entry.getMessage().startswith(f"training {LINE.format('validation')}") for entry in caplog.records] == [
        True
    ]
    caplog.clear()
    new = write_lines(tmp_path / "new.jsonl", rows(["something else"]))
    evaluated = EvalConfig(model=config.model, adapter=[config.output], probe=[f"v={config.validation}", f"n={new}"])
    found = evaluate_config(evaluated)["adapters"][config.output]
    assert found["leaks"] == {"probe v": LEAK}
    assert [entry.getMessage().startswith(f"{config.output} {LINE.format('probe v')}") for entry in caplog.records]
    # Who has the adapter alone cannot tell what it was trained on.
    assert len(caplog.records) == 1
    (Path(config.output) / TRAINED_ON).unlink()
    assert "leaks" not in evaluate_config(evaluated)["adapters"][config.output]


def test_without_leaks_nothing_is_said(config, tmp_path, caplog):
    record = train(replace(config, validation=write_lines(tmp_path / "new.jsonl", rows(NEW[:2]))))
    assert record["leaks"] == {}
    assert caplog.records == []


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_align_says_it(model_folder, tmp_path, caplog):
    pairs = [{"prompt": f"a{c}:", "chosen": " yes", "rejected": " no"} for c in "abcd"]
    held_out = [pairs[0], {**pairs[1], "chosen": " YES!"}, {**pairs[2], "prompt": "new"}]
    config = AlignConfig(model=str(model_folder), data=write_lines(tmp_path / "p.jsonl", pairs), method="dpo", steps=1,
                         validation=write_lines(tmp_path / "v.jsonl", held_out), density=0.1, batch_size=2, lr=0.01,
                         output=str(tmp_path / "run"))  # fmt: skip
    leaked = {"v.jsonl": {"exact": 1, "normalised": 1, "n": 3}}
    assert align(config)["leaks"] == leaked
    assert "training has seen what it is measured on: 2 of 3 of v.jsonl" in caplog.text
    assert (tmp_path / "run" / TRAINED_ON).is_file()


def test_a_study_says_once_which_task_has_seen_which_set(model_folder, tmp_path, capsys):
    def answers(prompts):
        return [{"prompt": f"{prompt}:", "choices": [" yes", " no"], "answer": 0} for prompt in prompts]

    files = {part: write_lines(tmp_path / f"{part}.jsonl", answers(prompts))
             for part, prompts in {"train": "abcdefgh", "validation": "aij", "test": "kl"}.items()}  # fmt: skip
    probe = write_lines(tmp_path / "probe.jsonl", rows(["B: Yes", "else"]))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({
        "model": str(model_folder), "tasks": {"letters": files}, "probes": {"p": probe}, "seeds": [0], "generate": 0,
        "arms": [{"rule": "random", "density": 0.05, "lrs": [1e-3]}], "train": {"steps": 1, "batch_size": 4},
        "output": str(tmp_path / "out"),
    }))  # fmt: skip
    assert main(["compare", "--config", str(tmp_path / "study.yaml"), "--json"]) == 0
    shown = capsys.readouterr()
    leaked = {"letters": {"validation of letters": {"exact": 1, "normalised": 0, "n": 3},
                          "probe p": {"exact": 0, "normalised": 1, "n": 2}}}  # fmt: skip
    assert json.loads(shown.out)["leaks"] == leaked
    assert json.loads((tmp_path / "out" / "study.json").read_text())["leaks"] == leaked
    assert shown.err.count("has seen what it is measured on") == 1
    assert (
        "task 'letters' has seen what it is measured on: 1 of 3 of validation of letters, 1 of 2 of probe p"
        in shown.err
    )


def test_a_sequence_says_which_tests_a_task_has_seen(model_folder, tmp_path, capsys):
    letters = [{"prompt": f"{c}:", "choices": [" yes", " no"], "answer": 0} for c in "abcdef"]
    a, b, new = (write_lines(tmp_path / name, part) for name, part in
                 (("a.jsonl", letters[:3]), ("b.jsonl", letters[3:5]), ("new.jsonl", letters[5:])))  # fmt: skip
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({
        "model": str(model_folder), "output": str(tmp_path / "out"), "density": 0.02, "train": {"steps": 1},
        "overlap": "exclude", "tasks": {"one": {"train": a, "test": new}, "two": {"train": b, "test": a}},
    }))  # fmt: skip
    assert main(["sequence", "--config", str(tmp_path / "tasks.yaml"), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["leaks"] == {"one": {"test of two": {"exact": 3, "normalised": 0, "n": 3}}}
    assert "task 'one' has seen what it is measured on: 3 of 3 of test of two" in shown.err


def test_merged_adapters_and_those_chosen_in_python_know_what_was_seen(config, tmp_path, capsys):
    train(config)
    assert main(["merge", config.output, config.output, "--output", str(tmp_path / "merged"), "--weights", "0.5", "0.5",
                 ]) == 0  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(config.model)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    finepoint.sparsify(model, "gallop", 0.1, data=config.data, tokenizer=tokenizer)
    finepoint.save(model, tmp_path / "python")
    for name in ("merged", "python"):
        assert leaks(Seen.beside(tmp_path / name), {"a": [Text(TRAINED[0])]}) == {
            "a": {"exact": 1, "normalised": 0, "n": 1}
        }
    capsys.readouterr()
    main(["merge", config.output, config.output, "--output", str(tmp_path / "tuned"), "--tune", config.validation,
          "--model", config.model])  # fmt: skip
    assert "training has seen what it is measured on: 5 of 9 of val.jsonl" in capsys.readouterr().err
