"""The messages between a sender and a receiver: bytes that say what they are, how long, and whether they are whole.

    magic, 4 bytes | length of the head, 4 bytes | length of the payload, 8 bytes | head: JSON | payload | SHA-256

all numbers little-endian. No pickle: JSON and plain numbers are all that is ever read. Kinds of heads:

    state     from the sender: version, session, and the digest of the places whose values are the payload; with `full`
              also the places themselves (names, shapes, dtypes, counts; positions before the values) and the base
    hello     from a receiver that has come: what it holds
    answer    from a receiver: what became of a version: applied, ignored, refused (with a reason), rolled back
    bye       from whoever leaves
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from typing import Any

import torch
from torch import Tensor

from finepoint.adapters.fingerprint import Fingerprint, is_fingerprint
from finepoint.errors import FinepointError

MAGIC = b"FPS1"
PREFIX = struct.Struct("<4sIQ")
DIGEST = 32
LONGEST_HEAD = 64 << 20  # bytes; a base of 100,000 weights has a fingerprint of some 10 MB
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Message:
    """A head, which is JSON, and bytes."""

    head: dict[str, Any]
    payload: bytes = b""

    @property
    def kind(self) -> str:
        return str(self.head.get("kind"))

    @property
    def session(self) -> str:
        return str(self.head.get("session"))

    @property
    def version(self) -> int:
        return int(self.head.get("version", 0))

    @property
    def full(self) -> bool:
        return bool(self.head.get("full"))


def pack(head: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """A message as bytes."""
    told = json.dumps(head, separators=(",", ":")).encode()
    whole = b"".join((PREFIX.pack(MAGIC, len(told), len(payload)), told, payload))
    return whole + sha256(whole).digest()


def length_after(prefix: bytes, most: int) -> int:
    """How many bytes of a message follow its first `PREFIX.size`.

    Raises:
        FinepointError: no message of ours, or one longer than `most` bytes.
    """
    magic, head, payload = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise FinepointError("what came is no message of finepoint.sync; is this the sender's address?")
    if head > LONGEST_HEAD or head + payload > most:
        raise FinepointError(f"a message of {head + payload:,} bytes was announced, where at most {most:,} are "
                             "expected: it is of another model")  # fmt: skip
    return int(head + payload + DIGEST)


def unpack(data: bytes) -> Message:
    """A message, looked at as far as that goes without a model.

    Raises:
        FinepointError: cut short, damaged, or not of a kind that is known.
    """
    if len(data) < PREFIX.size + DIGEST or data[:4] != MAGIC:
        raise FinepointError("a message came damaged: its beginning is no message of finepoint.sync")
    _, head, payload = PREFIX.unpack(data[: PREFIX.size])
    if len(data) != PREFIX.size + head + payload + DIGEST:
        raise FinepointError(f"a message came damaged: {len(data):,} bytes, and it announced "
                             f"{PREFIX.size + head + payload + DIGEST:,}")  # fmt: skip
    if sha256(memoryview(data)[:-DIGEST]).digest() != data[-DIGEST:]:
        raise FinepointError("a message came damaged: its bytes are not those that its checksum was taken of")
    try:
        found = json.loads(data[PREFIX.size : PREFIX.size + head])
    except ValueError as error:
        raise FinepointError(f"a message has a head that is no JSON: {error}") from error
    version = found.get("version", 0) if isinstance(found, dict) else None
    if type(version) is not int or version < 0 or not isinstance(found.get("kind"), str):
        raise FinepointError("a message has a head without kind or version")
    return Message(found, data[PREFIX.size + head : -DIGEST])


@dataclass(frozen=True, eq=False)
class Place:
    """Where values go in one weight, and in which dtype they are sent."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    indices: Tensor
    """(k,) flat, ascending: int32 where the weight has no more than 2^31 entries, else int64"""

    @property
    def wide(self) -> bool:
        return prod(self.shape) > 1 << 31

    def told(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, "count": len(self.indices)}


