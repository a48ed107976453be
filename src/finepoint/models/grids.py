"""Where entries of quantised weights can be: GGUF's number formats, and a layer's weight in torchao's or bitsandbytes'.

In GGUF's every entry of a block is a code times the block's step, plus its minimum.

A code lies in one or two bit fields of its block, so that it can be read and changed without any other. Layouts as
llama.cpp's `block_q4_0` to `block_q6_K` have them; float formats have no grid, and their bits are their codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

ROUNDED = torch.bfloat16
"""what a GGUF file's values are rounded to when finepoint loads it"""
Numbers = np.ndarray
Field = tuple[Numbers, Numbers | int, int]
"""a byte in the block, a shift, and a width in bits; of one part of a code"""


@dataclass(frozen=True)
class Form:
    """How a tensor's numbers are packed: `block` entries in `size` bytes."""

    block: int
    size: int
    fields: Callable[[Numbers], list[Field]]
    """from places in the block to the fields of their codes, the lowest bits first"""
    width: int
    """bits of a code"""
    steps: Callable[[Numbers, Numbers, Numbers], tuple[Numbers, Numbers | None]] | None = None
    """from the file's bytes, where blocks begin, and places in them to steps and minima, float32; None of floats"""
    flip: int = 0
    """the bit that is stored the other way round: that of a sign"""
    zero: int = 0
    """the code of the number 0"""


def _whole(size: int) -> Callable[[Numbers], list[Field]]:
    return lambda places: [(np.full_like(places, byte), 0, 8) for byte in range(size)]


