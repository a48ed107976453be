"""Files of finepoint's first versions are read today, those of a later one are refused.

`tests/first` was made by the earliest commits that wrote each format, with a tiny model: `run` is a training run of
6 steps (its checkpoint of step 4 is kept), `study` a study of one cell.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import assert_same_bits, snapshot
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.combining import merge
from finepoint.adapters.format import TENSORS
from finepoint.errors import FinepointError
from finepoint.models.loading import load_model
from finepoint.runtime.files import VERSION, read_record
from finepoint.studies.compare import compare
from finepoint.studies.results import read_results
from finepoint.studies.settings import CompareConfig
from finepoint.training.run import train
from finepoint.training.settings import TrainConfig

FIRST = Path(__file__).parent / "first"


@pytest.fixture
def first(tmp_path, monkeypatch):
    """A copy of what the first versions wrote, in the working folder, as it was then."""
    shutil.copytree(FIRST, tmp_path / "first")
    monkeypatch.chdir(tmp_path / "first")
    return tmp_path / "first"


STUDY = CompareConfig(
    model="model",
    tasks={"ends": dict.fromkeys(("train", "validation", "test"), "rows.jsonl")},
    arms=[{"rule": "gallop", "density": 0.02, "lrs": [0.001]}],
    train={"steps": 2, "batch_size": 8, "scoring_examples": 8},
    seeds=[0], validation_limit=8, test_limit=8, generate=0, output="study",
)  # fmt: skip


def test_an_adapter_of_the_first_version_goes_in_and_out(first, caplog):
    adapter = SparseAdapter.load(first / "run")
    assert "knows its base by the values at its entries alone" in caplog.text
    stored = load_file(first / "run" / TENSORS)
    assert adapter.count == 77 == sum(len(stored[f"{name}.indices"]) for name in adapter)
    for name, change in adapter.changes.items():
        assert torch.equal(change.numbers, stored[f"{name}.delta"])
        assert torch.equal(change.indices, stored[f"{name}.indices"].long())
    model = load_model("model")
    before = snapshot(model)
    adapter.apply(model)
    assert any(not torch.equal(before[name], value) for name, value in snapshot(model).items())
    adapter.revert(model)
    assert_same_bits(before, snapshot(model))
    merge([adapter], how="first", model=model).save("anew")
    anew = SparseAdapter.load("anew")
    assert anew.fingerprint is not None
    assert anew.equals(adapter)


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="its random state is a pickle of NumPy 2's")
def test_a_run_of_the_first_version_is_finished_today(first, caplog):
    whole = SparseAdapter.load(first / "run")
    (first / "run" / "run.json").unlink()  # as if it had been killed after its last checkpoint
    train(TrainConfig(model="model", data="rows.jsonl", output="run", steps=6, save_every=2, batch_size=8, density=0.02,
                      lr=0.01, scoring_examples=8, resume=True))  # fmt: skip
    assert "does not know its base as a whole" in caplog.text
    resumed = SparseAdapter.load(first / "run")
    assert resumed.fingerprint is not None
    for name, change in whole.changes.items():
        assert torch.equal(change.indices, resumed.changes[name].indices)
        # Another machine adds up in another order.
        torch.testing.assert_close(change.numbers, resumed.changes[name].numbers, rtol=1e-3, atol=1e-5)


def test_a_study_of_the_first_version_goes_on_and_is_reported(first):
    assert len(read_results(first / "study").cells) == 1
    kept = (first / "study" / "cells" / "ends.gallop-0.02.lr0.001.s0.json").read_bytes()
    done = compare(replace(STUDY, seeds=[0, 1]))
    assert (done["cells"], done["done"], done["failed"]) == (2, 2, {})
    assert (first / "study" / "cells" / "ends.gallop-0.02.lr0.001.s0.json").read_bytes() == kept


def later(path, version=99):
    """Gives a file a version that a later finepoint might write."""
    if path.suffix == ".json":
        key = "format" if path.name == "study.json" else VERSION
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: version}))
        return
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    if "finepoint" in metadata:
        metadata["finepoint"] = json.dumps(json.loads(metadata["finepoint"]) | {VERSION: version})
    else:
        metadata[VERSION] = str(version)
    save_file(tensors, path, metadata)


def test_every_file_has_a_version_and_a_later_one_is_refused(first):
    shutil.rmtree("study")
    compare(STUDY)
    settings = TrainConfig(model="model", data="rows.jsonl", output="new", steps=3, save_every=2, batch_size=8,
                           density=0.02, scoring_examples=8)  # fmt: skip
    train(settings)
    go_on = replace(settings, steps=4, resume=True)
    statistics = sorted(first.glob("study/statistics/*/*.safetensors"))[0]
    cell = next(first.glob("study/cells/*.json"))
    more = replace(STUDY, arms=[*STUDY.arms, {"rule": "saft", "density": 0.02, "lrs": [0.001]}])
    for path, read in (
        (first / "new" / TENSORS, lambda: SparseAdapter.load("new")),
        (first / "new" / "run.json", lambda: train(go_on)),
        (first / "new" / "checkpoints" / "checkpoint-3" / "sealed.json", lambda: train(go_on)),
        (first / "study" / "study.json", lambda: compare(STUDY)),
        (first / "study" / "base.json", lambda: compare(STUDY)),
        (cell, lambda: compare(STUDY)),
        (cell, lambda: read_results("study")),
        (statistics, lambda: _failure(compare(more))),
    ):
        kept = path.read_bytes()
        if path.suffix == ".json" and path.name != "study.json":
            read_record(path)
            assert json.loads(kept)[VERSION] == 1
        later(path)
        with pytest.raises(FinepointError, match=r"has format version 99; this finepoint reads 1.*; update finepoint"):
            read()
        path.write_bytes(kept)


def _failure(done):
    """A cell that failed stops no other: its error as one."""
    for error in done["failed"].values():
        raise FinepointError(error)
