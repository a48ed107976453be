"""Weights that wait on disk or in the processor's memory until their layer runs are refused by name, wherever asked."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload

import finepoint
from conftest import snapshot, tiny_llama
from finepoint.errors import FinepointError
from finepoint.tuner.tuner import SparseTuner

ABSENT = "model.layers.1.mlp.up_proj.weight"
INDICES = {"model.layers.0.mlp.up_proj.weight": torch.arange(3), ABSENT: torch.arange(5)}


def offloaded(where, folder):
    model = tiny_llama()
    if where == "disk":
        disk_offload(model.model.layers[1], str(folder), execution_device="cpu")
    elif where == "cpu":
        cpu_offload(model.model.layers[1], execution_device="cpu")
    elif where == "cpu, all of it":
        cpu_offload(model, execution_device="cpu")
    else:
        model.to("meta")
    return model


def adapter():
    model = tiny_llama()
    with SparseTuner(model, INDICES) as tuner:
        for delta in tuner.parameters():
            delta.data.fill_(0.5)
        return tuner.adapter()


WAYS = {
    "select": lambda model: finepoint.select(model, rule="magnitude-low", density=0.1),
    "sparsify": lambda model: finepoint.sparsify(model, density=0.1),
    "sparsify by indices": lambda model: finepoint.sparsify(model, indices=INDICES),
    "load": lambda model: finepoint.load(model, adapter()),
    "load to train": lambda model: finepoint.load(model, adapter(), trainable=True),
    "apply": lambda model: adapter().apply(model),
    "set": lambda model: finepoint.AdapterSet(model).add("one", adapter()),
}


@pytest.mark.parametrize("where", ["disk", "cpu", "cpu, all of it", "meta"])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_not_in_memory_is_refused_by_name(way, where, tmp_path):
    model = offloaded(where, tmp_path)
    names = [name for name, weight in model.named_parameters() if weight.is_meta]
    with pytest.raises(FinepointError, match=r"is not in memory \(offloaded\); load the model without") as raised:
        WAYS[way](model)
    assert any(f"{name} is not" in str(raised.value) for name in names)
    assert not hasattr(model, "finepoint")


@pytest.mark.parametrize("where", ["disk", "cpu, all of it"])
def test_a_tuner_refuses_it_too(where, tmp_path):
    with pytest.raises(FinepointError, match="is not in memory"):
        SparseTuner(offloaded(where, tmp_path), INDICES)
    with pytest.raises(FinepointError, match="is not in memory"):
        SparseTuner(offloaded(where, tmp_path), {}, ready=(name for name in [ABSENT]))


def test_weights_that_are_here_train_beside_others_that_are_not(tmp_path):
    here = {"model.layers.0.mlp.up_proj.weight": torch.arange(3)}
    model, whole = offloaded("disk", tmp_path), tiny_llama()
    x = torch.arange(4, 9)[None]
    gradients = []
    for each in (model, whole):
        with SparseTuner(each, here) as tuner:
            each(input_ids=x, labels=x).loss.backward()
            gradients.append(tuner.parameters()[0].grad)
    assert torch.equal(*gradients)
    assert snapshot(whole).keys() == snapshot(model).keys()
