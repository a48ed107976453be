"""Where the chosen entries of a study's arms lie, and how many of them are the same: rows for tables and figures."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from finepoint.adapters.inspection import place
from finepoint.errors import FinepointError
from finepoint.reporting.views import Row, measures
from finepoint.selection.rules import RULES
from finepoint.studies.results import Cell, Results, tuned

INDICES = ".indices"  # ends the names of an adapter's tensors that say which entries it changes
Sizes = dict[str, dict[str, int]]
"""{weight name: {"chosen": n, "size": N}}"""


def allocation(results: Results) -> list[Row]:
    """How the entries of each rule's arm spread over layers and modules, at the first seed: the data of heat maps."""
    rows = []
    for task in results.tasks:
        for arm in results.arms:
            cell = chosen_cell(results, task, arm)
            rows += [{"task": task, "arm": arm, **row} for row in spread(_sizes(cell) if cell else {})]
    return rows


def spread(sizes: Sizes) -> list[Row]:
    """How the entries of one selection spread over layers and modules: a row for each weight's place."""
    sums: dict[tuple[str, str], list[int]] = {}
    for name, weight in sizes.items():
        total = sums.setdefault(place(name), [0, 0])  # a module may hold a weight and a bias
        total[0] += weight["chosen"]
        total[1] += weight["size"]
    return [
        {"layer": layer, "module": module, "chosen": chosen, "size": size, "share": chosen / size if size else 0.0}
        for (layer, module), (chosen, size) in sums.items()
    ]


def chosen_cell(results: Results, task: str, arm: str) -> Cell | None:
    """The tuned run at the first seed, where a rule chose its entries."""
    first = [cell for cell in tuned(results, task, arm) if cell["seed"] == results.seeds[0]]
    return first[0] if first and first[0].get("selection") else None


def _sizes(cell: Cell) -> Sizes:
    return dict((cell.get("selection") or {}).get("weights") or {})


def overlaps(results: Results) -> list[Row]:
    """Jaccard overlap of pairs of selections, beside what chance gives: arms, seeds of an arm, tasks of an arm.

    `expected` is the overlap of two random sets of these sizes; `expected_by_weight` of random sets that put as many
    entries into every weight as these do, so that what exceeds it is agreement about entries, not about layers.
    """
    rows = []
    for task in results.tasks:
        cells = [cell for arm in results.arms if (cell := chosen_cell(results, task, arm)) and results.chosen(cell)]
        for density in dict.fromkeys(results.arm(cell["arm"]).get("density") for cell in cells):
            rows += _pairs(results, "arms", [c for c in cells if results.arm(c["arm"]).get("density") == density])
    for arm in results.arms:
        for task in results.tasks:
            rows += _pairs(results, "seeds", [cell for cell in tuned(results, task, arm) if results.chosen(cell)])
        found = [chosen_cell(results, task, arm) for task in results.tasks]
        rows += _pairs(results, "tasks", [cell for cell in found if cell and results.chosen(cell)])
    return rows


def _pairs(results: Results, across: str, cells: Sequence[Cell]) -> list[Row]:
    if len(cells) < 2:
        return []
    sizes, shared = counted([path for cell in cells if (path := results.chosen(cell))])
    rows = []
    for i, j in combinations(range(len(cells)), 2):
        one, other = cells[i], cells[j]
        union = sizes[i] + sizes[j] - shared[i][j]
        rows.append({
            "across": across, "density": results.arm(one["arm"]).get("density"),
            "task": one["task"], "arm": one["arm"], "seed": one["seed"],
            "other_task": other["task"], "other_arm": other["arm"], "other_seed": other["seed"],
            "chosen": sizes[i], "other_chosen": sizes[j], "shared": shared[i][j],
            "jaccard": shared[i][j] / union if union else None, **expected(_sizes(one), _sizes(other)),
        })  # fmt: skip
    return rows


