"""GGUF through llama.cpp's own converter, which knows every architecture's layout; we only find it and run it."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from finepoint.errors import FinepointError
from finepoint.exchange.folded import write_merged
from finepoint.exchange.layouts import Source, layout

COMMANDS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
"""The converter as llama.cpp's checkout has it, and as a package of that name installs it."""
FILE = "model.gguf"
TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def converter() -> str:
    """The converter's path.

    Raises:
        FinepointError: there is none on the PATH.
    """
    if found := next(filter(None, map(shutil.which, COMMANDS)), None):
        return found
    raise FinepointError(
        "gguf needs llama.cpp's converter, and neither convert_hf_to_gguf.py nor convert-hf-to-gguf is on the PATH; "
        "or export with --format merged and run it on that folder (docs/exchange.md)"
    )


@layout("gguf", dtype=True, peft=True, check=converter)
def write_gguf(source: Source, into: Path) -> dict[str, Any]:
    """Writes `model.gguf`, not quantised, by way of a folded model that is thrown away.

    Raises:
        FinepointError: as for `write_merged`; no converter, or one that fails (with its last line).
    """
    command = converter()
    with tempfile.TemporaryDirectory(dir=into) as temporary:
        # The converter names the model after its folder.
        folder = Path(temporary) / f"{Path(source.checkpoint.name).stem}-{Path(source.adapter).resolve().name}"
        folder.mkdir()
        found = write_merged(source, folder)
        if found["dtype"] not in TYPES:
            raise FinepointError(f"gguf holds no {found['dtype']}; give --dtype, one of {', '.join(TYPES)}")
        arguments = [command, str(folder), "--outfile", str(into / FILE), "--outtype", TYPES[found["dtype"]]]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode or not (into / FILE).is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it says nothing"]
        raise FinepointError(f"{Path(command).name} failed: {last[0]}")
    return found
