"""How long a cell of a study might take, before any has been run."""

import time
from math import ceil
from typing import Any

import torch

from finepoint.data.examples import read_examples, some
from finepoint.data.tokens import encode_each
from finepoint.models.loading import load_tokenizer, shape_of
from finepoint.studies.study import Study, planned, train_config
from finepoint.training.resolve import steps_of
from finepoint.training.run import EVALUATIONS

SAMPLE = 64  # examples of a file whose lengths are looked at
SHARE_OF_PEAK = 0.5  # of a matrix product's speed that a small model's passes reach


def estimate(study: Study) -> float:
    """Seconds a cell might take: its arithmetic by the speed of this machine's matrix product.

    A forward pass costs two operations for each weight and token, a training step about three times that.
    """
    config = study.config
    tokenizer = load_tokenizer(config.model)
    weights = sum(parameter.numel() for parameter in shape_of(config.model).parameters())

    def tokens(path: str, limit: int | None) -> float:
        examples = read_examples(path, config.train.get("columns"))
        lengths = [len(row.ids) for row in encode_each(tokenizer, some(examples, SAMPLE))]
        return sum(lengths) / len(lengths) * min(limit or len(examples), len(examples))

    task = config.tasks[study.tasks[0]]
    examples = len(read_examples(task["train"], config.train.get("columns")))
    settings = train_config(study, planned(study, [], [])[0], config.output)
    steps = steps_of(settings, examples)
    trained = tokens(task["train"], None) / examples * settings.batch_size * settings.accumulation * steps
    passes = ceil(steps / (settings.eval_every or max(1, steps // EVALUATIONS))) + 1
    scored = passes * tokens(task["validation"], config.validation_limit)
    scored += sum(tokens(files["test"], config.test_limit) for files in config.tasks.values())
    scored += 2 * sum(tokens(path, config.probe_limit) for path in config.probes.values())
    return 2 * weights * (3 * trained + scored) / (SHARE_OF_PEAK * operations_a_second())


def operations_a_second() -> float:
    """The speed of a float32 matrix product here: the best of several, since other work only makes it slower."""
    a: Any = torch.randn(1024, 1024)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(times)
