"""Sixteen requests for several adapters of SmolLM2-135M, answered in one batch, or one adapter after the other.

python benchmarks/rows.py

Tokens a second of processor time, prompts (16 tokens) and answers (8, greedy) both counted. *merged*: one adapter in
the weights, the batch whole; *switched*: an `AdapterSet` switches, and each adapter's requests are a batch of their
own; *rows*: `AdapterSet.rows`, one batch; LoRA's by PEFT's `adapter_names`, one batch. *rows, 1* is one adapter for two
requests beside fourteen for the base; LoRA's is one adapter for all. The first answer of each is not counted: it makes
what is kept.
"""

import time

import torch

from common import options, random_adapter, report

REQUESTS, PROMPT, ANSWER = 16, 16, 8
KINDS = {"entries 1 %": {"density": 1e-2}, "columns 1 %": {"density": 1e-2, "structure": "column"},
         "entries 0.1 %": {"density": 1e-3}, "columns 0.1 %": {"density": 1e-3, "structure": "column"}}  # fmt: skip


def main() -> None:
    from finepoint.models.loading import load_model

    given = options(__doc__, repeats=2, dtype="float32")
    repeats = 1 if given.quick else given.repeats
    rows: list[dict[str, object]] = [lora(load_model("smollm2", given.dtype), repeats)]
    model = load_model("smollm2", given.dtype).eval()
    for kind in KINDS:
        print(rows[-1], flush=True)
        rows.append(ours(model, kind, repeats))
    columns = ["adapters", "merged, 1", "switched, 4", "switched, 16", "rows, 1", "rows, 4", "rows, 16"]
    report("rows", given.output, columns, rows, dtype=given.dtype)


def names_of(count: int) -> list[str]:
    """Which adapter each request is for, in turn."""
    return [f"adapter{at % count}" for at in range(REQUESTS)]


def prompts() -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 2000, (REQUESTS, PROMPT), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def written(model, inputs, **more) -> torch.Tensor:
    return model.generate(
        **inputs, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=0, **more
    )


def rate(work, repeats: int) -> float:
    """Tokens a second of processor time."""
    work()
    started = time.process_time()
    for _ in range(repeats):
        work()
    return repeats * REQUESTS * (PROMPT + ANSWER) / (time.process_time() - started)


def ours(model, kind: str, repeats: int) -> dict[str, object]:
    import finepoint

    inputs, adapters = prompts(), finepoint.AdapterSet(model)
    for seed in range(16):
        adapters.add(f"adapter{seed}", random_adapter(model, seed, **KINDS[kind]))

    def switched(count: int) -> None:
        for name in sorted(set(names := names_of(count))):
            mine = [at for at, other in enumerate(names) if other == name]
            with adapters.using(name):
                written(model, {key: value[mine] for key, value in inputs.items()})

    def together(names: list[str | None]) -> None:
        with adapters.rows(names):
            written(model, inputs)

    # One adapter beside the base: of one alone a batch is merged.
    one = ["adapter0", *[None] * (REQUESTS // 2 - 1)] * 2
    found = {f"rows, {count}": rate(lambda count=count: together(names_of(count)), repeats) for count in (16, 4)}
    if kind == next(iter(KINDS)):  # which kind they are of matters little there
        found |= {f"switched, {count}": rate(lambda count=count: switched(count), repeats) for count in (4, 16)}
        found |= {"merged, 1": rate(lambda: switched(1), repeats), "rows, 1": rate(lambda: together(one), repeats)}
    return {"adapters": kind} | found


def lora(model, repeats: int) -> dict[str, object]:
    import peft

    torch.manual_seed(0)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config, inputs = peft.LoraConfig(r=8, target_modules=linear, init_lora_weights=False), prompts()
    model = peft.get_peft_model(model, config, adapter_name="adapter0").eval()
    for seed in range(1, 16):
        model.add_adapter(f"adapter{seed}", config)
    found = {f"rows, {count}": rate(lambda count=count: written(model, inputs, adapter_names=names_of(count)), repeats)
             for count in (1, 4, 16)}  # fmt: skip
    return {"adapters": "LoRA r8"} | found


if __name__ == "__main__":
    main()
