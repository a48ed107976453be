"""Safetensors files read with care: what is wrong with one is told by its name, and nothing it says is believed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finepoint.errors import FinepointError

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes a weight may have, by safetensors' name for them."""
LONGEST_HEADER = 16 << 20
"""Bytes: some 35,000 changed weights. safetensors itself takes 100 MB, which it reads for seconds."""
Form = tuple[str, tuple[int, ...]]
"""A tensor's dtype, by safetensors' name, and its shape."""


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        FinepointError: missing, truncated or damaged, or no file but a device or a pipe.
    """
    try:
        if path.exists() and not path.is_file():
            raise FinepointError(f"cannot read {path}: it is no ordinary file")
        if header_bytes(path) > LONGEST_HEADER:
            raise FinepointError(f"cannot read {path}: it is no safetensors file, or its header is longer than "
                                 f"{LONGEST_HEADER:,} bytes")  # fmt: skip
        with _opened(path) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FinepointError(f"cannot read {path}: {error}") from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as error:  # torch, which maps the file into memory
        raise OSError(error) from error


def header_bytes(path: Path) -> int:
    """How long a safetensors file says its header is."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def forms(file: Any) -> dict[str, Form]:
    """What an open file says of its tensors; none of their bytes is read."""
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
