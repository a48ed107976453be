"""Commands on adapters: inspect, verify, merge, scale, extract, export, import, push, pull."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from finepoint.cli.output import console, print_json, print_table
from finepoint.errors import FinepointError
from finepoint.runtime.settings import (
    ADAPTERS_DTYPE,
    ANY_BASE,
    AS_TRAINED,
    COMPACT,
    JSON,
    MODEL,
    OVERWRITE,
    DType,
    ImportFormat,
    Quantise,
    setting,
)

if TYPE_CHECKING:
    from finepoint.adapters.adapter import SparseAdapter

# fmt: off


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Say what is in an adapter: facts, a table by layer and module, a map of where its entries lie."""

    folder: str = setting("adapter folder", positional=True)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check that an adapter's file is sound and that it belongs to a model; revert is tried, bit for bit."""

    folder: str = setting("adapter folder", positional=True)
    model: str = setting(MODEL)
    dtype: DType | None = setting(ADAPTERS_DTYPE, None)
    any_base: bool = setting(ANY_BASE, False)
    quantise: Quantise | None = setting(AS_TRAINED, None)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Combine adapters of one base model into one adapter; look at their interference first with --dry-run."""

    adapter: list[str] = setting(
        "adapter folders, also without their flag: `finepoint merge DIR DIR ..`", [], positional=True)
    how: str = setting(
        "sum (task arithmetic), mean, ties, dare, breadcrumbs or consensus; on shared entries first, last or error",
        "sum", registry="adapters/combining.py method")
    weights: list[float] = setting("a factor for each adapter, in their order, may be negative; 1 where not given", [])
    options: dict[str, float] = setting("the method's options, e.g. density=0.5 for ties, drop=0.5 seed=1 for dare", {})
    model: str | None = setting(
        "the base model; needed for half-precision adapters where their deltas matter, and for --tune", None)
    any_base: bool = setting(ANY_BASE, False)
    tune: str | None = setting(
        "search the weights that do best on these examples, a JSON Lines file; needs --model", None)
    tune_by: Literal["accuracy", "nll"] | None = setting(
        "accuracy or nll (likelihood); accuracy where the examples have one", None)
    limit: int | None = setting("at most so many of these examples, always the same", None, least=1)
    dry_run: bool = setting("print how far the adapters interfere, pair by pair, and merge nothing", False)
    output: str | None = setting("folder to write; required unless --dry-run", None)
    compact: bool = setting(COMPACT, False)
    overwrite: bool = setting(OVERWRITE, False)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Weaken an adapter until it disturbs the base's predictions on other text no more than a budget allows."""

    adapter: str = setting("adapter folder, also LoRA's or DoRA's as PEFT writes them", positional=True)
    model: str = setting(MODEL)
    protect: str | list[str] = setting(
        "text whose predictions are to be kept, not what training protected: files, news, novels, or own (the base "
        "writes other texts than training holds)")
    protect_examples: int | None = setting(
        "at most so many of these texts, always the same, up to 256 tokens of each; 64, of own alone 32 where not "
        "given", None, least=1)
    disturb_at_most: float = setting(
        "the budget: KL of the base's predictions to the adapted model's on that text, in nats a token", least=1e-6)
    by: Literal["wise-ft", "depth"] = setting(
        "scale the whole change alike (wise-ft), or early blocks more than late ones (depth, as LiNeS does)", "wise-ft")
    output: str = setting("folder to write")
    compact: bool = setting(COMPACT, False)
    dtype: DType | None = setting(ADAPTERS_DTYPE, None)
    any_base: bool = setting(ANY_BASE, False)
    quantise: Quantise | None = setting(AS_TRAINED, None)
    overwrite: bool = setting(OVERWRITE, False)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Make an adapter of the difference between two checkpoints, read weight by weight."""

    base: str = setting(f"the model before: {MODEL}")
    tuned: str = setting("the model after, of the same shape and dtype")
    output: str = setting("folder to write")
    density: float | None = setting("share of all entries to keep, those that changed most, in (0, 1]", None)
    all: bool = setting(
        "keep every entry that changed: applied to the base, it gives the tuned checkpoint bit for bit", False)
    compact: bool = setting(COMPACT, False)
    overwrite: bool = setting(OVERWRITE, False)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an adapter in another layout: merged into its model, for PEFT, peft-sparta, vLLM, llama.cpp."""

    model: str = setting(f"the base: {MODEL}")
    adapter: str = setting(
        "adapter folder, also without its flag; for merged and gguf also LoRA or DoRA as PEFT writes them",
        positional=True)
    format: str = setting(
        "merged, shira, supertuning, sparta, vllm-patch, gguf-patch (codes of a quantised .gguf base), or gguf (with "
        "llama.cpp's converter on the PATH)", registry="exchange/*.py layout")
    output: str = setting("folder to write")
    dtype: DType = setting("of the written weights (merged, gguf, vllm-patch); auto keeps the base's", "auto")
    any_base: bool = setting(ANY_BASE, False)
    overwrite: bool = setting(OVERWRITE, False)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make an adapter of somebody else's: PEFT's SHiRA and Super-Tuning, peft-sparta's files."""

    folder: str = setting("their folder, also without its flag: `finepoint import DIR ..`", positional=True)
    model: str = setting(f"the base it was trained on: {MODEL}")
    output: str = setting("folder to write")
    format: ImportFormat = setting(
        "shira, supertuning or sparta; auto tells it by the files; --from is the same flag", "auto", also="from")
    dtype: DType = setting("of the weights the adapter will be applied to; auto for the base's", "auto")
    compact: bool = setting(COMPACT, False)
    overwrite: bool = setting(OVERWRITE, False)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Send an adapter to the Hugging Face hub with a model card: base, data, licence, results."""

    adapter: str = setting("adapter folder", positional=True)
    to: str = setting("the repository on the hub, OWNER/NAME; it is made where there is none")
    results: str | None = setting("what `finepoint eval --output FILE` wrote of this adapter, for the card", None)
    base_model: str | None = setting("the base's id on the hub, where it was trained from a folder", None)
    license: str | None = setting("as the hub calls it, e.g. apache-2.0; mind the base's and the data's own", None)
    private: bool = setting("make the repository private", False)
    message: str = setting("of the commit", "Upload adapter")
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class PullConfig:
    """Fetch an adapter from the Hugging Face hub into a folder, checked."""

    repository: str = setting("OWNER/NAME on the hub", positional=True)
    output: str = setting("folder to write")
    revision: str | None = setting("branch, tag or commit; the newest where not given", None)
    overwrite: bool = setting(OVERWRITE, False)
    json: bool = setting(JSON, False)


# fmt: on


def run_inspect(config: InspectConfig) -> None:
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.inspection import by_module, facts, heat_map, in_a_line

    adapter = SparseAdapter.load(config.folder)
    found = facts(adapter)
    if config.json:
        print_json(found)
        return
    simple = in_a_line(found)
    shown = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in simple.items()}
    print_table(["fact", "value"], [[key, value] for key, value in shown.items()], title=config.folder)
    print()
    rows = by_module(adapter)
    print_table(
        ["module", "weights", "entries", "share", "mean |delta|", "max |delta|"],
        [
            [row["module"], row["weights"], row["entries"], scientific(row["share"]),
             scientific(row["mean_abs_delta"]), scientific(row["largest"])]
            for row in rows
        ],
    )  # fmt: skip
    if all(row["largest"] is None for row in rows):
        print("no |delta|: the adapter holds exact values, and how far they are from the base's only the base knows")
    print()
    console().print(heat_map(adapter), highlight=False, markup=False)


def scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


# How far the adapter knows that base.
KNOWN = {"whole": "", "sampled": " (of the rest of it a sample was compared)",
         "entries": " (whether the rest of it is that base the adapter does not know)"}  # fmt: skip


def run_verify(config: VerifyConfig) -> None:
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.bases import rebased, verify

    adapter = SparseAdapter.load(config.folder)
    model = _base_of(config.model, [adapter], config.dtype, labels=adapter.info.get("labels", ()),
                     quantise=config.quantise)  # fmt: skip
    if config.any_base:
        adapter = rebased(adapter, model)
    found = verify(adapter, model) | {key: adapter.info[key] for key in ("unfinished",) if key in adapter.info}
    if config.json:
        print_json({"adapter": config.folder, "model": config.model, **found})
    else:
        print(
            f"{config.folder} fits {config.model}: {found['entries']:,} entries in {found['weights']} weights lie on "
            f"the base it was trained on{KNOWN[found['base']]}; apply changed {found['changed']:,} stored values, "
            "revert restored every bit"
        )
        if not found["changed"]:
            print("the adapter changes nothing: no value differs from the base")


def run_merge(config: MergeConfig) -> None:
    _check_merge(config)
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.bases import rebased
    from finepoint.adapters.combining import merge
    from finepoint.data.leaks import Seen

    adapters = {folder: SparseAdapter.load(folder) for folder in config.adapter}
    model = _base_of(config.model, adapters.values()) if config.model else None
    if config.any_base and model is not None:
        adapters = {folder: rebased(adapter, model) for folder, adapter in adapters.items()}
    if config.dry_run:
        _report_interference(config, adapters, model)
        return
    parts = [adapters[folder] for folder in config.adapter]
    search = _search_weights(config, model, parts) if config.tune else None
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


def _check_merge(config: MergeConfig) -> None:
    """What can be known before anything is read."""
    if not config.adapter:
        raise FinepointError("there is nothing to merge; give adapter folders: finepoint merge DIR DIR .. --output DIR")
    if config.output is None and not config.dry_run:
        raise FinepointError("--output is required: the folder to write; or give --dry-run for the report alone")
    if config.tune and config.model is None:
        raise FinepointError("--tune measures the merged model; give the base model as --model M")
    if config.dry_run and len(set(config.adapter)) < 2:
        raise FinepointError("--dry-run compares adapters with each other; give at least two different folders")


def _base_of(model: str, adapters: "Iterable[SparseAdapter]", dtype: DType | None = None, **options: Any) -> Any:
    """The base model, in the adapters' dtype where they have one and no other is given."""
    from finepoint.models.loading import load_model

    dtypes = {change.dtype for adapter in adapters for change in adapter.changes.values()}
    return load_model(model, dtype or cast(DType, dtypes.pop() if len(dtypes) == 1 else "auto"), **options)


