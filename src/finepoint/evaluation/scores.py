"""Scores as people read them: every figure with its error, every measure by its name. The same rows everywhere."""

import html
from collections.abc import Callable, Mapping
from typing import Any

KL = "KL to the base"
LOSS = "loss, nats a token"
SHOWN = 12  # classes whose confusion fits beside each other
NOTE = ("± is one standard error: of a share over its n examples, of a loss over the texts that its n tokens come in. "
        "Changes, in brackets, are of the same examples, and surer than two such errors.")  # fmt: skip
Table = tuple[list[str], list[list[Any]]]
"""the header, and rows as long"""


class Scores(dict[str, Any]):
    """What `finepoint eval --json` prints, {"base": scores, "adapters": {name: scores, changes}}; shown as a table."""

    def __repr__(self) -> str:
        parts = [(None, table(self)), *confusions(self)]
        return "\n\n".join([_plain(title, *found) for title, found in parts] + [NOTE])

    def _repr_html_(self) -> str:
        parts = [(None, table(self)), *confusions(self)]
        return "".join(_html(title, *found) for title, found in parts) + f"<p><small>{NOTE}</small></p>"


def table(found: Mapping[str, Any]) -> Table:
    """A row a set and measure; the base, then every adapter with its change."""
    rows: list[list[Any]] = []
    for kind in ("id", "ood", "probe"):
        for name in found["base"][kind]:
            rows += _main_rows(kind, name, found) + _more_rows(kind, name, found)
    rows += _task_rows(found)
    if any("protected" in adapter for adapter in found["adapters"].values()):
        kept = [adapter["protected"] for adapter in found["adapters"].values()]
        rows.append(["protected", KL, kept[0]["tokens"], "-", *(f"{scores['kl']:.4f}" for scores in kept)])
    return ["set", "measure", "n", "base", *found["adapters"]], rows


def confusions(found: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Of classifiers a table for every adapter and set: each class with its figures, and what it was answered as."""
    return [
        (f"{adapter}, {kind} {name}", _confusion(score))
        for adapter, scores in found["adapters"].items()
        for kind in ("id", "ood")
        for name, score in scores[kind].items()
        if "confusion" in score
    ]


def with_error(value: float, error: float | None) -> str:
    """A figure with its standard error, if that is known."""
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _main_rows(kind: str, name: str, found: Mapping[str, Any]) -> list[list[Any]]:
    """The measure of a set; of what is written the loss as well, of classes the macro F1."""
    base = found["base"][kind][name]
    scores = [base, *(adapter[kind][name] for adapter in found["adapters"].values())]
    rows: list[list[Any]] = []

    def row(measure: str, n: str, key: str, of: Callable[[Any], Any] = lambda score: score) -> None:
        if any((of(score) or {}).get(key) is None for score in scores):
            return
        first, *others = (of(score) for score in scores)
        error = "" if key == "macro_f1" else "stderr"
        shown = [f"{with_error(other[key], other.get(error))} ({other[key] - first[key]:+.3f})" for other in others]
        rows.append([f"{kind} {name}", measure, first[n], with_error(first[key], first.get(error)), *shown])

    if kind == "probe":
        row(LOSS, "tokens", "nll")
        return rows
    row(base.get("measure", "accuracy"), "n", "accuracy")
    row(LOSS, "tokens", "nll", lambda score: score.get("loss"))
    row("macro F1", "n", "macro_f1")
    return rows


def _more_rows(kind: str, name: str, found: Mapping[str, Any]) -> list[list[Any]]:
    """What else is known of a set: KL to the base of a probe, answers by generation."""
    adapters = [adapter[kind][name] for adapter in found["adapters"].values()]
    title, rows = f"{kind} {name}", list[list[Any]]()
    for key, measure in (("kl", KL), ("kl_prompts", f"{KL}, prompts")):
        if any(key in scores for scores in adapters):
            rows.append([title, measure, "", "-", *(f"{scores[key]:.4f}" for scores in adapters)])
    base = found["base"][kind][name].get("generated", {})
    for measure in ("accuracy", "format_failures", "empty", "memorised"):
        values = [base.get(measure), *(scores.get("generated", {}).get(measure) for scores in adapters)]
        if any(value is not None for value in values):
            shown = ["-" if value is None else f"{value:.3f}" for value in values]
            rows.append([title, f"generated: {measure.replace('_', ' ')}", base["n"], *shown])
    return rows


def _task_rows(found: Mapping[str, Any]) -> list[list[Any]]:
    """The metrics of lm-evaluation-harness, with the errors that it tells."""
    rows: list[list[Any]] = []
    for task, metrics in found["base"].get("tasks", {}).items():
        for metric, value in metrics.items():
            if metric == "n" or "_stderr" in metric:
                continue
            row = [f"task {task}", metric, metrics.get("n", ""), with_error(value, _error_of(metrics, metric))]
            for adapter in found["adapters"].values():
                own, change = adapter["tasks"][task], adapter["tasks_change"][task][metric]
                row.append(f"{with_error(own[metric], _error_of(own, metric))} ({change:+.3f})")
            rows.append(row)
    return rows


def _error_of(metrics: Mapping[str, Any], metric: str) -> float | None:
    error = metrics.get(f"{metric}_stderr")
    return error if isinstance(error, float) else None


def _confusion(score: Mapping[str, Any]) -> Table:
    columns = score["labels"] if len(score["labels"]) <= SHOWN else []
    rows = [
        [label, own["n"], *("-" if own[key] is None else own[key] for key in ("precision", "recall", "f1")),
         *counts[: len(columns)]]
        for (label, own), counts in zip(score["classes"].items(), score["confusion"], strict=True)
    ]  # fmt: skip
    return ["class", "n", "precision", "recall", "F1", *(f"as {label}" for label in columns)], rows


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _plain(title: str | None, header: list[str], rows: list[list[Any]]) -> str:
    cells = [header, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*([title] if title else []), *lines])


def _html(title: str | None, header: list[str], rows: list[list[Any]]) -> str:
    def line(cells: list[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(_cell(cell))}</{tag}>" for cell in cells) + "</tr>"

    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    return f"<table>{caption}{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