@dataclass(frozen=True, eq=False)
class Places:
    """All places of a model that are written to."""

    each: tuple[Place, ...]

    @cached_property
    def digest(self) -> str:
        """What another message names these places by."""
        found = sha256(json.dumps([place.told() for place in self.each]).encode())
        found.update(self.positions())
        return found.hexdigest()[:32]

    def positions(self) -> bytes:
        return b"".join(raw(place.indices) for place in self.each)

    def split(self, payload: memoryview) -> list[Tensor]:
        """The values of each place: (k,), in the dtype they were sent in.

        Raises:
            FinepointError: there are more bytes than that, or fewer.
        """
        dtypes = [getattr(torch, place.dtype) for place in self.each]
        sizes = [len(place.indices) for place in self.each]
        expected = sum(size * dtype.itemsize for size, dtype in zip(sizes, dtypes, strict=True))
        if len(payload) != expected:
            raise FinepointError(f"a message has {len(payload):,} bytes of values, and its places take {expected:,}")
        return list(_tensors(payload, sizes, dtypes))


def state(
    session: str, version: int, places: Places, values: bytes, base: Fingerprint | None = None,
    form: Mapping[str, Any] | None = None,
) -> bytes:  # fmt: skip
    """What a model holds from this version on, as bytes.

    Args:
        values: those of all places, one after the other.
        base: of the model, for whoever does not know the places yet; with its `form`.
    """
    head: dict[str, Any] = {"kind": "state", "session": session, "version": version, "places": places.digest}
    if base is None:
        return pack(head, values)
    told = [place.told() for place in places.each]
    head |= {"full": True, "weights": told, "base": base.as_json(), "form": dict(form or {})}
    return pack(head, places.positions() + values)


def places_of(message: Message) -> tuple[Places, memoryview]:
    """The places that a full message tells, and its values' bytes.

    Raises:
        FinepointError: it says nothing that could be a model's places.
    """
    told = message.head.get("weights")
    if not isinstance(told, list) or not told or not all(map(_is_place, told)):
        raise FinepointError("a message tells no places that could be a model's")
    if not is_fingerprint(message.head.get("base")) or not isinstance(message.head.get("form"), dict):
        raise FinepointError("a message does not tell the base that it belongs to")
    sizes = [each["count"] for each in told]
    dtypes = [torch.long if prod(each["shape"]) > 1 << 31 else torch.int32 for each in told]
    split = sum(size * dtype.itemsize for size, dtype in zip(sizes, dtypes, strict=True))
    payload = memoryview(message.payload)
    if len(payload) < split:
        raise FinepointError(f"a message has {len(payload):,} bytes, and its positions alone take {split:,}")
    found = []
    for each, indices in zip(told, _tensors(payload[:split], sizes, dtypes), strict=True):
        shape = tuple(each["shape"])
        if int(indices[0]) < 0 or int(indices[-1]) >= prod(shape) or bool((indices[1:] <= indices[:-1]).any()):
            raise FinepointError(f"the positions of {each['name']} in a message are not ascending, or lie outside of "
                                 f"its {prod(shape):,} entries")  # fmt: skip
        found.append(Place(each["name"], shape, each["dtype"], indices))
    places = Places(tuple(found))
    if places.digest != message.head.get("places") or len({place.name for place in found}) != len(found):
        raise FinepointError("a message tells other places than it names")
    return places, payload[split:]


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor on the CPU, without its form."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _tensors(data: memoryview, sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> Iterator[Tensor]:
    at = 0
    for size, dtype in zip(sizes, dtypes, strict=True):
        piece = bytearray(data[at : at + size * dtype.itemsize])  # a copy: torch wants memory it may write to
        yield torch.frombuffer(piece, dtype=dtype)
        at += len(piece)


def _is_place(told: Any) -> bool:
    if not isinstance(told, dict) or not isinstance(told.get("name"), str) or told.get("dtype") not in DTYPES:
        return False
    shape, count = told.get("shape"), told.get("count")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        return False
    return type(count) is int and 0 < count <= prod(shape)
