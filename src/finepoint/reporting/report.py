"""`finepoint report`: the page of a study, of a sequence of tasks, of a run, or of adapters side by side."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finepoint.errors import FinepointError
from finepoint.reporting import overlap, tables, views
from finepoint.reporting.page import PAGE, Drawing, Page, Section, cleared, drawing_package, write_page
from finepoint.reporting.tables import between, change, fixed, general, size, table, text, whole
from finepoint.reporting.text import DEFINITIONS, headline
from finepoint.reporting.views import Row
from finepoint.runtime.files import as_yaml
from finepoint.studies.results import SEQUENCE, STUDY, Results, read_results
from finepoint.studies.settings import ReportConfig


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Writes index.html, report.md, tables.tex, data/*.csv and figures/*.svg; returns what was written, JSON-ready.

    Raises:
        FinepointError: no results in the folder, packages missing, or the output folder holds something else.
    """
    first, *others = map(Path, config.folder)
    if others and config.output is None:
        raise FinepointError("--output is required: adapters side by side belong into no one's folder")
    place = Path(config.output) if config.output else first / "report"
    figures = drawing_package()
    if not others and (first / STUDY).is_file():
        page = study_page(read_results(first), figures, place)
    else:
        page = _page_of_adapters(config.folder, figures)
    return write_page(page, cleared(place)) | {"summary": page.data.get("summary", [])}


def _page_of_adapters(folders: Sequence[str], figures: Any) -> Page:
    from finepoint.reporting.one_run import is_run, run_page  # they read adapters, which takes torch
    from finepoint.reporting.side_by_side import adapters_page, sequence_page

    first = Path(folders[0])
    if len(folders) > 1:
        return adapters_page(folders, figures)
    if (first / SEQUENCE).is_file():
        return sequence_page(first, figures)
    if is_run(first):
        return run_page(first, figures)
    return study_page(read_results(first), figures)  # which says what is missing


def study_page(results: Results, figures: Any, place: Path | None = None) -> Page:
    """The page of a study, finished or not.

    Args:
        place: where it will lie, for its links to the runs; the study's `report` where not given.
    """
    data = view_data(results)
    sections = [*build(results, data, figures), _runs(results, data, place)]
    marks = {arm: figures.marker_svg(style) for arm, style in figures.styles(results).items()}
    tasks = ", ".join(results.tasks)
    return Page(
        f"Sparse fine-tuning study: {tasks}", "Sparse fine-tuning, compared", byline(results), headline(results),
        views.warnings(results), sections, data, DEFINITIONS, configuration(results), marks,
    )  # fmt: skip


def byline(results: Results) -> str:
    """Model, tasks and extent of a study, its date and machine."""
    study, seeds = results.study, len(results.seeds)
    machine = study.get("machine")
    parts = [
        str(study["config"]["model"]), f"trained on {', '.join(results.tasks)}", f"{len(results.arms)} arms",
        f"{len(results.cells)} runs", f"{seeds} seed{'s' if seeds > 1 else ''}", study.get("date"),
        machine if not isinstance(machine, dict) else ", ".join(map(str, machine.values())),
    ]  # fmt: skip
    return " · ".join(str(part) for part in parts if part)


def configuration(results: Results) -> str:
    """Everything that decided the results, as YAML: configuration, arms, data, versions, machine."""
    keys = ("config", "arms", "data", "versions", "machine", "date")
    chosen = {key: results.study[key] for key in keys if key in results.study}
    return as_yaml(json.loads(json.dumps(chosen)))


def view_data(results: Results) -> dict[str, list[Row]]:
    """The rows of every view, by the name of its CSV."""
    overlap_rows = overlap.overlaps(results)
    return {
        "summary": views.summary(results),
        "base": views.base_scores(results),
        "ood_change": views.ood_changes(results),
        "pareto": views.pareto(results),
        "density": views.by_density(results),
        "paths": views.paths(results),
        "allocation": overlap.allocation(results),
        "overlap": overlap_rows,
        "curves": views.curves(results),
        "overfitting": views.overfitting(results),
        "paired_random": views.paired(results, "random"),
        "paired_lora": views.paired(results, "lora"),
        "equal_budget": views.equal_budget(results),
        "equal_accuracy": views.equal_accuracy(results),
        "equal_loss": views.equal_loss(results),
        "equal_norm": views.equal_norm(results),
        "epsilon": overlap.epsilon_sweep(results, overlap_rows),
        "antidotes": views.antidotes(results),
        "answers": views.answers(results),
        "runs": views.runs(results),
        "failures": views.failures(results),
        "missing": views.missing(results),
    }


