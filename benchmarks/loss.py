"""The loss of SmolLM2-135M on 4 x 512 tokens: whole logits against the head at labels only, a chunk at a time.

Both ways live in one process and take turns: a step (forward, backward, AdamW) of a sparse tuner at density 0.001, or
an evaluation without gradients. *extra* is the peak memory that a turn adds to what the process held before it.

    python benchmarks/loss.py
"""

import ctypes
import statistics
import time
from typing import Any

import torch

from common import options, report, text_batches
from finepoint.training.loss import completion_loss

ROWS, TOKENS = 4, 512
LABELS = {"all": TOKENS - 1, "last 8": 8}
WAYS = {"whole logits": lambda model, batch: model(**batch).loss, "in chunks": completion_loss}


def main() -> None:
    given = options(__doc__, repeats=3)
    import finepoint
    from finepoint.models.loading import load_model

    model = load_model("smollm2", "float32")
    tuner = finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=1e-3))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0)  # a rate of 0: every turn sees the same model
    rows = []
    for work in ("train", "eval"):
        for labels, count in LABELS.items():
            batch = text_batches(ROWS, TOKENS, count, count=1)[0]
            turns: dict[str, list[tuple[float, int, float]]] = {way: [] for way in WAYS}
            for _ in range((1 if given.quick else given.repeats) + 1):
                for way, loss in WAYS.items():
                    turns[way].append(turn(model, batch, optimizer if work == "train" else None, loss))
            for way, found in turns.items():
                seconds, extra, values = zip(*found[1:], strict=True)  # the first warms up
                over = statistics.median(a[0] / b[0] for a, b in zip(found[1:], turns["whole logits"][1:], strict=True))
                rows.append({"work": work, "labels": labels, "loss": way, "seconds": statistics.median(seconds),
                             "x whole": over, "extra MB": max(extra) / 1e6, "value": values[0]})  # fmt: skip
    report("loss", given.output, ["work", "labels", "loss", "seconds", "x whole", "extra MB", "value"], rows)


def turn(model: Any, batch: dict[str, Any], optimizer: Any, loss_of: Any) -> tuple[float, int, float]:
    """Seconds, extra bytes at the peak, and the loss."""
    from finepoint.runtime.devices import peak_bytes, reset_peak

    ctypes.CDLL(None).malloc_trim(0)  # what earlier turns freed counts as extra memory when it is used again (Linux)
    reset_peak()
    before = peak_bytes()
    started = time.perf_counter()
    with torch.set_grad_enabled(optimizer is not None):
        loss = loss_of(model, batch)
    if optimizer:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started, peak_bytes() - before, loss.item()


if __name__ == "__main__":
    main()
