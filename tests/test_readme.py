"""What the README and the tour show runs as it stands."""

import copy
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import finepoint
from conftest import assert_same_bits, random_batches, snapshot, tiny_llama, write_lines
from documents import blocks
from finepoint.cli import COMMANDS
from finepoint.models.loading import load_model, load_tokenizer

ROOT = Path(__file__).parent.parent
README, TOUR = (ROOT / "README.md").read_text(), (ROOT / "docs" / "tour.md").read_text()


def test_the_example_of_the_readme(tmp_path, monkeypatch, given):
    monkeypatch.chdir(shutil.copytree(given, tmp_path / "reader"))
    (block,) = blocks(README, "python")
    for _ in range(2):  # it can be run again where it has been run
        names = {}
        exec(block.code.replace("smollm2", "my-model"), names)
    base = snapshot(load_model("my-model"))
    assert any(not torch.equal(base[name], value) for name, value in snapshot(names["model"]).items())
    finepoint.unload(names["model"])
    assert_same_bits(snapshot(names["model"]), base)


def test_the_readme_is_short_and_says_its_limits_first():
    assert len(README.split()) < 650
    assert README.index("**Limits.**") < README.index("\n## ")


def test_the_two_lines(tmp_path, monkeypatch, model_folder):
    monkeypatch.chdir(tmp_path)
    block, _ = blocks(TOUR, "python")
    write_lines(tmp_path / "train.jsonl", [{"prompt": f"{word} is", "completion": " so"} for word in "abcdefgh"])
    names = {
        "finepoint": finepoint,
        "model": load_model(str(model_folder)),
        "tokenizer": load_tokenizer(str(model_folder)),
    }
    given, base = names["model"], snapshot(names["model"])
    training = (
        "tuner = finepoint.tuner_of(model)\nfor delta in tuner.parameters(): delta.data += 1e-2\ntuner.follow_()\n"
    )
    exec(block.code.replace("\n...", f"\n{training}#"), names)
    assert names["model"] is given
    other = load_model(str(model_folder))
    finepoint.load(other, "adapters/x")
    changed = [name for name, value in snapshot(other).items() if not torch.equal(value, base[name])]
    assert changed
    assert all(torch.equal(snapshot(given)[name], snapshot(other)[name]) for name in base)


def test_the_five_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, block = blocks(TOUR, "python")
    code = block.code
    model = tiny_llama()
    base_model = copy.deepcopy(model)
    names = {"model": model, "base_model": base_model, "batches": random_batches()}
    training = (
        "import torch\noptimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)\n"
        "model(**batches[0]).loss.backward()\noptimizer.step()\n"
    )
    assert code.count("\n...") == 1
    exec(code.replace("\n...", f"\n{training}#"), names)
    names["tuner"].close()
    assert_same_bits(snapshot(model), snapshot(base_model))
    entries = sum(weight.numel() for weight in names["finepoint"].target_weights(model).values())
    assert names["indices"].count == round(1e-3 * entries)
    assert any(not (value == snapshot(tiny_llama())[name]).all() for name, value in snapshot(base_model).items())


@pytest.mark.parametrize("page", [README, TOUR], ids=["readme", "tour"])
def test_the_commands_it_names_exist(page):
    named = set(re.findall(r"^\s{4}finepoint (\w+)", page, re.MULTILINE)) | set(re.findall(r"`finepoint (\w+)", page))
    assert named - {"COMMAND"} <= set(COMMANDS)
    assert {"train", "eval", "inspect", "verify", "data", "rules"} <= named


def commands(page):
    """The commands in a page's section on the command line, each on one line."""
    text = page.split("\n## The command line\n")[1].split("\n## ")[0].replace("\\\n", " ")
    return re.findall(r"^    (finepoint .*)$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "left"),
    [(README, "merged/model.safetensors"), (TOUR, "adapters/both/finepoint.safetensors")],
    ids=["readme", "tour"],
)
def test_its_commands_run_one_after_the_other(page, left, warm, given, tmp_path):
    """With a tiny model of smollm2's dtype in its place, and the files that `finepoint data` would fetch.

    FINEPOINT_BIN names another `finepoint` to run: that of a wheel.
    """
    folder = shutil.copytree(given, tmp_path / "reader")
    load_model(str(folder / "my-model")).to(torch.bfloat16).save_pretrained(folder / "my-model")
    lines = [line.replace("smollm2", "my-model") for line in commands(page)]
    assert lines[0] == "finepoint data vader --output vader"
    train = lines[1]
    if "adapters/other" in "".join(lines):
        lines[1:2] = [train, train.replace("adapters/movies", "adapters/other") + " --seed 1"]
    for line in lines[1:]:
        if binary := os.environ.get("FINEPOINT_BIN"):
            words = ["bash", "-c", line.replace("finepoint", binary, 1)]
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        else:
            done = warm.run(*line.partition("#")[0].split(), folder=folder)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert (folder / left).is_file()
