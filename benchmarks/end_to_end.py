"""The headline: from the command to the saved adapter, finepoint beside stock LoRA, each in processes of its own.

40 steps of 16 movie reviews on SmolLM2-135M in bfloat16: `finepoint train`, the same with `--baseline lora`, and a
script as most people write it (transformers' Trainer around PEFT's LoRA r8) on the same rows. Arms take turns; wall
time and the processor time of all threads are medians. On a machine that others use, only the latter means something.

    python benchmarks/end_to_end.py [--repeats 3]
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import options, report, text_file

STEPS, ROWS = 40, 16
FLAGS = ["--model", "smollm2", "--dtype", "bfloat16", "--batch-size", str(ROWS)]
ARMS = {
    "finepoint train": FLAGS,
    "finepoint train, columns": [*FLAGS, "--structure", "column", "--density", "0.01"],
    "finepoint train --baseline lora": [*FLAGS, "--baseline", "lora"],
    "Trainer and PEFT, LoRA r8": None,
}


def main() -> None:
    given = options(__doc__, repeats=3, steps=STEPS, arm="", folder="")
    steps = 4 if given.quick else given.steps
    if given.arm:
        stock(given.folder, steps)
        return
    text_file()  # fetched, and the model converted, before anything is timed
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}
    for turn in range(1 if given.quick else given.repeats):
        for name in ARMS:
            times[name].append(timed(name, steps))
            print(f"turn {turn}: {name}: {times[name][-1][0]:.1f} s, processor {times[name][-1][1]:.1f} s", flush=True)
    base = times["Trainer and PEFT, LoRA r8"]
    rows = [
        {"arm": name, "seconds": statistics.median(wall for wall, _ in found),
         "processor s": statistics.median(cpu for _, cpu in found),
         "x stock LoRA": statistics.median(a / b for (a, _), (b, _) in zip(found, base, strict=True)),
         "processor x stock LoRA": statistics.median(a / b for (_, a), (_, b) in zip(found, base, strict=True))}
        for name, found in times.items()
    ]  # fmt: skip
    columns = ["arm", "seconds", "processor s", "x stock LoRA", "processor x stock LoRA"]
    report("end_to_end", given.output, columns, rows, times=times, steps=steps)


def timed(name: str, steps: int) -> tuple[float, float]:
    """Seconds of an arm from its start to its end, and those of processors in it."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ARMS[name]
        if flags is None:
            command = [sys.executable, __file__, "--arm", name, "--folder", folder, "--steps", str(steps)]
        else:
            command = [sys.executable, "-m", "finepoint", "train", *flags, "--data", text_file("movies-train"),
                       "--steps", str(steps), "--output", f"{folder}/adapter"]  # fmt: skip
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def stock(folder: str, steps: int) -> None:
    """LoRA as a usual script has it; the rows are those that finepoint trains on."""
    import peft
    import transformers

    from finepoint.data.examples import read_examples
    from finepoint.data.tokens import encode_all
    from finepoint.models.loading import load_model, load_tokenizer

    model, tokenizer = load_model("smollm2", "bfloat16"), load_tokenizer("smollm2")
    rows = encode_all(tokenizer, read_examples(text_file("movies-train")), 8192)
    data = [{"input_ids": row.ids, "labels": row.labels} for row in rows]
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=linear, task_type="CAUSAL_LM"))
    told = transformers.TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=1e-4, report_to=[],
        save_strategy="no", bf16=False, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    transformers.Trainer(adapted, told, train_dataset=data, data_collator=collator).train()
    adapted.save_pretrained(str(Path(folder) / "adapter"))


if __name__ == "__main__":
    main()