def _nibbles(start: int, high: int = 0) -> Callable[[Numbers], list[Field]]:
    """Of 32 entries, those of the second half in the upper nibbles; a fifth bit each in four bytes at `high`."""

    def fields(places: Numbers) -> list[Field]:
        found: list[Field] = [(start + places % 16, places // 16 * 4, 4)]
        return [*found, (high + places // 8, places % 8, 1)] if high else found

    return fields


def _nibbles_k(start: int, high: int = 0) -> Callable[[Numbers], list[Field]]:
    """Of 256 entries, 64 share 32 bytes; a fifth bit each in 32 bytes at `high`."""

    def fields(places: Numbers) -> list[Field]:
        found: list[Field] = [(start + places // 64 * 32 + places % 32, places // 32 % 2 * 4, 4)]
        return [*found, (high + places % 32, places // 32, 1)] if high else found

    return fields


def _six_bits(places: Numbers) -> list[Field]:
    half, rest = np.divmod(places, 128)
    return [(half * 64 + rest % 64, rest // 64 * 4, 4), (128 + half * 32 + rest % 32, rest // 32 * 2, 2)]


def _half(data: Numbers, at: Numbers) -> Numbers:
    """Two bytes as float16, in float32."""
    return (data[at].astype(np.uint16) | data[at + 1].astype(np.uint16) << 8).view(np.float16).astype(np.float32)


def _step(data: Numbers, at: Numbers, places: Numbers) -> tuple[Numbers, None]:
    return _half(data, at), None


def _step_and_minimum(data: Numbers, at: Numbers, places: Numbers) -> tuple[Numbers, Numbers]:
    return _half(data, at), _half(data, at + 2)


def _steps_k(data: Numbers, at: Numbers, places: Numbers) -> tuple[Numbers, Numbers]:
    """Eight steps and eight minima of six bits in twelve bytes: four of each whole, four by nibble and upper bits."""
    part = places // 32
    first, later = at + 4 + part % 4, part >= 4
    low, high, both = data[first], data[first + 4], data[first + 8]
    step = np.where(later, both & 15 | low >> 6 << 4, low & 63).astype(np.float32)
    minimum = np.where(later, both >> 4 | high >> 6 << 4, high & 63).astype(np.float32)
    return _half(data, at) * step, -(_half(data, at + 2) * minimum)


def _steps_of_sixteen(data: Numbers, at: Numbers, places: Numbers) -> tuple[Numbers, None]:
    return _half(data, at + 208) * data[at + 192 + places // 16].view(np.int8).astype(np.float32), None


FORMS = {
    "F32": Form(1, 4, _whole(4), 32),
    "F16": Form(1, 2, _whole(2), 16),
    "BF16": Form(1, 2, _whole(2), 16),
    "Q4_0": Form(32, 18, _nibbles(2), 4, _step, zero=8),
    "Q4_1": Form(32, 20, _nibbles(4), 4, _step_and_minimum),
    "Q5_0": Form(32, 22, _nibbles(6, 2), 5, _step, zero=16),
    "Q5_1": Form(32, 24, _nibbles(8, 4), 5, _step_and_minimum),
    "Q8_0": Form(32, 34, lambda places: [(2 + places, 0, 8)], 8, _step, flip=128, zero=128),
    "Q4_K": Form(256, 144, _nibbles_k(16), 4, _steps_k),
    "Q5_K": Form(256, 176, _nibbles_k(48, 16), 5, _steps_k),
    "Q6_K": Form(256, 210, _six_bits, 6, _steps_of_sixteen, zero=32),
}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def codes_at(data: Numbers, form: Form, start: int, positions: Numbers) -> Numbers:
    """The codes of entries of a tensor: (k,) int64.

    Args:
        data: the file's bytes, (n,) uint8; the tensor's begin at `start`.
        positions: flat, (k,) int64.
    """
    found, low = np.zeros(len(positions), dtype=np.int64), 0
    at = start + positions // form.block * form.size
    for byte, shift, width in form.fields(positions % form.block):
        found |= (data[at + byte].astype(np.int64) >> shift & (1 << width) - 1) << low
        low += width
    return found


def changed_bytes(form: Form, start: int, positions: Numbers, bits: Numbers) -> tuple[Numbers, Numbers]:
    """The bytes of the file that hold what differs between codes, and what to exclusive-or them with.

    Args:
        bits: old codes exclusive-or new ones, (k,) int64.

    Returns:
        Addresses, (m,) int64 with repetitions, and (m,) uint8.
    """
    at = start + positions // form.block * form.size
    addresses, masks, low = [], [], 0
    for byte, shift, width in form.fields(positions % form.block):
        addresses.append(at + byte)
        masks.append(((bits >> low & (1 << width) - 1) << shift).astype(np.uint8))
        low += width
    return np.concatenate(addresses), np.concatenate(masks)


class Grid(Protocol):
    """Where k entries of a weight can be."""

    def snapped(self, delta: Tensor, dtype: torch.dtype) -> Tensor:
        """What a loaded model holds when its entries are moved by deltas and rounded to the grid: (k,), `dtype`."""

    def reach(self) -> tuple[Tensor, Tensor, Tensor]:
        """How far neighbouring numbers lie apart at each entry, and how far away the lowest and highest one are: each
        (k,) float32, not negative."""


@dataclass(frozen=True)
class EntryGrid:
    """Where chosen entries of a weight can be: on their own block's steps. All (k,)."""

    codes: Tensor
    """those of the base, int64, as stored"""
    step: Tensor
    """float32"""
    minimum: Tensor | None
    """float32; None in formats without any"""
    form: Form

    @staticmethod
    def read(data: Numbers, form: Form, start: int, positions: Numbers) -> "EntryGrid":
        """The grid of entries; arguments as for `codes_at`."""
        assert form.steps is not None
        at = start + positions // form.block * form.size
        step, minimum = form.steps(data, at, positions % form.block)
        codes = torch.from_numpy(codes_at(data, form, start, positions))
        return EntryGrid(codes, torch.from_numpy(step), None if minimum is None else torch.from_numpy(minimum), form)

    def to(self, device: torch.device) -> "EntryGrid":
        minimum = None if self.minimum is None else self.minimum.to(device)
        return EntryGrid(self.codes.to(device), self.step.to(device), minimum, self.form)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for: (k,) float32, each operation rounded as GGUF's readers round it."""
        found = ((codes ^ self.form.flip) - self.form.zero).float() * self.step
        return found if self.minimum is None else found + self.minimum

    def rounded(self, codes: Tensor) -> Tensor:
        """The same as a loaded model holds it: (k,) bfloat16."""
        return self.values(codes).to(ROUNDED)

    def moved(self, delta: Tensor) -> Tensor:
        """The codes nearest to where the deltas lead, which stay within the format's range: (k,) int64."""
        return self._by((delta / self.step).round(), self.codes)

    def nearest(self, values: Tensor) -> Tensor:
        """The codes nearest to values: (k,) int64."""
        zero = torch.full_like(self.codes, self.form.zero ^ self.form.flip)
        return self._by(((values if self.minimum is None else values - self.minimum) / self.step).round(), zero)

    def _by(self, steps: Tensor, start: Tensor) -> Tensor:
        """Codes so many steps from others; a block whose step is 0 has nowhere to go."""
        steps = torch.where(self.step == 0, 0, steps).clamp(-(1 << 20), 1 << 20).long()
        return ((start ^ self.form.flip) + steps).clamp(0, (1 << self.form.width) - 1) ^ self.form.flip

    def snapped(self, delta: Tensor, dtype: torch.dtype) -> Tensor:
        """What a loaded model holds when its entries are moved by deltas and rounded to the grid: (k,), `dtype`."""
        return self.rounded(self.moved(delta)).to(dtype)

    def reach(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `Grid.reach`."""
        place, step = self.codes ^ self.form.flip, self.step.abs()
        rest = (1 << self.form.width) - 1 - place
        down, up = _turned(place, rest, self.step)
        return step, down * step, up * step


@dataclass(frozen=True)
class LevelGrid:
    """Where chosen entries of a weight in torchao's or bitsandbytes' few bits can be: a level times a scale. All (k,)
    but the levels."""

    at: Tensor
    """which level the base's entries are at, int64"""
    scale: Tensor
    """as the library keeps it, or works it out"""
    zero: Tensor | None
    """what is taken off a level first, if anything is, int64"""
    levels: Tensor
    """(m,) float32, ascending"""
    value: Callable[[Tensor, Tensor], Tensor]
    """from levels less zero, float32, and scales to values, rounded in the library's own order"""
    unit: float = 1.0
    """how many scales a level of 1 is"""

    def values(self, at: Tensor) -> Tensor:
        """What levels stand for: (k,)."""
        levels = self.levels[at]
        return self.value(levels if self.zero is None else levels - self.zero, self.scale)

    def moved(self, delta: Tensor) -> Tensor:
        """The levels nearest to where the deltas lead: (k,) int64; where the scale is 0, there is nowhere to go."""
        steps = torch.where(self.scale == 0, 0.0, delta.float() / (self.scale.float() * self.unit))
        between = (self.levels[1:] + self.levels[:-1]) / 2
        return torch.where(steps == 0, self.at, torch.bucketize(self.levels[self.at] + steps, between))

    def snapped(self, delta: Tensor, dtype: torch.dtype) -> Tensor:
        """What the dequantised weight holds when its entries are moved by deltas and rounded to the grid: (k,)."""
        return self.values(self.moved(delta)).to(dtype)

    def reach(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `Grid.reach`; where levels are uneven, the distance is the mean of that below and that above."""
        gaps, size = self.levels.diff(), self.scale.float().abs() * self.unit
        step = (torch.cat([gaps[:1], gaps]) + torch.cat([gaps, gaps[-1:]])) / 2
        level = self.levels[self.at]
        down, up = _turned(level - self.levels[0], self.levels[-1] - level, self.scale)
        return step[self.at] * size, down * size, up * size


def _turned(below: Tensor, above: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What lies below and above on the side of the values: a negative scale turns the codes' order round."""
    return torch.where(scale < 0, above, below), torch.where(scale < 0, below, above)
