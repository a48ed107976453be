"""finepoint verify --model M DIR"""

from dataclasses import dataclass
from typing import cast

from finepoint.cli.output import print_json
from finepoint.runtime.settings import DType, Quantise, setting

# fmt: off


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check that an adapter's file is sound and that it belongs to a model; revert is tried, bit for bit."""

    folder: str = setting("adapter folder", positional=True)
    model: str = setting("a folder, a hub id, a .gguf file, smollm2, or gemma3-270m")
    dtype: DType | None = setting("of the weights; that of the adapter where not given", None)
    any_base: bool = setting(
        "take a model that is another than the adapter's base beside the entries it changes", False)
    quantise: Quantise | None = setting(
        "hold the linear layers in int8, int4 or nf4, as the adapter's training did", None)
    json: bool = setting("print one JSON object on stdout", False)


# fmt: on
CONFIG = VerifyConfig
# How far the adapter knows that base.
KNOWN = {"whole": "", "sampled": " (of the rest of it a sample was compared)",
         "entries": " (whether the rest of it is that base the adapter does not know)"}  # fmt: skip


def run(config: VerifyConfig) -> None:
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.other_bases import rebased
    from finepoint.adapters.verification import verify
    from finepoint.models.loading import load_model

    adapter = SparseAdapter.load(config.folder)
    dtypes = {change.dtype for change in adapter.changes.values()}
    dtype = config.dtype or (dtypes.pop() if len(dtypes) == 1 else "auto")
    model = load_model(config.model, cast(DType, dtype), adapter.info.get("labels", ()), quantise=config.quantise)
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
