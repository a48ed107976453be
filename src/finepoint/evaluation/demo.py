"""The demo: GaLLoP and a random choice on a small real model and real data, against the base, in minutes."""

import logging
from pathlib import Path
from typing import Any

from finepoint.data.recipes.vader import write_vader
from finepoint.evaluation.evaluate import Evaluation, read_sets
from finepoint.evaluation.settings import DemoConfig
from finepoint.runtime.files import claim_folder, write_json
from finepoint.training.context import prepare
from finepoint.training.run import fit
from finepoint.training.settings import TrainConfig

logger = logging.getLogger(__name__)

# Tuned alike (docs/methods.md): of four rates, the smallest whose validation accuracy is within an error of the best.
LEARNING_RATES = {"random": 3e-2, "gallop": 3e-4}
DENSITY = 1e-3
SCORING_EXAMPLES = 64
OOD = ("amazon", "tweets", "nyt")
PROBE_TEXTS = 8


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """{"base": scores, "runs": {rule: scores, changes and the facts of the run}}; adapters lie in the output folder.

    Raises:
        FinepointError: the package registry cannot be reached, or the output folder holds something.
    """
    with claim_folder(config.output, config.overwrite) as folder:
        return _run(config, folder)


def _run(config: DemoConfig, folder: Path) -> dict[str, Any]:
    data = folder / "data"
    logger.info("data: VADER's movie reviews to train on, three other domains to see what carries over")
    write_vader(data, overwrite=True)
    evaluation = Evaluation(
        id=read_sets([f"movies={data / 'movies-test.jsonl'}"], "id", config.limit),
        ood=read_sets([f"{name}={data / name}.jsonl" for name in OOD], "ood", config.limit * 3 // 8),
        probe=read_sets([f"news={data / 'news.jsonl'}"], "probe", PROBE_TEXTS),
    )
    configs = {rule: train_config(rule, config, folder) for rule in LEARNING_RATES}
    place = prepare(configs["gallop"])
    logger.info("model: SmolLM2-135M-Instruct in %s; training examples: %d", place.model.dtype, len(place.rows))
    base = evaluation.scores(place.model, place.tokenizer, "base")
    found: dict[str, Any] = {"base": base, "runs": {}, "train_examples": len(place.rows)}
    for rule, run in configs.items():
        logger.info("%s: %d steps at learning rate %g", rule, run.steps, run.lr)
        record, adapter = fit(run, place)
        scores = evaluation.compared(place.model, place.tokenizer, base, adapter, rule)
        facts = ("trained", "adapter_bytes", "seconds", "train_seconds", "selection_seconds", "peak_bytes", "lr",
                 "update_norm", "changed")  # fmt: skip
        found["runs"][rule] = scores | {fact: record[fact] for fact in facts}
    found["settings"] = {"model": "smollm2", "density": DENSITY, "steps": config.steps,
                         "dtype": str(place.model.dtype).removeprefix("torch."), "seed": 0}  # fmt: skip
    write_json(folder / "demo.json", found)
    return found


def train_config(rule: str, config: DemoConfig, folder: Path) -> TrainConfig:
    """One run of the demo; all but the rule and its tuned rate is equal."""
    return TrainConfig(
        model="smollm2",
        data=str(folder / "data" / "movies-train.jsonl"),
        output=str(folder / rule),
        rule=rule,
        density=DENSITY,
        lr=LEARNING_RATES[rule],
        steps=config.steps,
        scoring_examples=SCORING_EXAMPLES,
        overwrite=config.overwrite,
    )
