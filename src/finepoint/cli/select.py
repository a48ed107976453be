"""finepoint select --model M --data F --rule R --density D --output DIR"""

from finepoint.cli.output import print_json, print_table
from finepoint.runtime import distributed
from finepoint.selection.settings import SelectConfig

CONFIG = SelectConfig


def run(config: SelectConfig) -> None:
    from finepoint.training.run import choose

    selection = choose(config)
    if not distributed.is_first():
        return
    statistics = selection.statistics
    if config.json:
        print_json({"output": config.output, "rule": selection.rule, **statistics})
        return
    print(
        f"{selection.rule}: {statistics['chosen']:,} of {statistics['entries']:,} entries "
        f"(density {statistics['density']:.3g}) in {len(selection)} weights -> {config.output}"
    )
    rows = [
        [kind, which, *(f"{value:.3g}" for value in statistics[kind][which].values())]
        for kind in ("abs_weight", "abs_gradient")
        if kind in statistics
        for which in ("chosen", "all")
    ]
    print_table(["quantiles", "of", *statistics["abs_weight"]["all"]], rows)
    print(f"share of chosen with |weight| < 1e-4: {statistics['near_zero_share']:.3f} "
          f"(of all: {statistics['near_zero_share_of_all']:.3f})")  # fmt: skip
