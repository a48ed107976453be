"""What the README shows runs as it stands."""

import copy
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

import finepoint
from conftest import assert_same_bits, random_batches, snapshot, tiny_llama, write_lines
from documents import blocks
from finepoint.cli import COMMANDS
from finepoint.models.loading import load_model, load_tokenizer

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_two_lines(tmp_path, monkeypatch, model_folder):
    monkeypatch.chdir(tmp_path)
    block, _ = blocks(README, "python")
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
    _, block = blocks(README, "python")
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


def test_the_commands_it_names_exist():
    named = set(re.findall(r"^\s{4}finepoint (\w+)", README, re.MULTILINE)) | set(
        re.findall(r"`finepoint (\w+)", README)
    )
    assert named - {"COMMAND"} <= set(COMMANDS)
    assert {"train", "eval", "inspect", "verify", "data", "rules"} <= named


def commands(section):
    """The commands of a section of the README, each on one line."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0].replace("\\\n", " ")
    return re.findall(r"^    (finepoint .*)$", text, re.MULTILINE)


def test_its_commands_run_one_after_the_other(warm, given, tmp_path):
    """With a tiny model in the place of smollm2, and the files that `finepoint data` would fetch.

    FINEPOINT_BIN names another `finepoint` to run: that of a wheel.
    """
    folder = shutil.copytree(given, tmp_path / "reader")
    lines = [line.replace("smollm2", "my-model") for line in commands("The command line")]
    assert lines[0] == "finepoint data vader --output vader"
    train = lines[1]
    lines[1:2] = [train, train.replace("adapters/movies", "adapters/other") + " --seed 1"]
    for line in lines[1:]:
        if binary := os.environ.get("FINEPOINT_BIN"):
            words = ["bash", "-c", line.replace("finepoint", binary, 1)]
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        else:
            done = warm.run(*line.partition("#")[0].split(), folder=folder)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert (folder / "adapters" / "both" / "finepoint.safetensors").is_file()
