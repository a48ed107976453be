"""What changed between a base model and an adapted one: plain functions of plain numbers."""

from collections.abc import Mapping, Sequence
from math import floor, sqrt
from statistics import mean
from typing import Any

Scores = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""{"id": {name: {"accuracy", ..}}, "ood": {..}, "probe": {name: {"nll", ..}}}"""


def ratio_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """The standard error of sum(sums) / sum(counts), a mean over tokens, whose tokens come by texts.

    The texts are what was drawn, and the tokens of one are alike: by linearisation, as for any ratio estimator,
    sqrt(n / (n - 1) sum_i (s_i - r c_i)^2) / sum_i c_i with r the ratio, over n texts. None of fewer than two.
    """
    n, total = len(sums), sum(counts)
    if n < 2 or not total:
        return None
    ratio = sum(sums) / total
    return sqrt(n / (n - 1) * sum((s - ratio * c) ** 2 for s, c in zip(sums, counts, strict=True))) / total


def confusion(right: Sequence[int], answered: Sequence[int], classes: int) -> list[list[int]]:
    """How often each class (row) was answered as each (column)."""
    counts = [[0] * classes for _ in range(classes)]
    for row, column in zip(right, answered, strict=True):
        counts[row][column] += 1
    return counts


def by_class(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> dict[str, Any]:
    """What a classifier gets right, class by class.

    Args:
        counts: see `confusion`.

    Returns:
        `macro_f1`, the mean F1 of the classes that occur, in the data or the answers; `classes`, by name how many there
        are (`n`), were `answered` and are `right`, with `precision`, `recall` and `f1`, 2 right / (n + answered), None
        where there is nothing to divide by; `confusion`, a row for each right class, in the order of `labels`.
    """
    found: dict[str, dict[str, Any]] = {}
    for i, label in enumerate(labels):
        n, answered, right = sum(counts[i]), sum(row[i] for row in counts), counts[i][i]
        found[label] = {"n": n, "answered": answered, "right": right,
                        "precision": right / answered if answered else None, "recall": right / n if n else None,
                        "f1": 2 * right / (n + answered) if n + answered else None}  # fmt: skip
    scores = [each["f1"] for each in found.values() if each["f1"] is not None]
    return {"macro_f1": mean(scores) if scores else None, "classes": found, "labels": list(labels),
            "confusion": [list(row) for row in counts]}  # fmt: skip


def forget_ratio(base: float, adapted: float) -> float | None:
    """max(0, (base - adapted) / base), as GaLLoP (arXiv:2510.19778) defines it for accuracies; None if base is 0.

    The max hides gains: read it beside the signed change.
    """
    return max(0.0, (base - adapted) / base) if base else None


def collapse(accuracies: Mapping[str, float], chances: Mapping[str, float | None]) -> dict[str, Any]:
    """How many OOD sets collapsed: as GaLLoP (arXiv:2510.19778) counts them, and by chance.

    Args:
        accuracies: of the OOD sets.
        chances: the accuracy of a guess, by set; None where there is nothing to guess from.

    Returns:
        `count`: sets whose accuracy in whole per cent is 0, the printed formula; `rate`: that by the number of sets;
        `at_or_below_chance`: the share of sets no better than a guess, which sees a constant answer too.
    """
    if not accuracies:
        return {"count": 0, "rate": None, "at_or_below_chance": None}
    # floor(100 x): rounded first, since 100 * 0.29 lies below 29.
    count = sum(floor(round(100 * accuracy, 9)) == 0 for accuracy in accuracies.values())
    guessable = [accuracy <= chance for name, accuracy in accuracies.items() if (chance := chances[name]) is not None]
    at_or_below = sum(guessable) / len(guessable) if guessable else None
    return {"count": count, "rate": count / len(accuracies), "at_or_below_chance": at_or_below}


def changes(base: Scores, adapted: Scores) -> dict[str, Any]:
    """Signed changes for every set; forget ratios of the OOD sets, their means, and which of them collapsed."""
    ood = {name: (base["ood"][name]["accuracy"], adapted["ood"][name]["accuracy"]) for name in adapted["ood"]}
    found: dict[str, Any] = {
        "id_change": _moved(base, adapted, "id", "accuracy"),
        "ood_change": _moved(base, adapted, "ood", "accuracy"),
        "forget_ratio": {name: forget_ratio(before, after) for name, (before, after) in ood.items()},
        "probe_change": _moved(base, adapted, "probe", "nll"),
    }
    if "tasks" in adapted:
        found["tasks_change"] = task_changes(base["tasks"], adapted["tasks"])
    if ood:
        before = sum(pair[0] for pair in ood.values()) / len(ood)
        after = sum(pair[1] for pair in ood.values()) / len(ood)
        found["ood_mean"] = {"base": before, "adapted": after, "change": after - before,
                             "forget_ratio": forget_ratio(before, after)}  # fmt: skip
        found["collapse"] = collapse({name: accuracy for name, (_, accuracy) in ood.items()},
                                     {name: base["ood"][name].get("chance") for name in ood})  # fmt: skip
    return found


def _moved(base: Scores, adapted: Scores, kind: str, measure: str) -> dict[str, float]:
    return {name: scores[measure] - base[kind][name][measure] for name, scores in adapted[kind].items()}


def task_changes(base: Mapping[str, Any], adapted: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The signed change of every metric of every task of lm-evaluation-harness; not of errors and counts."""
    return {
        task: {name: value - base[task][name] for name, value in metrics.items()
               if name != "n" and "_stderr" not in name and name in base[task]}
        for task, metrics in adapted.items()
    }  # fmt: skip


def sequence_metrics(matrix: Sequence[Sequence[float]]) -> dict[str, float]:
    """What a sequence of T tasks leaves of each, from R[i][j], the accuracy on task j after training tasks 0..i.

    Returns:
        `average_accuracy`, the mean of the last row; `backward_transfer`, the mean over all but the last task of
        R[T-1][j] - R[j][j] (GEM, arXiv:1706.08840), below 0 where later tasks hurt; `forgetting`, the mean over the
        same of the best R[i][j] before the last task minus R[T-1][j] (arXiv:1801.10112).
    """
    last, earlier = matrix[-1], range(len(matrix) - 1)
    return {
        "average_accuracy": mean(last),
        "backward_transfer": mean(last[j] - matrix[j][j] for j in earlier),
        "forgetting": mean(max(row[j] for row in matrix[:-1]) - last[j] for j in earlier),
    }


def losses_metrics(matrix: Sequence[Sequence[float]]) -> dict[str, float]:
    """As `sequence_metrics`, of L[i][j], the loss on task j after training tasks 0..i.

    Returns:
        `average_loss`, the mean of the last row; `loss_rise`, the mean over all but the last task of
        L[T-1][j] - L[j][j], above 0 where later tasks hurt.
    """
    last = matrix[-1]
    return {"average_loss": mean(last), "loss_rise": mean(last[j] - matrix[j][j] for j in range(len(matrix) - 1))}
