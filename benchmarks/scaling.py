"""A sparse step over the bound, and LoRA's, over three model sizes and four sequence lengths.

Random Llamas of three sizes, so that nothing has to be fetched, 1 % of the linear weights at random; 512 tokens
a batch; logits at the last 8 positions. Arms take turns in one process.

    python benchmarks/scaling.py
"""

import statistics
import time

import torch

from common import bound, median_ratios, options, report, sparse, through_peft

# hidden size, intermediate size, layers, heads
SIZES = {"10M": (256, 768, 8, 4), "40M": (512, 1536, 11, 8), "110M": (768, 2048, 15, 12)}
LENGTHS = (64, 128, 256, 512)
TOKENS = 512
ARMS = {"bound": bound, "sparse 1 %": sparse(1e-2), "LoRA r8": through_peft("LoraConfig", r=8)}


def main() -> None:
    given = options(__doc__, repeats=5)
    rows = []
    for size, shape in list(SIZES.items())[: 1 if given.quick else 3]:
        steps = {name: make(llama(*shape)) for name, make in ARMS.items()}
        for length in LENGTHS:
            times: dict[str, list[float]] = {name: [] for name in steps}
            ids = torch.randint(4000, (TOKENS // length, length))
            batch = {"input_ids": ids, "labels": ids[:, -9:], "logits_to_keep": 9}
            for turn in range(given.repeats + 1):
                for name, step in steps.items():
                    started = time.perf_counter()
                    step(batch)
                    if turn:
                        times[name].append(time.perf_counter() - started)
            ratios = median_ratios(times, "bound")
            rows.append({"model": size, "tokens a row": length, "bound s": statistics.median(times["bound"]),
                         "sparse x bound": ratios["sparse 1 %"], "LoRA x bound": ratios["LoRA r8"],
                         "sparse x LoRA": median_ratios(times, "LoRA r8")["sparse 1 %"]})  # fmt: skip
    report("scaling", given.output, list(rows[0]), rows, tokens=TOKENS)


def llama(hidden: int, intermediate: int, layers: int, heads: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                                        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=4096,
                                        max_position_embeddings=2048))  # fmt: skip


if __name__ == "__main__":
    main()
