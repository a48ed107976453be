"""Entries are not spent on weights that the data at hand never reach: of models of pictures, trained on text."""

import pytest
import torch

import finepoint
from conftest import assert_same_bits, random_batches, snapshot
from families import FAMILIES
from finepoint.errors import FinepointError
from finepoint.selection.reach import unreached_by_text

pytestmark = pytest.mark.filterwarnings("ignore")  # of models, about kernels that are not installed
SEEING = ["gemma3", "llava", "qwen2_5_vl"]


def without_gradient(model, batch, names):
    """By plain autograd."""
    weights = [model.get_parameter(name) for name in names]
    found = torch.autograd.grad(model(**batch).loss, weights, allow_unused=True)
    return {name for name, gradient in zip(names, found, strict=True) if gradient is None}


@pytest.mark.parametrize("name", SEEING)
def test_what_text_never_reaches_is_what_has_no_gradient(name, caplog):
    model = FAMILIES[name].build().eval()
    text = random_batches(1)
    names = list(finepoint.target_weights(model, "all"))
    before = snapshot(model)
    lost = unreached_by_text(model, names)
    assert set(lost) == without_gradient(model, text[0], names)
    assert lost
    chosen = finepoint.select(model, text, rule="magnitude-high", density=0.05, targets="all")
    assert not set(chosen) & set(lost)
    sizes = {name: weight.numel() for name, weight in finepoint.target_weights(model, "all").items()}
    assert chosen.count == int(0.05 * sum(size for name, size in sizes.items() if name not in lost) + 0.5)
    assert sum(f"text never reaches {next(iter(lost.values()))}" in line for line in caplog.messages) == 1
    assert_same_bits(before, snapshot(model))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_pictures_reach_them(caplog):
    model = FAMILIES["gemma3"].build().eval()
    batch = FAMILIES["gemma3"].batch(torch.Generator().manual_seed(0))
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    chosen = finepoint.select(model, [batch], rule="magnitude-high", density=0.2, targets="linear-everywhere")
    assert set(chosen) & set(unreached_by_text(model, chosen))
    assert "text never reaches" not in caplog.text


def test_where_nothing_tells_what_it_is_trained_on_the_parts_are_named(caplog):
    model = finepoint.sparsify(FAMILIES["gemma3"].build(), "random", 0.05, targets="linear-everywhere")
    assert "text never reaches model.vision_tower" in caplog.text
    assert "entries are chosen: give targets" in caplog.text
    finepoint.unload(model)


def test_targets_that_text_never_reaches_are_refused():
    model = FAMILIES["gemma3"].build()
    with pytest.raises(FinepointError, match="text never reaches the targets, which all belong to model.vision_tower"):
        finepoint.select(model, rule="random", density=0.1, targets="*vision_tower*q_proj", text=True)


@pytest.mark.parametrize("name", ["llama", "jamba", "qwen3_moe", "t5"])
def test_models_of_text_are_reached_everywhere(name):
    model = FAMILIES[name].build()
    assert not unreached_by_text(model, finepoint.target_weights(model, "all"))
