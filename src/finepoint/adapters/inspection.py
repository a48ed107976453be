"""What an adapter holds: facts, a table by weight, and a map of where its entries lie."""

import re
from collections import defaultdict
from collections.abc import Mapping
from html import escape
from math import prod
from typing import Any

from finepoint.adapters.change import Contents

SHADES = " .:-=+*#%@"


def by_module(adapter: Contents) -> list[dict[str, Any]]:
    """One row for each kind of module over all layers: weights, entries, share, mean and largest |delta|."""
    rows: dict[str, dict[str, Any]] = {}
    for name, weight in facts(adapter)["weights"].items():
        layer, module = place(name)
        key = module if module != "-" else layer
        row = rows.setdefault(
            key, {"module": key, "weights": 0, "entries": 0, "size": 0, "total": 0.0, "largest": None}
        )
        row["weights"] += 1
        row["entries"] += weight["entries"]
        row["size"] += prod(weight["shape"])
        if weight["mean_abs_delta"] is not None:
            row["total"] += weight["mean_abs_delta"] * weight["entries"]
            row["largest"] = max(row["largest"] or 0.0, weight["max_abs_delta"])
    for row in rows.values():
        row["share"] = row["entries"] / row.pop("size")
        row["mean_abs_delta"] = row.pop("total") / row["entries"] if row["largest"] is not None else None
    return list(rows.values())


def in_a_line(info: Mapping[str, Any]) -> dict[str, str | int | float]:
    """What an adapter says of itself that a line can show; also by how much it was weakened, and to which budget."""
    shown = {key: value for key, value in info.items() if isinstance(value, str | int | float)}
    told = info.get("scaled")
    keys = ("scale", "disturb_at_most", "kl")
    scale, budget, kl = (told.get(key) if isinstance(told, dict) else None for key in keys)
    if all(isinstance(value, int | float) for value in (scale, budget, kl)):  # strangers write what they like
        shown["scaled"] = f"by {scale:.4g}, the change that was trained, for a KL of at most {budget:g}: {kl:.3g}"
    return shown


def facts(adapter: Contents) -> dict[str, Any]:
    """Everything known of an adapter, JSON-ready; `weights` has a row for each weight."""
    weights = {}
    for name, change in adapter.changes.items():
        moved = change.numbers.double().abs() if change.kind == "delta" and len(change) else None
        weights[name] = {
            "shape": list(change.shape),
            "dtype": change.dtype,
            "kind": change.kind,
            "entries": len(change),
            "share": len(change) / prod(change.shape),
            "mean_abs_delta": None if moved is None else moved.mean().item(),
            "max_abs_delta": None if moved is None else moved.max().item(),
        }
    idle = {"changes": "nothing: no value differs from the base"} if adapter.changes_nothing() else {}
    return {"entries": adapter.count, "changed_weights": len(adapter), **idle, **adapter.info, "weights": weights}


def html(adapter: Contents) -> str:
    """A notebook's table of an adapter: its kinds of modules."""
    cells = [[row["module"], row["weights"], f"{row['entries']:,}", f"{row['share']:.3g}",
              "" if row["mean_abs_delta"] is None else f"{row['mean_abs_delta']:.3g}"]
             for row in by_module(adapter)]  # fmt: skip
    head = ["module", "weights", "entries", "share", "mean |delta|"]
    rows = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in cells)
    return (f"<p>{escape(repr(adapter))}</p><table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{rows}"
            "</table>")  # fmt: skip


def heat_map(adapter: Contents) -> str:
    """Entries by layer (down) and module (across), each with a shade for its share: blank none, @ the largest."""
    cells: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    modules: dict[str, None] = {}
    for name, weight in facts(adapter)["weights"].items():
        layer, module = place(name)
        cells[layer][module] = (weight["entries"], weight["share"])
        modules[module] = None
    top = max(share for row in cells.values() for _, share in row.values())
    left = max(len(layer) for layer in cells)
    lines = [f"entries by layer and module; shade {SHADES[1]} to {SHADES[-1]}: share of the weight, up to {top:.2e}"]
    lines.append(" " * left + "".join(f"  {module:>12}" for module in modules))
    for layer, row in cells.items():
        shown = [row.get(module, (0, 0.0)) for module in modules]
        lines.append(f"{layer:>{left}}" + "".join(f"  {count:>8,} {_shade(share, top) * 3}" for count, share in shown))
    return "\n".join(lines)


def place(name: str) -> tuple[str, str]:
    """The layer number (or the name, outside the layers) and the module a weight belongs to."""
    found = re.search(r"\.(\d+)\.(.+?)(\.weight)?$", name)
    if not found:
        return name.removesuffix(".weight"), "-"
    return found[1], found[2].split(".", 1)[-1]


def _shade(share: float, top: float) -> str:
    if share == 0:
        return SHADES[0]
    # By the square root: shares differ by orders of magnitude, and the small ones should be told apart too.
    return SHADES[1 + round((len(SHADES) - 2) * (share / top) ** 0.5)]
