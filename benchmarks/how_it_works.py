"""The figures of docs/how-it-works.md: where rules choose and which weights, and what rounding loses.

Selections on SmolLM2-135M from a few movie reviews, then a random model of bfloat16 weights trained twice, with float32
deltas and with nothing wider than its weights. Drawn by what draws finepoint's reports.

    python benchmarks/how_it_works.py [--draw yes: only draw what was measured before]
"""

import json
from pathlib import Path
from typing import Any

from common import RESULTS, facts, options, print_table, text_file

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
RULES = ("gallop", "gradient", "magnitude-low", "random")
DENSITY = 1e-3
STEPS, RATE = 100, 1e-5


def selections(examples: int) -> dict[str, Any]:
    """What every rule's selection says of itself, at one density, from the same examples."""
    import finepoint
    from finepoint.data.batches import Collator, encode_all
    from finepoint.data.examples import read_examples
    from finepoint.models.loading import load_model, load_tokenizer

    model, tokenizer = load_model("smollm2", "float32"), load_tokenizer("smollm2")
    rows = encode_all(tokenizer, read_examples(text_file("movies-train"))[:examples], 8192)
    collator = Collator.of(model, tokenizer)
    batches = [collator(rows[at : at + 8]) for at in range(0, len(rows), 8)]
    return {rule: finepoint.select(model, batches, rule=rule, density=DENSITY).statistics for rule in RULES}


def rounding() -> dict[str, list[float]]:
    """The share of chosen entries whose stored bfloat16 value has moved, after each step: with deltas and without."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import finepoint

    shares: dict[str, list[float]] = {}
    for way in ("float32 deltas", "bfloat16 alone"):
        torch.manual_seed(0)
        shape = LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                            num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
        model = LlamaForCausalLM(shape).to(torch.bfloat16)
        ids = torch.randint(512, (8, 32))
        tuner = finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=0.01))
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=RATE, weight_decay=0)
        shares[way] = [0.0]
        for _ in range(STEPS):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if way == "bfloat16 alone":
                tuner.round_(torch.bfloat16)
            shares[way].append(tuner.changed() / tuner.count)
        tuner.close()
    return shares


def draw(found: dict[str, Any]) -> None:
    from finepoint.reporting.figures import heat_map, panel, standalone
    from finepoint.reporting.overlap import spread

    panels = {"rounding": panel("stored values that have moved", moved(found["rounding"])),
              "chosen-weights": panel("|w| of the chosen entries", sizes(found["selections"]), (5.6, 2.2))}  # fmt: skip
    for rule, statistics in found["selections"].items():
        rows = spread(sized(statistics))
        panels[f"places-{rule}"] = heat_map(rule, rows, max(row["share"] for row in rows))
    FIGURES.mkdir(exist_ok=True)
    for name, drawn in panels.items():
        (FIGURES / f"{name}.svg").write_text(standalone(drawn.svg), encoding="utf-8")


def sized(statistics: dict[str, Any]) -> dict[str, dict[str, int]]:
    from math import prod

    return {name: {"chosen": weight["chosen"], "size": prod(weight["shape"])}
            for name, weight in statistics["weights"].items()}  # fmt: skip


def moved(shares: dict[str, list[float]]) -> Any:
    from finepoint.reporting.figures import ARM_COLOURS

    def on(axes: Any) -> None:
        for (way, values), colour in zip(shares.items(), ARM_COLOURS, strict=False):
            axes.plot([100 * value for value in values], color=colour)
            axes.annotate(way, (len(values) - 1, 100 * values[-1]), xytext=(-4, -4), textcoords="offset points",
                          ha="right", va="top", color=colour)  # fmt: skip
        axes.set_xlabel(f"steps of AdamW at {RATE:g}")
        axes.set_ylabel("% of the chosen entries")

    return on


def sizes(selections: dict[str, Any]) -> Any:
    """A line from the 1st to the 99th percentile of |w|, thick between the quartiles."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    from finepoint.reporting.figures import ARM_COLOURS, INK

    every = next(iter(selections.values()))["abs_weight"]["all"]
    lines = {"all entries": every} | {rule: s["abs_weight"]["chosen"] for rule, s in selections.items()}

    def on(axes: Any) -> None:
        for y, (name, at) in enumerate(lines.items()):
            colour = INK if name == "all entries" else ARM_COLOURS[y - 1]
            least = 1e-6  # a logarithmic axis has no place for the exact zeros of a dequantised checkpoint
            ends = [max(at[q], least) for q in ("0.01", "0.25", "0.5", "0.75", "0.99")]
            axes.plot([ends[0], ends[4]], [y, y], color=colour, linewidth=1)
            axes.plot([ends[1], ends[3]], [y, y], color=colour, linewidth=5, solid_capstyle="butt")
            axes.plot([ends[2]], [y], "o", color=colour, markersize=6)
        axes.set_yticks(range(len(lines)), list(lines))
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("|w|: median, quartiles, 1st and 99th percentile")

    return on


def main() -> None:
    given = options(__doc__, examples=32, draw="no")
    path = Path(given.output) if given.output else RESULTS / "how_it_works.json"
    if given.draw == "yes":
        draw(json.loads(path.read_text()))
        return
    found = {"facts": facts(examples=given.examples, density=DENSITY), "selections": selections(given.examples),
             "rounding": rounding()}  # fmt: skip
    path.write_text(json.dumps(found) + "\n")
    rows = [{"rule": rule, "chosen": s["chosen"], "median |w|": s["abs_weight"]["chosen"]["0.5"],
             "|w| < 1e-4": s["near_zero_share"]} for rule, s in found["selections"].items()]  # fmt: skip
    print_table(["rule", "chosen", "median |w|", "|w| < 1e-4"], rows)
    print({way: round(values[-1], 4) for way, values in found["rounding"].items()})
    draw(found)


if __name__ == "__main__":
    main()
