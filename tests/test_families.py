"""Every family of models trains exactly, is saved and reverted to the bit, and is batched as alone: or is refused."""

import warnings

import pytest
import torch

import finepoint
from families import FAMILIES
from supported import PAGE, check_batches, check_export, check_training, told, weights

# The most used and the most different; all others take minutes.
QUICK = ["llama", "gpt2", "gemma3_text", "qwen3_moe", "gpt_oss", "mamba2", "jamba", "roberta", "deberta-v2", "t5",
         "qwen2_5_vl", "clip", "wavlm", "whisper"]  # fmt: skip
PADDED = [name for name, family in FAMILIES.items() if family.padded]

# What is refused, rightly.
REFUSED = {
    "batches": {"fnet": "the model sees padding"},
    "merged": {"marian": "the files of such a model do not hold model.encoder.embed_positions.weight"},
}


def listed(names):
    """The families as test parameters; most are slow."""
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def quiet():
    """Models warn of kernels that are not installed, and of what their own forward does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", listed(FAMILIES))
def test_default_targets_train_as_dense_training_would(name):
    trained = check_training(FAMILIES[name])
    assert not trained.refused
    assert told(name, "default targets") in (weights(trained), None)


@pytest.mark.parametrize("name", listed(FAMILIES))
def test_all_weights_train_as_dense_training_would(name):
    trained = check_training(FAMILIES[name], "all")
    assert not trained.refused
    assert told(name, "all weights") in (weights(trained), None)


@pytest.mark.parametrize("name", listed(PADDED))
def test_examples_of_any_company_count_as_alone(name):
    refusal = check_batches(FAMILIES[name])
    assert REFUSED["batches"].get(name, "") in refusal
    assert bool(refusal) == (name in REFUSED["batches"])


@pytest.mark.parametrize("name", listed(FAMILIES))
def test_a_merged_export_loads_as_the_base_with_the_adapter_applied(name):
    refusal = check_export(FAMILIES[name])
    assert REFUSED["merged"].get(name, "") in refusal
    assert bool(refusal) == (name in REFUSED["merged"])


@pytest.mark.parametrize("name", ["rwkv", "xlstm"])
def test_states_that_are_changed_in_place_are_no_hindrance_to_a_choice(name):
    """Told nothing, these models keep a cache in eval mode, whose states cannot be differentiated."""
    model = FAMILIES[name].build().eval()
    batch = FAMILIES[name].batch(torch.Generator().manual_seed(0))
    told_nothing = {key: batch[key] for key in ("input_ids", "labels")}
    found = [finepoint.select(model, [given], rule="gradient", density=0.1) for given in (batch, told_nothing)]
    assert all(torch.equal(found[0][weight], found[1][weight]) for weight in found[0])
    assert model.config.use_cache is True


def test_the_page_lists_every_family_and_its_refusals():
    text = PAGE.read_text()
    lines = text.splitlines()
    for name in FAMILIES:
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1, f"{name}: run `make families`"
    for found in REFUSED.values():
        for reason in found.values():
            assert reason.split(" model.")[0] in text


def test_at_least_sixty_families_are_listed():
    assert len(FAMILIES) >= 60
    assert len({family.kind for family in FAMILIES.values()}) >= 10
    assert set(QUICK) <= set(FAMILIES)
