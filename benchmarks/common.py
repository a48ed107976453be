"""What the benchmarks share: real text, the arms that are compared, the facts of a machine, tables and JSON."""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parent.parent / "runs" / "benchmarks" / "data"
PACKAGES = ("torch", "transformers", "peft", "numba", "safetensors", "lm_eval", "peft-sparta")
Step = Callable[[dict[str, Any]], None]


def options(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """The command line of a benchmark: --output, --quick and a flag for every default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="JSON file (of gpu.py, folder); in benchmarks/results where not given")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and cases")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default, type=type(default), help=f"default: {default or 'none'}")
    return parser.parse_args()


def facts(**more: Any) -> dict[str, Any]:
    """When, on what and with what a result was made."""
    import torch

    import finepoint

    versions = {"finepoint": finepoint.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"date": str(date.today()), "processor": processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "versions": versions} | more  # fmt: skip


def processor() -> str:
    """The processor's name and the vector instructions that decide how fast it multiplies."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = text.split("model name")[1].split("\n")[0].lstrip("\t: ")
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in text]
    return f"{name} ({', '.join(wide)})"


def report(
    name: str, output: str | None, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], **more: Any
) -> None:
    """Prints a table of `columns` and writes everything as JSON."""
    rows = [dict(row) for row in rows]
    print_table(columns, rows)
    path = Path(output) if output else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"facts": facts(), **more, "columns": list(columns), "rows": rows}, indent=1) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """As Markdown, so that it can go into the documentation as it is."""
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        print("| " + " | ".join(shown(row.get(column)) for column in columns) + " |", flush=True)


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        digits = next(
            (spec for least, spec in ((100, ",.0f"), (10, ".1f"), (0.1, ".2f")) if abs(value) >= least), ".3g"
        )
        return format(value, digits)
    return f"{value:,}" if isinstance(value, int) else str(value)


def text_file(name: str = "news") -> str:
    """A file of the demo's real data, fetched at first use."""
    if not DATA.is_dir():
        from finepoint.data.recipes.table import recipe

        recipe("vader").write(DATA)
    return str(DATA / f"{name}.jsonl")


def text_batches(rows: int, tokens: int, learned: int | None = None, count: int = 8) -> list[dict[str, Any]]:
    """Batches of running text without padding; a loss on the last `learned` tokens of a row, or on all."""
    import torch

    from finepoint.data.examples import Text, read_examples
    from finepoint.models.loading import load_tokenizer

    tokenizer = load_tokenizer("smollm2")
    ids: list[int] = []
    for example in read_examples(text_file()):
        assert isinstance(example, Text)
        ids += tokenizer(example.text)["input_ids"]
    size = rows * tokens
    ids *= -(-size * count // len(ids))
    found = []
    for start in range(0, size * count, size):
        batch = torch.tensor(ids[start : start + size]).view(rows, tokens)
        if learned is None:
            found.append({"input_ids": batch, "labels": batch})
        else:
            found.append({"input_ids": batch, "labels": batch[:, -learned - 1 :], "logits_to_keep": learned + 1})
    return found


def median_ratios(times: Mapping[str, Sequence[float]], base: str) -> dict[str, float]:
    """The median over the turns of each arm's time over that of `base` in the same turn."""
    return {name: statistics.median(a / b for a, b in zip(values, times[base], strict=True))
            for name, values in times.items()}  # fmt: skip


def stepper(model: Any, parameters: list[Any]) -> Step:
    """A step of AdamW over the parameters (none: forward and backward alone).

    Every arm's head gets its input in one piece: else PyTorch takes a slow way wherever the head is frozen, which is
    not of any method and would hide what each costs.
    """
    import torch

    from finepoint.tuner.autograd import fold_head_input

    fold_head_input(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None
    model.train()

    def step(batch: dict[str, Any]) -> None:
        model(**batch).loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    step.count = sum(parameter.numel() for parameter in parameters)  # type: ignore[attr-defined]
    step.model, step.optimizer = model, optimizer  # type: ignore[attr-defined]
    return step


def bound(model: Any) -> Step:
    """Nothing trainable in the linear layers: forward and input gradients alone."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return stepper(model, [])


def sparse(density: float, structure: str = "entry", within: str | None = None) -> Callable[[Any], Step]:
    def make(model: Any) -> Step:
        import finepoint

        chosen = finepoint.select(model, rule="random", density=density, structure=structure, within=within)
        tuner = finepoint.SparseTuner(model, chosen)
        return stepper(model, tuner.parameters())

    return make


def through_peft(kind: str, narrow: bool = False, **settings: Any) -> Callable[[Any], Step]:
    """An arm of PEFT's; `narrow`: what is trained is in the model's own dtype, where PEFT takes float32 by default."""

    def make(model: Any) -> Step:
        import peft

        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = getattr(peft, kind)(target_modules=linear, **settings)
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=not narrow)
        return stepper(adapted, [p for p in adapted.parameters() if p.requires_grad])

    return make


def sparta(density: float) -> Callable[[Any], Step]:
    def make(model: Any) -> Step:
        from peft_sparta import SpaRTA

        import finepoint

        # Its sparsity counts all parameters; ours the linear weights.
        linear = sum(weight.numel() for weight in finepoint.target_weights(model).values())
        share = density * linear / sum(parameter.numel() for parameter in model.parameters())
        adapted = SpaRTA(model, sparsity=1 - share, frozen_modules=["embed_tokens", "norm"])
        return stepper(adapted, list(adapted.parameters()))

    return make


def full(model: Any) -> Step:
    return stepper(model, list(model.parameters()))


# SHiRA's budget is r (in + out) a layer: r = 3 is the nearest to 1 % of SmolLM2-135M.
ARMS: dict[str, Callable[[Any], Step]] = {
    "bound": bound,
    "sparse 0.1 %": sparse(1e-3),
    "sparse 1 %": sparse(1e-2),
    "columns 1 %": sparse(1e-2, "column"),
    "1 % within 3 % of columns": sparse(1e-2, within="columns:0.03"),
    "rows 1 %": sparse(1e-2, "row"),
    "blocks 16x16 1 %": sparse(1e-2, "block:16x16"),
    "LoRA r8": through_peft("LoraConfig", r=8),
    "DoRA r8": through_peft("LoraConfig", r=8, use_dora=True),
    "SHiRA 1 %": through_peft("ShiraConfig", r=3),
    "Super-Tuning 1 %": through_peft("SupertuningConfig", sparsity=0.99),
    "peft-sparta 1 %": sparta(1e-2),
    "full": full,
}
QUICK_ARMS = ("bound", "sparse 1 %", "LoRA r8")


def random_adapter(model: Any, seed: int, **choice: Any) -> Any:
    """An adapter of random deltas at random entries."""
    import torch

    import finepoint

    tuner = finepoint.SparseTuner(model, finepoint.select(model, rule="random", seed=seed, **choice), audit=False)
    torch.manual_seed(seed)
    for delta in tuner.parameters():
        delta.data.normal_(std=1e-2)
    adapter = tuner.adapter()
    tuner.revert_()
    tuner.close()
    return adapter
