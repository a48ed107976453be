"""The page of one run, or of one adapter: how it was trained, what it cost, where its change lies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.format import TENSORS
from finepoint.adapters.inspection import by_module, facts, place
from finepoint.reporting.page import Drawing, Page, Section
from finepoint.reporting.tables import general, table, text, whole
from finepoint.reporting.views import Row, number
from finepoint.runtime.files import as_yaml, read_json
from finepoint.training.logfile import LOG, read_log
from finepoint.training.run import ANSWERS, RECORD

DEFINITIONS = {
    "training loss": "Of each logged step, and as the mean over a tenth of the run; nats a token.",
    "validation loss": "On examples that were not trained on, where the run had some.",
    "share": "Changed entries over all entries of the weight.",
    "mean |delta|": "Mean size of the change of an entry, against the base's value.",
}
# What a run's record says, in words, in the order of the page.
FACTS = {
    "first_loss": "first loss", "last_loss": "last loss", "validation_loss": "validation loss",
    "best_step": "kept step", "steps": "steps", "lr": "learning rate", "trained": "trained numbers",
    "changed": "changed stored values", "update_norm": "norm of the change", "train_seconds": "training, s",
    "selection_seconds": "selection, s", "tokens_per_second": "tokens a second", "peak_bytes": "peak memory, bytes",
    "adapter_bytes": "adapter, bytes",
}  # fmt: skip


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run's record, or an adapter."""
    return (folder / RECORD).is_file() or (folder / TENSORS).is_file()


def run_page(folder: Path, figures: Any) -> Page:
    """The page of a run's folder; of an adapter that somebody else has trained, as much as its files tell.

    Raises:
        FinepointError: a file of the folder cannot be read.
    """
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    log = read_log(folder / LOG)
    adapter = SparseAdapter.load(folder) if (folder / TENSORS).is_file() else None
    info = dict(adapter.info) if adapter else {}
    curve = [
        {"step": line["step"], **{key: number(line.get(of)) for key, of in POINTS.items()}} for line in log
        if any(number(line.get(of)) is not None for of in POINTS.values())
    ]  # fmt: skip
    known = [
        {"fact": words, "value": _shown(record[key])} for key, words in FACTS.items() if record.get(key) is not None
    ]
    modules = by_module(adapter) if adapter else []
    byline = [str(info.get("base_model") or ""), str(record.get("baseline") or info.get("rule") or "")]
    sections = [_training(curve, known, figures)] if curve or known else []
    answers = read_json(folder / ANSWERS).get("examples", []) if (folder / ANSWERS).is_file() else []
    sections += [_answers(answers)] if answers else []
    sections += [_places(adapter, modules, figures)] if adapter else []
    return Page(
        f"finepoint: {folder.name}", folder.name, " · ".join(part for part in byline if part),
        _findings(record, adapter), _warnings(record, info), sections,
        {"curve": curve, "answers": answers, "modules": modules},
        DEFINITIONS,
        as_yaml({"record": _short(record), "adapter": _short(info)}),
    )  # fmt: skip


POINTS = {"loss": "loss", "validation_loss": "eval_loss", "learning_rate": "learning_rate", "kl": "disturbed"}
"""what a line of the log holds"""
CURVES = {
    "loss": "training loss", "validation_loss": "validation loss", "learning_rate": "learning rate",
    "kl": "KL to the base on protected text",
}  # fmt: skip


def _training(curve: Sequence[Row], known: Sequence[Row], figures: Any) -> Section:
    panels = [
        figures.curve(words, [(row["step"], row[key]) for row in curve if row[key] is not None], key == "loss")
        for key, words in CURVES.items() if any(row[key] is not None for row in curve)
    ]  # fmt: skip
    return Section(
        "Training",
        "How the loss fell, and what it took.",
        [Drawing("curve", "Along the steps", "The thin line is each logged step, the thick one the mean over a tenth "
                 "of the run.", "curve", panels, "the folder has no log")],
        [table("facts", "The run", "From its record", known, [text("", "fact"), text("", "value")])],
    )  # fmt: skip


def _answers(answers: Sequence[Row]) -> Section:
    columns = [text("prompt", "prompt"), text("wanted", "wanted"), text("before", "base"), text("after", "trained")]
    return Section(
        "Before and after",
        "What the model wrote after a few validation examples, without the adapter and with it.",
        tables=[table("before-after", "Answers", "The likeliest token after token, at most 32; of a prompt its end",
                      answers, columns)],
    )  # fmt: skip


def _places(adapter: SparseAdapter, modules: Sequence[Row], figures: Any) -> Section:
    rows = [
        {"layer": place(name)[0], "module": place(name)[1], "share": weight["share"]}
        for name, weight in facts(adapter)["weights"].items()
    ]
    panels = [figures.heat_map("changed share of each weight", rows, max((row["share"] for row in rows), default=0))]
    columns = [
        text("module", "module"), whole("weights", "weights"), whole("entries", "entries"), general("share", "share"),
        general("mean |delta|", "mean_abs_delta"), general("largest", "largest"),
    ]  # fmt: skip
    return Section(
        "Where the change lies",
        f"{adapter.count:,} entries in {len(adapter)} weights.",
        [Drawing("places", "Changed share by layer and module", "Stronger colour: a larger share, by its square root.",
                 "modules", panels if rows else [], "the adapter changes no weight", small=True)],
        [table("modules", "By kind of module", "Over all layers", modules, columns)],
    )  # fmt: skip


def _findings(record: Mapping[str, Any], adapter: SparseAdapter | None) -> list[str]:
    said = []
    if (first := number(record.get("first_loss"))) is not None and (
        last := number(record.get("last_loss"))
    ) is not None:
        said.append(f"In {record['steps']} steps the training loss went from {first:.3f} to {last:.3f}.")
    if (validation := number(record.get("validation_loss"))) is not None:
        said.append(f"On validation examples it is {validation:.3f}.")
    if adapter and adapter.changes_nothing():
        said.append("The adapter changes nothing: no value differs from the base.")
    return said


def _warnings(record: Mapping[str, Any], info: Mapping[str, Any]) -> list[str]:
    found = [f"its training was left at {info['unfinished']}"] if info.get("unfinished") else []
    return found + (["validation examples were trained on: see leaks in the record"] if record.get("leaks") else [])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    """What fits a page: no tables by weight."""
    return {key: value for key, value in values.items() if isinstance(value, str | int | float | bool | None)}
