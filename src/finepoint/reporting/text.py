"""What a report says in words: the summary with its numbers, and what each quantity means."""

from collections.abc import Sequence

from finepoint.reporting import views
from finepoint.reporting.views import ALL_TASKS, Row
from finepoint.studies.results import Results

DEFINITIONS = {
    "arm": ("One way of training: a rule that chooses which entries are trained, at a density, or a baseline."),
    "density": (
        "Share of the target entries that an arm may train. Effective share: how many of those then really changed."
    ),
    "tuned": (
        "Every arm runs all its learning rates at the first seed. The one with the best validation accuracy "
        "(ties: lower validation loss, then the smaller rate), or with tuning: one-se the smallest within one "
        "standard error of it, runs at the other seeds. Nothing out of distribution takes part in a choice."
    ),
    "± and intervals": (
        "95 % Student t interval of the mean over seeds, t(n−1) · sd / √n. It holds the spread of training, not "
        "that of the test's items, for which the binomial standard error √(a(1−a)/n) stands in the CSV of base "
        "scores. With three seeds t is 4.3, so intervals are wide; a single seed has none. Bars in figures show "
        "one standard deviation."
    ),
    "ID, OOD": (
        "ID is accuracy on the test of the task trained on (of completions and chats exact "
        "match). OOD is the mean accuracy on the tests of all other tasks."
    ),
    "signed change": ("Accuracy after training less the base model's, by test. Gains and losses can cancel in a mean."),
    "forget ratio": (
        "max(0, (base − tuned) / base) of mean OOD accuracy, after GaLLoP (arXiv:2510.19778). The max hides gains."
    ),
    "collapse": (
        "Count and share of OOD tests whose accuracy rounds down to 0 %; and how many are at or below chance, "
        "which also catches a model that gives the same answer to everything."
    ),
    "probe NLL change": (
        "How much less likely neutral text became, in nats a token; independent of any answer format."
    ),
    "KL": (
        "Divergence of the tuned model's next-token distribution from the base model's, in nats a token: on the "
        "probes, on the prompts of the task's own test (which predicts forgetting, arXiv:2509.04259), on the "
        "protected text."
    ),
    "update norm": ("The Euclidean length of the whole change. Arms that move less forget less for free."),
    "normalised, generated": (
        "Accuracy by likelihood divided by the answer's length; and accuracy of answers the model writes itself, "
        "with the shares that cannot be parsed, are empty, or repeat an answer."
    ),
    "Pareto front": (
        "Arms that no other arm matches in both accuracies and beats in one. It is taken over means and changes "
        "with noise: read it with the bars."
    ),
    "overlap": (
        "Jaccard: shared entries over entries in either set. By chance: pq / (p + q − pq) for random sets of "
        "densities p and q; weight by weight: for random sets that put as many entries into each weight as these "
        "do."
    ),
    "equal validation loss": (
        "KL on the probes where an arm's validation loss is the least one of a baseline, read off along the arm's "
        "learning rates at the first seed, in the logarithm of KL. A ratio below 1: less disturbance for as much."
    ),
    "equal ID accuracy, equal norm": (
        "Read off along an arm's learning rates at the first seed, linearly between runs (norms in the "
        "logarithm). A dash means that the arm never gets there. Norms are compared between rules of one density "
        "only."
    ),
}


def headline(results: Results) -> list[str]:
    """The findings in a few sentences with numbers, cautious where the intervals overlap."""
    rows = [row for row in views.summary(results) if row["id"] is not None]
    general = [row for row in rows if row["task"] == ALL_TASKS]
    tasks = [ALL_TASKS] if general else list(dict.fromkeys(row["task"] for row in rows))
    sentences = []
    for task in tasks:
        sentences += _about(results, task, [row for row in rows if row["task"] == task])
    return sentences + _disturbance(results)


def _disturbance(results: Results) -> list[str]:
    """Which arm moves the base least for as much as LoRA learned."""
    rows = views.equal_loss(results)
    where = views.MEDIAN if len(results.tasks) > 1 else results.tasks[0]
    rows = [row for row in rows if row["task"] == where and row["ratio"] is not None]
    references = list(dict.fromkeys(row["reference"] for row in rows))
    reference = next((name for name in references if results.arm(name).get("method") == "lora"), None)
    others = [row for row in rows if row["reference"] == reference and row["arm"] != reference]
    if not others:
        return []
    least = min(others, key=lambda row: row["ratio"])
    over = f", in the median of {len(results.tasks)} tasks" if where == views.MEDIAN else ""
    return [
        f"Where it has learned as much as {reference}, {least['arm']} has moved the base's predictions on neutral "
        f"text {least['ratio']:.2g} times as far{over} (KL)."
    ]


def _about(results: Results, task: str, rows: Sequence[Row]) -> list[str]:
    where = f"Averaged over {len(results.tasks)} tasks" if task == ALL_TASKS else f"Trained on {task}"
    best = max(rows, key=lambda row: row["id"])
    base = {row["test"]: row["accuracy"] for row in views.base_scores(results)}
    trained = results.tasks if task == ALL_TASKS else [task]
    before = views.mean(base.get(name) for name in trained)
    against = f", against {before:.3f} of the base model" if before is not None else ""
    learned = f"{with_interval(best, 'id')} in distribution{against}"
    said = [f"{where}, {best['arm']} learned most: {learned}{_level_with(best, rows, 'id')}."]
    far = [row for row in rows if row["ood"] is not None]
    if far:
        best = max(far, key=lambda row: row["ood"])
        moved = f" ({best['ood_change']:+.3f} against the base)" if best["ood_change"] is not None else ""
        near = _level_with(best, far, "ood")
        said.append(f"Best out of distribution was {best['arm']}: {with_interval(best, 'ood')}{moved}{near}.")
        front = [row["arm"] for row in views.pareto(results) if row["task"] == task and row["front"]]
        said.append(f"On the front of both lie {len(front)} of {len(far)} arms: {_listed(front)}.")
    probed = [row for row in rows if row["nll_change"] is not None]
    if probed:
        least, most = (choose(probed, key=lambda row: row["nll_change"]) for choose in (min, max))
        said.append(
            f"The loss on neutral text changed by {least['nll_change']:+.3f} ({least['arm']}) to "
            f"{most['nll_change']:+.3f} ({most['arm']}) nats a token."
        )
    return said


def with_interval(row: Row, key: str) -> str:
    """A mean with half its interval, if it has one."""
    high = row[f"{key}_high"]
    return f"{row[key]:.3f}" + (f" ± {high - row[key]:.3f}" if high is not None else " (one seed)")


def _level_with(best: Row, rows: Sequence[Row], key: str) -> str:
    """How many other arms' means lie within the best one's interval."""
    low = best[f"{key}_low"]
    close = [row for row in rows if row is not best and low is not None and row[key] >= low]
    if len(close) == 1:
        return f"; the mean of {close[0]['arm']} lies within that interval"
    return f"; the means of {len(close)} other arms lie within that interval" if close else ""


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
