"""finepoint import DIR --model M --output DIR"""

from dataclasses import dataclass

from finepoint.cli.output import print_json
from finepoint.exchange.formats import ImportFormat
from finepoint.runtime.settings import DType, setting

# fmt: off


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make an adapter of somebody else's: PEFT's SHiRA and Super-Tuning, peft-sparta's files."""

    folder: str = setting("their folder, also without its flag: `finepoint import DIR ..`", positional=True)
    model: str = setting("the base it was trained on: a folder, a hub id, a .gguf file, smollm2, or gemma3-270m")
    output: str = setting("folder to write")
    format: ImportFormat = setting(
        "shira, supertuning or sparta; auto tells it by the files; --from is the same flag", "auto", also="from")
    dtype: DType = setting("of the weights the adapter will be applied to; auto for the base's", "auto")
    compact: bool = setting(
        "write the gaps between positions in one or two bytes instead of the positions in four", False)
    overwrite: bool = setting("allow an output folder that holds something", False)
    json: bool = setting("print one JSON object on stdout", False)


# fmt: on
CONFIG = ImportConfig


def run(config: ImportConfig) -> None:
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
