"""finepoint export --model M --adapter DIR --format F --output DIR"""

from dataclasses import dataclass

from finepoint.cli.output import print_json
from finepoint.runtime.settings import DType, setting

# fmt: off


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an adapter in another layout: merged into its model, for PEFT, peft-sparta, vLLM, llama.cpp."""

    model: str = setting("the base: a folder, a hub id, a .gguf file, smollm2, or gemma3-270m")
    adapter: str = setting(
        "adapter folder, also without its flag; for merged and gguf also LoRA or DoRA as PEFT writes them",
        positional=True)
    format: str = setting(
        "merged, shira, supertuning, sparta, vllm-patch, or gguf (with llama.cpp's converter on the PATH)")
    output: str = setting("folder to write")
    dtype: DType = setting("of the written weights (merged, gguf, vllm-patch); auto keeps the base's", "auto")
    any_base: bool = setting(
        "take a model that is another than the adapter's base beside the entries it changes", False)
    overwrite: bool = setting("allow an output folder that holds something", False)
    json: bool = setting("print one JSON object on stdout", False)


# fmt: on
CONFIG = ExportConfig
# What a layout could not keep, in words; each is a key of what `export` returns.
LOSSES = {
    "rounded": "values were rounded to the written dtype",
    "vanished": "changes were too small for it and vanished",
    "inexact": "values will come out differently there, by rounding",
    "padding": "entries with a change of 0 fill what the layout asks for",
    "idle": "entries are all that the adapter has, and none differs from the base: it changes nothing",
}


def run(config: ExportConfig) -> None:
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
