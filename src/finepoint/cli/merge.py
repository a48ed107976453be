"""finepoint merge DIR DIR .. --how H --output DIR"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finepoint.cli.output import print_json, print_table
from finepoint.config import DType, MergeConfig
from finepoint.errors import FinepointError

if TYPE_CHECKING:
    from finepoint.adapters.adapter import SparseAdapter

CONFIG = MergeConfig


def run(config: MergeConfig) -> None:
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.merging import merge
    from finepoint.adapters.widening import rebased
    from finepoint.leaks import Seen

    _check(config)
    adapters = {folder: SparseAdapter.load(folder) for folder in config.adapter}
    model = _base(config, adapters)
    if config.any_base and model is not None:
        adapters = {folder: rebased(adapter, model) for folder, adapter in adapters.items()}
    if config.dry_run:
        _report(config, adapters, model)
        return
    parts = [adapters[folder] for folder in config.adapter]
    search = _search(config, model, parts) if config.tune else None
    weights = search["weights"] if search else config.weights or [1.0] * len(parts)
    if not any(weights):
        raise FinepointError(
            f"nothing does better than the base model on {config.tune}; nothing is saved" if search
            else "all weights are 0, which is the base model itself; there is nothing to save"
        )  # fmt: skip
    merged = merge(parts, weights, config.how, model=model, **config.options)
    assert config.output is not None
    folder = merged.save(config.output, config.overwrite, config.compact)
    if seen := Seen.together(map(Seen.beside, config.adapter)):
        seen.save(folder)
    if config.json:
        tuning = {"tuning": search} if search else {}
        print_json({"output": config.output, "entries": merged.count, "changed_weights": len(merged),
                    **merged.info["merge"], "weights": weights, "adapters": config.adapter, **tuning})  # fmt: skip
        return
    if search:
        rows = [[*row["weights"], row.get("score", "-"), row.get("problem", "")] for row in search["tried"]]
        print_table([*config.adapter, search["measure"], ""], rows, title=f"weights tried on {config.tune}")
    chosen = ", ".join(f"{weight:g}" for weight in weights)
    print(f"merged {len(parts)} adapters by {config.how} with weights {chosen}: "
          f"{merged.count:,} entries in {len(merged)} weights -> {config.output}")  # fmt: skip


def _check(config: MergeConfig) -> None:
    """What can be known before anything is read."""
    if not config.adapter:
        raise FinepointError("there is nothing to merge; give adapter folders: finepoint merge DIR DIR .. --output DIR")
    if config.output is None and not config.dry_run:
        raise FinepointError("--output is required: the folder to write; or give --dry-run for the report alone")
    if config.tune and config.model is None:
        raise FinepointError("--tune measures the merged model; give the base model as --model M")
    if config.dry_run and len(set(config.adapter)) < 2:
        raise FinepointError("--dry-run compares adapters with each other; give at least two different folders")


def _base(config: MergeConfig, adapters: "dict[str, SparseAdapter]") -> Any:
    """The base model in the adapters' dtype, where it is given."""
    if config.model is None:
        return None
    from finepoint.models import load_model

    dtypes = {change.dtype for adapter in adapters.values() for change in adapter.changes.values()}
    return load_model(config.model, cast(DType, dtypes.pop() if len(dtypes) == 1 else "auto"))


def _search(config: MergeConfig, model: Any, parts: "list[SparseAdapter]") -> dict[str, Any]:
    from finepoint.data import read_examples, some
    from finepoint.files import check_output
    from finepoint.leaks import Seen, leaks, warn_of_leaks
    from finepoint.measuring.coefficients import tuned_weights
    from finepoint.models import load_tokenizer

    assert config.output is not None
    assert config.tune is not None
    assert config.model is not None
    examples = some(read_examples(config.tune), config.limit)
    check_output(config.output, config.overwrite)
    if seen := Seen.together(map(Seen.beside, config.adapter)):
        warn_of_leaks(leaks(seen, {Path(config.tune).name: examples}))
    return tuned_weights(model, load_tokenizer(config.model), parts, examples, config.how, config.options,
                         measure=config.tune_by, start=config.weights or None)  # fmt: skip


def _report(config: MergeConfig, adapters: "dict[str, SparseAdapter]", model: Any) -> None:
    from finepoint.adapters.interference import interference

    rows = interference(adapters, model)
    if config.json:
        print_json({"adapters": config.adapter, "interference": rows})
        return
    print(
        "a, b: two adapters; by chance: the Jaccard index of random choices; energy: share of ||delta||² on the overlap"
    )
    columns = {
        "entries_a": "in a", "entries_b": "in b", "shared": "shared", "jaccard": "Jaccard",
        "jaccard_by_chance": "by chance", "sign_conflicts": "opposite", "cosine": "cosine", "energy_a": "energy of a",
        "energy_b": "energy of b",
    }  # fmt: skip
    for a, b in dict.fromkeys((row["a"], row["b"]) for row in rows):
        pair = [row for row in rows if (row["a"], row["b"]) == (a, b)]
        shown = [[row["scope"], *("-" if row[key] is None else row[key] for key in columns)] for row in pair]
        print_table(["scope", *columns.values()], shown, title=f"a: {a}, b: {b}")
        if model is None and pair[0]["shared"] and pair[0]["cosine"] is None:
            print("What stands as - needs the changes, which adapters of exact values have against their base alone: "
                  "give it as --model M.")  # fmt: skip
        if pair[0]["jaccard"] == 1:
            print("They hold the same entries, as choices by one rule from one seed do. To keep them apart, "
                  "train one with another --seed, or with --exclude of the other.")  # fmt: skip