def build(results: Results, data: dict[str, list[Row]], figures: Any) -> list[Section]:
    """The sections of the report, in order."""
    return [
        _results(results, data, figures),
        _keeping(results, figures),
        _choices(results, data, figures),
        _costs(results, data, figures),
        _confounds(data),
        _training(results, data, figures),
        _answers(data),
        _failures(data),
    ]


TASK, ARM = text(tables.GROUPS, "task"), text("arm", "arm")
RUN = [TASK, ARM, general("lr", "lr"), whole("seed", "seed")]
ID, OOD, PLAIN_ID = between("ID", "id"), between("OOD", "ood"), fixed("ID", "id")
OOD_CHANGE, NLL_CHANGE = change("OOD change", "ood_change"), change("NLL change", "nll_change")
KLS = (general("KL", "kl"), general("KL, own prompts", "kl_prompts"), general("KL, protected", "kl_protected"))
NORM = general("norm", "update_norm")
PAIRED = [
    TASK, ARM, text("reference", "reference"), whole("pairs", "pairs"), between("ID", "id", "+.3f"),
    between("OOD", "ood", "+.3f"), between("NLL change", "nll_change", "+.3f"),
]  # fmt: skip


def _results(results: Results, data: dict[str, list[Row]], figures: Any) -> Section:
    columns = [
        TASK, ARM, general("lr", "lr"), whole("seeds", "seeds"), ID, OOD, between("OOD change", "ood_change", "+.3f"),
        fixed("forget ratio", "forget_ratio"), between("NLL change", "nll_change", "+.3f"), *KLS,
        general("norm", "update_norm"), fixed("collapse", "collapse_rate", 2),
        fixed("≤\u00a0chance", "collapse_at_or_below_chance", 2),
    ]  # fmt: skip
    rows = with_base(results, data["summary"])
    tasks_begin = sum(row["task"] == views.ALL_TASKS for row in rows)  # those come first
    caption = "Accuracy and forgetting of each arm at its tuned learning rate; mean ± half a 95 % interval over seeds"
    return Section(
        "Learning and keeping",
        "Zero forgetting with nothing learned is no achievement, so both are shown together.",
        [
            Drawing("id-ood", "Accuracy in and out of distribution",
                    "Mean over seeds; bars are one standard deviation. Dashed: the Pareto front of the means. "
                    "The cross is the base model; up and to the right is better.",
                    "pareto", figures.id_ood(results), "no task has tests out of distribution", results.arms_run),
            Drawing("density", "Accuracy against density",
                    "Mean over seeds; bars are one standard deviation. Dotted lines: baselines, without density.",
                    "density", figures.density(results), "the rules ran at one density only", results.arms_run),
        ],
        [
            table("overall", "Results", caption, rows[:tasks_begin], columns, PAGE),
            table("summary", "Results by task", caption, rows[tasks_begin:], columns, PAGE),
        ],
    )  # fmt: skip


def with_base(results: Results, rows: Sequence[Row]) -> list[Row]:
    """The rows with one for the base model before those of each task."""
    found: list[Row] = []
    for row in rows:
        if not found or found[-1]["task"] != row["task"]:
            base = views.base_point(results, row["task"])
            if base is not None:
                nothing = dict.fromkeys(row)
                found.append(nothing | {"task": row["task"], "arm": "base", "id": base[0], "ood": base[1]})
        found.append(row)
    return found


