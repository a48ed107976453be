"""Every family of models trains exactly, is saved and reverted to the bit, and is batched as alone: or is refused."""

import warnings

import pytest

from families import FAMILIES
from supported import check_batches, check_export, check_training

# The most used and the most different; all others take minutes.
QUICK = ["llama", "gpt2", "gemma3_text", "qwen3_moe", "gpt_oss", "mamba2", "jamba", "roberta", "deberta-v2", "t5",
         "qwen2_5_vl", "clip", "wavlm", "whisper"]  # fmt: skip
PADDED = [name for name, family in FAMILIES.items() if family.padded]

NO_LABELS = "gradients are taken only of batches with labels"
PADDING = "an example sees the padding, or another example"
OTHER_LAYOUT = "the files have another layout than the model, which is refused though it need not be"
NO_DIMENSION = "parameters without a dimension are not understood"
# What is known to be wrong; a mark that is right no more fails.
EXPECTED = {
    "linear": {
        NO_LABELS: ["bert (question answering)", "clip", "siglip", "chinese_clip", "altclip", "blip"],
    },
    "all": {
        NO_LABELS: ["bert (question answering)", "clip", "siglip", "chinese_clip", "altclip", "blip"],
    },
    "batches": {
        PADDING: ["openai-gpt", "gpt_neo", "recurrent_gemma", "rwkv", "xlstm", "bert", "roberta", "distilbert",
                  "electra", "deberta",
                  "deberta-v2", "albert", "modernbert", "mpnet", "camembert", "xlm-roberta", "nomic_bert", "roformer",
                  "big_bird", "longformer", "fnet", "t5 (classifier)"],
    },
    "merged": {
        OTHER_LAYOUT: ["gpt_neox", "mixtral", "olmoe", "granitemoe", "phimoe", "granitemoeshared", "flex_olmo",
                       "minimax", "qwen2_moe", "qwen3_moe", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe",
                       "deepseek_v2", "deepseek_v3", "longcat_flash", "jamba", "granitemoehybrid", "qwen3_next",
                       "olmo_hybrid", "nemotron_h", "nomic_bert", "qwen2_moe (classifier)", "marian", "llava",
                       "llava_next", "qwen2_vl", "qwen2_5_vl", "gemma3", "paligemma", "mllama", "internvl",
                       "mistral3", "gemma3 (text alone)", "vit", "dinov2", "beit", "ijepa", "qwen2_audio"],
        NO_DIMENSION: ["clip", "chinese_clip", "altclip", "blip"],
    },
}  # fmt: skip


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
    check_batches(FAMILIES[name])


@pytest.mark.parametrize("name", listed(FAMILIES, "merged"))
def test_a_merged_export_loads_as_the_base_with_the_adapter_applied(name):
    assert not check_export(FAMILIES[name])


def test_at_least_sixty_families_are_listed():
    assert len(FAMILIES) >= 60
    assert len({family.kind for family in FAMILIES.values()}) >= 10
    assert set(QUICK) <= set(FAMILIES)
    assert {name for found in EXPECTED.values() for names in found.values() for name in names} <= set(FAMILIES)
