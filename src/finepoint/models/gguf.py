"""GGUF files: what their header says of their tensors, and where a model's weights lie in them.

The header is read by ourselves, and nothing it says is believed: a file that is cut short or damaged is refused. How
transformers rearranges a tensor when it makes a weight of it (llama's queries and keys lie in another order of rows) is
not known here: numbered entries are sent through its own processing.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finepoint.errors import FinepointError, needing, reason_of
from finepoint.models.grids import FLOATS, FORMS, ROUNDED, EntryGrid, Form, Numbers
from finepoint.models.packages import digest
from finepoint.models.weights import names_of_weights

VERSIONS = (2, 3)
ALIGNMENT = 32  # of tensors, where the file does not say
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
DEEPEST = 4  # lists in lists
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file."""

    name: str
    type: str
    shape: tuple[int, ...]
    """rows first, as torch has it"""
    start: int
    """its first byte in the file"""

    @property
    def form(self) -> Form:
        """How its numbers are packed.

        Raises:
            FinepointError: that is not known here.
        """
        if self.type not in FORMS:
            raise FinepointError(f"{self.name} is {self.type}, whose grid finepoint does not know; it knows "
                                 f"{', '.join(FORMS)}")  # fmt: skip
        return FORMS[self.type]


@dataclass(frozen=True)
class GGUFFile:
    """What a file's header says."""

    path: Path
    architecture: str
    tensors: dict[str, GGUFTensor]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the whole file, read once."""
        return digest(self.path)

    def bytes(self) -> Numbers:
        """The file's bytes, (n,) uint8, mapped into memory."""
        return np.memmap(self.path, dtype=np.uint8, mode="r")