def _keeping(results: Results, figures: Any) -> Section:
    return Section(
        "What was forgotten",
        "By test, since a mean hides trades between tasks; and on neutral text, which no answer format can disturb.",
        [
            Drawing("ood-change", "Change on each test out of distribution",
                    "Accuracy after training less the base model's: with 95 % intervals over the seeds or, where tests "
                    "are many, one marker for each. Left of the line is forgetting.",
                    "ood_change", figures.ood_change(results), "no task has tests out of distribution",
                    results.arms_run),
            Drawing("forgetting", "Forgetting against learning",
                    "Each path runs from the base model (cross) through the arm's learning rates at the first seed; "
                    "the large marker is the rate kept. Low and to the right is better.",
                    "paths", figures.forgetting(results), "the study has no probe texts", results.arms_run),
            Drawing("loss-kl", "Disturbance against learning",
                    "KL to the base on the probe texts against validation loss, along each arm's learning rates at the "
                    "first seed; the large marker is the rate kept. Low and to the left is better.",
                    "paths", figures.loss_kl(results), "the study has no probe texts or no validation loss",
                    results.arms_run),
        ],
    )  # fmt: skip


def _choices(results: Results, data: dict[str, list[Row]], figures: Any) -> Section:
    pairs = [row for row in data["overlap"] if row["across"] != "arms"]
    columns = [
        text("across", "across"), ARM, text("task", "task"), whole("seed", "seed"), text("other task", "other_task"),
        whole("other seed", "other_seed"), fixed("Jaccard", "jaccard"), fixed("by chance", "expected"),
        fixed("weight by weight", "expected_by_weight"),
    ]  # fmt: skip
    return Section(
        "Which entries",
        "Where the rules put their entries, and how far they agree.",
        [
            Drawing("places", "Chosen share by layer and module",
                    "Stronger colour: a larger share of the weight, by its square root; one scale for a density.",
                    "allocation", figures.places(data["allocation"], results), "no rule left its selection",
                    small=True),
            Drawing("overlap", "Overlap of the arms' choices",
                    "Below the diagonal: Jaccard overlap in per cent. Above: that of random choices with as many "
                    "entries in each weight.",
                    "overlap", figures.overlap(data["overlap"]), "there are no two selections of one density"),
        ],
        [table("overlap", "Overlap across seeds and tasks", "Jaccard overlap of one arm's choices", pairs, columns)],
    )  # fmt: skip


def _costs(results: Results, data: dict[str, list[Row]], figures: Any) -> Section:
    columns = [
        TASK, ARM, whole("trained", "trained"), fixed("changed share", "effective_share", 4),
        size("file", "adapter_bytes"), fixed("selection s", "selection_seconds", 1), fixed("step s", "step_seconds"),
        fixed("training s", "train_seconds", 1), whole("tokens/s", "tokens_per_second"), size("peak", "peak_bytes"),
    ]  # fmt: skip
    return Section(
        "Cost",
        "Means over the seeds, on the machine named below.",
        [Drawing("cost", "Accuracy against cost", "Mean over seeds; bars are one standard deviation.", "summary",
                 figures.cost(results), "no run recorded its time or memory", results.arms_run)],
        [table("cost", "Cost", "Trained weights, time and memory", data["summary"], columns)],
    )  # fmt: skip


CONFOUNDS = [
    ("paired_random", "Paired differences from random", "Seed by seed; mean ± half a 95 % interval", PAIRED),
    ("paired_lora", "Paired differences from LoRA", "Seed by seed; mean ± half a 95 % interval", PAIRED),
    ("equal_budget", "Equal budget", "Arms that train about equally many weights (within 10 %)",
     [TASK, ARM, whole("budget", "budget"), whole("trained", "trained"), ID, OOD, NLL_CHANGE]),
    ("equal_accuracy", "Equal ID accuracy", "What is forgotten where 50, 75 and 90 % of the best arm's gain is learned",
     [TASK, ARM, fixed("share of gain", "share_of_best_gain", 2), PLAIN_ID, OOD_CHANGE, NLL_CHANGE]),
    ("equal_loss", "Equal validation loss", "KL to the base on the probes where an arm has learned what a baseline has",
     [TASK, text("as much as", "reference"), general("loss", "validation_loss"), ARM, general("KL", "kl"),
      general("the baseline's KL", "reference_kl"), general("ratio", "ratio")]),
    ("equal_norm", "Equal update norm", "Rules of one density that moved equally far; baselines move in other ways",
     [TASK, ARM, general("density", "density"), NORM, PLAIN_ID, OOD_CHANGE, NLL_CHANGE]),
    ("epsilon", "GaLLoP's epsilon", "From favouring the smallest weights (0) towards the largest gradients; first seed",
     [TASK, ARM, general("epsilon", "epsilon"), fixed("chosen near zero", "near_zero"),
      fixed("overlap with magnitude-low", "overlap_magnitude-low"), fixed("with gradient", "overlap_gradient"),
      PLAIN_ID, OOD_CHANGE, NLL_CHANGE]),
    ("antidotes", "Antidotes", "The change scaled back after training, against the run itself (none)",
     [TASK, ARM, text("how", "how"), general("alpha", "alpha"), fixed("validation", "validation"), PLAIN_ID,
      fixed("OOD", "ood"), OOD_CHANGE, NLL_CHANGE, NORM]),
]  # fmt: skip


