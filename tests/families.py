"""Tiny models of many families of transformers, and what each of them trains on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

from finepoint.data.batches import IGNORED

IMAGE = 60  # the token that stands for a piece of an image or of a sound

# One size for all: what a family's configuration does not know, it carries along unused.
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
HEADS = {"head_dim": 4}
WINDOW = {"head_dim": 4, "sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}  # fmt: skip
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
          "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
          "n_shared_experts": 1}  # fmt: skip
PAIRED: dict[str, Any] = {
    "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_kv": 4, "d_ff": 24,
    "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "init_std": 0.2, "num_experts": 4,
}  # fmt: skip
SIGHT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4, "num_channels": 3, "initializer_range": 0.2, "projection_dim": 16,
}  # fmt: skip
SOUND: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer",
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "mask_time_prob": 0,
    "ctc_loss_reduction": "mean", "ctc_zero_infinity": True, "num_labels": 3, "classifier_proj_size": 16,
}  # fmt: skip

Batch = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, and what it trains on."""

    name: str
    kind: str
    build: Callable[[], Any]
    batch: Callable[[torch.Generator], Batch]
    padded: bool = False
    """finepoint makes the batches of such a model, from rows of unequal length"""


FAMILIES: dict[str, Family] = {}


def add(
    name: str, kind: str, model: str, batch: Callable[[torch.Generator], Batch], size: Batch,
    config: str | None = None, padded: bool = False,
) -> None:  # fmt: skip
    """Lists a family, if the installed transformers has it; `model` is a class of its own or an Auto class."""

    def build() -> Any:
        torch.manual_seed(0)
        settings = CONFIG_MAPPING[config or name](**size)
        factory = getattr(transformers, model)
        return factory.from_config(settings) if model.startswith("Auto") else factory(settings)

    assert name not in FAMILIES, name
    if (config or name) in CONFIG_MAPPING and hasattr(transformers, model):
        FAMILIES[name] = Family(name, kind, build, batch, padded)


def tokens(generator: torch.Generator, rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, IMAGE, (rows, length), generator=generator)


def numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Causal models of text.


def language(generator: torch.Generator) -> Batch:
    """Rows longer than the window, of which the end is learned."""
    ids = tokens(generator)
    labels = ids.clone()
    labels[:, :5] = IGNORED
    return {"input_ids": ids, "labels": labels}


def each(names: str, changes: Batch | None = None) -> dict[str, Batch]:
    return dict.fromkeys(names.split(), changes or {})


def decoders(kind: str, families: dict[str, Batch]) -> None:
    for name, changes in families.items():
        add(name, kind, "AutoModelForCausalLM", language, SMALL | changes, padded=True)


