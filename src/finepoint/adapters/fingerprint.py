"""What the weights of a base hold, in 64 bits each: another base is known by it, however little of it differs.

The print of a weight is a sum over its entries modulo 2^64: an entry's bits as a float32, in halves of 16, times odd
multipliers of its place in a row of 1,024 and of the row. A sum may be taken in any order and in parts, on any device,
and what is known to have moved can be set right in it without the rest: where an adapter is applied to a model, or
rows of a weight lie in several processes, the base's print is found all the same. Its multiplications are those of
float64, whose results are whole numbers below 2^53 and exact: they take little memory at a time, and a
gigabyte takes about a third of a second of one core.

A value has one print in every dtype that holds it (bfloat16 is the upper half of float32; what float32 does not hold of
a float64 is counted beside it); -0.0 counts as 0.0, and every NaN as one. No entry can change alone, nor two change
places, without being seen; of other accidents one in some 2^50 would pass. It is no protection against intent.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from finepoint.models.quantised import float_values
from finepoint.models.weights import names_of_weights
from finepoint.runtime import distributed

logger = logging.getLogger(__name__)
ROW = 1024  # entries that share a multiplier of their row
CHUNK = 1 << 18  # entries taken, or passed over, together
MOST = 1 << 33  # entries of a base beyond which not every chunk is looked at
CONTAINER = "finepoint."  # what a tuner hangs on a model is none of it
FINGERPRINT = "fingerprint"  # its key where a base is described
UNKNOWN = ""  # the print of a weight whose content is not the base's, or cannot be read


class Moved(NamedTuple):
    """Entries of a weight that do not hold the base's values now: flat positions, base values, values, each (k,)."""

    name: str
    indices: Tensor
    base: Tensor
    now: Tensor


@dataclass(frozen=True)
class Fingerprint:
    """The prints of a base's weights and stored buffers, by all of their names; a tied weight has several."""

    weights: dict[str, str]
    """16 hexadecimal digits, or `UNKNOWN`: a new head, whose values were drawn, is no part of the base"""
    one_in: int = 1
    """of so many chunks of a weight one is looked at; more than 1 of very large bases only"""

    def __repr__(self) -> str:
        return f"Fingerprint({len(self.weights)} weights, one chunk in {self.one_in})"

    def as_json(self) -> dict[str, Any]:
        return {"one_in": self.one_in, "weights": dict(self.weights)}

    @staticmethod
    def of_json(found: Any) -> "Fingerprint":
        """What `as_json` gave."""
        return Fingerprint(found["weights"], found["one_in"])

    @property
    def unknown(self) -> list[str]:
        """The names of the weights whose content is no part of it."""
        return [name for name, value in self.weights.items() if value == UNKNOWN]

    def without(self, names: Collection[str], tied: Iterable[Iterable[str]] = ()) -> "Fingerprint":
        """The same without the content of these weights, under their other names too.

        Args:
            tied: groups of names of one weight.
        """
        gone = {*names, *(other for group in map(set, tied) if group & {*names} for other in group)}
        weights = {name: UNKNOWN if name in gone else value for name, value in self.weights.items()}
        return Fingerprint(weights, self.one_in)


def is_fingerprint(found: Any) -> bool:
    """Whether this is what `Fingerprint.as_json` gives."""
    if not isinstance(found, dict) or type(found.get("one_in")) is not int or not 1 <= found["one_in"] < 1 << 31:
        return False
    weights = found.get("weights")
    return isinstance(weights, dict) and all(_is_print(value) for value in weights.values())


def _is_print(value: Any) -> bool:
    return isinstance(value, str) and (not value or (len(value) == 16 and set(value) <= set("0123456789abcdef")))


def fingerprint(
    contents: Mapping[str, Tensor], moved: Iterable[Moved] = (), one_in: int | None = None, without: Iterable[str] = ()
) -> Fingerprint:
    """The fingerprint of the base that a model is, or is beneath what has moved. Several processes ask together.

    Args:
        contents: what the model holds, as `contents_of` gives it.
        moved: every entry that does not hold the base's value; one that moved twice comes twice.
        one_in: as another fingerprint has it that this is to be compared with; by the model's size where not given.
        without: weights whose content is not the base's.

    A weight that is not in memory (offloaded) stays unknown, and a line says so.
    """
    without = set(without)
    absent = [name for name, weight in contents.items() if weight.is_meta and name not in without]
    if absent and len(absent) < len(contents):
        logger.warning("%d weights are not in memory (offloaded), the first %s: whether they are the base's cannot be "
                       "told", len(absent), absent[0])  # fmt: skip
    weights = {id(weight): (name, weight) for name, weight in list(contents.items())[::-1]}
    if one_in is None:
        one_in = one_in_for(sum(weight.numel() for _, weight in weights.values()))
    left_out = {id(contents[name]) for name in [*without, *absent] if name in contents}
    shifts: dict[int, int] = {}
    for name, indices, base, now in moved:
        key = id(contents[name])
        shifts[key] = shifts.get(key, 0) + part(indices, base, one_in) - part(indices, now, one_in)
    found = {}
    for key, (_, weight) in weights.items():
        if key not in left_out:
            found[key] = _sum_of(weight, one_in)
    _add_up(found, weights)
    prints = {key: shown(tuple(weights[key][1].shape), total + shifts.get(key, 0)) for key, total in found.items()}
    return Fingerprint({name: prints.get(id(weight), UNKNOWN) for name, weight in contents.items()}, one_in)


