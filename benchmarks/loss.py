"""The loss of SmolLM2-135M on 4 x 512 tokens: whole logits against the head at labels only, a chunk at a time.

All arms live in one process and take turns: a step (forward, backward, AdamW) of a sparse tuner at density 0.001, or an
evaluation without gradients. *extra* is the peak memory that a turn adds to what the process held before it. The
ratio is of processor time, which other work on the machine disturbs less; set OMP_NUM_THREADS=1 where there is some.

    python benchmarks/loss.py --output benchmarks/results/loss.json
"""

import argparse
import ctypes
import json
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

import finepoint
from finepoint.batches import IGNORED
from finepoint.data import Text, read_examples
from finepoint.models import load_model, load_tokenizer
from finepoint.training import loss as chunked
from finepoint.training.memory import peak_bytes, reset_peak
from finepoint.training.run import versions

ROWS, TOKENS = 4, 512
Turn = tuple[float, float, int, float]
"""Seconds, processor seconds, extra bytes at the peak, loss."""
LABELS = {"all": TOKENS - 1, "last 8": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="runs/demo/data/news.jsonl", help="texts; `make demo` makes them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[chunked.CHUNK], help="chunk sizes to try, in positions"
    )
    parser.add_argument("--output", default="benchmarks/results/loss.json")
    options = parser.parse_args()
    model = load_model("smollm2", "float32")
    batches = {labels: real_text(options.text, count) for labels, count in LABELS.items()}
    tuner = finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=1e-3))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0)  # a rate of 0: every turn sees the same model
    rows = []
    print(
        f"{'work':<6} {'labels':<7} {'loss':<14} {'seconds':>8} {'cpu s':>7} {'x whole':>8} {'extra MB':>9} {'loss':>8}"
    )
    for work in ("train", "eval"):
        for labels, batch in batches.items():
            turns: dict[int, list[Turn]] = {size: [] for size in (0, *options.sizes)}
            for _ in range(options.repeats + 1):
                for size, found in turns.items():
                    found.append(turn(model, batch, optimizer if work == "train" else None, size))
            for size, found in turns.items():
                seconds, processor, extra, values = zip(*found[1:], strict=True)  # the first warms up
                ratio = statistics.median(a[1] / b[1] for a, b in zip(found[1:], turns[0][1:], strict=True))
                name = f"chunks of {size}" if size else "whole logits"
                print(f"{work:<6} {labels:<7} {name:<14} {statistics.median(seconds):8.2f}"
                      f" {statistics.median(processor):7.2f} {ratio:8.2f} {max(extra) / 1e6:9.0f} {values[0]:8.5f}",
                      flush=True)  # fmt: skip
                rows.append({"work": work, "labels": labels, "chunk": size, "seconds": seconds,
                             "processor": processor, "extra": extra, "ratio": ratio, "loss": values[0]})  # fmt: skip
    facts = {"date": str(date.today()), "threads": torch.get_num_threads(), "versions": versions()}
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"facts": facts, "rows": rows}, indent=2) + "\n")


def turn(model: Any, batch: dict[str, Any], optimizer: torch.optim.Optimizer | None, size: int) -> Turn:
    """One turn; a size of 0 stands for the model's own loss."""
    chunked.CHUNK = size or chunked.CHUNK
    ctypes.CDLL(None).malloc_trim(0)  # what earlier turns freed counts as extra memory when it is used again (Linux)
    reset_peak()
    before = peak_bytes()
    started, processor = time.perf_counter(), time.process_time()
    with torch.set_grad_enabled(optimizer is not None):
        loss = chunked.completion_loss(model, batch) if size else model(**batch).loss
    if optimizer:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started, time.process_time() - processor, peak_bytes() - before, loss.item()


def real_text(path: str, labels: int) -> dict[str, Any]:
    """A batch of running text without padding, labels on the last tokens of each row."""
    tokenizer = load_tokenizer("smollm2")
    ids: list[int] = []
    for example in read_examples(path):
        assert isinstance(example, Text)
        ids += tokenizer(example.text)["input_ids"]
    batch = torch.tensor(ids[: ROWS * TOKENS]).view(ROWS, TOKENS)
    kept = batch[:, -labels - 1 :].clone()
    kept[:, 0] = IGNORED
    return {"input_ids": batch, "labels": kept, "logits_to_keep": labels + 1}


if __name__ == "__main__":
    main()
