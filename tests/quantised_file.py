"""A tiny GGUF file, written with the package gguf: what finepoint reads by itself is read back with that package."""

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KEYS, WIDTH, INNER, LAYERS = 4, 2, 64, 256, 2
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ .,:!?\n0123456789"
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *("Ġ" if c == " " else "Ċ" if c == "\n" else c for c in CHARACTERS), "ab"]


def tiny(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(TOKENS), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
                    num_attention_heads=HEADS, num_key_value_heads=KEYS, tie_word_embeddings=True,
                    max_position_embeddings=128, initializer_range=0.2)
    )  # fmt: skip


def permuted(weight, heads):
    """Rows of queries and keys as llama.cpp orders them: halves of a head become pairs."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def random_blocks(rows, width, type_, generator):
    """Bytes of a format that the package can read and not write; steps and minima of a sensible size."""
    block, size = gguf.GGML_QUANT_SIZES[type_]
    found = generator.integers(0, 256, (rows * width // block, size), dtype=np.uint8)
    for at in (0, 2) if type_ != gguf.GGMLQuantizationType.Q6_K else (208,):
        found[:, at : at + 2] = generator.uniform(1e-4, 2e-4, (len(found), 1)).astype(np.float16).view(np.uint8)
    return found.reshape(rows, -1)


def write_gguf(path, seed=0, **types):
    """A llama of two blocks; `types` are formats by what the tensors' names contain, Q4_1 where none is given."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3, 3] + [1] * (len(TOKENS) - 4))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    generator = np.random.default_rng(seed)
    for name, weight in tiny(seed).named_parameters():
        stored = names.get_name(name, try_suffixes=(".weight",))
        value = weight.detach().numpy()
        if "attn_q" in stored or "attn_k" in stored:
            value = permuted(value, HEADS if "attn_q" in stored else KEYS)
        given = next((type_ for part, type_ in types.items() if part in stored), "Q4_1")
        type_ = gguf.GGMLQuantizationType[given if value.ndim == 2 else "F32"]
        if type_.name in ("Q4_K", "Q5_K", "Q6_K"):
            writer.add_tensor(stored, random_blocks(*value.shape, type_, generator), raw_dtype=type_)
        elif type_.name in ("F32", "F16"):
            writer.add_tensor(stored, value.astype({"F32": np.float32, "F16": np.float16}[type_.name]))
        else:
            writer.add_tensor(stored, gguf.quantize(np.ascontiguousarray(value), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_patch(path, folder, seed=0, count=50):
    """A patch of a file, with codes drawn at random in each of its quantised matrices."""
    from finepoint.exchange import gguf_patch
    from finepoint.models.gguf import open_gguf
    from finepoint.models.grids import FLOATS, codes_at

    file, generator = open_gguf(path), np.random.default_rng(seed)
    found = {}
    for tensor in file.tensors.values():
        if tensor.type not in FLOATS:
            at = np.sort(generator.choice(int(np.prod(tensor.shape)), count, replace=False))
            old = codes_at(file.bytes(), tensor.form, tensor.start, at)
            new = (old + generator.integers(1, 1 << tensor.form.width, count)) % (1 << tensor.form.width)
            found[tensor.name] = gguf_patch.Codes(tensor.type, at, old, new)
    made = gguf_patch.finished(
        file, found, {"adapter": folder.name, "entries": 0, "changed": 0, "lost": 0.0, "clamped": 0}
    )
    folder.mkdir()
    gguf_patch.save_patch(made, folder / gguf_patch.FILE)
