"""The figures of a report: SVG drawn by matplotlib, whose colours the page sets: one drawing suits light and dark.

An arm keeps its colour and marker in every figure; arms that differ only in density share them, and size tells them
apart.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from finepoint.reporting import views
from finepoint.reporting.views import ALL_TASKS, Row, family
from finepoint.studies.results import Results

INK, FAINT = "#010203", "#010204"
# What a drawing says, the page's name for it, and the colour on white paper.
COLOURS = {
    INK: ("--ink", "#1c2126"), FAINT: ("--faint", "#b9c0c6"),
    "#010210": ("--c0", "#0b6e99"), "#010211": ("--c1", "#c4501b"), "#010212": ("--c2", "#2a8a5b"),
    "#010213": ("--c3", "#8a4f9e"), "#010214": ("--c4", "#a67c00"), "#010215": ("--c5", "#c0397b"),
    "#010216": ("--c6", "#5b6770"),
}  # fmt: skip
ARM_COLOURS = [colour for colour, (name, _) in COLOURS.items() if name.startswith("--c")]
MARKERS = "osD^vPX*"  # one more than colours: the pairs repeat only after 56 families
PANEL = (4.4, 3.2)  # inches: half a page on a desk, a whole one on a phone
SMALL_PRINT = 0.055  # a line of it, as a share of the height of a panel's axes
MOST_PANELS = 16
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "finepoint", "text.parse_math": False, "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.edgecolor": FAINT,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.titlesize": 9.5, "axes.titlelocation": "left", "lines.linewidth": 1.3,
    "axes.labelpad": 5, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How an arm is drawn everywhere."""

    colour: str
    marker: str
    size: float


@dataclass(frozen=True)
class Panel:
    """One drawing of a figure: its title and the SVG as matplotlib wrote it."""

    title: str
    svg: str


Draw = Callable[[Any], None]
TIP = "shown over it: "  # begins the id of what a browser is to show a text over


def styles(results: Results) -> dict[str, Style]:
    """Colour and marker by family in the study's order; larger for a higher density."""
    families = list(dict.fromkeys(family(results, arm) for arm in results.arms))
    densities = sorted({density for arm in results.arms if (density := results.arm(arm).get("density")) is not None})
    found = {}
    for arm in results.arms:
        i, density = families.index(family(results, arm)), results.arm(arm).get("density")
        step = (densities.index(density) + 1) / len(densities) if density is not None else 0.6
        found[arm] = Style(ARM_COLOURS[i % len(ARM_COLOURS)], MARKERS[i % len(MARKERS)], 4 + 4.5 * step)
    return found


def panel(title: str, draw: Draw, size: tuple[float, float] = PANEL) -> Panel:
    """Draws one panel."""
    out = io.StringIO()
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that matplotlib's font lacks: the browser has it
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        draw(axes)
        axes.set_title(short(title, 48))
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Panel(title, re.sub(rf'<g id="{TIP}([^"]*)">', r"<g><title>\1</title>", out.getvalue()))


def themed(svg: str, prefix: str) -> str:
    """The drawing for the page: its colours as the page's variables, its ids its own, no size of its own."""
    svg = _bare(svg)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg class="drawing" \1 role="img">', svg, count=1)
    for colour, (name, _) in COLOURS.items():
        svg = svg.replace(colour, f"var({name})")
    return svg


def standalone(svg: str) -> str:
    """The drawing as a file of its own, in the colours for white paper."""
    for colour, (_, light) in COLOURS.items():
        svg = svg.replace(colour, light)
    return svg


def _bare(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)  # the page's typeface


def marker_svg(style: Style) -> str:
    """An arm's marker alone, for legends and tables in the page."""
    with rc_context(STYLE):
        canvas = Canvas(figsize=(0.2, 0.2))
        FigureCanvasSVG(canvas)
        axes = canvas.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.plot([0], [0], style.marker, color=style.colour, markersize=style.size)
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return out.getvalue()


def short(name: str, most: int = 26) -> str:
    """A name that fits a figure."""
    name = " ".join(str(name).split())
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _trained_on(task: str) -> str:
    return task if task == ALL_TASKS else f"trained on {task}"