def counted(files: Sequence[Path]) -> tuple[list[int], list[list[int]]]:
    """How many entries each adapter's file chooses, and how many each two share; one weight in memory at a time.

    Raises:
        FinepointError: a file is missing or damaged.
    """
    sizes = [0] * len(files)
    shared = [[0] * len(files) for _ in files]
    try:
        opened = [safe_open(str(file), framework="numpy") for file in files]
        held = [{name for name in file.keys() if name.endswith(INDICES)} for file in opened]  # noqa: SIM118
        for name in sorted(set().union(*held)):
            parts = [file.get_tensor(name) if name in keys else None for file, keys in zip(opened, held, strict=True)]
            for i, part in enumerate(parts):
                sizes[i] += 0 if part is None else len(part)
            for i, j in combinations(range(len(files)), 2):
                both = _common(parts[i], parts[j])
                shared[i][j] += both
                shared[j][i] += both
    except (OSError, SafetensorError) as error:
        raise FinepointError(
            f"cannot read the selections of the study: {error}; run `finepoint compare` again"
        ) from error
    return sizes, shared


def _common(one: Any, other: Any) -> int:
    if one is None or other is None:
        return 0
    return int(np.isin(one, other, assume_unique=True).sum())


def expected(one: Sizes, other: Sizes) -> Row:
    """The Jaccard overlap of random sets with the densities of these, over all targets and weight by weight."""
    total = sum(weight["size"] for weight in one.values())
    if not total or total != sum(weight["size"] for weight in other.values()):
        return {"expected": None, "expected_by_weight": None}  # other targets: no common set to draw from
    p, q = (sum(weight["chosen"] for weight in sizes.values()) / total for sizes in (one, other))
    both = sum(
        weight["chosen"] * other[name]["chosen"] / weight["size"] for name, weight in one.items() if name in other
    )
    return {"expected": by_chance(p, q), "expected_by_weight": ratio(both / total, p, q)}


def by_chance(p: float, q: float) -> float | None:
    """The Jaccard overlap of two random sets of densities p and q: pq / (p + q - pq)."""
    return ratio(p * q, p, q)


def ratio(both: float, p: float, q: float) -> float | None:
    """Shared over united share of two sets."""
    return both / (p + q - both) if p + q - both else None


def epsilon_sweep(results: Results, overlap_rows: Sequence[Row]) -> list[Row]:
    """GaLLoP's score with several epsilons: between choosing the smallest weights and the largest gradients.

    Args:
        overlap_rows: from `overlaps`, which reads files.
    """
    arms = [arm for arm in results.arms if results.arm(arm).get("method") == "gallop"]
    if not any("epsilon" in (results.arm(arm).get("options") or {}) for arm in arms):
        return []
    rows = []
    for task in results.tasks:
        for arm in arms:
            about, cell = results.arm(arm), chosen_cell(results, task, arm)
            if cell is None:
                continue
            epsilon = (RULES["gallop"].options | (about.get("options") or {}))["epsilon"]
            row = {"task": task, "arm": arm, "density": about.get("density"), "epsilon": epsilon,
                   "near_zero": (cell.get("selection") or {}).get("near_zero")}  # fmt: skip
            for method in ("magnitude-low", "gradient"):
                row[f"overlap_{method}"] = _overlap_with(results, overlap_rows, task, arm, method)
            found = measures(cell)
            keys = ("id", "ood", "ood_change", "nll_change", "update_norm")
            rows.append(row | {key: found[key] for key in keys})
    return sorted(rows, key=lambda row: (row["task"], row["density"] or 0.0, row["epsilon"]))


def _overlap_with(results: Results, rows: Sequence[Row], task: str, arm: str, method: str) -> float | None:
    for row in rows:
        if row["across"] == "arms" and row["task"] == task and arm in (row["arm"], row["other_arm"]):
            other = row["other_arm"] if row["arm"] == arm else row["arm"]
            if results.arm(other).get("method") == method:
                return float(row["jaccard"])
    return None