def _search_weights(config: MergeConfig, model: Any, parts: "list[SparseAdapter]") -> dict[str, Any]:
    from finepoint.data.examples import read_examples, some
    from finepoint.data.leaks import Seen, leaks, warn_of_leaks
    from finepoint.evaluation.combining_weights import tuned_weights
    from finepoint.models.loading import load_tokenizer
    from finepoint.runtime.files import check_output

    assert config.output is not None
    assert config.tune is not None
    assert config.model is not None
    examples = some(read_examples(config.tune), config.limit)
    check_output(config.output, config.overwrite)
    if seen := Seen.together(map(Seen.beside, config.adapter)):
        warn_of_leaks(leaks(seen, {Path(config.tune).name: examples}))
    return tuned_weights(model, load_tokenizer(config.model), parts, examples, config.how, config.options,
                         measure=config.tune_by, start=config.weights or None)  # fmt: skip


def _report_interference(config: MergeConfig, adapters: "dict[str, SparseAdapter]", model: Any) -> None:
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


def run_scale(config: ScaleConfig) -> None:
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.bases import rebased
    from finepoint.adapters.peft import is_peft, load_merged
    from finepoint.data.leaks import Seen
    from finepoint.models.loading import load_tokenizer
    from finepoint.runtime.files import check_output
    from finepoint.training.budget import scale_to_budget
    from finepoint.training.texts import examples_to_keep, protected_files, to_measure

    check_output(config.output, config.overwrite)
    protected_files(config.protect)  # refused, or fetched, before a model is loaded
    sparse = None if is_peft(config.adapter) else SparseAdapter.load(config.adapter)
    model = _base_of(config.model, [sparse] if sparse else [], config.dtype, quantise=config.quantise)
    adapter = sparse or load_merged(config.adapter, model)
    if config.any_base:
        adapter = rebased(adapter, model)
    tokenizer = load_tokenizer(config.model)
    texts = examples_to_keep(config.protect, config.protect_examples, to_measure(model, tokenizer))
    found = scale_to_budget(adapter, model, tokenizer, texts, config.disturb_at_most, config.by)
    folder = found.adapter.save(config.output, config.overwrite, config.compact)
    if seen := Seen.beside(config.adapter):
        seen.save(folder)
    if config.json:
        told = {name: getattr(found, name) for name in ("scale", "kl", "kl_before", "texts", "tokens", "seconds")}
        given = {name: getattr(config, name) for name in ("adapter", "output", "by", "disturb_at_most")}
        print_json(given | told | {"tries": [{"scale": scale, "kl": kl} for scale, kl in found.tries]})
        return
    print(
        f"{config.adapter} at scale {found.scale:.4g}: KL to the base on {found.texts} texts {found.kl_before:.4g} -> "
        f"{found.kl:.4g} nats a token (at most {config.disturb_at_most:g}), in {found.seconds:.0f} s -> {config.output}"
    )