class _Cursor:
    """Reads one thing after the other."""

    def __init__(self, path: Path, data: Numbers) -> None:
        self.path, self.data, self.at = path, data, 0

    def need(self, condition: bool, what: str) -> None:
        if not condition:
            raise FinepointError(f"{self.path} is no whole GGUF file: {what}; fetch it again")

    def skip(self, count: int) -> int:
        start, self.at = self.at, self.at + count
        self.need(self.at <= len(self.data), "it ends within its header")
        return start

    def number(self, kind: str) -> Any:
        size = struct.calcsize(f"<{kind}")
        start = self.skip(size)
        return struct.unpack(f"<{kind}", self.data[start : start + size].tobytes())[0]

    def text(self) -> str:
        length = self.number("Q")
        start = self.skip(length)
        return self.data[start : start + length].tobytes().decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of the metadata; of lists, which may be long, nothing."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == TEXT:
            return self.text()
        self.need(kind == LIST and depth < DEEPEST, f"a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            self.skip(count * struct.calcsize(f"<{SCALARS[inner]}"))
            return None
        for _ in range(count):  # every turn takes bytes, of which there are so many
            self.skip(self.number("Q")) if inner == TEXT else self.value(inner, depth + 1)
        return None


def open_gguf(path: Path) -> GGUFFile:
    """Reads the header of a GGUF file and checks that all of its tensors are there.

    Raises:
        FinepointError: there is no such file; it is cut short, damaged, a part of several, or no GGUF file of a known
            version.
    """
    if not path.is_file():
        raise FinepointError(f"there is no file {path}")
    try:
        if path.stat().st_size < 24:
            raise FinepointError(f"{path} is no whole GGUF file: it has {path.stat().st_size} bytes; fetch it again")
        return _read(_Cursor(path, np.memmap(path, dtype=np.uint8, mode="r")))
    except OSError as error:
        raise FinepointError(f"cannot read {path}: {error.strerror or error}") from error


def _read(file: _Cursor) -> GGUFFile:
    start = file.skip(4)
    file.need(file.data[start : start + 4].tobytes() == b"GGUF", "it does not begin with GGUF")
    version = file.number("I")
    if version not in VERSIONS:
        raise FinepointError(f"{file.path} is GGUF version {version}; finepoint reads "
                             f"{' and '.join(map(str, VERSIONS))}, in little-endian order")  # fmt: skip
    tensors, pairs = file.number("Q"), file.number("Q")
    known = {}
    for _ in range(pairs):
        name = file.text()
        known[name] = file.value(file.number("I"))
    if isinstance(parts := known.get("split.count"), int) and parts > 1:
        raise FinepointError(f"{file.path} is one of {parts} parts of a GGUF file; join them first: llama-gguf-split "
                             "--merge FIRST.gguf WHOLE.gguf")  # fmt: skip
    listed = [_listed(file) for _ in range(tensors)]
    alignment = known.get("general.alignment", ALIGNMENT)
    file.need(isinstance(alignment, int) and 0 < alignment < 1 << 20, f"its alignment is {alignment!r}")
    first = -(-file.at // alignment) * alignment
    found = {}
    for name, type_, shape, offset in listed:
        file.need(name not in found, f"it has {name!r} twice")
        found[name] = GGUFTensor(name, type_, shape, first + offset)
        if form := FORMS.get(type_):
            file.need(shape[-1] % form.block == 0, f"{name} has rows of {shape[-1]} entries in blocks of {form.block}")
            end = first + offset + prod(shape) // form.block * form.size
            file.need(end <= len(file.data), f"{name} ends at byte {end:,} and the file at {len(file.data):,}")
    return GGUFFile(file.path, str(known.get("general.architecture", "")), found)


def _listed(file: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
    """A tensor's line: name, type, shape, and where it begins behind the header."""
    name, dimensions = file.text(), file.number("I")
    file.need(0 < dimensions <= 8, f"{name} has {dimensions} dimensions")
    shape = tuple(file.number("Q") for _ in range(dimensions))[::-1]
    file.need(all(shape) and prod(shape) < 1 << 48, f"{name} has shape {shape}")
    number, offset = file.number("I"), file.number("Q")
    return name, TYPES.get(number, f"of type {number}"), shape, offset


@dataclass(frozen=True)
class Place:
    """Where chosen entries of a weight lie in a file."""

    tensor: GGUFTensor
    positions: Numbers
    """flat, in the file's tensor, (k,) int64, in the entries' order"""
    shift: float
    """what transformers adds to the file's values"""


@dataclass(frozen=True)
class Home:
    """What a weight is made of in a file."""

    tensor: GGUFTensor
    order: Numbers | None
    """which of the tensor's entries each entry of the weight is, flat; None where all are in order"""
    shift: float
    """what transformers adds to the file's values"""

    def place(self, positions: Tensor) -> Place:
        """Where entries of the weight lie. positions: flat, (k,)."""
        at = positions.cpu().long().numpy()
        return Place(self.tensor, at if self.order is None else self.order[at], self.shift)


def places(file: GGUFFile, model: Any, indices: Mapping[str, Tensor]) -> dict[str, Place]:
    """Where entries of a model's weights lie in the GGUF file that it was loaded from.

    Args:
        indices: flat positions by weight name, (k,).

    Raises:
        FinepointError: as for `homes`.
    """
    home = homes(file, model)
    return {name: home(name).place(positions) for name, positions in indices.items()}


def homes(file: GGUFFile, model: Any) -> Callable[[str], Home]:
    """What tells of a weight, by name, what it is made of in the GGUF file that the model was loaded from.

    Raises:
        FinepointError: transformers does not know the architecture; when asked, a weight is put together in another way
            than by taking a tensor's entries in some order.
    """
    with needing(f"reading {file.path.name}", "gguf"):
        import gguf  # noqa: F401 - transformers needs it
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except (NotImplementedError, AttributeError) as error:
        raise FinepointError(f"where the weights lie in {file.path} is not known: {reason_of(error)}") from error
    tied = {name: set(group) for group in names_of_weights(model) for name in group}

    def home(name: str) -> Home:
        own = [stored for stored, weight in names.items() if weight in tied.get(name, ()) and stored in file.tensors]
        if len(own) != 1:
            raise FinepointError(f"{file.path} has no tensor that {name} is made of; leave it out of the targets")
        tensor = file.tensors[own[0]]
        order, shift = _order(processor, tensor, names)
        if order is not None and order.size != model.get_parameter(name).numel():
            raise FinepointError(_other_layout(tensor))
        return Home(tensor, order, shift)

    return home


def _order(processor: Any, tensor: GGUFTensor, names: Mapping[str, str]) -> tuple[Numbers | None, float]:
    """Which of a tensor's entries each entry of the weight is, flat, or None where all are in order; and the shift."""

    def processed(weights: Numbers) -> Numbers:
        made = processor.process(weights=weights, name=tensor.name, tensor_key_mapping=names,
                                 parsed_parameters={"tensors": {}})  # fmt: skip
        if made.name != tensor.name:
            raise FinepointError(_other_layout(tensor))
        result: Numbers = made.weights
        return result

    blank = np.broadcast_to(np.float32(0), tensor.shape)  # takes no memory
    after = processed(blank)
    if after is blank:
        return None, 0.0
    shift = float(after.flat[0])
    count = prod(tensor.shape)
    order = processed(np.arange(count, dtype=np.int64).reshape(tensor.shape)).reshape(-1) - int(shift)
    seen = np.zeros(count, dtype=bool)
    if order.dtype.kind == "i" and order.size == count and order.min() >= 0 and order.max() < count:
        seen[order] = True
    if not seen.all() or shift != int(shift) or (after != shift).any():
        raise FinepointError(_other_layout(tensor))
    return order, shift


def _other_layout(tensor: GGUFTensor) -> str:
    return f"{tensor.name} is put together with others when it is loaded; leave it out of the targets"


def entry_grids(file: GGUFFile, model: Any, entries: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, EntryGrid]:
    """The grids of chosen entries.

    Args:
        entries: flat positions and the base's values there, by weight name; each (k,).

    Raises:
        FinepointError: a weight has no grid in the file, or its values are not those of the file.
    """
    home = homes(file, model)
    return {name: entry_grid(file, name, home(name).place(at), base) for name, (at, base) in entries.items()}


def entry_grid(file: GGUFFile, name: str, place: Place, base: Tensor) -> EntryGrid:
    """The grid of entries of a weight, on the device of the base's values there, (k,).

    Raises:
        FinepointError: as for `entry_grids`.
    """
    tensor = place.tensor
    if tensor.type in FLOATS:
        raise FinepointError(f"{name} is {tensor.type} in {file.path}, which has no grid; leave it out of the targets")
    grid = EntryGrid.read(file.bytes(), tensor.form, tensor.start, place.positions).to(base.device)
    if place.shift or not torch.equal(grid.rounded(grid.codes).to(base.dtype), base):
        raise FinepointError(not_the_files(name, file.path))
    return grid


def not_the_files(name: str, path: Path) -> str:
    return f"the values of {name} are not those of {path}; give the base that was loaded from this file"


def float_values(data: Numbers, place: Place) -> Tensor:
    """The values of entries of a float tensor, as the file has them: (k,)."""
    dtype = FLOATS[place.tensor.type]
    rows = data[place.tensor.start :][: prod(place.tensor.shape) * dtype.itemsize].reshape(-1, dtype.itemsize)
    return torch.from_numpy(rows[place.positions].copy()).view(dtype).reshape(-1)


def loaded(values: Tensor, shift: float) -> Tensor:
    """What a loaded model holds where a float tensor of the file has these values: bfloat16."""
    return (values.float() + shift).to(ROUNDED)
