"""What a study says, as tables: each view is a plain function from results to rows, the data of a figure or of a CSV.

The confounds that let one rule look better than another for free (tuning, budget, movement) have a view each.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import atan, cos, exp, isfinite, log, log10, pi, sin, sqrt
from statistics import fmean, median
from typing import Any

from finepoint.studies.results import Cell, Results, at_edge, best_lr, first_seed, tuned

Row = dict[str, Any]

ALL_TASKS = "mean over tasks"
MEDIAN = "median over tasks"
SPREAD = ("id", "ood", "ood_change", "nll_change", "kl", "kl_prompts", "kl_protected")
SAME_BUDGET = 1.1
GAINS = (0.5, 0.75, 0.9)


def number(value: Any) -> float | None:
    """A value where it is a finite number, else None: a diverged run leaves nan, and a mean over it would too."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) else None


def mean(values: Iterable[Any]) -> float | None:
    """The mean of the numbers among the values; None where there is none."""
    numbers = [value for value in map(number, values) if value is not None]
    return fmean(numbers) if numbers else None


def measures(cell: Cell) -> Row:
    """The numbers of one run, flat; None where something was not measured."""
    scores, changes, cost = cell["scores"], cell.get("changes") or {}, cell.get("cost") or {}
    found = at_once(scores, changes, cell["task"])
    collapse = changes.get("collapse") or {}
    found |= {f"collapse_{key}": number(collapse.get(key)) for key in ("count", "rate", "at_or_below_chance")}
    found["update_norm"] = number(cell.get("update_norm"))
    validation = cell.get("validation") or {}
    found |= {f"validation_{key}": number(validation.get(key)) for key in ("accuracy", "loss")}
    costs = ("trained", "changed", "adapter_bytes", "selection_seconds", "step_seconds", "train_seconds", "peak_bytes",
             "seconds", "tokens_per_second")  # fmt: skip
    found |= {key: number(cost.get(key)) for key in costs}
    trained, changed = found["trained"], found["changed"]
    found["effective_share"] = changed / trained if trained and changed is not None else None
    return found


def at_once(scores: Row, changes: Row, task: str) -> Row:
    """The scores and changes that runs and their antidotes share."""
    here = (scores.get("id") or {}).get(task) or {}
    ood, probe = scores.get("ood") or {}, scores.get("probe") or {}
    mean_change = changes.get("ood_mean") or {}
    ood_changes = (changes.get("ood_change") or {}).values()
    return {
        "id": number(here.get("accuracy")),
        "id_change": number((changes.get("id_change") or {}).get(task)),
        "ood": mean(score.get("accuracy") for score in ood.values()),
        "ood_change": mean(ood_changes),
        "worst_ood_change": min(ood_changes, default=None),
        "forget_ratio": number(mean_change.get("forget_ratio")),
        "nll_change": mean((changes.get("probe_change") or {}).values()),
        "kl": mean(score.get("kl") for score in probe.values()),
        "kl_prompts": number(here.get("kl_prompts")),
        "kl_protected": number((changes.get("protected") or {}).get("kl")),
    }


def _arms_of(results: Results) -> Iterator[tuple[str, str, list[Cell]]]:
    """Every task with every arm, and the arm's tuned runs on it."""
    for task in results.tasks:
        for arm in results.arms:
            yield task, arm, tuned(results, task, arm)


def summary(results: Results) -> list[Row]:
    """A row for each task and arm at its tuned learning rate: mean and spread over the seeds; all tasks first."""
    rows = [
        {"task": task, **_named(results, arm), "lr": cells[0]["lr"], "lr_at_edge": at_edge(results, task, arm),
         **_spread([measures(cell) for cell in cells])}
        for task, arm, cells in _arms_of(results) if cells
    ]  # fmt: skip
    return _over_tasks(results) + rows


def _over_tasks(results: Results) -> list[Row]:
    """Arms that ran on every task, averaged over the tasks seed by seed: tasks are no sample, seeds are."""
    if len(results.tasks) < 2:
        return []
    rows = []
    for arm in results.arms:
        runs = [{cell["seed"]: measures(cell) for cell in tuned(results, task, arm)} for task in results.tasks]
        common = [seed for seed in results.seeds if all(seed in found for found in runs)]
        if not common:
            continue
        averaged = [_averaged([found[seed] for found in runs]) for seed in common]
        rows.append({"task": ALL_TASKS, **_named(results, arm), "lr": None, "lr_at_edge": None, **_spread(averaged)})
    return rows


