"""What the README shows runs as it stands."""

import copy
import re
from pathlib import Path

from conftest import assert_same_bits, random_batches, snapshot, tiny_llama
from documents import blocks
from finepoint.cli import COMMANDS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_five_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(README, "python")
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