def fingerprint_of(readers: Mapping[str, Callable[[], Tensor] | None], one_in: int) -> Fingerprint:
    """The same of weights that are read one after the other.

    Args:
        readers: what reads each, by all of its names; None of one that cannot be read.
    """
    known: dict[Any, str] = {None: UNKNOWN}
    for reader in readers.values():
        if reader not in known:
            weight = reader()  # type: ignore[misc]
            known[reader] = shown(tuple(weight.shape), total_of(weight, one_in))
    return Fingerprint({name: known[reader] for name, reader in readers.items()}, one_in)


def one_in_for(entries: int) -> int:
    """Of how many chunks of a base of so many entries one is looked at."""
    return -(-entries // MOST) if entries else 1


def unlike(known: Fingerprint, here: Fingerprint) -> list[tuple[str, str]]:
    """The names of the weights in which two fingerprints differ, with how: `values`, `missing` or `more`, in `here`.

    What either does not know is passed over.
    """
    found = []
    for name, value in known.weights.items():
        if value and name not in here.weights:
            found.append((name, "missing"))
        elif value and here.weights[name] not in (value, UNKNOWN):
            found.append((name, "values"))
    return found + [(name, "more") for name, value in here.weights.items() if value and name not in known.weights]


def contents_of(model: nn.Module) -> dict[str, Tensor]:
    """What a model computes with and a checkpoint holds: weights and floating-point buffers, by all of their names.

    Buffers that are not stored are made of the configuration, and counters decide nothing.
    """
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return {name: tensor for name, tensor in found.items() if not name.startswith(CONTAINER)}


def stamps(contents: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tells most writes without a look at a number: memory and version of every tensor.

    Writes through `.data` do not show, and a stamp that changed proves nothing: then the fingerprint tells.
    """
    return {
        name: (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for name, tensor in contents.items()
    }


def shown(shape: tuple[int, ...], total: int) -> str:
    """The print of a weight of this shape whose sum this is."""
    return sha256(f"{shape} {total % (1 << 64)}".encode()).hexdigest()[:16]


# The sum.


def _sum_of(weight: Tensor, one_in: int) -> int:
    """A weight's sum, or of a sharded one what this process adds to it."""
    if not distributed.is_sharded(weight):
        return total_of(weight, one_in)
    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    copies = [mesh.get_local_rank(axis) for axis, placement in enumerate(placements) if placement.is_replicate()]
    local, first = distributed.own_rows(weight)
    return 0 if any(copies) else total_of(local, one_in, first)


def _add_up(found: dict[int, int], weights: Mapping[int, tuple[str, Tensor]]) -> None:
    """Adds the parts of sharded weights over all processes, in one message."""
    keys = [key for key in found if distributed.is_sharded(weights[key][1])]
    if keys:
        sums = torch.tensor([_signed(found[key]) for key in keys], device=distributed.device())
        distributed.add_up_(sums)
        found.update(zip(keys, sums.tolist(), strict=True))


@torch.no_grad()
def total_of(weight: Tensor, one_in: int = 1, first: int = 0) -> int:
    """The sum over a tensor's entries, of which the first has this flat position in its weight."""
    flat = float_values(weight).reshape(-1)
    here = flat.device.type in ("cpu", "cuda")  # others may lack float64
    size = CHUNK if one_in > 1 or flat.device.type == "cpu" else 32 * CHUNK
    sums, places = [], []
    for start, stop in _stretches(first, len(flat), size, one_in):
        piece = flat[start - first : stop - first]
        for bits, halves in _bits(piece if here else piece.cpu()):
            ends = (start % ROW * halves, -stop % ROW * halves)
            rows = (pad(bits, ends) if any(ends) else bits).view(-1, ROW * halves).double()
            sums.append(torch.mv(rows, _multipliers(halves, rows.device)).long())
            places.append(torch.arange(start // ROW, start // ROW + len(rows), device=rows.device))
    return int((torch.cat(sums) * _odd(torch.cat(places))).sum()) if sums else 0


@torch.no_grad()
def part(indices: Tensor, values: Tensor, one_in: int = 1) -> int:
    """What entries at flat positions add to the sum while they hold these values; both (k,)."""
    indices = indices.detach().to("cpu", torch.long)
    taken = indices // CHUNK % one_in == 0
    indices, total = indices[taken], 0
    for bits, halves in _bits(values.detach().cpu().reshape(-1)[taken]):
        table = _multipliers(halves, torch.device("cpu")).view(ROW, halves).long()
        sums = (bits.view(-1, halves).long() * table[indices % ROW]).sum(1)
        total += int((sums * _odd(indices // ROW)).sum())
    return total


def _stretches(first: int, count: int, size: int, one_in: int) -> Iterator[tuple[int, int]]:
    """The pieces of `first` to `first + count` that are looked at, cut where a weight is cut."""
    for piece in range(first // size, -(-(first + count) // size)):
        if piece % one_in == 0:
            yield max(first, piece * size), min(first + count, (piece + 1) * size)


def _bits(values: Tensor) -> Iterator[tuple[Tensor, int]]:
    """(n,) values as (n * halves,) 16-bit integers, with how many there are of each: 1 or 2, and 4 of a remainder."""
    if not len(values):
        return
    if values.dtype == torch.float64 or not values.is_floating_point():
        exact = values.double()
        values = exact.float()
        wide = values.double()
        rest = torch.where(wide.isinf(), exact, exact - wide).masked_fill_((wide == exact) | exact.isnan(), 0.0)
        if bool(rest.any()):
            yield rest.view(torch.int16), 4
    elif values.dtype not in (torch.bfloat16, torch.float32):
        values = values.float()
    whole = torch.int16 if values.itemsize == 2 else torch.int32
    if values.view(whole).amin() == torch.iinfo(whole).min or values.sum().isnan():  # -0.0, NaN
        values = values.masked_fill(values == 0, 0.0).masked_fill_(values.isnan(), torch.nan)
    yield values.contiguous().view(torch.int16), values.itemsize // 2


@cache
def _multipliers(halves: int, device: torch.device) -> Tensor:
    """The multipliers of the places in a row, (ROW * halves,) float64: different odd numbers below 2^25."""
    every = _odd(torch.arange(1 << 14)).bitwise_right_shift(39) & ((1 << 25) - 1) | 1
    table = torch.tensor(list(dict.fromkeys(every.tolist()))[: 6 * ROW], dtype=torch.float64).view(ROW, 6)
    columns = {1: table[:, 1:2], 2: table[:, :2], 4: table[:, 2:]}[halves]  # the upper half is the second in memory
    return columns.reshape(-1).to(device)


def _odd(numbers: Tensor) -> Tensor:
    """Odd numbers of 64 bits that look drawn at random, one for each of these: splitmix64."""
    found = numbers * -7046029254386353131 + -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        found = (found ^ (found >> shift) & ((1 << (64 - shift)) - 1)) * factor
    return found | 1


def _signed(number: int) -> int:
    """A number modulo 2^64, as int64 holds it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def form_of(model: nn.Module) -> dict[str, Any]:
    """The names of weights that are tied to each other, and how many token embeddings there are; JSON-ready.

    A tied weight and an untied one may hold the same values, yet a change of one is, or is not, a change of the other.
    """
    form: dict[str, Any] = {"tied": sorted(sorted(group) for group in names_of_weights(model) if len(group) > 1)}
    with suppress(AttributeError, NotImplementedError, IndexError):  # no language model of transformers'
        form["vocabulary"] = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    return form


def differences(form: Mapping[str, Any], model: nn.Module, names: Iterable[str]) -> list[str]:
    """How the model's form differs from the base's, as far as a change of these weights is concerned.

    Args:
        form: the base's, as `form_of` gives it; empty where it is not known.
    """
    if "tied" not in form:
        return []
    here = form_of(model)
    found = []
    if "vocabulary" in form and here.get("vocabulary", form["vocabulary"]) != form["vocabulary"]:
        found.append(f"the model has {here['vocabulary']} token embeddings, the adapter's base {form['vocabulary']}")
    for name in names:
        base, model_ = (_tied_to(name, one) for one in (form, here))
        if base != model_:
            told = [" and ".join(sorted(others)) or "no other weight" for others in (model_, base)]
            found.append(f"{name}: tied to {told[0]} in the model, to {told[1]} in the adapter's base")
    return found


def _tied_to(name: str, form: Mapping[str, Any]) -> set[str]:
    return {other for group in form.get("tied", ()) if name in group for other in group} - {name}
