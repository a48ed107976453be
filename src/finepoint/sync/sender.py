"""What a tuner trains, sent to models elsewhere."""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finepoint.adapters.entries import scatter_
from finepoint.adapters.fingerprint import Fingerprint, contents_of, fingerprint_of, form_of
from finepoint.errors import FinepointError
from finepoint.models.quantised import float_values
from finepoint.runtime import distributed
from finepoint.sync.lines import GONE, Line, Listener, listen
from finepoint.sync.messages import Message, Place, Places, pack, raw, state, unpack
from finepoint.tuner.sparse_weight import Moved, SparseWeight
from finepoint.tuner.tuner import SparseTuner

logger = logging.getLogger(__name__)
LONGEST_ANSWER = 1 << 20  # bytes of what a receiver may say


@dataclass
class Peer:
    """A receiver, as its sender knows it."""

    line: Line
    name: str
    ready: bool = False
    """whether it has said that it is there"""
    places: str = ""
    """the digest of the places that it knows"""
    held: int = 0
    """the version of this session in its weights"""
    refused: tuple[int, str] | None = None
    """a version that it could not take, and why"""


@dataclass(frozen=True)
class Sent:
    """The newest version, for whoever comes later too."""

    version: int
    places: Places
    values: bytes


class Sender:
    """Sends what is trained to every `Receiver` that comes to its address.

    `send()` after an optimizer's step sends the exact values that the trained entries hold now, and what has settled:
    positions the first time and after entries were chosen anew, then values alone. Receivers may come, go, be killed
    and come again: each is sent what it lacks. Nobody is asked for a password, so whoever reaches the address is sent
    what is trained; the default is this machine alone.

    With several processes the first one sends; its deltas must be whole there.

    Args:
        tuner: of a model that lies on its plain base, with no adapter applied beneath.
        addresses: `host:port` (port 0: one that is free), `shm:name` for shared memory on this machine, or a `Line` to
            one receiver, such as a `GroupLine`.
        dtype: of the receivers' weights, where they hold this base rounded to it: values are rounded once, here.
        timeout: seconds that a receiver may take to take a message before it is given up.

    Raises:
        FinepointError: an address that cannot be had; an adapter beneath; deltas that FSDP2 has sharded.
    """

    tuner: SparseTuner
    addresses: tuple[str, ...]
    version: int

    def __init__(
        self, tuner: SparseTuner, *addresses: str | Line, dtype: torch.dtype | None = None, timeout: float = 30.0
    ) -> None:
        if tuner.beneath:
            raise FinepointError("an adapter is applied beneath what is trained, which receivers do not have; fold it "
                                 "into the base (finepoint export --format merged) and train that")  # fmt: skip
        if any(distributed.is_sharded(delta) for delta in tuner.parameters()):
            raise FinepointError("FSDP2 has sharded the deltas; shard the model before making the tuner, as "
                                 "`finepoint train` does")  # fmt: skip
        self.tuner, self.version = tuner, 0
        self._dtype, self._session = dtype, secrets.token_hex(8)
        self._base = tuner.base if dtype is None else rounded_base(tuner, dtype)
        self._form = form_of(tuner.model)
        self._sent: Sent | None = None
        self._peers: list[Peer] = []
        self._changed = threading.Condition(threading.RLock())
        self._closed = False
        given = addresses or ("127.0.0.1:0",)
        self._listeners: list[Listener] = []
        for address in (each for each in given if isinstance(each, str)):
            try:
                self._listeners.append(listen(address, timeout))
            except FinepointError:
                self.close()
                raise
        self.addresses = tuple(listener.address for listener in self._listeners)
        for listener in self._listeners:
            _in_background(partial(self._accept, listener))
        for line in (each for each in given if not isinstance(each, str)):
            self._meet(line)

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        where = ", ".join(self.addresses) or "lines of its own"
        return f"Sender({where}, version {self.version}, {len(self.receivers)} receivers)"

    @property
    def address(self) -> str:
        """The first address at which receivers reach it."""
        return self.addresses[0]

    @property
    def receivers(self) -> dict[str, int]:
        """Who is there now, and the version that each holds."""
        with self._changed:
            return {peer.name: peer.held for peer in self._peers if peer.ready}

    def send(self) -> int:
        """Sends what the entries hold now to all receivers, which take it when they next look (`poll`).

        Returns:
            The version, from 1: that which `wait` waits for.

        Raises:
            FinepointError: the sender is closed; a value is too large for the receivers' dtype; nothing is sent then.
        """
        if self._closed:
            raise FinepointError("the sender is closed; make another one")
        entries = [each for each in self.tuner.entries.values() if len(each.indices) or len(each.settled_indices)]
        known = [each.known() for each in entries]
        values = b"".join(self._values(each, now) for each, now in zip(entries, known, strict=True))
        with self._changed:
            places = self._places(entries, known)
            self.version += 1
            self._sent = Sent(self.version, places, values)
            for peer in [peer for peer in self._peers if peer.ready]:
                self._send_to(peer)
            return self.version

    def wait(self, version: int | None = None, receivers: int = 1, timeout: float = 60.0) -> None:
        """Waits until a version is in the weights of all receivers that are there, and of so many at least.

        Args:
            version: the newest one where not given.

        Raises:
            FinepointError: a receiver refuses it, and why; it takes longer than `timeout` seconds.
        """
        version = self.version if version is None else version
        until = time.monotonic() + timeout
        with self._changed:
            while True:
                ready = [peer for peer in self._peers if peer.ready]
                for peer in ready:
                    if peer.refused and peer.refused[0] >= version:
                        raise FinepointError(f"receiver {peer.name} refused version {version}: {peer.refused[1]}")
                held = [peer for peer in ready if peer.held >= version]
                if len(held) >= receivers and len(held) == len(ready):
                    return
                if not self._changed.wait(max(0.0, until - time.monotonic())) and time.monotonic() >= until:
                    raise FinepointError(f"after {timeout:g} seconds {len(held)} of {len(ready)} receivers hold "
                                         f"version {version}, and {receivers} are expected; do they poll?")  # fmt: skip

    def close(self) -> None:
        """Says goodbye; receivers keep what they hold, and wait for another sender at the same address."""
        with self._changed:
            self._closed = True
            for peer in list(self._peers):
                with suppress(*GONE):
                    peer.line.send(pack({"kind": "bye"}))
                self._forget(peer)
        for listener in self._listeners:
            listener.close()

    # Values and places.

    def _values(self, entries: SparseWeight, known: Moved) -> bytes:
        values = entries.meant(known)
        if self._dtype is not None and self._dtype != values.dtype:
            sent = values.to(self._dtype)
            if not bool((sent.isfinite() | ~values.isfinite()).all()):
                told = str(self._dtype).removeprefix("torch.")
                raise FinepointError(f"{entries.name}: a trained value is too large a number for {told}")
            values = sent
        return raw(values.cpu())

    def _places(self, entries: list[SparseWeight], known: list[Moved]) -> Places:
        """Those sent last, where the entries are still the same."""
        if self._sent is not None and len(entries) == len(self._sent.places.each):
            pairs = zip(entries, known, self._sent.places.each, strict=True)
            if all(one.name == place.name and _same(now.indices, place.indices) for one, now, place in pairs):
                return self._sent.places
        return Places(tuple(self._place(one, now) for one, now in zip(entries, known, strict=True)))

    def _place(self, entries: SparseWeight, known: Moved) -> Place:
        shape = tuple(entries.shape)
        wide = torch.long if entries.weight.numel() > 1 << 31 else torch.int32
        dtype = str(self._dtype or known.base.dtype).removeprefix("torch.")
        return Place(entries.name, shape, dtype, known.indices.detach().to("cpu", wide, copy=True))

    # Receivers.

    def _accept(self, listener: Listener) -> None:
        with suppress(*GONE):
            while not self._closed:
                self._meet(listener.accept())

    def _meet(self, line: Line) -> None:
        with self._changed:
            peer = Peer(line, f"{len(self._peers) + 1}")
            self._peers.append(peer)
        _in_background(partial(self._listen, peer))

    def _listen(self, peer: Peer) -> None:
        """Takes what a receiver says, until it is gone."""
        try:
            while True:
                message = unpack(peer.line.receive(LONGEST_ANSWER))
                if message.kind == "bye":
                    break
                self._take(peer, message)
        except GONE:
            pass
        except FinepointError as error:
            logger.warning("receiver %s is let go: %s", peer.name, error)
        with self._changed:
            self._forget(peer)

    def _take(self, peer: Peer, message: Message) -> None:
        with self._changed:
            ours = message.session == self._session
            if message.kind == "hello":
                peer.name, peer.ready = str(message.head.get("name") or peer.name), True
                peer.places = str(message.head.get("places", "")) if ours else ""
                peer.held = message.version if ours else 0
                if self._sent is not None and not (ours and peer.held == self._sent.version):
                    self._send_to(peer)
            elif message.kind == "answer" and ours:
                peer.held = int(message.head.get("held", 0))
                if message.head.get("outcome") == "refused":
                    peer.refused = message.version, str(message.head.get("reason", ""))
                    peer.places = ""  # whatever it lacks it is told again
            self._changed.notify_all()

    def _send_to(self, peer: Peer) -> None:
        assert self._sent is not None
        sent, full = self._sent, peer.places != self._sent.places.digest
        told = (self._base, self._form) if full else ()
        try:
            peer.line.send(state(self._session, sent.version, sent.places, sent.values, *told))
            peer.places = sent.places.digest
        except GONE as error:
            logger.warning("receiver %s is gone: %s", peer.name, error)
            self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        if peer in self._peers:
            self._peers.remove(peer)
        peer.line.close()
        self._changed.notify_all()


def rounded_base(tuner: SparseTuner, dtype: torch.dtype) -> Fingerprint:
    """The fingerprint of the tuner's base with everything rounded to a dtype, made weight by weight."""
    known = {id(entries.weight): entries.known() for entries in tuner.entries.values()}
    readers: dict[int, Callable[[], Tensor]] = {}

    def read(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            return float_values(tensor).to(dtype)
        values = float_values(tensor).clone()
        scatter_(values, known[id(tensor)].indices, known[id(tensor)].base)
        return values.to(dtype)

    contents = contents_of(tuner.model)
    for tensor in contents.values():
        readers.setdefault(id(tensor), partial(read, tensor))
    return fingerprint_of({name: readers[id(tensor)] for name, tensor in contents.items()}, tuner.base.one_in)


def _same(now: Tensor, sent: Tensor) -> bool:
    return now.shape == sent.shape and torch.equal(now.cpu().to(sent.dtype), sent)


def _in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True, name="finepoint.sync").start()
