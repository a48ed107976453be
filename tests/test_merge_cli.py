"""`finepoint merge`, in this process."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import assert_same_bits, tiny_llama, write_lines
from finepoint import SparseTuner, select
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.bases import verify
from finepoint.adapters.combining import METHODS, merge
from finepoint.cli import main
from finepoint.cli.adapters import MergeConfig
from finepoint.cli.options import parse
from finepoint.data.examples import Choices
from finepoint.evaluation import combining_weights
from finepoint.evaluation.scoring import choice_likelihoods
from finepoint.models.loading import load_model
from test_adapter import assert_same_adapter
from test_combining import applied, make


@pytest.fixture(scope="module")
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder)


@pytest.fixture
def folders(model, tmp_path):
    return [str(make(model, seed, 0.3).save(tmp_path / f"in{seed}")) for seed in (1, 2, 3)]


def finepoint(capsys, *arguments, status=0):
    found = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert found == status, printed.err
    if status:
        # Adapters made by hand, as those of earlier versions, do not know their base as a whole, which is said first.
        said = [line for line in printed.err.strip().splitlines() if "knows its base by the values at" not in line]
        assert len(said) == 1
        assert printed.out == ""
        return said[0]
    return printed.out


def test_the_command_merges_as_the_function(capsys, model, folders, tmp_path):
    out = finepoint(capsys, "merge", *folders, "--how", "ties", "--weights", 1, -0.5, 2, "--options", "density=0.5",
                    "--output", tmp_path / "m", "--json")  # fmt: skip
    found = json.loads(out)
    merged = SparseAdapter.load(tmp_path / "m")
    expected = merge([SparseAdapter.load(f) for f in folders], [1, -0.5, 2], "ties", density=0.5)
    assert_same_adapter(expected, merged)
    assert (found["entries"], found["weights"], found["how"]) == (merged.count, [1, -0.5, 2], "ties")
    assert found["adapters"] == folders
    assert verify(merged, model)["reverted"]


def test_the_base_is_taken_where_it_is_given(capsys, model, model_folder, folders, tmp_path):
    flags = [flag for folder in folders for flag in ("--adapter", folder)]
    out = finepoint(capsys, "merge", *flags, "--model", model_folder, "--compact", "--output", tmp_path / "m")
    assert "merged 3 adapters by sum with weights 1, 1, 1: " in out
    merged = SparseAdapter.load(tmp_path / "m")
    assert not any(change.parts for change in merged.changes.values())
    assert_same_bits(applied(model, merge([SparseAdapter.load(f) for f in folders])), applied(model, merged))
    finepoint(capsys, "verify", tmp_path / "m", "--model", model_folder)
    finepoint(capsys, "inspect", tmp_path / "m")


def test_dry_run_reports_and_writes_nothing(capsys, folders, model_folder, tmp_path):
    before = set(tmp_path.iterdir())
    found = json.loads(finepoint(capsys, "merge", *folders, "--dry-run", "--json"))
    pairs = [(row["a"], row["b"]) for row in found["interference"] if row["scope"] == "all"]
    assert pairs == [(folders[0], folders[1]), (folders[0], folders[2]), (folders[1], folders[2])]
    table = finepoint(capsys, "merge", "--dry-run", *folders, "--model", model_folder)
    assert "opposite" in table
    assert "up_proj" in table
    assert set(tmp_path.iterdir()) == before


def test_dry_run_says_where_two_hold_the_same_entries(capsys, model, folders, tmp_path):
    assert "the same entries" not in finepoint(capsys, "merge", *folders, "--dry-run")
    scaled = merge([SparseAdapter.load(folders[0])], [0.5]).save(tmp_path / "scaled")
    assert finepoint(capsys, "merge", folders[0], scaled, "--dry-run").count("the same entries") == 1


def test_dry_run_says_what_it_cannot_know_of_exact_values_without_their_base(capsys, model_folder, tmp_path):
    model = load_model(str(model_folder), "bfloat16")
    places = []
    for seed in range(2):
        with SparseTuner(model, select(model, density=0.2, seed=seed)) as tuner:
            for delta in tuner.parameters():
                delta.data += 0.5
            places.append(tuner.adapter().save(tmp_path / str(seed)))
            tuner.revert_()
    assert "give it as --model M" in finepoint(capsys, "merge", *places, "--dry-run")
    assert "--model M" not in finepoint(capsys, "merge", *places, "--dry-run", "--model", model_folder)
    assert "only the base knows" in finepoint(capsys, "inspect", places[0])


def test_tuning_prints_what_it_tried(capsys, model, tokenizer, folders, model_folder, tmp_path):
    prompts, choices = [f"{a}{b}:" for a in "abcdefgh" for b in "abcd"], (" x", " yy", " z", " u")
    with merge([SparseAdapter.load(f) for f in folders[:2]], [1.25, 0.5]).applied(model):
        scores = choice_likelihoods(model, tokenizer, [Choices(prompt, choices, 0) for prompt in prompts], 64)
    data = write_lines(tmp_path / "d.jsonl", [
        {"prompt": prompt, "choices": choices, "answer": found.index(max(found))}
        for prompt, found in zip(prompts, scores, strict=True)
    ])  # fmt: skip
    arguments = ["merge", *folders[:2], "--model", model_folder, "--tune", data, "--output"]
    found = json.loads(finepoint(capsys, *arguments, tmp_path / "m", "--json"))
    tuning = found["tuning"]
    assert tuning["score"] == max(row["score"] for row in tuning["tried"]) > 0.5
    assert tuning["weights"] == found["weights"]
    assert SparseAdapter.load(tmp_path / "m").count == found["entries"]
    table = finepoint(capsys, *arguments, tmp_path / "n", "--limit", 8)
    assert f"weights tried on {data}" in table


def test_a_base_that_does_best_is_left_alone(capsys, folders, model_folder, tmp_path, monkeypatch):
    def worse_the_more(model, tokenizer, merged, examples, measure):
        return 0.0 if merged is None else sum(part["weight"] for part in merged.info["merge"]["parts"])

    monkeypatch.setattr(combining_weights, "_measured", worse_the_more)
    text = write_lines(tmp_path / "t.jsonl", [{"text": "hello you"}])
    error = finepoint(capsys, "merge", *folders[:2], "--model", model_folder, "--tune", text, "--output",
                      tmp_path / "o", status=2)  # fmt: skip
    assert "nothing does better than the base model" in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "OUT"], "there is nothing to merge; give adapter folders"),
        (["A", "B"], "--output is required"),
        (["A", "B", "--output", "OUT", "--weights", "1"], "1 weights for 2 adapters"),
        (["A", "B", "--output", "OUT", "--weights", "1", "nan"], "expected float, got nan"),
        (["A", "B", "--output", "OUT", "--weights", "1", "x"], "expected float, got x"),
        (["A", "B", "--output", "OUT", "--weights", "0", "0"], "all weights are 0"),
        (["A", "B", "--output", "OUT", "--how", "tiez"], "there are: sum, mean, ties"),
        (["A", "B", "--output", "OUT", "--how", "ties", "--options", "drop=1"], "ties has no option 'drop'"),
        (["A", "B", "--output", "OUT", "--how", "ties", "--options", "density=x"], "expected float, got x"),
        (["A", "B", "--output", "OUT", "--how", "error"], "the adapters share"),
        (["A", "B", "--output", "OUT", "--tune", "x.jsonl"], "give the base model as --model M"),
        (["A", "--dry-run"], "at least two different folders"),
        (["A", "nowhere", "--output", "OUT"], "is not an adapter folder"),
        (["A", "B", "--output", "A"], "is not empty; choose another --output or give --overwrite"),
        (["A", "OTHER", "--output", "OUT"], "bfloat16 (64, 16) in adapter 2, float32 (64, 16) in adapter 1"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(capsys, model, folders, tmp_path, arguments, message):
    other = make(tiny_llama(torch.bfloat16), 4).save(tmp_path / "other")
    names = {"A": folders[0], "B": folders[1], "OUT": str(tmp_path / "out"), "OTHER": str(other)}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    error = finepoint(capsys, "merge", *(names.get(word, word) for word in arguments), status=2)
    assert message in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_flag_offers_every_method():
    assert all(name in MergeConfig.__dataclass_fields__["how"].metadata["meaning"] for name in METHODS)


def test_folders_may_stand_anywhere():
    for words in (["A", "B", "--how", "mean"], ["--how", "mean", "A", "B"], ["A", "--dry-run", "B", "--how=mean"]):
        config = parse(MergeConfig, "merge", words)
        assert (config.adapter, config.how) == (["A", "B"], "mean")