def _of(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _values(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _point(axes: Any, style: Style, name: str, x: float, y: float, x_sd: Any = None, y_sd: Any = None) -> None:
    axes.errorbar([x], [y], xerr=[x_sd or 0], yerr=[y_sd or 0], color=style.colour, linewidth=0.8, alpha=0.6)
    _marker(axes, style, style.size, name, x, y)


def _marker(axes: Any, style: Style, size: float, name: str, x: float, y: float) -> None:
    """A marker, over which a browser shows its name and numbers."""
    (line,) = axes.plot([x], [y], style.marker, color=style.colour, markersize=size, markeredgewidth=0)
    line.set_gid(f"{TIP}{name}: {x:.4g}, {y:.4g}")


def _grid(axes: Any, axis: str = "both") -> None:
    axes.grid(True, axis=axis, color=FAINT, linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)


def _logarithmic(axis: Any) -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    # As many as have room for their numbers, and two at least.
    between = (1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if high < 4 * low else (2.0, 5.0) if high < 30 * low else (3.0,)
    axis.set_major_locator(LogLocator(subs=(1.0, *between), numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def id_ood(results: Results) -> list[Panel]:
    """ID against mean OOD accuracy, with the front of arms that no other beats."""
    rows, style = (
        [row for row in views.summary(results) if row["id"] is not None and row["ood"] is not None],
        styles(results),
    )
    fronts = {(row["task"], row["arm"]) for row in views.pareto(results) if row["front"]}

    def draw(task: str, axes: Any) -> None:
        _grid(axes)
        for row in _of(rows, task=task):
            _point(axes, style[row["arm"]], row["arm"], row["id"], row["ood"], row["id_sd"], row["ood_sd"])
        front = sorted((row["id"], row["ood"]) for row in _of(rows, task=task) if (task, row["arm"]) in fronts)
        axes.plot(*zip(*front, strict=True), "--", color=INK, linewidth=0.8, drawstyle="steps-pre", zorder=1)
        _start(axes, views.base_point(results, task))
        axes.locator_params(nbins=7)
        axes.set(xlabel="accuracy in distribution", ylabel="mean accuracy out of distribution")

    return [panel(_trained_on(task), partial(draw, task)) for task in _values(rows, "task")]


def _start(axes: Any, base: tuple[float, float] | None) -> None:
    """Marks the base model; in words where it is so far from the arms that they would shrink to a dot."""
    if base is None:
        return
    limits = axes.get_xlim(), axes.get_ylim()
    near = all(low - (high - low) < at < high + (high - low) for at, (low, high) in zip(base, limits, strict=True))
    if near:
        axes.plot(*([at] for at in base), "+", color=INK, markersize=9)
        axes.annotate("base", base, xytext=(5, 5), textcoords="offset points", fontsize=8)
    else:
        axes.text(0.02, 0.02, f"base, off the plot: {base[0]:.3f}, {base[1]:.3f}", transform=axes.transAxes, fontsize=8)


def density(results: Results) -> list[Panel]:
    """ID and OOD accuracy over density; baselines, which have none, as dotted lines."""
    rows, style = views.by_density(results), styles(results)
    if len(_values(rows, "density")) < 2:
        return []
    flat = [row for row in views.summary(results) if row["density"] is None]

    def draw(task: str, key: str, label: str, axes: Any) -> None:
        _grid(axes)
        for name in _values(_of(rows, task=task), "family"):
            line = [row for row in _of(rows, task=task, family=name) if row[key] is not None]
            look = style[line[0]["arm"]] if line else None
            if look is None:
                continue
            axes.plot([row["density"] for row in line], [row[key] for row in line], color=look.colour, linewidth=1)
            for row in line:
                _point(axes, style[row["arm"]], row["arm"], row["density"], row[key], None, row[f"{key}_sd"])
        _levels(axes, [(row[key], row["arm"], style[row["arm"]].colour) for row in _of(flat, task=task)
                       if row[key] is not None])  # fmt: skip
        _logarithmic(axes.xaxis)
        axes.set(xlabel="density (share of target entries)", ylabel=label)

    kinds = (("id", "accuracy in distribution"), ("ood", "mean accuracy out of distribution"))
    tasks = [task for task in (ALL_TASKS, *results.tasks) if _of(rows, task=task)]
    return [
        panel(_trained_on(task), partial(draw, task, key, label))
        for task in tasks for key, label in kinds
        if any(row[key] is not None for row in _of(rows, task=task))
    ]  # fmt: skip


def _levels(axes: Any, levels: Sequence[tuple[float, str, str]]) -> None:
    """Dotted lines at some values, each named beyond its end in its colour; names do not lie on one another."""
    levels = sorted(levels)
    for value, _, colour in levels:
        axes.axhline(value, color=colour, linestyle=":", linewidth=1.2)
    low, high = axes.get_ylim()
    line = (high - low) * SMALL_PRINT
    places = [value for value, _, _ in levels]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + line)
    for i, (_, name, colour) in enumerate(levels):
        place = min(places[i], high - (len(levels) - 1 - i) * line)
        axes.annotate(short(name, 16), (1, place), xycoords=("axes fraction", "data"), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=7.5, color=colour)  # fmt: skip


def ood_change(results: Results) -> list[Panel]:
    """Signed change on each OOD test by arm, with intervals over the seeds; one panel a task where tests are many."""
    rows, style = views.ood_changes(results), styles(results)
    pairs = list(dict.fromkeys((row["task"], row["test"]) for row in rows))
    apart = len(pairs) <= MOST_PANELS

    def draw(found: list[Row], axes: Any) -> None:
        names = _values(found, "arm")
        axes.axvline(0, color=INK, linewidth=0.8)
        for row in found:
            y, look = names.index(row["arm"]), style[row["arm"]]
            if row["low"] is not None and apart:
                axes.plot([row["low"], row["high"]], [y, y], color=look.colour, linewidth=1.2)
            axes.plot([row["mean"]], [y], look.marker, color=look.colour, markersize=6, markeredgewidth=0)
        axes.set_yticks(range(len(names)), [short(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _grid(axes, "x")
        axes.set_xlabel("change of accuracy against the base")

    groups = (
        [(f"{task} → {test}", _of(rows, task=task, test=test)) for task, test in pairs] if apart
        else [(f"{task} → {len(_values(_of(rows, task=task), 'test'))} tests", _of(rows, task=task))
              for task in _values(rows, "task")]
    )  # fmt: skip
    return [panel(title, partial(draw, found), tall(_values(found, "arm"))) for title, found in groups]


def tall(names: Sequence[Any], line: float = 0.22) -> tuple[float, float]:
    """The size of a panel with one line for each name."""
    return PANEL[0], max(1.6, 0.9 + line * len(names))


def forgetting(results: Results) -> list[Panel]:
    """What is forgotten against what is learned: every learning rate of an arm as a path from the base model."""
    rows = [row for row in views.paths(results) if row["nll_change"] is not None and row["id_change"] is not None]

    def draw(task: str, axes: Any) -> None:
        _paths(axes, results, _of(rows, task=task), "id_change", "nll_change", [(0.0, 0.0)])
        axes.plot([0], [0], "+", color=INK, markersize=9)
        axes.set(xlabel="change of accuracy in distribution", ylabel="change of probe NLL (nats a token)")

    return [panel(f"trained on {task}", partial(draw, task)) for task in _values(rows, "task")]


def loss_kl(results: Results) -> list[Panel]:
    """KL to the base against validation loss: every learning rate of an arm."""
    rows = [row for row in views.paths(results) if row["kl"] and row["validation_loss"] is not None]

    def draw(task: str, axes: Any) -> None:
        _paths(axes, results, _of(rows, task=task), "validation_loss", "kl")
        _logarithmic(axes.yaxis)
        axes.set(xlabel="validation loss (nats a token)", ylabel="KL to the base on the probes (nats)")

    return [panel(f"trained on {task}", partial(draw, task)) for task in _values(rows, "task")]


def _paths(
    axes: Any, results: Results, rows: Sequence[Row], x: str, y: str, start: Sequence[tuple[float, float]] = ()
) -> None:
    """Each arm's runs along its learning rates, the tuned one large."""
    _grid(axes)
    style = styles(results)
    for arm in _values(rows, "arm"):
        path, look = _of(rows, arm=arm), style[arm]
        points = [*start, *((row[x], row[y]) for row in path)]
        axes.plot(*zip(*points, strict=True), "-", color=look.colour, linewidth=0.9, alpha=0.75)
        for row in path:
            size = look.size if row["tuned"] else 2.5
            _marker(axes, look, size, f"{arm}, rate {row['lr']:g}", row[x], row[y])


def places(rows: Sequence[Row], results: Results) -> list[Panel]:
    """A heat map of layers and modules for each arm: the chosen share of each weight, relative to the largest."""
    panels = []
    tasks = _values(rows, "task")
    if len({(row["task"], row["arm"]) for row in rows}) > MOST_PANELS:
        tasks = tasks[:1]  # the CSV has all
    for task in tasks:
        for arm in _values(_of(rows, task=task), "arm"):
            found = _of(rows, task=task, arm=arm)
            alike = [row["share"] for row in rows if results.arm(row["arm"])["density"] == results.arm(arm)["density"]]
            panels.append(heat_map(f"{arm}, {task}" if len(tasks) > 1 else arm, found, max(alike)))
    return panels


def heat_map(title: str, rows: Sequence[Row], top: float) -> Panel:
    """Layers (down) and modules (across), each shaded by its share of chosen entries; `top` is the darkest.

    Args:
        rows: of one selection, as `reporting.overlap.spread` gives them.
    """
    size = PANEL[0] * 0.75, 1.2 + 0.13 * max(6, len(_values(rows, "layer")))
    return panel(title, partial(_heat, rows, top), size)


def _heat(rows: Sequence[Row], top: float, axes: Any) -> None:
    layers, modules = _values(rows, "layer"), _values(rows, "module")
    for row in rows:
        # By the square root: shares differ by orders of magnitude, and the small ones should be told apart too.
        shade = (row["share"] / top) ** 0.5 if top else 0.0
        _square(axes, modules.index(row["module"]), layers.index(row["layer"]), shade)
    _lattice(axes, modules, layers, 12, every=max(1, len(layers) // 10))
    axes.set(xlabel=f"largest share: {max(row['share'] for row in rows):.3g}", ylabel="layer")


def _square(axes: Any, x: int, y: int, shade: float, words: str = "", colour: str = ARM_COLOURS[0]) -> None:
    """A square of a lattice, at most as dark as its colour."""
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, alpha=shade, linewidth=0, antialiased=False))
    if words:
        axes.text(x, y, words, ha="center", va="center", fontsize=7.5)


def _lattice(axes: Any, columns: Sequence[Any], lines: Sequence[Any], most: int, every: int = 1) -> None:
    """Names for columns and lines of squares."""
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(lines) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), [short(name, most) for name in columns], rotation=35, ha="right")
    axes.set_yticks(range(0, len(lines), every), [short(name, most) for name in lines[::every]])
    axes.tick_params(length=0)


def overlap(rows: Sequence[Row]) -> list[Panel]:
    """Matrices of arms at one density: measured overlap below the diagonal, by chance (weight by weight) above."""
    panels = []
    found = [row for row in rows if row["across"] == "arms"]
    for task, value in dict.fromkeys((row["task"], row["density"]) for row in found):
        part = _of(found, task=task, density=value)
        names = list(dict.fromkeys([row["arm"] for row in part] + [row["other_arm"] for row in part]))
        panels.append(_matrix(f"{task}, density {value:g}" if value is not None else task, part, names))
    return panels


def pair_matrix(title: str, rows: Sequence[Row], names: Sequence[str]) -> Panel:
    """Every two adapters' Jaccard overlap below the diagonal, that by chance above."""
    same = {"arm": "a", "other_arm": "b", "jaccard": "jaccard", "expected_by_weight": "jaccard_by_chance"}
    return _matrix(title, [{ours: row[theirs] for ours, theirs in same.items()} for row in rows], list(names))


def _matrix(title: str, rows: Sequence[Row], names: list[str]) -> Panel:
    def on(axes: Any) -> None:
        for row in rows:
            one, other = sorted((names.index(row["arm"]), names.index(row["other_arm"])))
            for x, y, value, colour in ((one, other, row["jaccard"], ARM_COLOURS[0]),
                                        (other, one, row["expected_by_weight"], ARM_COLOURS[6])):  # fmt: skip
                if value is not None:
                    _square(axes, x, y, 0.75 * value**0.5, f"{100 * value:.3g}", colour)
        _lattice(axes, names, names, 18)
        axes.set_aspect("equal")

    side = 1.6 + 0.42 * len(names)
    return panel(title, on, (max(PANEL[0], side + 0.6), side))


def grid(title: str, lines: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], float]) -> Panel:
    """Shares in [0, 1] as a grid of numbers, the stronger the higher."""

    def on(axes: Any) -> None:
        for (y, line), (x, column) in product(enumerate(lines), enumerate(columns)):
            _square(axes, x, y, 0.7 * values[line, column], f"{values[line, column]:.3f}")
        _lattice(axes, columns, lines, 18)

    return panel(title, on, (1.4 + 0.75 * len(columns), 1.3 + 0.42 * len(lines)))


def by_layer(rows: Sequence[Row]) -> list[Panel]:
    """For every two adapters, their Jaccard overlap over the layers, with that by chance."""

    def draw(found: list[Row], axes: Any) -> None:
        _grid(axes)
        at = range(len(found))
        axes.plot(at, [100 * row["jaccard"] for row in found], "-o", color=ARM_COLOURS[0], markersize=3)
        axes.plot(at, [100 * row["jaccard_by_chance"] for row in found], ":", color=ARM_COLOURS[6])
        every = max(1, len(found) // 8)
        axes.set_xticks(at[::every], [row["scope"].removeprefix("layer ") for row in found[::every]])
        axes.set_ylim(bottom=0)
        axes.set(xlabel="layer", ylabel="common entries (%)")

    pairs = list(dict.fromkeys((row["a"], row["b"]) for row in rows))[:MOST_PANELS]
    return [panel(f"{a}, {b}", partial(draw, _of(rows, a=a, b=b)), (3.6, 2.5)) for a, b in pairs]


def cost(results: Results) -> list[Panel]:
    """ID accuracy against time (selection and training) and against peak memory."""
    rows, style = [row for row in views.summary(results) if row["id"] is not None], styles(results)
    kinds = {
        "selection and training (s)": lambda row: None if row["train_seconds"] is None
        else row["train_seconds"] + (row["selection_seconds"] or 0.0),
        "peak memory (GB)": lambda row: None if row["peak_bytes"] is None else row["peak_bytes"] / 1e9,
    }  # fmt: skip

    def draw(found: list[tuple[Row, float]], label: str, axes: Any) -> None:
        _grid(axes)
        for row, x in found:
            _point(axes, style[row["arm"]], row["arm"], x, row["id"], None, row["id_sd"])
        axes.set_xlim(0, 1.1 * max(x for _, x in found))
        axes.set(xlabel=label, ylabel="accuracy in distribution")

    panels = []
    for task in _values(rows, "task"):
        for label, of in kinds.items():
            found = [(row, value) for row in _of(rows, task=task) if (value := of(row))]
            if found and task != ALL_TASKS:
                panels.append(panel(f"trained on {task}", partial(draw, found, label)))
    return panels


def losses(results: Results) -> list[Panel]:
    """Training loss, as a moving average over a tenth of the run, and validation loss of the tuned runs."""
    rows, style = views.curves(results), styles(results)

    def draw(task: str, key: str, label: str, axes: Any) -> None:
        _grid(axes)
        for arm in _values(_of(rows, task=task), "arm"):
            points = [(row["step"], row[key]) for row in _of(rows, task=task, arm=arm) if row[key] is not None]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            look = style[arm]
            if key == "loss":
                axes.plot(steps, smooth(values), color=look.colour, linewidth=1)
            else:
                axes.plot(steps, values, f"-{look.marker}", color=look.colour, markersize=4, linewidth=0.9)
        axes.set(xlabel="step", ylabel=label)

    kinds = (("loss", "training loss"), ("validation_loss", "validation loss"))
    return [
        panel(f"trained on {task}", partial(draw, task, key, label))
        for task in _values(rows, "task") for key, label in kinds
        if any(row[key] is not None for row in _of(rows, task=task))
    ]  # fmt: skip


def curve(title: str, points: Sequence[tuple[float, float]], smoothed: bool) -> Panel:
    """One quantity along the steps of a run; with its mean over a tenth of the run where single steps are noisy."""

    def draw(axes: Any) -> None:
        _grid(axes)
        steps, values = zip(*points, strict=True)
        thin = {"linewidth": 0.6, "alpha": 0.5} if smoothed else {"linewidth": 1.3}
        axes.plot(steps, values, "-" if len(points) > 1 else "o", color=ARM_COLOURS[0], **thin)
        if smoothed:
            axes.plot(steps, smooth(values), color=ARM_COLOURS[0])
        axes.set(xlabel="step", ylabel=title)

    return panel(title, draw)


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, over a tenth of the run."""
    window = max(1, len(values) // 10)
    parts = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
