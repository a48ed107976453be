"""What a quantised file keeps of a fine-tune: entries trained on its grid, snapped to it afterwards, and LoRA.

    finepoint data vader --output runs/data/vader        # and wordnet, arithmetic
    python studies/patch.py --data runs/data --output runs/patch
    python studies/patch.py --output runs/patch --page   # docs/study/patch.csv and patch.svg, of what there is

A cell is one training and all that is measured of it, one JSON file; the same command goes on where it was broken off.
LoRA is measured twice: as it was trained, beside the quantised base, and merged in float32 and quantised anew into the
formats of the file. Q4_K and Q6_K are quantised here, by a search for the steps of least squared error; everything
else by the package `gguf`. All arms are measured on the same validation examples, by the loss of the right answers and
by greedy answers that are exactly right.
"""

import argparse
import csv
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import PeftModel
from torch.nn import functional

from finepoint.adapters.adapter import SparseAdapter
from finepoint.data.batches import Collator
from finepoint.data.examples import Example, read_examples
from finepoint.data.tokens import IGNORED, encode_all
from finepoint.exchange.checkpoint import open_checkpoint
from finepoint.exchange.gguf_patch import patch_of, save_patch, snap
from finepoint.exchange.layouts import Source
from finepoint.models.gguf import entry_grids, open_gguf, places
from finepoint.models.loading import gguf_file, load_model, load_tokenizer
from finepoint.training.context import training_context
from finepoint.training.run import train
from finepoint.training.settings import TrainConfig

TASKS = {"movies": "vader/movies", "words": "wordnet/wordnet", "sums": "arithmetic/arithmetic"}
LORA_RATES = {"lora": 1e-3, "lora-slow": 3e-4}
ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "on-grid": {"rule": "random", "density": 0.01, "on_grid": True},
    "snapped": {"rule": "random", "density": 0.01, "lr": 0.003, "store": "delta"},
    **{arm: {"baseline": "lora", "lr": rate} for arm, rate in LORA_RATES.items()},
    "snapped-far": {"rule": "random", "density": 0.001, "lr": 0.03, "store": "delta"},
    "on-grid-few": {"rule": "random", "density": 0.001, "on_grid": True},
}
MEASURED_ON = 100
STEPS, BATCH = 30, 16
Numbers = np.ndarray
Scores = dict[str, Any]


def planned(models: list[str]) -> Iterator[tuple[str, int, str, str]]:
    """Model, seed, task, arm, so that a part of them is of use."""
    most, slow, few = [*ARMS][:4], [*ARMS][4:5], [*ARMS][5:]
    small, *others = models
    yield from ((small, 0, task, arm) for task in ("movies", "sums") for arm in most)
    yield from ((other, 0, "sums", arm) for other in others for arm in most)
    yield from ((small, 0, "words", arm) for arm in most)
    yield from ((small, 0, task, arm) for task in TASKS for arm in slow)
    yield from ((small, seed, task, arm) for seed in (1, 2) for task in TASKS for arm in most[1:])
    yield from ((other, 0, task, arm) for other in others for task in TASKS for arm in most)
    yield from ((small, 0, task, arm) for task in TASKS for arm in few)
    yield from ((other, seed, task, arm) for other in others for seed in (1, 2) for task in TASKS for arm in most[1:])