decoders(
    "decoder",
    each(
        "llama gpt2 gpt_neox bloom phi phi3 gemma2 qwen2 mistral olmo olmo2 stablelm starcoder2 cohere granite mpt "
        "persimmon smollm3 nemotron arcee apertus gpt_bigcode seed_oss biogpt openai-gpt modernbert-decoder nanochat "
        "diffllama bitnet"
    )
    | each("gemma helium qwen3 glm glm4 ernie4_5 exaone4 hunyuan_v1_dense ministral", HEADS)
    | each("gemma3_text cohere2 olmo3 cwm", WINDOW)
    | {
        "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
        "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        "gptj": {"n_embd": 16, "n_head": 4, "rotary_dim": 4},
        "codegen": {"n_embd": 16, "n_head": 4, "rotary_dim": 4},
        "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    },
)
add("bloom (slow but exact)", "decoder", "AutoModelForCausalLM", language,
    SMALL | {"slow_but_exact": True, "pretraining_tp": 2}, "bloom", True)  # fmt: skip
decoders(
    "mixture of experts",
    each("mixtral olmoe granitemoe phimoe jetmoe granitemoeshared flex_olmo minimax", EXPERTS)
    | each("qwen2_moe qwen3_moe glm4_moe ernie4_5_moe hunyuan_v1_moe", EXPERTS | HEADS)
    | each("deepseek_v2 deepseek_v3", EXPERTS | LATENT)
    | {
        "dbrx": {"d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
                 "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
                 "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16}},
        "gpt_oss": EXPERTS | WINDOW,
        "llama4_text": EXPERTS | HEADS | {"intermediate_size_mlp": 24, "attention_chunk_size": 8},
        "longcat_flash": EXPERTS | LATENT | HEADS | {"num_layers": 2, "ffn_hidden_size": 24, "moe_topk": 2,
                                                     "expert_ffn_hidden_size": 8, "zero_expert_num": 2},
    },
)  # fmt: skip
MAMBA = {"state_size": 4, "mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4,
         "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4, "mamba_dt_rank": 4}  # fmt: skip
decoders(
    "state space or hybrid",
    {
        "mamba": MAMBA,
        "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
        "falcon_mamba": MAMBA,
        "jamba": MAMBA | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                                    "expert_layer_offset": 1, "use_mamba_kernels": False},
        "bamba": MAMBA | {"attn_layer_indices": [1]},
        "granitemoehybrid": MAMBA | EXPERTS | {"layer_types": ["mamba", "attention"]},
        "zamba2": {"mamba_d_state": 4, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 4, "num_mem_blocks": 1,
                   "layers_block_type": ["mamba", "hybrid"], "use_mem_rope": False},
        "falcon_h1": MAMBA | {"mamba_d_ssm": 32, "head_dim": 4},
        "recurrent_gemma": {"lru_width": 16, "block_types": ["recurrent", "attention"], "attention_window_size": 8},
        "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 24, "block_multiple_of": 8},
        "qwen3_next": EXPERTS | HEADS | {"layer_types": ["linear_attention", "full_attention"],
                                         "linear_num_value_heads": 2, "linear_num_key_heads": 2,
                                         "linear_key_head_dim": 4, "linear_value_head_dim": 4},
        "olmo_hybrid": HEADS | {"layer_types": ["linear_attention", "full_attention"]},
        "nemotron_h": MAMBA | EXPERTS | {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4,
                                         "n_groups": 1, "chunk_size": 4, "hybrid_override_pattern": "M*",
                                         "head_dim": 4},
    },
)  # fmt: skip

for name, size in {"rwkv": {"attention_hidden_size": 16, "context_length": 64},
                   "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0, "num_heads": 2,
                             "chunk_size": 4}}.items():  # fmt: skip
    # Their states are changed in place where a cache is kept, and then have no gradient.
    add(name, "state space or hybrid", "AutoModelForCausalLM",
        lambda generator: language(generator) | {"use_cache": False}, SMALL | size, padded=True)  # fmt: skip

# Classifiers of text.


def classes(generator: torch.Generator) -> Batch:
    ids = tokens(generator)
    ids[:, -1] = SMALL["eos_token_id"]
    return {"input_ids": ids, "labels": torch.randint(0, 3, (2,), generator=generator)}


CLASSES = SMALL | {"num_labels": 3, "embedding_size": 16}
CLASSIFIERS = each(
    "bert roberta electra albert mpnet camembert xlm-roberta nomic_bert eurobert roformer big_bird fnet"
) | {
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "longformer": {"attention_window": 4},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
}
for name, changes in CLASSIFIERS.items():
    add(name, "encoder as classifier", "AutoModelForSequenceClassification", classes, CLASSES | changes, padded=True)
for name, size in {
    "llama": CLASSES,
    "gpt2": CLASSES,
    "gemma3_text": CLASSES | WINDOW,
    "qwen2_moe": CLASSES | EXPERTS,
}.items():
    add(f"{name} (classifier)", "decoder as classifier", "AutoModelForSequenceClassification", classes, size, name,
        padded=True)  # fmt: skip
add("t5 (classifier)", "encoder-decoder as classifier", "T5ForSequenceClassification", classes,
    PAIRED | {"num_labels": 3}, "t5", True)  # fmt: skip


def spans(generator: torch.Generator) -> Batch:
    ids = tokens(generator)
    return {"input_ids": ids, "start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 7])}


def tags(generator: torch.Generator) -> Batch:
    return {"input_ids": tokens(generator), "labels": torch.randint(0, 3, (2, 12), generator=generator)}


add("bert (question answering)", "encoder", "BertForQuestionAnswering", spans, SMALL, "bert")
add("bert (tokens)", "encoder", "BertForTokenClassification", tags, CLASSES, "bert")
add("bert (masked words)", "encoder", "BertForMaskedLM", language, SMALL, "bert")

# Encoder-decoders of text.


def translation(generator: torch.Generator) -> Batch:
    labels = tokens(generator, length=7)
    labels[0, 5:] = IGNORED
    return {"input_ids": tokens(generator), "labels": labels}


for name in each("t5 bart mbart pegasus marian m2m_100 blenderbot led longt5 switch_transformers umt5 mt5 plbart "
                 "nllb-moe bigbird_pegasus"):  # fmt: skip
    add(name, "encoder-decoder", "AutoModelForSeq2SeqLM", translation, PAIRED | {"attention_window": 4})


# Images and text.


def seeing(count: int = 4, before: tuple[int, ...] = (), side: int = 8, **more: Callable[[torch.Tensor], Any]) -> Any:
    """A batch of one image: `count` tokens of it, text after them; `more`: of the token ids, what else is given."""

    def batch(generator: torch.Generator) -> Batch:
        ids = torch.cat([torch.tensor([[1, *before, *[IMAGE] * count]]), tokens(generator, 1, 8)], 1)
        labels = ids.masked_fill(ids == IMAGE, IGNORED)
        found = {"input_ids": ids, "labels": labels, "pixel_values": numbers(generator, 1, 3, side, side)}
        return found | {key: make(found) for key, make in more.items()}

    return batch


def flags(found: Batch) -> torch.Tensor:
    return (found["input_ids"] == IMAGE).long()


def patches(generator: torch.Generator) -> Batch:
    """An image as Qwen's models take it: 16 patches, put together four by four."""
    batch = seeing(before=(62,))(generator)
    return batch | {"pixel_values": numbers(generator, 16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]]),
                    "mm_token_type_ids": flags(batch)}  # fmt: skip


