"""On a GPU: what the gradient at chosen entries costs beside the dense product, and a step beside its rivals.

    PYTHONPATH=src python benchmarks/gpu.py [--seconds 540] [--only step,compiled] [--output FOLDER]

Needs torch, transformers and finepoint's folder src; peft for the rivals, lm_eval for scoring. What is missing is
skipped with a line. Every row is written as it comes, so that a run that is cut short has lost one row: gpu-NAME.json
for each section, the most important first; `python benchmarks/page.py` puts them into the page. No section or arm
begins after --seconds. `--device cpu --quick` tries the script itself, on tiny shapes.

Times are medians, in milliseconds. Errors are relative to float64. Models are drawn at random: only shapes matter.
"""

import gc
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

import common

Rows = Iterator[dict[str, Any]]
SHAPES = ((4096, 4096, 4096), (2048, 8192, 4096), (14336, 4096, 4096), (576, 1536, 2048))  # out, in, tokens
DENSITIES = (1e-4, 1e-3, 1e-2, 5e-2)
# hidden, intermediate, layers, heads, key-value heads, vocabulary; rows and tokens of a batch
MODELS = {
    "1B, 4 x 1,024": ((2048, 8192, 16, 32, 8, 32768), 4, 1024),
    "135M, 16 x 128": ((576, 1536, 30, 9, 3, 49152), 16, 128),
    "8B, 1 x 1,024": ((4096, 14336, 32, 32, 8, 32768), 1, 1024),
}
ONE_B, SMALL = "1B, 4 x 1,024", "135M, 16 x 128"
TINY = {"1B, 4 x 1,024": ((64, 128, 2, 4, 2, 128), 2, 16), "135M, 16 x 128": ((32, 64, 2, 4, 2, 128), 2, 16),
        "8B, 1 x 1,024": ((64, 160, 2, 4, 2, 128), 1, 16)}  # fmt: skip
ARMS: dict[str, Callable[[Any], common.Step]] = {
    "bound": common.bound,
    "columns 1 %": common.sparse(1e-2, "column"),
    "sparse 1 %": common.sparse(1e-2),
    "sparse 0.1 %": common.sparse(1e-3),
    "1 % within 3 % of columns": common.sparse(1e-2, within="columns:0.03"),
    "LoRA r8": common.through_peft("LoraConfig", r=8),
    "LoRA r8, factors in bfloat16": common.through_peft("LoraConfig", narrow=True, r=8),
    "full": common.full,
    "DoRA r8": common.through_peft("LoraConfig", r=8, use_dora=True),
    "SHiRA r16": common.through_peft("ShiraConfig", r=16),
    "rows 1 %": common.sparse(1e-2, "row"),
    "blocks 16x16 1 %": common.sparse(1e-2, "block:16x16"),
}
PEFTS = ("LoRA", "DoRA", "SHiRA")
LARGE = ("bound", "columns 1 %", "sparse 0.1 %", "LoRA r8", "LoRA r8, factors in bfloat16")  # of 8B
DEVICE = "cuda"


