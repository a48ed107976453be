"""finepoint scale ADAPTER --model M --protect FILE --disturb-at-most 0.01 --output DIR"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from finepoint.cli.output import print_json
from finepoint.runtime.settings import DType, Quantise, refuse_out_of_range, setting

if TYPE_CHECKING:
    from finepoint.adapters.adapter import SparseAdapter

# fmt: off


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Weaken an adapter until it disturbs the base's predictions on other text no more than a budget allows."""

    adapter: str = setting("adapter folder, also LoRA's or DoRA's as PEFT writes them", positional=True)
    model: str = setting("a folder, a hub id, a .gguf file, smollm2, or gemma3-270m")
    protect: str = setting("text whose predictions are to be kept, a JSON Lines file; not what training protected")
    protect_examples: int = setting(
        "at most so many of these texts, always the same, up to 256 tokens of each", 64, least=1)
    disturb_at_most: float = setting(
        "the budget: KL of the base's predictions to the adapted model's on that text, in nats a token", least=1e-6)
    by: Literal["wise-ft", "depth"] = setting(
        "scale the whole change alike (wise-ft), or early blocks more than late ones (depth, as LiNeS does)", "wise-ft")
    output: str = setting("folder to write")
    compact: bool = setting("write positions as gaps, in one or two bytes each instead of four; as exact", False)
    dtype: DType | None = setting("of the weights; that of the adapter where not given", None)
    any_base: bool = setting(
        "take a model that is another than the adapter's base beside the entries it changes", False)
    quantise: Quantise | None = setting(
        "hold the linear layers in int8, int4 or nf4, as the adapter's training did", None)
    overwrite: bool = setting("allow an output folder that holds something", False)
    json: bool = setting("print one JSON object on stdout", False)


# fmt: on
CONFIG = ScaleConfig


def run(config: ScaleConfig) -> None:
    from finepoint.data.examples import read_examples, some
    from finepoint.data.leaks import Seen
    from finepoint.models.loading import load_tokenizer
    from finepoint.runtime.files import check_output
    from finepoint.training.budget import scale_to_budget

    refuse_out_of_range(config)
    check_output(config.output, config.overwrite)
    texts = some(read_examples(config.protect), config.protect_examples)
    model, adapter = _loaded(config)
    tokenizer = load_tokenizer(config.model)
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


def _loaded(config: ScaleConfig) -> "tuple[Any, SparseAdapter]":
    """The base model in the adapter's dtype, and the adapter."""
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.other_bases import rebased
    from finepoint.adapters.peft import is_peft, load_merged
    from finepoint.models.loading import load_model

    sparse = None if is_peft(config.adapter) else SparseAdapter.load(config.adapter)
    dtypes = {change.dtype for change in sparse.changes.values()} if sparse else set()
    dtype = config.dtype or (dtypes.pop() if len(dtypes) == 1 else "auto")
    model = load_model(config.model, cast(DType, dtype), quantise=config.quantise)
    adapter = sparse or load_merged(config.adapter, model)
    return model, rebased(adapter, model) if config.any_base else adapter
