"""The demo: LoRA, entries at random, and columns held to what the model knew, on a small real model and real data."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finepoint.data.recipes.table import recipe
from finepoint.evaluation.evaluate import Evaluation, read_sets
from finepoint.evaluation.settings import DemoConfig
from finepoint.runtime.files import claim_folder, write_json
from finepoint.training.context import prepare
from finepoint.training.run import fit
from finepoint.training.settings import TrainConfig

logger = logging.getLogger(__name__)

HELD = "columns, held"
# What each arm has of its own. Rates were tuned alike (docs/study.md): of four, the smallest whose validation accuracy
# is within an error of the best. What is held to the base is what moved it least for what it learned
# (docs/study-keeping.md), at the rate that is usual there.
ARMS: dict[str, dict[str, Any]] = {
    "lora": {"baseline": "lora", "lr": 3e-4},
    "random": {"rule": "random", "density": 1e-3, "lr": 3e-2},
    HELD: {"rule": "random", "structure": "column", "density": 1e-2, "lr": 1e-2, "protect": "own"},
}
OOD = ("amazon", "tweets", "nyt")
PROBE_TEXTS = 8


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """{"base": scores, "runs": {arm: scores, changes and the facts of the run}}; adapters lie in the output folder.

    Raises:
        FinepointError: the package registry cannot be reached, or the output folder holds something.
    """
    with claim_folder(config.output, config.overwrite) as folder:
        return _run(config, folder)


def _run(config: DemoConfig, folder: Path) -> dict[str, Any]:
    data = folder / "data"
    logger.info("data: VADER's movie reviews to train on, three other domains to see what carries over")
    recipe("vader").write(data, overwrite=True)
    evaluation = Evaluation(
        id=read_sets([f"movies={data / 'movies-test.jsonl'}"], "id", config.limit),
        ood=read_sets([f"{name}={data / name}.jsonl" for name in OOD], "ood", config.limit * 3 // 8),
        probe=read_sets([f"news={data / 'news.jsonl'}"], "probe", PROBE_TEXTS),
    )
    arms = {arm: train_config(arm, config, folder) for arm in ARMS if arm != "lora" or find_spec("peft")}
    if "lora" not in arms:
        logger.warning("LoRA is left out: it needs PEFT; pip install peft")
    context = prepare(arms["random"])
    logger.info("model: SmolLM2-135M-Instruct in %s; training examples: %d", context.model.dtype, len(context.rows))
    base = evaluation.scores(context.model, context.tokenizer, "base")
    found: dict[str, Any] = {"base": base, "runs": {}, "train_examples": len(context.rows)}
    for arm, run in arms.items():
        logger.info("%s: %d steps at learning rate %g", arm, run.steps, run.lr)
        record, adapter = fit(run, context)
        scores = evaluation.compared(context.model, context.tokenizer, base, adapter, arm)
        facts = ("trained", "adapter_bytes", "seconds", "train_seconds", "selection_seconds", "peak_bytes", "lr",
                 "update_norm", "changed")  # fmt: skip
        found["runs"][arm] = scores | {fact: record[fact] for fact in facts}
    found["settings"] = {"model": "smollm2", "steps": config.steps, "seed": 0,
                         "density": ARMS["random"]["density"], "columns": ARMS[HELD]["density"],
                         "dtype": str(context.model.dtype).removeprefix("torch.")}  # fmt: skip
    write_json(folder / "demo.json", found)
    return found


def train_config(arm: str, config: DemoConfig, folder: Path) -> TrainConfig:
    """One run of the demo; the runs differ only in what `ARMS` sets."""
    return TrainConfig(
        model="smollm2",
        data=str(folder / "data" / "movies-train.jsonl"),
        output=str(folder / arm.replace(", ", "-")),
        steps=config.steps,
        overwrite=config.overwrite,
        **ARMS[arm],
    )