def _averaged(found: Sequence[Row]) -> Row:
    """The mean of each number; None where one of them is missing, for a mean over fewer tasks is another quantity."""
    return {
        key: None if any(row[key] is None for row in found) else mean(row[key] for row in found) for key in found[0]
    }


def _named(results: Results, arm: str) -> Row:
    about = results.arm(arm)
    return {"arm": arm, "method": about.get("method", arm), "kind": about.get("kind"), "density": about.get("density")}


def _spread(found: Sequence[Row]) -> Row:
    """The mean of every number, and sd and interval of the main ones."""
    row: Row = {"seeds": len(found)}
    for key in found[0]:
        values = [value for one in found if (value := one[key]) is not None]
        row |= _with_spread(key, values) if key in SPREAD else {key: mean(values)}
    return row


def _with_spread(key: str, values: Sequence[float]) -> Row:
    """The mean under its key, and sd and interval under keys of their own; None where there is nothing."""
    spread: Row = interval(values) if values else {}
    return {key: spread.get("mean")} | {f"{key}_{part}": spread.get(part) for part in ("sd", "low", "high")}


def base_scores(results: Results) -> list[Row]:
    """What the base model scores on every test, and what guessing would."""
    keys = ("accuracy", "accuracy_normalised", "stderr", "n", "most_frequent_answer", "chance", "majority")
    return [
        {"test": test, **{key: number(score.get(key)) for key in keys}}
        for test, score in (results.base.get("tests") or {}).items()
    ]


def base_point(results: Results, task: str) -> tuple[float, float] | None:
    """The base model's accuracy on a task and its mean on the other tests; over all tasks, the means of these."""
    base = {row["test"]: row["accuracy"] for row in base_scores(results)}
    tasks = results.tasks if task == ALL_TASKS else [task]
    here = [base.get(name) for name in tasks]
    far = [mean(value for test, value in base.items() if test != name) for name in tasks]
    on, off = (mean(values) if None not in values else None for values in (here, far))
    return None if on is None or off is None else (on, off)


def ood_changes(results: Results) -> list[Row]:
    """The signed change of accuracy on every other task, for each task and arm: the mean hides trades between them."""
    rows = []
    for task, arm, cells in _arms_of(results):
        found: dict[str, list[float]] = {}
        for cell in cells:
            for test, change in ((cell.get("changes") or {}).get("ood_change") or {}).items():
                found.setdefault(test, []).append(change)
        for test, changes in found.items():
            rows.append({"task": task, "arm": arm, "test": test, **interval(changes)})
    return rows


def paired(results: Results, method: str) -> list[Row]:
    """Differences from the arm of a reference method, seed by seed, so that what a seed does to both cancels.

    The reference of a rule is the method's arm at the same density, if the method has densities.
    """
    rows = []
    for task, arm, cells in _arms_of(results):
        reference = reference_of(results, arm, method)
        if reference is None:
            continue
        ours = {cell["seed"]: measures(cell) for cell in cells}
        theirs = {cell["seed"]: measures(cell) for cell in tuned(results, task, reference)}
        seeds = [seed for seed in ours if seed in theirs]
        row: Row = {"task": task, "arm": arm, "reference": reference, "pairs": len(seeds)}
        for measure in ("id", "ood", "nll_change"):
            pairs = [(ours[seed][measure], theirs[seed][measure]) for seed in seeds]
            differences = [mine - other for mine, other in pairs if mine is not None and other is not None]
            row |= _with_spread(measure, differences)
        if seeds:
            rows.append(row)
    return rows


def reference_of(results: Results, arm: str, method: str) -> str | None:
    """The arm of a method that an arm is fairly compared with: of the same density, or the method's only one."""
    candidates = [other for other in results.study["arms"] if other.get("method") == method]
    density = results.arm(arm).get("density")
    same = [other for other in candidates if other.get("density") == density]
    if not same and len(candidates) == 1 and (density is None or candidates[0].get("density") is None):
        same = candidates
    return same[0]["name"] if same and same[0]["name"] != arm else None


def pareto(results: Results) -> list[Row]:
    """ID and mean OOD accuracy of each arm, and whether no other arm is as good in both and better in one, by means."""
    rows = [row for row in summary(results) if row["id"] is not None and row["ood"] is not None]
    keys = ("task", "arm", "density", "seeds", "id", "id_low", "id_high", "ood", "ood_low", "ood_high")
    found = []
    for row in rows:
        rivals = [other for other in rows if other["task"] == row["task"]]
        found.append({key: row[key] for key in keys} | {"front": not any(beats(other, row) for other in rivals)})
    return found


