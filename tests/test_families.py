"""Every family of models trains exactly, is saved and reverted to the bit, and is batched as alone: or is refused."""

import warnings

import pytest

from families import FAMILIES
from supported import check_batches, check_export, check_training

# The most used and the most different; all others take minutes.
QUICK = ["llama", "gpt2", "gemma3_text", "qwen3_moe", "gpt_oss", "mamba2", "jamba", "roberta", "deberta-v2", "t5",
         "qwen2_5_vl", "clip", "wavlm", "whisper"]  # fmt: skip
PADDED = [name for name, family in FAMILIES.items() if family.padded]

# What is known to be wrong; a mark that is right no more fails.
EXPECTED: dict[str, dict[str, list[str]]] = {"linear": {}, "all": {}, "batches": {}, "merged": {}}
# What is refused, rightly.
REFUSED = {
    "batches": {"fnet": "the model sees padding"},
    "merged": {
        "marian": "the files of such a model do not hold model.encoder.embed_positions.weight",
        # Loading sets its padding's embedding to 0, whatever the file holds.
        "chinese_clip": "the values of text_model.embeddings.word_embeddings.weight are not those",
    },
}


def listed(names, check):
    """The families as test parameters: most are slow, some are expected to fail."""

    def parameter(name):
        marks = [] if name in QUICK else [pytest.mark.slow]
        reasons = [reason for reason, found in EXPECTED[check].items() if name in found]
        return pytest.param(name, marks=marks + [pytest.mark.xfail(reason=reason, strict=True) for reason in reasons])

    return [parameter(name) for name in names]


@pytest.fixture(autouse=True)
def quiet():
    """Models warn of kernels that are not installed, and of what their own forward does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", listed(FAMILIES, "linear"))
def test_default_targets_train_as_dense_training_would(name):
    assert not check_training(FAMILIES[name]).refused


@pytest.mark.parametrize("name", listed(FAMILIES, "all"))
def test_all_weights_train_as_dense_training_would(name):
    assert not check_training(FAMILIES[name], "all").refused


@pytest.mark.parametrize("name", listed(PADDED, "batches"))
def test_examples_of_any_company_count_as_alone(name):
    refusal = check_batches(FAMILIES[name])
    assert REFUSED["batches"].get(name, "") in refusal
    assert bool(refusal) == (name in REFUSED["batches"])


@pytest.mark.parametrize("name", listed(FAMILIES, "merged"))
def test_a_merged_export_loads_as_the_base_with_the_adapter_applied(name):
    refusal = check_export(FAMILIES[name])
    assert REFUSED["merged"].get(name, "") in refusal
    assert bool(refusal) == (name in REFUSED["merged"])


def test_at_least_sixty_families_are_listed():
    assert len(FAMILIES) >= 60
    assert len({family.kind for family in FAMILIES.values()}) >= 10
    assert set(QUICK) <= set(FAMILIES)
    assert {name for found in EXPECTED.values() for names in found.values() for name in names} <= set(FAMILIES)
