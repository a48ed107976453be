"""One training step on SmolLM2-135M, side by side: the bound, sparse at several densities, LoRA, DoRA, full.

All arms live in one process and take turns on the same batches of real text. The median step (forward, backward,
optimizer) after a warm-up is compared with the bound: the same model with nothing trainable in its linear layers,
forward and input gradients only. Logits are computed at the last two positions for every arm, so that the head does not
hide the difference. Needs the package peft (extra `bench`).

    python benchmarks/step.py --output benchmarks/results/step.json
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import finepoint
from finepoint.data import Text, read_examples
from finepoint.models import load_model, load_tokenizer
from finepoint.training.run import versions

Step = Callable[[dict[str, Any]], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="runs/demo/data/news.jsonl", help="texts; `make demo` makes them")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default="benchmarks/results/step.json")
    options = parser.parse_args()
    batches = real_text(options.text, options.rows, options.tokens)
    arms = {name: make(load_model("smollm2", options.dtype)) for name, make in ARMS.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(options.repeats + 2):
        for name, step in arms.items():
            started = time.perf_counter()
            step(batches[turn % len(batches)])
            if turn >= 2:  # the first two warm caches, allocators and compiled kernels
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: statistics.median(a / b for a, b in zip(values, times["bound"], strict=True))
              for name, values in times.items()}  # fmt: skip
    print(f"{'arm':<14} {'seconds':>8} {'x bound':>8} {'x LoRA':>8}")
    for name, seconds in medians.items():
        print(f"{name:<14} {seconds:8.2f} {ratios[name]:8.2f} {seconds / medians['LoRA r8']:8.2f}")
    facts = {"date": str(date.today()), "dtype": options.dtype, "rows": options.rows, "tokens": options.tokens,
             "repeats": options.repeats, "threads": torch.get_num_threads(), "versions": versions(),
             "processor": platform.processor() or platform.machine()}  # fmt: skip
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        json.dumps({"facts": facts, "medians": medians, "ratios": ratios, "times": times}, indent=2) + "\n"
    )


def real_text(path: str, rows: int, tokens: int) -> list[dict[str, Any]]:
    """Batches of running text without padding, labels on the last token of each row."""
    tokenizer = load_tokenizer("smollm2")
    ids: list[int] = []
    for example in read_examples(path):
        assert isinstance(example, Text)
        ids += tokenizer(example.text)["input_ids"]
    size = rows * tokens
    found = []
    for start in range(0, min(len(ids) - size, 8 * size), size):
        batch = torch.tensor(ids[start : start + size]).view(rows, tokens)
        found.append({"input_ids": batch, "labels": batch[:, -2:], "logits_to_keep": 2})
    return found


def stepper(model: Any, parameters: list[torch.nn.Parameter]) -> Step:
    """A step of AdamW over the parameters (none: forward and backward alone)."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None
    model.train()

    def step(batch: dict[str, Any]) -> None:
        model(**batch).loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return step


def bound(model: Any) -> Step:
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return stepper(model, [])


def sparse(density: float) -> Callable[[Any], Step]:
    def make(model: Any) -> Step:
        tuner = finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=density))
        return stepper(model, tuner.parameters())

    return make


def lora(**options: Any) -> Callable[[Any], Step]:
    def make(model: Any) -> Step:
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", **options))
        return stepper(adapted, [p for p in adapted.parameters() if p.requires_grad])

    return make


def full(model: Any) -> Step:
    return stepper(model, list(model.parameters()))


ARMS: dict[str, Callable[[Any], Step]] = {
    "bound": bound,
    "sparse 0.1 %": sparse(1e-3),
    "sparse 1 %": sparse(1e-2),
    "LoRA r8": lora(),
    "DoRA r8": lora(use_dora=True),
    "full": full,
}

if __name__ == "__main__":
    main()