def beats(one: Row, other: Row) -> bool:
    """Whether one arm is at least as good in both accuracies and better in one."""
    pairs = [(one[key], other[key]) for key in ("id", "ood")]
    return all(mine >= theirs for mine, theirs in pairs) and any(mine > theirs for mine, theirs in pairs)


def by_density(results: Results) -> list[Row]:
    """Accuracy of each rule over the densities it was run at."""
    keys = ("task", "arm", "density", "seeds", "id", "id_sd", "ood", "ood_sd", "nll_change", "nll_change_sd")
    rows = [
        {"family": family(results, row["arm"]), **{key: row[key] for key in keys}}
        for row in summary(results) if row["density"] is not None
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["density"])


def family(results: Results, arm: str) -> str:
    """An arm without its density: the method, its options and its settings of training; or its name, where these are
    those of another arm as well."""
    mine = _settings(results.arm(arm))
    if [_settings(other) for other in results.study["arms"]].count(mine) > 1:
        return arm
    method, options, train, _ = mine
    said = ", ".join(f"{key} {value}" for key, value in {**options, **train}.items())
    return f"{method or arm} ({said})" if said else str(method or arm)


def _settings(about: Mapping[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any], Any]:
    return about.get("method"), about.get("options") or {}, about.get("train") or {}, about.get("density")


def equal_budget(results: Results) -> list[Row]:
    """Arms that train about equally many weights (within 10 %), side by side; arms without company are left out."""
    keys = ("arm", "trained", "seeds", "id", "id_low", "id_high", "ood", "ood_low", "ood_high", "nll_change", "kl")
    rows = []
    for task in results.tasks:
        found = [row for row in summary(results) if row["task"] == task and row["trained"]]
        for group in budgets(found):
            rows += [{"task": task, "budget": group[0]["trained"], **{key: row[key] for key in keys}} for row in group]
    return rows