CLIP = {"model_type": "clip_vision_model", **SIGHT}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **SIGHT}
LLAMA = {"model_type": "llama", **SMALL}
PIXELS = {"pixel_values": lambda found: found["pixel_values"][:, None]}
SEES = "vision and language"

add("llava", SEES, "LlavaForConditionalGeneration", seeing(),
    {"vision_config": CLIP, "text_config": LLAMA, "image_token_id": IMAGE})  # fmt: skip
add("llava_next", SEES, "LlavaNextForConditionalGeneration",
    seeing(10, pixel_values=lambda found: found["pixel_values"][:, None].expand(1, 2, 3, 8, 8),
           image_sizes=lambda found: torch.tensor([[8, 8]])),
    {"vision_config": CLIP, "text_config": LLAMA, "image_token_id": IMAGE,
     "image_grid_pinpoints": [[8, 8]]})  # fmt: skip
QWEN_SIGHT = {
    "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3, "mlp_ratio": 2, "intermediate_size": 24,
    "out_hidden_size": 16, "fullatt_block_indexes": [1], "window_size": 16, "initializer_range": 0.2,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "image_size": 16,
}  # fmt: skip
QWEN = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63,
        "image_start_token_id": 62, "image_end_token_id": 63, "vision_config": QWEN_SIGHT,
        "text_config": SMALL | HEADS | {"rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4,
            "partial_rotary_factor": 1.0}}}  # fmt: skip
for name, model in {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "glm4v": "Glm4v"}.items():
    add(name, SEES, f"{model}ForConditionalGeneration", patches, QWEN)
add("gemma3", SEES, "Gemma3ForConditionalGeneration", seeing(token_type_ids=flags),
    {"vision_config": SIGLIP, "text_config": SMALL | WINDOW, "mm_tokens_per_image": 4, "image_token_index": IMAGE,
     "boi_token_index": 61, "eoi_token_index": 62})  # fmt: skip
add("paligemma", SEES, "PaliGemmaForConditionalGeneration",
    seeing(token_type_ids=lambda found: 1 - flags(found), attention_mask=lambda found: torch.ones_like(flags(found))),
    {"vision_config": SIGLIP, "text_config": {"model_type": "gemma", **SMALL, **HEADS}, "image_token_index": IMAGE,
     "projection_dim": 16})  # fmt: skip
add("idefics", SEES, "IdeficsForVisionText2Text",
    seeing(0, **PIXELS, image_attention_mask=lambda found: torch.ones(1, found["input_ids"].shape[1], 1).long()),
    SMALL | {"vision_config": {"embed_dim": 16, **SIGHT}, "perceiver_config": {"use_resampler": False},
             "additional_vocab_size": 0, "cross_layer_interval": 1, "use_resampler": False})  # fmt: skip
add("idefics2", SEES, "Idefics2ForConditionalGeneration", seeing(**PIXELS),
    {"vision_config": SIGHT, "text_config": {"model_type": "mistral", **SMALL}, "image_token_id": IMAGE,
     "perceiver_config": {"hidden_size": 16, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
                          "resampler_head_dim": 4, "num_key_value_heads": 2}})  # fmt: skip
for name, model in {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}.items():
    add(name, SEES, f"{model}ForConditionalGeneration", seeing(**PIXELS),
        {"vision_config": SIGHT, "text_config": LLAMA, "image_token_id": IMAGE, "scale_factor": 1})  # fmt: skip
add("mllama", SEES, "MllamaForConditionalGeneration",
    seeing(1, pixel_values=lambda found: found["pixel_values"][:, None, None],
           aspect_ratio_ids=lambda found: torch.ones(1, 1).long(),
           aspect_ratio_mask=lambda found: torch.ones(1, 1, 1).long(),
           cross_attention_mask=lambda found: torch.ones(1, found["input_ids"].shape[1], 1, 1).long()),
    {"vision_config": {**SIGHT, "attention_heads": 4, "num_global_layers": 1, "vision_output_dim": 32,
                       "max_num_tiles": 1, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
     "text_config": SMALL | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default",
                                                                                "rope_theta": 1e4}},
     "image_token_index": IMAGE})  # fmt: skip
