"""A sparse step over the bound, and LoRA's, over model sizes and lengths; and what that says of larger models.

Random Llamas of 10M to 360M weights, so that nothing has to be fetched, 1 % of the linear weights at random; rows of 64
to 2,048 tokens, at least 512 tokens a batch; logits at the last 8 positions. Arms take turns in one process.

What a step costs is fitted by least squares of relative errors: the bound as so much for each weight and token and so
much for each pair of tokens that attention looks at; what an arm costs beyond as so much for each trained layer and so
much for each weight and token. From that the ratios of 1B and 8B on this machine are predicted: nobody has measured
them.

A cell that was measured is not measured again (delete the file to begin anew), so it may be broken off and gone on
with; no cell begins after --seconds. On a machine that others use: `--clock processor`.

    python benchmarks/scaling.py [--quick] [--seconds 540] [--clock processor]
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, bound, median_ratios, options, report, sparse, through_peft

# hidden size, intermediate size, layers, heads
SIZES = {"10M": (256, 768, 8, 4), "40M": (512, 1536, 11, 8), "110M": (768, 2048, 15, 12), "360M": (1024, 2816, 27, 16)}
LARGER = {"1B": (2048, 8192, 16, 32), "8B": (4096, 14336, 32, 32)}
LENGTHS = (64, 128, 256, 512, 1024, 2048)
TOKENS = 512
WARM_UP = 3  # turns: caches and kernels; training looks at its second step, its third, its fifth, its ninth ..
ARMS = {"bound": bound, "sparse 1 %": sparse(1e-2), "LoRA r8": through_peft("LoraConfig", r=8)}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
COLUMNS = ["model", "tokens a row", "bound s", "sparse x bound", "LoRA x bound", "sparse x LoRA"]


def main() -> None:
    given = options(__doc__, repeats=5, seconds=540, clock="wall")
    path, started = Path(given.output) if given.output else RESULTS / "scaling.json", time.monotonic()
    rows = kept(path)
    for size, shape in list(SIZES.items())[: 2 if given.quick else None]:
        lengths = LENGTHS[: 2 if given.quick else None]
        left = [each for each in lengths if (size, each) not in {(row["model"], row["tokens a row"]) for row in rows}]
        steps = {name: make(llama(*shape)) for name, make in ARMS.items()} if left else {}
        for length in left:
            if time.monotonic() - started > given.seconds:
                print(
                    f"{size}, {length} tokens: left out, {given.seconds} s are over; start again to go on", flush=True
                )
                continue
            rows.append(measured(size, length, steps, CLOCKS[given.clock], 3 if given.quick else given.repeats))
            report("scaling", str(path), COLUMNS, rows, tokens=TOKENS, clock=given.clock)
    if len(rows) >= 4:
        told = predicted(rows)
        report("scaling-predicted", str(path.with_name("scaling-predicted.json")), list(told[0]), told,
               fit=fitted(rows)[1], predicted=True)  # fmt: skip


def kept(path: Path) -> list[dict[str, Any]]:
    """The cells that were measured, those of a run of another kind left out."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return [row for row in found if "sparse s" in row]


def measured(size: str, length: int, steps: dict[str, Any], clock: Any, repeats: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    ids = torch.randint(4000, (max(1, TOKENS // length), length))
    batch = {"input_ids": ids, "labels": ids[:, -9:], "logits_to_keep": 9}
    for turn in range(repeats + WARM_UP):
        for name, step in steps.items():
            started = clock()
            step(batch)
            if turn >= WARM_UP:
                times[name].append(clock() - started)
    ratios = median_ratios(times, "bound")
    seconds = statistics.median(times["bound"])
    return {"model": size, "tokens a row": length, "bound s": seconds, "sparse x bound": ratios["sparse 1 %"],
            "LoRA x bound": ratios["LoRA r8"], "sparse x LoRA": median_ratios(times, "LoRA r8")["sparse 1 %"],
            "sparse s": seconds * ratios["sparse 1 %"], "LoRA s": seconds * ratios["LoRA r8"]}  # fmt: skip


def work(shape: tuple[int, ...], length: int) -> tuple[float, float, float]:
    """Of a step: weights x tokens and pairs of tokens x width, in units of 1e9; layers that are trained."""
    hidden, inner, layers, _ = shape
    tokens = max(TOKENS, length)
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    return linear * tokens / 1e9, layers * hidden * tokens * length / 1e9, 7.0 * layers


def fitted(rows: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The costs, none below 0, and how far the fit is from what was measured."""
    made = [work(SIZES[row["model"]], row["tokens a row"]) for row in rows]
    bound_s = np.array([row["bound s"] for row in rows])
    parts = {"bound": (bound_s, [(a, b) for a, b, _ in made])}
    for arm in ("sparse", "LoRA"):
        parts[arm] = np.array([row[f"{arm} s"] for row in rows]) - bound_s, [(c, a) for a, _, c in made]
    costs = {name: not_negative(np.array(of) / bound_s[:, None], wanted / bound_s)
             for name, (wanted, of) in parts.items()}  # fmt: skip
    off = {name: float(np.abs((np.array(of) @ costs[name] - wanted) / bound_s).max())
           for name, (wanted, of) in parts.items()}  # fmt: skip
    return costs, {"costs": {name: list(cost) for name, cost in costs.items()}, "farthest off, of the bound": off}


def not_negative(of: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with two costs that are not negative: the best of both, and of either alone."""
    found = [np.linalg.lstsq(of, wanted, rcond=None)[0]]
    for alone in range(2):
        cost = np.zeros(2)
        cost[alone] = max(0.0, of[:, alone] @ wanted / (of[:, alone] @ of[:, alone]))
        found.append(cost)
    return min((cost for cost in found if (cost >= 0).all()), key=lambda cost: float(((of @ cost - wanted) ** 2).sum()))


def predicted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    costs, _ = fitted(rows)
    found = []
    for size, shape in LARGER.items():
        for length in (512, 2048):
            weights, pairs, layers = work(shape, length)
            first = np.array([weights, pairs]) @ costs["bound"]
            sparse_s, lora = (first + np.array([layers, weights]) @ costs[arm] for arm in ("sparse", "LoRA"))
            found.append({"model": f"{size} (predicted)", "tokens a row": length, "sparse x bound": sparse_s / first,
                          "LoRA x bound": lora / first, "sparse x LoRA": sparse_s / lora})  # fmt: skip
    return found


def llama(hidden: int, intermediate: int, layers: int, heads: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                                        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=4096,
                                        max_position_embeddings=2048))  # fmt: skip


if __name__ == "__main__":
    main()