class Worker:
    """A model, at the base between cells, and the examples of its tasks."""

    def __init__(self, name: str, data: Path, output: Path) -> None:
        self.name, self.data, self.output = name, data, output
        self.model, self.tokenizer = load_model(name), load_tokenizer(name)
        path = gguf_file(name)
        assert path is not None
        self.file = open_gguf(path)

    def examples(self, task: str, part: str) -> list[Example]:
        """Of a set that may be sorted by what is right: in an order of their own, always the same."""
        found = list(read_examples(str(self.data / f"{TASKS[task]}-{part}.jsonl")))
        random.Random(0).shuffle(found)
        return found

    @torch.no_grad()
    def measured(self, task: str) -> Scores:
        """What the model, as it stands, knows of a task: the mean loss of a token of the right answers, and the share
        of these whose every token is the likeliest one (of sums the end, too): what a greedy answer would be.
        """
        self.model.eval()
        examples = self.examples(task, "validation")[:MEASURED_ON]
        rows = encode_all(self.tokenizer, examples, 512, (), "validation example", self.model)
        collator = Collator.of(self.model, self.tokenizer, [row.ids for row in rows])
        total, count, exact = 0.0, 0, 0
        for batch in collator.batches(rows, 20):
            labels = batch.pop("labels")[:, 1:]
            logits, known = self.model(**batch).logits[:, :-1], labels != IGNORED
            total += float(functional.cross_entropy(logits[known].float(), labels[known], reduction="sum"))
            count += int(known.sum())
            exact += int(((logits.argmax(-1) == labels) | ~known).all(1).sum())
        return {"loss": total / count, "exact": exact / len(rows), "n": len(rows)}

    def cell(self, seed: int, task: str, arm: str) -> dict[str, Any]:
        """Trains an arm, measures it, and leaves the model at the base."""
        if arm == "base":
            return {"file": self.measured(task)}
        folder = self.output / "adapters" / f"{self.file.path.stem}-{task}-{arm}-{seed}"
        config = TrainConfig(model=self.name, data=str(self.data / f"{TASKS[task]}-train.jsonl"), output=str(folder),
                             steps=STEPS, batch_size=BATCH, seed=seed, no_audit=True, max_length=512, overwrite=True,
                             **ARMS[arm])  # fmt: skip
        context = training_context(config, self.model, self.tokenizer, self.examples(task, "train"))
        record = train(config, context)
        told = {name: record[name] for name in ("lr", "trained", "loss", "last_loss", "step_seconds", "train_seconds")}
        found = self.lora(task, folder) if arm in LORA_RATES else self.entries(task, folder)
        shutil.rmtree(folder)
        return {"training": told, **found}

    def entries(self, task: str, folder: Path) -> dict[str, Any]:
        """Chosen entries: as they were trained, and as the patched file holds them."""
        source = Source(str(folder), open_checkpoint(self.name), None)
        patch, report = patch_of(self.file, source)
        save_patch(patch, folder / "patch.safetensors")
        facts = report | {"patch_bytes": (folder / "patch.safetensors").stat().st_size}
        with SparseAdapter.load(str(folder)).applied(self.model):
            trained = self.measured(task)
        grids = entry_grids(self.file, self.model, {name: (each.indices, each.base)
                                                    for name, each in source.patches.items()})  # fmt: skip
        new = {name: grids[name].rounded(snap(grids[name], each)).to(each.values.dtype)
               for name, each in source.patches.items()}  # fmt: skip
        if all(torch.equal(new[name], each.values) for name, each in source.patches.items()):
            return {"trained": trained, "file": trained, "patch": facts}
        weights = {name: self.model.get_parameter(name) for name in new}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.view(-1)[source.patches[name].indices] = new[name]
            snapped = self.measured(task)
            for name, weight in weights.items():
                weight.view(-1)[source.patches[name].indices] = source.patches[name].base
        return {"trained": trained, "file": snapped, "patch": facts}

    def lora(self, task: str, folder: Path) -> dict[str, Any]:
        """LoRA beside the base, and merged and quantised anew."""
        beside = PeftModel.from_pretrained(self.model, str(folder))
        trained = self.measured(task)
        deltas = {name: module.get_delta_weight("default").detach().float()
                  for name, module in _lora_layers(beside)}  # fmt: skip
        beside.unload()
        weights = {name: self.model.get_parameter(name) for name in deltas}
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        everywhere = {name: torch.arange(weight.numel()) for name, weight in weights.items()}
        data, same, total = self.file.bytes(), 0, 0
        with torch.no_grad():
            for name, place in places(self.file, self.model, everywhere).items():
                merged = np.empty(kept[name].numel(), np.float32)
                merged[place.positions] = (kept[name].float() + deltas[name]).reshape(-1).numpy()
                made = quantised(merged.reshape(place.tensor.shape), place.tensor.type)
                old = data[place.tensor.start :][: made.size]
                same, total = same + int((made == old).sum()), total + made.size
                type_ = gguf.GGMLQuantizationType[place.tensor.type]
                back = gguf.dequantize(made.reshape(place.tensor.shape[0], -1), type_).reshape(-1)[place.positions]
                weights[name].copy_(torch.from_numpy(back).view_as(weights[name]))
            anew = self.measured(task)
            for name, weight in weights.items():
                weight.copy_(kept[name])
        return {"trained": trained, "file": anew, "patch": {"same_bytes": same, "bytes": total}}


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            yield f"{name}.weight", module


# What llama.cpp quantises and the package gguf does not.