add("internvl", SEES, "InternVLForConditionalGeneration", seeing(side=16),
    {"vision_config": SIGHT | {"image_size": [16, 16], "patch_size": [4, 4]}, "image_token_id": IMAGE,
     "text_config": {"model_type": "qwen2", **SMALL}, "downsample_ratio": 0.5})  # fmt: skip
add("mistral3", SEES, "Mistral3ForConditionalGeneration",
    seeing(side=16, image_sizes=lambda found: torch.tensor([[16, 16]])),
    {"vision_config": {**SIGHT, **HEADS, "model_type": "pixtral", "image_size": 16}, "spatial_merge_size": 2,
     "text_config": {"model_type": "mistral", **SMALL, **HEADS}, "image_token_index": IMAGE})  # fmt: skip
add("blip-2", SEES, "Blip2ForConditionalGeneration", seeing(),
    {"vision_config": SIGHT, "qformer_config": SMALL | {"encoder_hidden_size": 16, "cross_attention_frequency": 1},
     "text_config": {"model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16, **SMALL}, "num_query_tokens": 4,
     "image_token_index": IMAGE})  # fmt: skip
add("git", SEES, "GitForCausalLM", seeing(0), SMALL | {"vision_config": SIGHT})
add("gemma3 (text alone)", SEES, "Gemma3ForConditionalGeneration",
    lambda generator: language(generator) | {"token_type_ids": torch.zeros(2, 12).long()},
    {"vision_config": SIGLIP, "text_config": SMALL | WINDOW, "mm_tokens_per_image": 4, "image_token_index": IMAGE,
     "boi_token_index": 61, "eoi_token_index": 62}, "gemma3")  # fmt: skip


def pairs(generator: torch.Generator) -> Batch:
    ids = tokens(generator, length=5)
    ids[:, -1] = SMALL["eos_token_id"]
    return {"input_ids": ids, "pixel_values": numbers(generator, 2, 3, 8, 8), "return_loss": True}


def pictures(generator: torch.Generator) -> Batch:
    return {"pixel_values": numbers(generator, 2, 3, 8, 8), "labels": torch.randint(0, 3, (2,), generator=generator)}


BESIDE = {"vision_config": SIGHT, "text_config": SMALL | {"projection_dim": 16, "projection_size": 16},
          "projection_dim": 16}  # fmt: skip
for name, model in {"clip": "CLIPModel", "siglip": "SiglipModel", "chinese_clip": "ChineseCLIPModel",
                    "altclip": "AltCLIPModel", "blip": "BlipModel"}.items():  # fmt: skip
    add(name, "images beside texts", model, pairs, BESIDE)
for name, size in {"vit": {}, "dinov2": {}, "beit": {}, "ijepa": {}, "siglip": BESIDE, "convnext": {
        "num_stages": 2, "hidden_sizes": [16, 16], "depths": [1, 1]}}.items():  # fmt: skip
    add(name if name != "siglip" else "siglip (classifier)", "image classifier", "AutoModelForImageClassification",
        pictures, SIGHT | {"num_labels": 3} | size, name)  # fmt: skip

# Sound.


def sounds(generator: torch.Generator) -> Batch:
    return {"input_values": numbers(generator, 2, 400), "labels": torch.randint(0, 3, (2,), generator=generator)}


def speech(generator: torch.Generator) -> Batch:
    return {"input_values": numbers(generator, 2, 400), "labels": torch.randint(3, 32, (2, 2), generator=generator)}


def mel(generator: torch.Generator) -> Batch:
    return {"input_features": numbers(generator, 2, 8, 40), "labels": translation(generator)["labels"]}


def hearing(generator: torch.Generator) -> Batch:
    batch = seeing(10)(generator)
    del batch["pixel_values"]
    return batch | {"input_features": numbers(generator, 1, 8, 40), "feature_attention_mask": torch.ones(1, 40).long()}


EAR = {"num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 24,
       "max_source_positions": 20, "init_std": 0.2}  # fmt: skip
for name in ("wav2vec2", "hubert", "wavlm"):
    add(name, "sound", "AutoModelForCTC", speech, SOUND)
add("wavlm (classifier)", "sound", "AutoModelForAudioClassification", sounds, SOUND, "wavlm")
add("whisper", "sound", "WhisperForConditionalGeneration", mel,
    PAIRED | EAR | {"max_target_positions": 20, "suppress_tokens": None, "begin_suppress_tokens": None})  # fmt: skip
add("qwen2_audio", "sound", "Qwen2AudioForConditionalGeneration", hearing,
    {"audio_config": EAR, "text_config": {"model_type": "qwen2", **SMALL}, "audio_token_index": IMAGE})  # fmt: skip
