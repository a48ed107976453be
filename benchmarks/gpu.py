"""On a GPU: what the gradient at chosen entries costs beside the dense product, and a step beside its rivals.

Times are medians of CUDA events, in milliseconds. Errors are relative to float64. Models are drawn at random: only
shapes matter here. Writes gpu-gradient.json and gpu-step.json beside the other results (into the folder `--output`).
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import common

SHAPES = ((4096, 4096, 4096), (2048, 8192, 4096), (14336, 4096, 4096), (576, 1536, 2048))  # out, in, tokens
DENSITIES = (1e-4, 1e-3, 1e-2, 5e-2)
# hidden, intermediate, layers, heads, key-value heads, vocabulary; rows and tokens of a batch
MODELS = {
    "1B, 4 x 1,024": ((2048, 8192, 16, 32, 8, 32768), 4, 1024),
    "135M, 16 x 128": ((576, 1536, 30, 9, 3, 49152), 16, 128),
}
ARMS = {name: common.ARMS[name] for name in ("bound", "sparse 0.1 %", "sparse 1 %", "columns 1 %", "rows 1 %",
                                             "blocks 16x16 1 %", "LoRA r8", "DoRA r8", "full")}  # fmt: skip


def main() -> None:
    options = common.options(__doc__)
    assert torch.cuda.is_available(), "needs a GPU"
    from finepoint.tuner.kernels import plain

    torch.backends.cuda.matmul.allow_tf32 = False
    folder = Path(options.output) if options.output else common.RESULTS
    name = torch.cuda.get_device_name()
    rows = [row for shape in SHAPES[: 2 if options.quick else None] for row in gradient_rows(shape, plain)]
    columns = ["weight, tokens", "density", "dense", "by_product", "x dense", "error", "widened", "by_gather"]
    common.report("gpu-gradient", str(folder / "gpu-gradient.json"), columns, rows, gpu=name)
    rows = []
    for title, (shape, count, tokens) in MODELS.items():
        rows += step_rows(title, shape, count, tokens, turns=5 if options.quick else 15)
    columns = ["model", "arm", "trained", "ms", "x bound", "peak GB", "memory x bound"]
    common.report("gpu-step", str(folder / "gpu-step.json"), columns, rows, gpu=name)


def gradient_rows(shape: tuple[int, int, int], plain: Any) -> list[dict[str, Any]]:
    """The ways to the gradient of one layer in bfloat16, by density."""
    out, width, tokens = shape
    dy = torch.randn(tokens, out, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    exact = (dy.double().T @ x.double()).reshape(-1)
    dense = timed(lambda: dy.T @ x)
    widened = timed(lambda: dy.float().T @ x.float(), repeats=5)
    rows = []
    for density in DENSITIES:
        indices = torch.randperm(out * width, device="cuda")[: int(density * out * width)].sort().values.int()
        found = timed(lambda indices=indices: plain.by_product(dy, x, indices))  # type: ignore[misc]
        wrong = plain.by_product(dy, x, indices).double() - exact[indices]
        row = {"weight, tokens": f"{out} x {width}, {tokens}", "density": density, "dense": dense, "by_product": found,
               "x dense": found / dense, "error": float(wrong.norm() / exact[indices].norm()),
               "widened": widened}  # fmt: skip
        if density <= 1e-3:
            row["by_gather"] = timed(lambda indices=indices: plain.by_gather(dy, x, indices), repeats=5)  # type: ignore[misc]
        rows.append(row)
    return rows


def timed(run: Callable[[], Any], repeats: int = 30) -> float:
    """The median time of a call, in milliseconds, after three that do not count."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def step_rows(title: str, shape: Sequence[int], rows: int, tokens: int, turns: int) -> list[dict[str, Any]]:
    """A step of each arm on a fresh model: time and peak memory, also as a multiple of the bound's."""
    ids = torch.randint(0, shape[-1], (rows, tokens), device="cuda")
    batch = {"input_ids": ids, "labels": ids[:, -9:], "logits_to_keep": 9}
    table: list[dict[str, Any]] = []
    for name, make in ARMS.items():
        gc.collect()
        torch.cuda.empty_cache()
        model = llama(*shape)
        step = make(model)
        timed(partial(step, batch), repeats=2)
        torch.cuda.reset_peak_memory_stats()
        row = {"model": title, "arm": name, "trained": step.count, "ms": timed(partial(step, batch), turns),  # type: ignore[attr-defined]
               "peak GB": torch.cuda.max_memory_allocated() / 1e9}  # fmt: skip
        first = table[0] if table else row
        table.append(row | {"x bound": row["ms"] / first["ms"], "memory x bound": row["peak GB"] / first["peak GB"]})
        print(table[-1], flush=True)
        del model, step
    return table


def llama(hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
