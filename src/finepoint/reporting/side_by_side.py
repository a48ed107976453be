"""Adapters side by side: how far they get in each other's way, and what a sequence of tasks leaves of each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.interference import interference
from finepoint.errors import FinepointError
from finepoint.reporting.page import Drawing, Page, Section
from finepoint.reporting.tables import Column, change, fixed, general, table, text, whole
from finepoint.reporting.views import Row
from finepoint.runtime.files import as_yaml, read_json
from finepoint.studies.results import SEQUENCE_RESULT, WAYS, adapter_folder

DEFINITIONS = {
    "Jaccard": "Entries that both adapters change, over entries that either changes.",
    "by chance": "The same for random choices of as many entries in each weight.",
    "opposite": "Share of the common entries that the two adapters move in opposite directions.",
    "cosine": "Of the two changes as vectors over all weights; 0 where no entry is common.",
    "energy": "Share of an adapter's squared change that lies on common entries: what merging can spoil.",
}
SEQUENCE_DEFINITIONS = {
    "R[i, j]": "Accuracy on task j after training tasks 0 to i in turn.",
    "average accuracy": "Mean of R's last row.",
    "backward transfer": "Mean over all but the last task of R[last, j] − R[j, j] (arXiv:1706.08840); below 0 later "
                         "tasks hurt.",
    "forgetting": "Mean over the same of the best R[i, j] before the last task − R[last, j] (arXiv:1801.10112).",
    "average loss": "Mean loss of the right answers over all tasks at the end, in nats a token.",
    "rise of loss": "Mean over all but the last task of the loss at the end − that right after its own training.",
    "removable": "The adapter alone was taken out of the model that holds all of them: its entries had the base's bits "
                 "again, all others kept theirs.",
}  # fmt: skip
TITLES = {name: way.title for name, way in WAYS.items()}
WHOLE = "all"  # interference's scope over all weights


def adapters_page(folders: Sequence[str], figures: Any) -> Page:
    """The page of two adapters or more: every pair's overlap, conflicts and shared energy.

    Raises:
        FinepointError: a folder that holds no adapter, adapters of different bases or shapes, whole weights.
    """
    if len(set(folders)) < len(folders):
        raise FinepointError("an adapter is given twice; give different folders")
    paths = [Path(folder) for folder in folders]
    short = len({path.name for path in paths}) == len(paths)
    adapters = {path.name if short else str(path): SparseAdapter.load(path) for path in paths}
    rows = interference(adapters)
    known = {name: adapter.info for name, adapter in adapters.items()}
    return Page(
        f"Interference: {', '.join(adapters)}", "Adapters side by side", " · ".join(adapters), _closest(rows), [],
        [_pairs(rows, list(adapters), figures)], {"interference": rows}, DEFINITIONS, as_yaml(known),
    )  # fmt: skip


def sequence_page(folder: Path, figures: Any) -> Page:
    """The page of `finepoint sequence`: accuracies after each task, and how the adapters overlap.

    Raises:
        FinepointError: the sequence is not finished.
    """
    if not (folder / SEQUENCE_RESULT).is_file():
        raise FinepointError(f"the sequence in {folder} is not finished; run `finepoint sequence` again: it goes on")
    found = read_json(folder / SEQUENCE_RESULT)
    tasks, config, ways = found["tasks"], found["config"], [way for way in WAYS if way in found]
    data = {"accuracies": accuracies(found, ways), "ways": summaries(found, ways)}
    sections = [_matrices(data, tasks, figures)]
    for way in (way for way in ways if not WAYS[way].baseline):
        adapters = {task: SparseAdapter.load(adapter_folder(folder, way, task, tasks)) for task in tasks}
        rows = data[f"interference_{way}"] = interference(adapters)
        sections.append(_pairs(rows, tasks, figures, way))
    byline = f"{config['model']} · {', '.join(tasks)} · {config['rule']} at density {config['density']:g}"
    return Page(
        f"Sequence of tasks: {', '.join(tasks)}", "One model, task after task", byline, _kept(data["ways"]), [],
        sections, data, SEQUENCE_DEFINITIONS | DEFINITIONS, as_yaml({"config": config, "versions": found["versions"]}),
    )  # fmt: skip


def accuracies(found: Mapping[str, Any], ways: Sequence[str]) -> list[Row]:
    """A row for every accuracy: way, after which task, on which task."""
    rows = []
    for way in ways:
        lines = [[found["base"][task] for task in found["tasks"]], *found[way]["matrix"]]
        for after, line in zip(["base", *found["tasks"]], lines, strict=True):
            rows += [
                {"way": way, "after": after, "task": task, "accuracy": value}
                for task, value in zip(found["tasks"], line, strict=True)
            ]
    return rows


def summaries(found: Mapping[str, Any], ways: Sequence[str]) -> list[Row]:
    """A row for each way of choosing entries."""
    rows = []
    for way in ways:
        one, tasks = found[way], found["tasks"]
        removable = [task for task, yes in zip(tasks, one["removable"], strict=True) if yes]
        common = sum(one["overlaps"][i][j] for i in range(len(tasks)) for j in range(i))
        rows.append({"way": TITLES[way], "common": common, "trained": sum(one["trained"]),
                     "removable": ", ".join(removable) or "none",
                     **{key: one[key] for key in ("average_accuracy", "backward_transfer", "forgetting")},
                     **{key: one.get(key) for key in ("average_loss", "loss_rise")}})  # fmt: skip
    return rows


def _matrices(data: Mapping[str, list[Row]], tasks: Sequence[str], figures: Any) -> Section:
    columns = [
        text("entries", "way"), fixed("average accuracy", "average_accuracy"),
        change("backward transfer", "backward_transfer"), change("forgetting", "forgetting"),
        fixed("average loss", "average_loss"), change("rise of loss", "loss_rise"),
        whole("trained", "trained"), whole("common to two", "common"), text("removable", "removable"),
    ]  # fmt: skip
    panels = [
        figures.grid(TITLES[way], ["base", *tasks], tasks,
                     {(row["after"], row["task"]): row["accuracy"] for row in data["accuracies"] if row["way"] == way})
        for way in dict.fromkeys(row["way"] for row in data["accuracies"])
    ]  # fmt: skip
    return Section(
        "What each task left of the others",
        "The same tasks in the same order, with and without the right to train an entry again.",
        [Drawing("accuracies", "Accuracy on every task", "Rows: after training which task. Columns: measured on which.",
                 "accuracies", panels, "nothing was measured", small=True)],
        [table("ways", "In one number", "All tasks trained", data["ways"], columns)],
    )  # fmt: skip


def _pairs(rows: Sequence[Row], names: Sequence[str], figures: Any, way: str | None = None) -> Section:
    """The interference of every two adapters."""
    whole_rows = [row for row in rows if row["scope"] == WHOLE]
    layers = [row for row in rows if row["scope"].startswith("layer ")]
    suffix = f"-{way}" if way else ""
    data = f"interference{suffix.replace('-', '_')}"
    columns: list[Column] = [
        text("a", "a"), text("b", "b"), whole("in a", "entries_a"), whole("in b", "entries_b"),
        whole("common", "shared"), general("Jaccard", "jaccard"), general("by chance", "jaccard_by_chance"),
        general("opposite", "conflict_share"), change("cosine", "cosine"), general("energy of a", "energy_a"),
        general("energy of b", "energy_b"),
    ]  # fmt: skip
    return Section(
        f"Interference, {TITLES[way]}" if way else "Interference",
        "How far two adapters change the same entries, and whether they agree about them.",
        [
            Drawing(f"jaccard{suffix}", "Common entries",
                    "Below the diagonal: Jaccard index in per cent. Above: by chance.", data,
                    [figures.pair_matrix("Jaccard index, per cent", whole_rows, names)], "there is no pair"),
            Drawing(f"layers{suffix}", "Common entries by layer",
                    "Jaccard index in per cent by layer (line), and by chance (dotted).", data,
                    figures.by_layer(layers), "no two adapters share a layer", small=True),
        ],
        [table(f"pairs{suffix}", "Pair by pair", "Over all weights", whole_rows, columns)],
    )  # fmt: skip


def _closest(rows: Sequence[Row]) -> list[str]:
    pairs = [row for row in rows if row["scope"] == WHOLE]
    most = max(pairs, key=lambda row: row["jaccard"])
    said = [f"{most['a']} and {most['b']} share most: {most['shared']:,} entries, {100 * most['jaccard']:.3g} % of all "
            f"that either changes, {100 * most['jaccard_by_chance']:.3g} % by chance."]  # fmt: skip
    if most["conflict_share"] is not None and most["shared"]:
        said.append(f"They move {100 * most['conflict_share']:.0f} % of them in opposite directions; "
                    f"the changes' cosine is {most['cosine']:+.3f}.")  # fmt: skip
    return said


def _kept(rows: Sequence[Row]) -> list[str]:
    return [
        f"With {row['way'].replace('each task on', 'each task trained on')}: average accuracy "
        f"{row['average_accuracy']:.3f}, backward transfer {row['backward_transfer']:+.3f}, "
        f"{row['common']:,} entries trained twice; removable: {row['removable']}."
        for row in rows
    ]  # fmt: skip