SHOWN = 12  # weights in the table for people; --json has all


def run_extract(config: ExtractConfig) -> None:
    if config.all == (config.density is not None):
        raise FinepointError("give either --density, to keep the largest changes, or --all, to keep every change")
    from finepoint.exchange.extract import extract
    from finepoint.runtime.files import check_output

    check_output(config.output, config.overwrite)
    adapter, rows = extract(config.base, config.tuned, config.density)
    adapter.save(config.output, config.overwrite, config.compact)
    info = adapter.info
    if config.json:
        print_json({"output": config.output, "entries": adapter.count, **info, "weights": rows})
        return
    print(
        f"{adapter.count:,} of {info['changed']:,} changed entries in {len(adapter)} weights keep "
        f"{info['kept_energy']:.4%} of the change (sum of squares) -> {config.output}"
    )
    rows.sort(key=lambda row: -row["energy"])
    print_table(
        ["weight", "changed", "kept", "share of the change", "of which kept"],
        [
            [row["weight"], row["changed"], row["kept"], _share(row["energy"], sum(other["energy"] for other in rows)),
             _share(row["kept_energy"], row["energy"])]
            for row in rows[:SHOWN]
        ],
    )  # fmt: skip
    if len(rows) > SHOWN:
        print(f".. and {len(rows) - SHOWN} more weights; --json lists all")


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "-"