def quantised(weight: Numbers, type_: str) -> Numbers:
    """A weight's bytes in one of GGUF's formats: (n,) uint8."""
    own = {"Q4_K": _q4_k, "Q6_K": _q6_k}.get(type_)
    if own:
        return own(weight.reshape(-1, 256)).reshape(-1)
    return gguf.quantize(np.ascontiguousarray(weight), gguf.GGMLQuantizationType[type_]).reshape(-1)


def _half(values: Numbers) -> Numbers:
    return values.astype(np.float16)


def _q4_k(blocks: Numbers) -> Numbers:
    parts = blocks.reshape(-1, 8, 32)
    step, minimum = _fitted(parts)
    d, m = (_half(each.max(1, keepdims=True) / 63) for each in (step, minimum))
    steps, minima = (np.where(whole > 0, np.rint(part / np.maximum(whole.astype(np.float32), 1e-30)), 0).clip(0, 63)
                     for part, whole in ((step, d), (minimum, m)))  # fmt: skip
    real = d.astype(np.float32) * steps
    codes = np.rint(np.divide(parts + (m.astype(np.float32) * minima)[..., None], real[..., None],
                              out=np.zeros_like(parts), where=real[..., None] > 0)).clip(0, 15)  # fmt: skip
    s, n = steps.astype(np.uint8), minima.astype(np.uint8)
    scales = np.concatenate([s[:, :4] | s[:, 4:] >> 4 << 6, n[:, :4] | n[:, 4:] >> 4 << 6,
                             s[:, 4:] & 15 | (n[:, 4:] & 15) << 4], 1)  # fmt: skip
    pairs = codes.astype(np.uint8).reshape(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([d.view(np.uint8), m.view(np.uint8), scales, packed], 1)


def _fitted(parts: Numbers) -> tuple[Numbers, Numbers]:
    """Steps, and what is taken off, of 16 codes: least squares over the codes of the best of several widths."""
    low, high = np.minimum(parts.min(-1), 0), parts.max(-1)
    best = np.full(low.shape, np.inf, np.float32)
    step, minimum = np.zeros_like(low), -low
    for levels in np.arange(14, 16.05, 0.1, dtype=np.float32):
        width = np.maximum(high - low, 1e-30)
        codes = np.rint((parts - low[..., None]) * (levels / width)[..., None]).clip(0, 15)
        mean, means = codes.mean(-1), parts.mean(-1)
        slope = ((codes - mean[..., None]) * (parts - means[..., None])).mean(-1) / np.maximum(codes.var(-1), 1e-30)
        offset = np.minimum(means - slope * mean, 0)
        error = np.square(slope[..., None] * codes + offset[..., None] - parts).sum(-1)
        better = (error < best) & (slope > 0)
        best, step, minimum = (np.where(better, new, old)
                               for new, old in ((error, best), (slope, step), (-offset, minimum)))  # fmt: skip
    return step.astype(np.float32), minimum.astype(np.float32)


def _q6_k(blocks: Numbers) -> Numbers:
    parts = blocks.reshape(-1, 16, 16)
    largest = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)[..., 0]
    best, step = np.full(largest.shape, np.inf, np.float32), np.zeros_like(largest)
    for levels in np.arange(31, 33.05, 0.1, dtype=np.float32):
        tried = -largest / levels
        codes = np.rint(np.divide(parts, tried[..., None], out=np.zeros_like(parts),
                                  where=tried[..., None] != 0)).clip(-32, 31)  # fmt: skip
        slope = (codes * parts).sum(-1) / np.maximum(np.square(codes).sum(-1), 1e-30)
        error = np.square(slope[..., None] * codes - parts).sum(-1)
        best, step = np.minimum(error, best), np.where(error < best, slope, step)
    widest = np.take_along_axis(step, np.abs(step).argmax(1)[:, None], 1)
    d = _half(-widest / 128)
    whole = d.astype(np.float32)
    steps = np.rint(np.divide(step, whole, out=np.zeros_like(step), where=whole != 0)).clip(-128, 127)
    real = (whole * steps)[..., None]
    codes = np.rint(np.divide(parts, real, out=np.zeros_like(parts), where=real != 0)).clip(-32, 31)
    c = (codes + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.stack([c[:, :, 0] & 15 | (c[:, :, 2] & 15) << 4, c[:, :, 1] & 15 | (c[:, :, 3] & 15) << 4], 2)
    high = sum(c[:, :, at] >> 4 << 2 * at for at in range(4))
    return np.concatenate([low.reshape(-1, 128), np.asarray(high).reshape(-1, 64),
                           steps.astype(np.int8).view(np.uint8), d.view(np.uint8)], 1)  # fmt: skip


# The page.

DOCS = Path(__file__).parent.parent / "docs" / "study"
OURS, RIVAL, LIMIT = "#1f6f8b", "#b0b7bd", "#c0392b"
WORDS = {"on-grid": "random 1 %, on the grid", "snapped": "random 1 %, snapped afterwards", "lora": "LoRA r8, 0.001",
         "lora-slow": "LoRA r8, 0.0003", "snapped-far": "random 0.1 %, snapped", "on-grid-few": "random 0.1 %, on grid",
         "base": "the base"}  # fmt: skip


def page(cells: list[dict[str, Any]]) -> None:
    """Writes what was measured, and draws the loss as it was trained and as the file holds it."""
    DOCS.mkdir(exist_ok=True)
    with (DOCS / "patch.csv").open("w", encoding="utf-8", newline="") as file:
        columns = ["model", "task", "arm", "seed", "lr", "trained", "trained_loss", "trained_exact", "file_loss",
                   "file_exact", "examples", "changed", "lost", "clamped", "patch_bytes", "same_bytes", "bytes",
                   "step_seconds"]  # fmt: skip
        out = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        out.writeheader()
        for cell in cells:
            told = {**cell, **cell.get("training", {}), **cell.get("patch", {}), "examples": cell["file"]["n"]}
            for when in ("trained", "file"):
                if isinstance(scores := cell.get(when), dict):
                    told |= {f"{when}_{key}": f"{scores[key]:.4g}" for key in ("loss", "exact")}
            told["trained"] = cell.get("training", {}).get("trained", "")
            told |= {"lost": f"{told['lost']:.3g}"} if "lost" in told else {}
            out.writerow({key: told[key] for key in columns if key in told})
    draw(cells)


def draw(cells: list[dict[str, Any]]) -> None:
    """One panel a file and task: hollow as it was trained, filled as the file holds it, and the base."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "finepoint"
    panels = sorted({(cell["model"], cell["task"]) for cell in cells}, key=lambda at: (at[0] != "smollm2", at))
    figure, axes = plt.subplots(1, len(panels), figsize=(2 + 2.6 * len(panels), 2.4), sharey=True, squeeze=False)
    arms = [arm for arm in WORDS if arm != "base" and any(cell["arm"] == arm for cell in cells)][::-1]
    for axis, (model, task) in zip(axes[0], panels, strict=True):
        here = [cell for cell in cells if (cell["model"], cell["task"]) == (model, task)]
        for cell in here:
            if cell["arm"] == "base":
                axis.axvline(cell["file"]["loss"], color=LIMIT, linestyle="--", linewidth=1)
                continue
            at, colour = arms.index(cell["arm"]), RIVAL if cell["arm"] in LORA_RATES else OURS
            ends = cell["trained"]["loss"], cell["file"]["loss"]
            axis.plot(ends, (at, at), color=colour, linewidth=1.5, zorder=1)
            axis.scatter(ends, (at, at), color=["white", colour], edgecolors=colour, s=36, zorder=2)
        axis.set(xscale="log", title=f"{model}: {task}", xlabel="loss of the answers", xlim=(0.08, 9))
        axis.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
        axis.set_xticks([], minor=True)
        axis.set_ylim(-0.6, len(arms) - 0.4)
        axis.title.set_fontsize(10)
        axis.set_yticks(range(len(arms)), [WORDS[arm] for arm in arms])
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(DOCS / "patch.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3-270m"])
    parser.add_argument("--until", help="begin no cell after this time of day, e.g. 23:30")
    parser.add_argument("--page", action="store_true", help="write docs/study/patch.csv and patch.svg, and run nothing")
    given = parser.parse_args()
    if given.page:
        page([json.loads(path.read_text()) for path in sorted((given.output / "cells").glob("*.json"))])
        return
    worker: Worker | None = None
    for model, seed, task, arm in planned(given.models):
        place = given.output / "cells" / f"{Path(model).stem}-{task}-{arm}-{seed}.json"
        if place.exists() or (given.until and time.strftime("%H:%M") > given.until):
            continue
        if worker is None or worker.name != model:
            worker = Worker(model, given.data, given.output)
        began = time.perf_counter()
        cell = {"model": model, "seed": seed, "task": task, "arm": arm} | worker.cell(seed, task, arm)
        cell["seconds"] = round(time.perf_counter() - began, 1)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_suffix(".part").write_text(json.dumps(cell, indent=1))
        os.replace(place.with_suffix(".part"), place)
        print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    main()