def budgets(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups of at least two rows whose trained weights differ by at most 10 % from the group's smallest."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row["trained"]):
        if groups and row["trained"] <= SAME_BUDGET * groups[-1][0]["trained"]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [group for group in groups if len(group) > 1]


def paths(results: Results) -> list[Row]:
    """Learning and forgetting of each arm along its learning rates, at the first seed; `tuned` marks the rate kept."""
    keys = ("validation_accuracy", "validation_loss", "id", "id_change", "ood", "ood_change", "nll_change", "kl",
            "kl_prompts", "kl_protected", "update_norm")  # fmt: skip
    rows = []
    for task in results.tasks:
        for arm in results.arms:
            cells = sorted(first_seed(results, task, arm), key=lambda cell: cell["lr"])
            for cell in cells:
                found = measures(cell)
                kept = cell["lr"] == best_lr(cells, results.tuning)
                rows.append({"task": task, "arm": arm, "lr": cell["lr"], "tuned": kept,
                             **{key: found[key] for key in keys}})  # fmt: skip
    return rows


def equal_accuracy(results: Results) -> list[Row]:
    """What each arm forgets where it has learned equally much, interpolated along its learning rates.

    The levels lie at 50, 75 and 90 % of the best arm's gain over the base. A path starts at the base model, which is
    where a learning rate of 0 leaves it, and is read where it first reaches the level; None: it never does.
    """
    rows = []
    for task in results.tasks:
        base = number(((results.base.get("tests") or {}).get(task) or {}).get("accuracy"))
        found = [row for row in paths(results) if row["task"] == task and row["id"] is not None]
        if base is None or not found:
            continue
        gain = max(row["id"] for row in found) - base
        start = {"id": base, "ood_change": 0.0, "nll_change": 0.0, "lr": None}
        for share in GAINS if gain > 0 else ():
            for arm in dict.fromkeys(row["arm"] for row in found):
                path = [start, *(row for row in found if row["arm"] == arm)]
                at = interpolated(path, "id", base + share * gain, ("ood_change", "nll_change"))
                rows.append({"task": task, "share_of_best_gain": share, "id": base + share * gain, "arm": arm, **at})
    return rows


def equal_loss(results: Results) -> list[Row]:
    """KL to the base on the probes where an arm has learned as much as a baseline: its least validation loss.

    Along an arm's learning rates KL rises, and it is read where the loss first comes down to the baseline's, linearly
    between two runs in the logarithm of KL; where the smallest rate is below already, it is that run's, and less would
    do. None: it never learns so much. The medians over the tasks stand last, where an arm gets there in every one.
    """
    rows, known = [], [row for row in paths(results) if row["validation_loss"] and row["kl"]]
    for task in results.tasks:
        points = [row for row in known if row["task"] == task]
        for reference in (arm for arm in results.arms if results.arm(arm).get("kind") == "baseline"):
            its = [row for row in points if row["arm"] == reference]
            if not its:
                continue
            best = min(its, key=lambda row: row["validation_loss"])
            same = {"task": task, "reference": reference, "validation_loss": best["validation_loss"]}
            for arm in dict.fromkeys(row["arm"] for row in points):
                kl = _kl_at([row for row in points if row["arm"] == arm], best["validation_loss"])
                ratio = None if kl is None else kl / best["kl"]
                rows.append({**same, "arm": arm, "kl": kl, "reference_kl": best["kl"], "ratio": ratio})
    return rows + _medians(results, rows)


def _kl_at(path: Sequence[Row], loss: float) -> float | None:
    """KL where a path, by rising learning rates, first comes down to a loss."""
    for before, row in zip([None, *path[:-1]], path, strict=True):
        if row["validation_loss"] <= loss:
            if before is None:
                return float(row["kl"])
            share = (before["validation_loss"] - loss) / (before["validation_loss"] - row["validation_loss"])
            return exp(log(before["kl"]) + share * (log(row["kl"]) - log(before["kl"])))
    return None


def _medians(results: Results, rows: Sequence[Row]) -> list[Row]:
    found = []
    for reference, arm in dict.fromkeys((row["reference"], row["arm"]) for row in rows):
        ratios = [row["ratio"] for row in rows if (row["reference"], row["arm"]) == (reference, arm)]
        if len(results.tasks) > 1 and len(ratios) == len(results.tasks) and None not in ratios:
            found.append({"task": MEDIAN, "reference": reference, "validation_loss": None, "arm": arm, "kl": None,
                          "reference_kl": None, "ratio": median(ratios)})  # fmt: skip
    return found


def equal_norm(results: Results) -> list[Row]:
    """What each rule learns and forgets after moving equally far, interpolated along its learning rates in log norm.

    Only rules of one density, among each other: the norm of a change says something else for LoRA's products or for a
    change spread over ten times the entries. The levels are the quartiles of all runs' norms; None: never that far.
    """
    rows = []
    rules = [arm for arm in results.arms if results.arm(arm).get("kind") == "rule"]
    for task in results.tasks:
        for density in dict.fromkeys(results.arm(arm).get("density") for arm in rules):
            arms = [arm for arm in rules if results.arm(arm).get("density") == density]
            found = [row for row in paths(results) if row["task"] == task and row["arm"] in arms and row["update_norm"]]
            for level in quartiles([row["update_norm"] for row in found]):
                for arm in dict.fromkeys(row["arm"] for row in found):
                    path = [row for row in found if row["arm"] == arm]
                    at = interpolated(path, "update_norm", level, ("id", "ood_change", "nll_change"), log10)
                    rows.append({"task": task, "density": density, "update_norm": level, "arm": arm, **at})
    return rows


def quartiles(values: Sequence[float]) -> list[float]:
    """The quartiles of positive numbers, rounded to two digits so that tables show the very level; none below 4."""
    ordered = sorted(values)
    if len(ordered) < 4:
        return []
    return list(
        dict.fromkeys(float(f"{ordered[round(share * (len(ordered) - 1))]:.2g}") for share in (0.25, 0.5, 0.75))
    )


def interpolated(
    path: Sequence[Row], along: str, level: float, wanted: Sequence[str], scale: Callable[[float], float] = float
) -> Row:
    """The wanted numbers where a path first crosses a level, linear between its points; None where it never does.

    Args:
        along: the number that is to be at the level.
        scale: of that number, e.g. log10.
    """
    points = [(scale(row[along]), row) for row in path if row[along] is not None]
    target = scale(level)
    for i, (here, row) in enumerate(points):
        if here == target:
            return {key: row[key] for key in wanted}
        if i + 1 < len(points) and (here < target < points[i + 1][0] or here > target > points[i + 1][0]):
            after, follower = points[i + 1]
            share = (target - here) / (after - here)
            return {key: _between(row[key], follower[key], share) for key in wanted}
    return dict.fromkeys(wanted)


def _between(one: float | None, other: float | None, share: float) -> float | None:
    return None if one is None or other is None else one + share * (other - one)


def overfitting(results: Results) -> list[Row]:
    """Whether the kept step is the last one, and how far training and validation loss have come apart."""
    rows = []
    for task, arm, cells in _arms_of(results):
        for cell in cells:
            curve = cell.get("curve") or []
            losses = [point["loss"] for point in curve if number(point.get("loss")) is not None]
            checks = {
                point["step"]: point["eval_loss"] for point in curve if number(point.get("eval_loss")) is not None
            }
            last = max(checks, default=None)
            end = losses[-max(1, len(losses) // 10) :]  # single steps are noisy
            row = {"task": task, "arm": arm, "lr": cell["lr"], "seed": cell["seed"],
                   "best_step": cell.get("best_step"), "last_step": max((p["step"] for p in curve), default=None),
                   "train_loss_end": mean(end), "validation_loss_best": min(checks.values(), default=None),
                   "validation_loss_end": checks[last] if last is not None else None}  # fmt: skip
            rows.append(row | {"gap": _minus(row["validation_loss_end"], row["train_loss_end"])})
    return rows


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def antidotes(results: Results) -> list[Row]:
    """Changes scaled back after training: each remedy and strength next to the tuned run itself (alpha 1)."""
    rows = []
    for task, arm, cells in _arms_of(results):
        found: dict[tuple[str, float], list[Row]] = {}
        for cell in cells:
            for one in cell.get("antidotes") or []:
                row = at_once(one["scores"], one.get("changes") or {}, task)
                row["validation"] = number((one.get("validation") or {}).get("accuracy"))
                row["update_norm"] = number(one.get("update_norm"))
                found.setdefault((one["how"], one["alpha"]), []).append(row)
        if not found:
            continue
        whole = [
            measures(cell) | {"validation": number((cell.get("validation") or {}).get("accuracy"))} for cell in cells
        ]
        for (how, alpha), some in [(("none", 1.0), whole), *sorted(found.items())]:
            keys = ("validation", "id", "ood", "ood_change", "nll_change", "kl", "kl_prompts", "kl_protected",
                    "update_norm")  # fmt: skip
            rows.append({"task": task, "arm": arm, "how": how, "alpha": alpha, "seeds": len(some),
                         **{key: mean(row[key] for row in some) for key in keys}})  # fmt: skip
    return rows


def answers(results: Results) -> list[Row]:
    """Every test by likelihood and by generation, with what goes wrong in the answers' form, beside chance."""
    rows = []
    base = results.base.get("tests") or {}
    for test, score in base.items():
        rows.append({"task": "-", "arm": "base", "test": test, **_answers([score], score)})
    for task, arm, cells in _arms_of(results):
        found: dict[str, list[Row]] = {}
        for cell in cells:
            for kind in ("id", "ood"):
                for test, score in (cell["scores"].get(kind) or {}).items():
                    found.setdefault(test, []).append(score)
        for test, scores in found.items():
            rows.append({"task": task, "arm": arm, "test": test, **_answers(scores, base.get(test) or {})})
    return rows


def _answers(scores: Sequence[Row], base: Row) -> Row:
    generated = [score.get("generated") or {} for score in scores]
    row = {key: mean(score.get(key) for score in scores)
           for key in ("accuracy", "accuracy_normalised", "stderr", "most_frequent_answer")}  # fmt: skip
    row |= {f"generated_{key}": mean(score.get(key) for score in generated)
            for key in ("accuracy", "format_failures", "empty", "memorised")}  # fmt: skip
    return row | {"chance": number(base.get("chance")), "majority": number(base.get("majority"))}


def curves(results: Results) -> list[Row]:
    """Training and validation loss by step, of the tuned runs at the first seed."""
    return [
        {"task": task, "arm": arm, "lr": cell["lr"], "step": point["step"], "loss": number(point.get("loss")),
         "validation_loss": number(point.get("eval_loss"))}
        for task, arm, cells in _arms_of(results) for cell in cells
        if cell["seed"] == results.seeds[0] for point in cell.get("curve") or []
    ]  # fmt: skip


def failures(results: Results) -> list[Row]:
    """The runs that raised."""
    keys = ("task", "arm", "lr", "seed", "error")
    return [{key: failure[key] for key in keys} for failure in results.failures]


def missing(results: Results) -> list[Row]:
    """Runs that the grid calls for and that neither finished nor failed."""
    known = {(cell["task"], cell["arm"], cell["lr"], cell["seed"]) for cell in [*results.cells, *results.failures]}
    rows = []
    for task in results.tasks:
        for arm in results.arms:
            rates = [float(rate) for rate in results.arm(arm).get("lrs") or []]
            wanted = [(rate, results.seeds[0]) for rate in rates]
            grid = first_seed(results, task, arm)
            if grid and {cell["lr"] for cell in grid} >= set(rates):
                wanted += [(best_lr(grid, results.tuning), seed) for seed in results.seeds[1:]]
            for rate, seed in wanted:
                if (task, arm, rate, seed) not in known:
                    rows.append({"task": task, "arm": arm, "lr": rate, "seed": seed})
    return rows


def warnings(results: Results) -> list[str]:
    """What a reader should hold against the numbers."""
    found = []
    rows = [row for row in summary(results) if row["task"] != ALL_TASKS]
    if edges := [row for row in rows if row["lr_at_edge"]]:
        found.append(
            f"the best learning rate is the smallest or largest of its grid for {len(edges)} of {len(rows)} arms"
            f" ({_arms(edges)}): a better one may lie outside"
        )
    if single := [row for row in rows if row["seeds"] == 1]:
        found.append(f"{_arms(single)}: one seed only, so there is no spread and no interval")
    counts = {len(arm.get("lrs") or []) for arm in results.study["arms"]}
    if len(counts) > 1:
        found.append(
            f"arms were tuned over {min(counts)} to {max(counts)} learning rates: more trials are an advantage"
        )
    found += [f"{', '.join(arms[:-1])} and {arms[-1]} gave the same numbers in all of their runs: here they are one "
              "method, and their markers lie on each other" for arms in equal_arms(results)]  # fmt: skip
    if gone := missing(results):
        found.append(f"{len(gone)} runs of the grid have not finished: {_arms(gone)}")
    if results.failures:
        found.append(f"{len(results.failures)} runs failed: {_arms(results.failures)}")
    if lost := [cell for cell in results.cells if cell.get("indices") and not results.chosen(cell)]:
        found.append(f"the folder lacks the entries that {len(lost)} runs chose: their overlap is left out")
    if not results.base:
        found.append("the base model has not been measured yet (no base.json)")
    return found


def equal_arms(results: Results) -> list[list[str]]:
    """Arms that have done the same runs (task, rate, seed) with the same numbers in each."""
    measured = ("scores", "validation", "changes", "update_norm")
    groups: dict[str, list[str]] = {}
    for arm in results.arms:
        runs = [[cell["task"], cell["lr"], cell["seed"], *(cell.get(key) for key in measured)]
                for cell in results.cells if cell["arm"] == arm]  # fmt: skip
        if runs:
            groups.setdefault(json.dumps(sorted(runs, key=lambda run: run[:3]), sort_keys=True), []).append(arm)
    return [arms for arms in groups.values() if len(arms) > 1]


def runs(results: Results) -> list[Row]:
    """The finished runs with what they found, and where each and its adapter lie, where the folder still has them."""
    found = []
    for cell in results.cells:
        name = str(cell.get("id") or "")
        places = {"run": f"cells/{name}.json", "adapter": f"adapters/{name}"}
        there = {key: place if name and (results.folder / place).exists() else None for key, place in places.items()}
        validation = cell.get("validation") or {}
        found.append({"task": cell["task"], "arm": cell["arm"], "lr": cell["lr"], "seed": cell["seed"], **there,
                      "validation": number(validation.get("accuracy")), "loss": number(validation.get("loss")),
                      "update_norm": number(cell.get("update_norm"))})  # fmt: skip
    return found


def _arms(rows: Sequence[Row], most: int = 4) -> str:
    """Which arms on which tasks, the first few by name."""
    names = list(dict.fromkeys(f"{row['arm']} on {row['task']}" for row in rows))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Means with their uncertainty over few seeds: Student's t, exactly, without a statistics library.
CONFIDENCE = 0.95


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> dict[str, Any]:
    """{"mean", "sd", "low", "high", "n"}: mean ± t sd / sqrt(n), sd with n - 1; a single value has no spread.

    Args:
        values: at least one, one a seed.
    """
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None, "n": n}
    sd = sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(n - 1, confidence) * sd / sqrt(n)
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "n": n}


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = confidence for Student's T with so many degrees of freedom."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def t_within(t: float, freedom: int) -> float:
    """P(|T| <= t), by the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2
    term, total = (cos(angle) if odd else 1.0), 0.0
    for i in range(1 + odd, freedom, 2):
        total += term
        term *= cos(angle) ** 2 * i / (i + 1)
    series = sin(angle) * total
    return 2 / pi * (angle + series) if odd else series