# What a layout could not keep, in words; each is a key of what `export` returns.
LOSSES = {
    "rounded": "values were rounded to the written dtype",
    "vanished": "changes were too small for it and vanished",
    "inexact": "values will come out differently there, by rounding",
    "padding": "entries with a change of 0 fill what the layout asks for",
    "idle": "entries are all that the adapter has, and none differs from the base: it changes nothing",
}


def run_export(config: ExportConfig) -> None:
    from finepoint.exchange.formats import export

    found = export(config.model, config.adapter, config.format, config.output, config.dtype, config.overwrite,
                   config.any_base)  # fmt: skip
    if config.json:
        print_json({"model": config.model, "adapter": config.adapter, **found})
        return
    print(f"{config.adapter} on {config.model} as {config.format} -> {config.output} ({found['bytes']:,} bytes)")
    for key, meaning in LOSSES.items():
        if found.get(key):
            print(f"{found[key]:,} {meaning}")


def run_import(config: ImportConfig) -> None:
    from finepoint.exchange.formats import import_adapter
    from finepoint.runtime.files import check_output

    check_output(config.output, config.overwrite)
    adapter = import_adapter(config.folder, config.model, config.format, config.dtype)
    adapter.save(config.output, config.overwrite, config.compact)
    if config.json:
        print_json({"output": config.output, "entries": adapter.count, "changed_weights": len(adapter), **adapter.info})
    else:
        print(f"{adapter.count:,} entries in {len(adapter)} weights of {config.model} -> {config.output}; "
              "whether it was trained on this base its files do not say")  # fmt: skip


def run_push(config: PushConfig) -> None:
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.hub import refuse_other_names, results_measured
    from finepoint.huggingface.session import push_to_hub
    from finepoint.runtime.files import read_json

    refuse_other_names(config.to)
    adapter = SparseAdapter.load(config.adapter)
    results = None
    if config.results:
        results = results_measured(read_json(Path(config.results)), config.adapter, config.results)
    address = push_to_hub(adapter, config.to, results=results, base_model=config.base_model,
                          license=config.license, private=config.private or None, message=config.message)  # fmt: skip
    if config.json:
        print_json({"adapter": config.adapter, "repository": config.to, "address": address, "entries": adapter.count,
                    "results": results or {}})  # fmt: skip
    else:
        print(f"{config.adapter} ({adapter.count:,} entries) -> {address}")


def run_pull(config: PullConfig) -> None:
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.hub import copy_adapter, fetch, refuse_other_names
    from finepoint.runtime.files import check_output, fill_folder

    refuse_other_names(config.repository)
    check_output(config.output, config.overwrite)
    place = fetch(config.repository, config.revision)
    adapter = SparseAdapter.load(str(place))
    with fill_folder(config.output, config.overwrite) as into:
        copy_adapter(place, into)
    base = adapter.info.get("base_model")
    if config.json:
        print_json({"output": config.output, "repository": config.repository, "entries": adapter.count,
                    "changed_weights": len(adapter), "base_model": base})  # fmt: skip
    else:
        print(f"{config.repository} -> {config.output}: {adapter.count:,} entries in {len(adapter)} weights of "
              f"{base or 'a base that it does not name'}")  # fmt: skip