def _confounds(data: dict[str, list[Row]]) -> Section:
    return Section(
        "Fair comparisons",
        "The same results with one confound held equal at a time: the seed, the budget, what was learned, how far the "
        "weights moved. A dash means that an arm never gets there.",
        tables=[
            table(name.replace("_", "-"), title, caption, data[name], columns)
            for name, title, caption, columns in CONFOUNDS if data[name]
        ],
    )  # fmt: skip


def _training(results: Results, data: dict[str, list[Row]], figures: Any) -> Section:
    columns = [
        *RUN, whole("best step", "best_step"), whole("of", "last_step"),
        fixed("training loss", "train_loss_end"), fixed("best validation", "validation_loss_best"),
        fixed("last validation", "validation_loss_end"), change("gap", "gap"),
    ]  # fmt: skip
    caption = "Losses at the end of training; the gap is validation less training loss"
    return Section(
        "Training",
        "Tuned runs at the first seed.",
        [Drawing("losses", "Loss curves", "Training loss is a moving average over a tenth of the run.", "curves",
                 figures.losses(results), "no run recorded its losses", results.arms_run)],
        [table("overfitting", "Over-fitting", caption, data["overfitting"], columns)],
    )  # fmt: skip


def _answers(data: dict[str, list[Row]]) -> Section:
    columns = [
        TASK, ARM, text("test", "test"), fixed("likelihood", "accuracy"), fixed("normalised", "accuracy_normalised"),
        fixed("generated", "generated_accuracy"), fixed("unparsed", "generated_format_failures"),
        fixed("empty", "generated_empty"), fixed("memorised", "generated_memorised"),
        fixed("most frequent", "most_frequent_answer"), fixed("chance", "chance"), fixed("majority", "majority"),
    ]  # fmt: skip
    caption = "Means over seeds; by likelihood, by likelihood normalised by length, and by generation"
    return Section(
        "Answers",
        "Each test scored in every way there is, beside what guessing would get.",
        tables=[table("answers", "Scores by test", caption, data["answers"], columns, 12)],
    )


def _runs(results: Results, data: dict[str, list[Row]], place: Path | None) -> Section:
    columns = [
        *RUN, fixed("validation", "validation"), general("loss", "loss"), NORM, text("run", "run"),
        text("adapter", "adapter"),
    ]  # fmt: skip
    root = os.path.relpath(results.folder.resolve(), (place or results.folder / "report").resolve())
    found = table("runs", "Every run", "Everything measured on a run is in its file", data["runs"], columns)
    return Section(
        "Runs",
        "One line for each, with its files in the study's folder where they are still there.",
        tables=[replace(found, root=quote(f"{Path(root).as_posix()}/"), linked=("run", "adapter"))],
    )


def _failures(data: dict[str, list[Row]]) -> Section:
    failed = table(
        "failures", "Failed runs", "Each raised the error given", data["failures"], [*RUN, text("error", "error")]
    )
    gone = table("missing", "Missing runs", "Called for by the grid, neither finished nor failed", data["missing"], RUN)
    words = "Nothing failed and nothing is missing." if not failed.rows + gone.rows else "Runs without a result."
    return Section("Failures", words, tables=[one for one in (failed, gone) if one.rows])