def main() -> None:
    global DEVICE
    options = common.options(f"{__doc__}\nSections: {', '.join(SECTIONS)}.", seconds=540, only="", device="cuda")
    DEVICE, quick, started = options.device, options.quick, time.monotonic()
    if unknown := set(filter(None, options.only.split(","))) - set(SECTIONS):
        raise SystemExit(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if DEVICE != "cpu" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here; --device cpu --quick tries the script on tiny shapes")
    if DEVICE == "cpu":
        MODELS.update(TINY)
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = Path(options.output) if options.output else common.RESULTS
    for name, (columns, rows) in SECTIONS.items():
        if options.only and name not in options.only.split(","):
            continue
        since = time.monotonic()
        if since - started > options.seconds:
            print(f"{name}: left out, {options.seconds} s are over", flush=True)
            continue
        found: list[dict[str, Any]] = []
        try:
            for row in rows(quick):
                found.append(row)
                print(name, json.dumps(row), flush=True)
                keep(folder / f"gpu-{name}.json", columns, found)
                if time.monotonic() - started > options.seconds:
                    print(f"{name}: cut short, {options.seconds} s are over", flush=True)
                    break
        except Exception as error:
            traceback.print_exc()
            keep(folder / f"gpu-{name}.json", columns, [*found, {columns[0]: name, "problem": first_line(error)}])
        print(f"{name}: {time.monotonic() - since:.1f} s", flush=True)


def keep(path: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Writes the rows so far; a problem is a column where there is one."""
    problem = ["problem"] if any("problem" in row for row in rows) else []
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU: a trial of the script"
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"facts": common.facts(), "gpu": name, "columns": [*columns, *problem], "rows": rows}
    path.write_text(json.dumps(told, indent=1) + "\n")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def missing(package: str, what: str) -> bool:
    """Whether a package is not there, which a line says."""
    if find_spec(package) is None:
        print(f"{what} needs {package}, which is not installed: skipped", flush=True)
        return True
    return False


# What is on the device at the end of an arm is gone before the next begins.


def clean() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak() -> float | None:
    """Gigabytes, by the card's own count."""
    return torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else None


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """How long something takes with all that it leaves to the device, and what it gives."""
    wait()
    started = time.perf_counter()
    found = run()
    wait()
    return time.perf_counter() - started, found


def timed(run: Callable[[], Any], repeats: int = 30, before: int = 3) -> float:
    """The median time of a call, in milliseconds, after some that do not count."""
    for _ in range(before):
        run()
    if DEVICE == "cpu":
        return 1e3 * statistics.median(seconds(run)[0] for _ in range(repeats))
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def step_rows(quick: bool) -> Rows:
    """A step of each arm on a fresh model: time, peak memory and how long it takes to be ready."""
    for title in MODELS:
        first: dict[str, Any] = {}
        for name, make in ARMS.items():
            if title.startswith("8B") and name not in LARGE:
                continue
            if name.startswith(PEFTS) and missing("peft", name):
                continue
            row = {"model": title, "arm": name}
            try:
                row |= step_row(title, make, 5 if quick or title.startswith("8B") else 15)
            except (RuntimeError, ValueError, TypeError, ImportError) as error:  # no room; not with this version
                row["problem"] = first_line(error)
            if "ms" in row:
                first = first or row
                row |= {"x bound": row["ms"] / first["ms"],
                        "memory x bound": row["peak GB"] / first["peak GB"] if row["peak GB"] else None}  # fmt: skip
            yield row


def step_row(title: str, make: Callable[[Any], common.Step], turns: int) -> dict[str, Any]:
    clean()
    model, batch = llama(title), batch_of(title)
    ready, step = seconds(lambda: make(model))
    one = partial(step, batch)
    first = seconds(one)[0]  # with the audit, and kernels measured
    timed(one, repeats=2)
    clean()
    return {"trained": step.count, "ms": timed(one, turns), "peak GB": peak(), "set-up s": ready,  # type: ignore[attr-defined]
            "first step s": first}  # fmt: skip


def gradient_rows(quick: bool) -> Rows:
    """The ways to the gradient of one layer in bfloat16, by density."""
    from finepoint.tuner.kernels import plain

    for out, width, tokens in SHAPES[: 2 if quick else None] if DEVICE == "cuda" else ((64, 32, 16),):
        dy = torch.randn(tokens, out, device=DEVICE, dtype=torch.bfloat16)
        x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
        exact = (dy.double().T @ x.double()).reshape(-1)
        dense = timed(lambda dy=dy, x=x: dy.T @ x)  # type: ignore[misc]
        widened = timed(lambda dy=dy, x=x: dy.float().T @ x.float(), repeats=5)  # type: ignore[misc]
        few = x[:, : max(1, width // 100)].contiguous()
        columns = timed(lambda dy=dy, few=few: plain.product(dy.T, few))  # type: ignore[misc]
        turned = timed(lambda dy=dy, few=few: plain.turned(dy.T, few))  # type: ignore[misc]
        for density in DENSITIES:
            count = max(1, int(density * out * width))
            indices = torch.randperm(out * width, device=DEVICE)[:count].sort().values.int()
            found = timed(partial(plain.by_product, dy, x, indices))
            wrong = plain.by_product(dy, x, indices).double() - exact[indices]
            row = {"weight, tokens": f"{out} x {width}, {tokens}", "density": density, "dense": dense,
                   "by_product": found, "x dense": found / dense, "widened": widened,
                   "error": float(wrong.norm() / exact[indices].norm()), "columns 1 %": columns,
                   "columns turned": turned}  # fmt: skip
            if density <= 1e-3:
                row["by_gather"] = timed(partial(plain.by_gather, dy, x, indices), repeats=5)
            yield row


def set_up_rows(quick: bool) -> Rows:
    """What it takes until a model is ready to be trained: choosing, and hanging the entries on it."""
    import finepoint

    chosen = {"entries 0.1 %": {"density": 1e-3}, "entries 1 %": {"density": 1e-2},
              "columns 1 %": {"density": 1e-2, "structure": "column"},
              "1 % within 3 % of columns": {"density": 1e-2, "within": "columns:0.03"}}  # fmt: skip
    for title in (ONE_B,) if quick else (ONE_B, "8B, 1 x 1,024"):
        model = llama(title)
        for name, settings in chosen.items():
            choosing, indices = seconds(partial(finepoint.select, model, rule="random", **settings))
            hanging, tuner = seconds(partial(finepoint.SparseTuner, model, indices))
            tuner.close()
            yield {"model": title, "arm": name, "entries": indices.count, "select s": choosing, "tuner s": hanging}
        model = None
        clean()


def captured_rows(quick: bool) -> Rows:
    """A step of the small model whose forward and backward pass are a CUDA graph; the optimizer's step is not."""
    if DEVICE == "cpu":
        return
    plain = 0.0
    for name in ("bound", "columns 1 %", "sparse 1 %", "LoRA r8, factors in bfloat16", "full"):
        row: dict[str, Any] = {"model": SMALL, "arm": name}
        try:
            clean()
            step = ARMS[name](llama(SMALL))
            batch = batch_of(SMALL)
            row["eager ms"] = timed(partial(step, batch), 5 if quick else 15)
            replay = graph_of(step, batch)
            row["captured ms"] = timed(replay, 5 if quick else 15)
            plain = plain or row["captured ms"]
            row |= {"x captured bound": row["captured ms"] / plain, "same loss": replay.same}  # type: ignore[attr-defined]
        except (RuntimeError, ValueError, ImportError) as error:
            row["problem"] = first_line(error)
        yield row


def graph_of(step: common.Step, batch: dict[str, Any]) -> Callable[[], None]:
    """One step with its forward and backward pass replayed; `same`: the graph's loss is that of a pass without it."""
    model, optimizer = step.model, step.optimizer  # type: ignore[attr-defined]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(**batch).loss.backward()
            if optimizer:
                optimizer.zero_grad()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(**batch).loss
        loss.backward()

    def replay() -> None:
        graph.replay()
        if optimizer:
            optimizer.step()

    graph.replay()
    with torch.no_grad():
        plain = model(**batch).loss
    replay.same = bool((plain - loss).abs() <= 0.01 * plain.abs())  # type: ignore[attr-defined]
    return replay


def compiled_rows(quick: bool) -> Rows:
    """torch.compile over eight layers of the small model: graphs break at each layer that is trained."""
    shape, rows, tokens = MODELS[SMALL]
    few = f"{SMALL}, 8 layers"
    MODELS[few] = (*shape[:2], min(8, shape[2]), *shape[3:]), rows, tokens
    for name in ("bound", "columns 1 %", "sparse 1 %", "LoRA r8, factors in bfloat16"):
        row: dict[str, Any] = {"model": few, "arm": name}
        try:
            clean()
            torch._dynamo.reset()
            step = ARMS[name](llama(few))
            batch = batch_of(few)
            row["eager ms"] = timed(partial(step, batch), 5)
            model = step.model  # type: ignore[attr-defined]
            model.forward = torch.compile(model.forward)
            row["compiling s"] = seconds(partial(step, batch))[0]
            row["compiled ms"] = timed(partial(step, batch), 5)
        except Exception as error:  # whatever a compiler raises
            row["problem"] = first_line(error)
        yield row
    del MODELS[few]


def select_rows(quick: bool) -> Rows:
    """Choosing by gradients, with all sums held and with a quarter of them, beside one step of training."""
    import finepoint

    for title in (SMALL, ONE_B):
        for rule, memory in (("gradient", 1.0), ("gradient", 0.25), ("fisher", 1.0)):
            clean()
            model, batches = llama(title), [batch_of(title)] * 2
            row: dict[str, Any] = {"model": title, "rule": rule, "scoring memory": memory}
            try:
                choose = partial(finepoint.select, model, batches, rule=rule, density=1e-3, scoring_memory=memory)
                took, chosen = seconds(choose)
                row |= {"seconds": took, "peak GB": peak(), "entries": chosen.count}
            except RuntimeError as error:
                row["problem"] = first_line(error)
            model = choose = None
            yield row


def switch_rows(quick: bool) -> Rows:
    """Switching between two adapters, and applying and reverting one."""
    import finepoint

    for density in (1e-3, 1e-2):
        clean()
        model = llama(ONE_B)
        made = []
        for seed in range(2):
            chosen = finepoint.select(model, rule="random", density=density, seed=seed)
            tuner = finepoint.SparseTuner(model, chosen, audit=False)
            for delta in tuner.parameters():
                delta.data.normal_(std=1e-2)
            made.append(tuner.adapter())
            tuner.revert_()
            tuner.close()
        switch = finepoint.AdapterSet(model)
        for name, adapter in zip("ab", made, strict=True):
            switch.add(name, adapter)
        times = [seconds(partial(switch.set, "ab"[turn % 2]))[0] for turn in range(12)]
        switch.disable()
        apply, revert = (seconds(partial(do, model))[0] for do in (made[0].apply, made[0].revert))
        yield {"model": ONE_B, "density": density, "entries": made[0].count,
               "switch ms": 1e3 * statistics.median(times[2:]), "apply ms": 1e3 * apply,
               "revert ms": 1e3 * revert}  # fmt: skip


def plan_rows(quick: bool) -> Rows:
    """The peak that `finepoint plan` predicts for this card beside the real one."""
    from finepoint.memory.plan import plan
    from finepoint.training.settings import PlanConfig

    shape, rows, tokens = MODELS[ONE_B]
    with tempfile.TemporaryDirectory() as folder:
        config(shape).save_pretrained(folder)
        for name, settings, make in (
            ("entries 1 %", {}, common.sparse(1e-2)),
            ("columns 1 %", {"structure": "column"}, common.sparse(1e-2, "column")),
            ("1 % within 3 % of columns", {"within": "columns:0.03"}, common.sparse(1e-2, within="columns:0.03")),
        ):
            told = PlanConfig(model=folder, density=1e-2, batch_size=rows, tokens=tokens, learned=8, padded=False,
                              dtype="bfloat16", device="cuda", **settings)  # type: ignore[arg-type]  # fmt: skip
            planned = sum(plan(told).training.values()) / 1e9
            real = step_row(ONE_B, make, 2)["peak GB"]
            yield {"model": ONE_B, "arm": name, "planned GB": planned, "peak GB": real,
                   "planned / peak": planned / real if real else None}  # fmt: skip


def scoring_rows(quick: bool) -> Rows:
    if not missing("lm_eval", "scoring beside lm-evaluation-harness"):
        print("scoring: run benchmarks/scoring.py, which needs the network once for its model and data", flush=True)
    yield from ()


def config(shape: Sequence[int]) -> Any:
    hidden, inner, layers, heads, groups, vocabulary = shape
    return transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=True, use_cache=False, dtype="bfloat16",
    )  # fmt: skip


def llama(title: str) -> Any:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return transformers.LlamaForCausalLM._from_config(config(MODELS[title][0]), dtype=torch.bfloat16)


def batch_of(title: str) -> dict[str, Any]:
    """Random tokens, logits and a loss at the last nine and eight."""
    shape, rows, tokens = MODELS[title]
    ids = torch.randint(0, shape[-1], (rows, tokens), device=DEVICE)
    return {"input_ids": ids, "labels": ids[:, -9:], "logits_to_keep": 9}


# The most important first: whoever is cut short has these.
SECTIONS: dict[str, tuple[Sequence[str], Callable[[bool], Rows]]] = {
    "step": (("model", "arm", "trained", "ms", "x bound", "peak GB", "memory x bound", "set-up s", "first step s"),
             step_rows),
    "set-up": (("model", "arm", "entries", "select s", "tuner s"), set_up_rows),
    "captured": (("model", "arm", "eager ms", "captured ms", "x captured bound", "same loss"), captured_rows),
    "plan": (("model", "arm", "planned GB", "peak GB", "planned / peak"), plan_rows),
    "select": (("model", "rule", "scoring memory", "seconds", "peak GB", "entries"), select_rows),
    "switch": (("model", "density", "entries", "switch ms", "apply ms", "revert ms"), switch_rows),
    "gradient": (("weight, tokens", "density", "dense", "by_product", "x dense", "error", "widened", "columns 1 %",
                  "columns turned", "by_gather"), gradient_rows),
    "compiled": (("model", "arm", "eager ms", "compiled ms", "compiling s"), compiled_rows),
    "scoring": (("items",), scoring_rows),
}  # fmt: skip


if __name__ == "__main__":
    main()
