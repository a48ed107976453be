"""Work that cells share, done once: gradients for scoring, and the entries that a rule chooses by them."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finepoint.adapters.format import write
from finepoint.errors import FinepointError
from finepoint.models.loading import new_head
from finepoint.runtime.files import VERSION, alone, read_record, refuse_version, write_atomic, write_json, write_record
from finepoint.runtime.settings import Decides, deciding
from finepoint.selection.rules import STATISTICS, rule_named
from finepoint.selection.statistics import Statistics, stream_statistics
from finepoint.training.context import TrainingContext, select_for
from finepoint.training.settings import TrainConfig
from finepoint.tuner.tuner import SparseTuner


def shared_selection(config: TrainConfig, context: TrainingContext, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a selection that any cell may use as `indices`, and what it took: `seconds`, `statistics`.

    Made by whoever comes first; others wait for it. `seconds` counts the gradients as if they had been made for this
    selection alone.
    """
    made = folder / "selections" / key(config, "statistics", "selection")
    with alone(made):
        if not (made / "selection.json").is_file():
            _select(config, context, made, folder / "statistics")
    return made, read_record(made / "selection.json")


def _select(config: TrainConfig, context: TrainingContext, made: Path, store: Path) -> None:
    needs = [need for need in STATISTICS if need in rule_named(config.rule).needs]
    # What a warm-up finds depends on the rule's options, too.
    options = config.rule_options if {"movement", "change"} & set(needs) else None
    kept = store / f"{'-'.join(needs)}-{key(config, 'statistics', options=options)}"
    spent = 0.0

    def stream(*arguments: Any) -> Iterator[tuple[str, Statistics]]:
        nonlocal spent
        with alone(kept):
            if not (kept / "seconds.json").is_file():
                _keep(stream_statistics(*arguments), kept)
            else:
                spent = float((kept / "seconds.json").read_text(encoding="utf-8"))
        for path in _kept(kept, arguments[1]):
            yield path.stem, Statistics(**_read(path))

    started = time.perf_counter()
    selection = select_for(config, context, stream if needs else stream_statistics)
    seconds = time.perf_counter() - started + spent
    with SparseTuner(context.model, selection, audit=False) as tuner:
        facts = {name: value for name, value in selection.statistics.items() if name != "weights"}
        head = new_head(context.model) if context.labels else []
        write(tuner.adapter("delta", head, {"rule": selection.rule, "selection": facts}), made)
    write_record(made / "selection.json", {"seconds": round(seconds, 2), "statistics": selection.statistics})


def _keep(statistics: Iterable[tuple[str, Statistics]], folder: Path) -> None:
    """Writes each weight's statistics as soon as they are computed, so that few are in memory at a time."""
    started = time.perf_counter()
    for name, found in statistics:
        tensors = {what: tensor for what, tensor in vars(found).items() if tensor is not None}
        write_atomic(folder / f"{name}.safetensors", partial(save_file, tensors, metadata={VERSION: "1"}))
    write_json(folder / "seconds.json", time.perf_counter() - started)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            refuse_version(path, int((file.metadata() or {}).get(VERSION, 1)))
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise FinepointError(f"cannot read {path}: {error}; delete its folder, and it is made again") from error


def _kept(folder: Path, weights: Mapping[str, nn.Parameter]) -> list[Path]:
    # Path.stem of "a.weight.safetensors" is the weight's name.
    return [folder / f"{name}.safetensors" for name in weights]


def key(config: TrainConfig, *decides: Decides, **more: Any) -> str:
    """A name for all settings that decide a result; the files' contents are the study's business."""
    values = deciding(config, *decides) | more
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
