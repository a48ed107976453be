"""A model that holds, between requests, what a sender elsewhere trains."""

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.adapters.adapter import moved_by_adapters
from finepoint.adapters.entries import gather, same_bits, scatter_
from finepoint.adapters.fingerprint import Fingerprint, Moved, contents_of, differences, fingerprint, stamps, unlike
from finepoint.errors import FinepointError
from finepoint.models.quantised import is_quantised
from finepoint.sync.lines import GONE, Line, dial, host_and_port
from finepoint.sync.messages import Message, Places, pack, places_of, unpack

logger = logging.getLogger(__name__)
Write = tuple[Tensor, Tensor, Tensor, Tensor]
"""A weight, the positions that are written to, what is written, and what was there: each (k,) but the weight."""


@dataclass(frozen=True, eq=False)
class Held:
    """A version as the model holds it, or held it: for each place the base's values and those that were sent."""

    session: str
    version: int
    places: Places
    base: list[Tensor]
    values: list[Tensor]


class Receiver:
    """Keeps a model at what a `Sender` sends; the model must be the base that is trained there.

    Messages come in the background; the model changes in `poll()` and `wait()` alone, in the thread that calls them:
    between two requests. Each version is written as a whole or not at all, and never over another base. While nothing
    comes, or the sender is gone, the model goes on with what it holds.

    Weights of another dtype take the values rounded to theirs, once, and a line says so.

    Args:
        model: with no adapter applied, not in training, not quantised where entries are trained; it stays the same
            object, and nobody else may write to it meanwhile.
        address: the sender's `host:port` or `shm:name`, which may begin to listen later, end and begin again; or a
            `Line`.
        keep: how many earlier versions can be gone back to; each costs the values of its entries.
        name: what the sender calls it by.
        timeout: seconds that sending an answer may take.

    Raises:
        FinepointError: the model is in training or has an adapter in its weights; an address that is none.
    """

    def __init__(
        self, model: nn.Module, address: str | Line, keep: int = 2, name: str | None = None, timeout: float = 30.0
    ) -> None:
        if hasattr(model, "finepoint"):
            raise FinepointError("the model is being trained; a receiver takes a plain copy of the base")
        if moved_by_adapters(model):
            raise FinepointError("an adapter is in the model's weights, which must be the base here; take it out first")
        if isinstance(address, str) and not address.startswith("shm:"):
            host_and_port(address)
        self.model, self.name = model, name or f"{socket.gethostname()}:{os.getpid()}"
        self.base: Fingerprint = fingerprint(contents_of(model))
        self._stamps = stamps(contents_of(model))
        self._most = 32 * sum(weight.numel() for weight in model.parameters()) + (64 << 20)
        self._now: Held | None = None
        self._earlier: deque[Held] = deque(maxlen=keep)
        self._seen = 0  # the highest version of the session that was taken or refused
        self._session = ""
        self._past: set[str] = set()  # sessions that another one has followed
        self._places: Places | None = None
        self._casts_told = False
        self._waiting: list[Message] = []
        self._came, self._telling = threading.Condition(), threading.Lock()
        self._line: Line | None = None
        self._closed = False
        threading.Thread(target=partial(self._follow, address, timeout), daemon=True, name="finepoint.sync").start()

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Receiver({type(self.model).__name__} at version {self.version})"

    @property
    def version(self) -> int:
        """The version in the model's weights, as its sender counts; 0 is the base."""
        return self._now.version if self._now else 0

    def poll(self) -> int | None:
        """Writes the newest whole message that has come into the weights; to be called between requests.

        Returns:
            The version that the model holds from now on; None where nothing newer has come. Whoever keeps keys and
            values of earlier prompts (a prefix cache) has to drop them then.

        Raises:
            FinepointError: what came is of another base, or of weights that this model has not; or the weights were
                replaced by somebody else. The model is as it was.
        """
        with self._came:
            waiting, self._waiting = self._waiting, []
        if not waiting:
            return None
        contents = contents_of(self.model)
        taken: tuple[Message, list[Tensor]] | None = None
        refused: FinepointError | None = None
        for message in waiting:
            try:
                values = self._values_of(message, contents)
            except FinepointError as error:
                self._answer(message, "refused", str(error))
                refused = error
                continue
            if values is not None:
                taken, refused = (message, values), None
        if taken is not None:
            self._apply(*taken, contents)
        if refused is not None:
            raise refused
        return taken and self.version

    def wait(self, version: int = 1, timeout: float = 60.0) -> int:
        """Waits until the model holds this version or a newer one, and returns which.

        Raises:
            FinepointError: as for `poll`; it takes longer than `timeout` seconds.
        """
        until = time.monotonic() + timeout
        while True:
            self.poll()
            if self.version >= version:
                return self.version
            with self._came:
                if not self._waiting and not self._came.wait(max(0.0, until - time.monotonic())):
                    raise FinepointError(f"version {version} has not come within {timeout:g} seconds, and the model "
                                         f"holds {self.version}; does the sender send?")  # fmt: skip

    def rollback(self, version: int = 0) -> None:
        """Goes back to an earlier version, or to the base, bit for bit; newer ones that come are written again.

        Raises:
            FinepointError: a version that is not kept; weights that were replaced by somebody else.
        """
        if version == self.version:
            return
        there = {held.version: held for held in self._earlier}
        if version and version not in there:
            kept = ", ".join(map(str, sorted({0, *there})))
            raise FinepointError(f"version {version} is not kept; there are {kept} (Receiver(.., keep=N) keeps more)")
        if version:
            self._write(there[version], contents_of(self.model))
            while self._earlier and self._earlier[-1].version >= version:
                self._earlier.pop()
        else:
            self._write(None, contents_of(self.model))
            self._earlier.clear()
        self._tell({"kind": "answer", "session": self._session, "version": self._seen, "outcome": "rolled back",
                    "held": self.version})  # fmt: skip

    def close(self) -> None:
        """Ends the line; the model keeps what it holds. `rollback()` beforehand gives back the base."""
        self._closed = True
        self._tell({"kind": "bye"})
        if self._line is not None:
            self._line.close()

    # What comes, in the background.

    def _follow(self, address: str | Line, timeout: float) -> None:
        """Comes to the sender, again and again where it goes, and takes what it sends."""
        while not self._closed:
            try:
                self._line = dial(address, timeout) if isinstance(address, str) else address
                self._greet()
                while not self._closed and self._take(self._line.receive(self._most)):
                    pass
            except GONE:
                pass
            except FinepointError as error:
                logger.warning("%s", error)
            if self._line is not None:
                self._line.close()
            if not isinstance(address, str):
                return
            time.sleep(0.1)

    def _take(self, data: bytes) -> bool:
        """Puts a message with those that wait for the next `poll`, as far as it is needed; False after a goodbye."""
        try:
            message = unpack(data)
        except FinepointError as error:
            logger.warning("%s; it is asked for again", error)
            self._greet()
            return True
        if message.kind != "state":
            return message.kind != "bye"
        with self._came:
            if any(each.session == message.session and each.version >= message.version for each in self._waiting):
                self._ignore(message)
                return True
            # The newest values are enough, and a message with its places needs none before it.
            self._waiting = [each for each in self._waiting
                             if each.session != message.session or (each.full and not message.full)]  # fmt: skip
            self._waiting.append(message)
            self._came.notify_all()
        return True

    def _greet(self) -> None:
        """Says what is held and known here; the sender answers with what is missing."""
        places = self._places.digest if self._places else ""
        self._tell({"kind": "hello", "session": self._session, "version": self.version, "places": places,
                    "name": self.name})  # fmt: skip

    def _tell(self, head: Mapping[str, Any]) -> None:
        if self._line is not None:
            with self._telling, suppress(*GONE):
                self._line.send(pack(head))

    def _answer(self, message: Message, outcome: str, reason: str = "") -> None:
        self._tell({"kind": "answer", "session": message.session, "version": message.version, "outcome": outcome,
                    "held": self.version if message.session == self._session else 0, "reason": reason})  # fmt: skip

    def _ignore(self, message: Message) -> None:
        logger.debug("version %d came again, or late, and was left out", message.version)
        self._answer(message, "ignored", "it is not newer than what has come already")

    # What is written.

    def _values_of(self, message: Message, contents: Mapping[str, Tensor]) -> list[Tensor] | None:
        """The values that a message has for the places that are known from now on; None if it is not newer, or came
        before its places, which the sender is asked for.

        Raises:
            FinepointError: it does not belong to this model; nothing is known from it then.
        """
        another = message.session != self._session
        if (another and message.session in self._past) or (not another and message.version <= self._seen):
            self._ignore(message)
            return None
        if message.full:
            places, payload = places_of(message)
            self._check(message, places, contents)
        elif self._places is None or another or self._places.digest != message.head.get("places"):
            self._greet()
            return None
        else:
            places, payload = self._places, memoryview(message.payload)
        values = self._cast(places, places.split(payload), contents)
        if another:
            self._past.add(self._session)
            self._session, self._earlier = message.session, deque(maxlen=self._earlier.maxlen)
        self._places, self._seen = places, message.version
        return values

    def _check(self, message: Message, places: Places, weights: Mapping[str, Tensor]) -> None:
        """Refuses places that are none of this model's, and another base.

        Raises:
            FinepointError: they are; the weight is named.
        """
        for place in places.each:
            if not isinstance(weights.get(place.name), nn.Parameter):
                raise FinepointError(f"values came for {place.name}, which the model has not")
            if tuple(weights[place.name].shape) != place.shape:
                raise FinepointError(f"{place.name}: shape {tuple(weights[place.name].shape)} in the model, "
                                     f"{place.shape} where it is trained")  # fmt: skip
            if is_quantised(weights[place.name]):
                raise FinepointError(f"{place.name} is quantised: none of its entries can be set on its own; load the "
                                     "receiver's model dequantised")  # fmt: skip
        known = Fingerprint.of_json(message.head["base"])
        base = self.base if known.one_in == self.base.one_in else self._beneath(known.one_in)
        if others := differences(message.head["form"], self.model, [place.name for place in places.each]):
            raise FinepointError(f"what is trained does not fit this model: {others[0]}")
        if found := unlike(known, base):
            raise FinepointError(f"the model is not the base that is trained: {found[0][0]} differs, and {len(found)} "
                                 "weights in all; load that base, or name this one's dtype where it is the same base "
                                 "rounded: Sender(.., dtype=torch.bfloat16)")  # fmt: skip

    def _cast(self, places: Places, values: list[Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
        """Values in the dtypes and on the devices of this model's weights.

        Raises:
            FinepointError: one is too large a number for its weight's dtype.
        """
        found = [sent.to(weights[place.name].device, weights[place.name].dtype)
                 for place, sent in zip(places.each, values, strict=True)]  # fmt: skip
        for place, sent, cast in zip(places.each, values, found, strict=True):
            if sent.dtype == cast.dtype:
                continue
            here = str(cast.dtype).removeprefix("torch.")
            if not bool((cast.cpu().isfinite() | ~sent.isfinite()).all()):
                raise FinepointError(f"{place.name}: a value that was trained in {place.dtype} is too large for {here}")
            if not self._casts_told:
                self._casts_told = True
                exact = torch.promote_types(sent.dtype, cast.dtype) == cast.dtype
                logger.warning("weights are %s here and %s where they are trained: values are %s", here, place.dtype,
                               "the same" if exact else "rounded, so that the two models differ")  # fmt: skip
        return found

    def _apply(self, message: Message, values: list[Tensor], contents: Mapping[str, Tensor]) -> None:
        assert self._places is not None
        before = self._now
        base = before.base if before is not None and before.places is self._places else []
        try:
            self._write(Held(message.session, message.version, self._places, base, values), contents)
        except FinepointError as error:
            self._answer(message, "refused", str(error))
            raise
        if before is not None and before.session == message.session:
            self._earlier.append(before)
        self._answer(message, "applied")

    def _write(self, then: Held | None, contents: Mapping[str, Tensor]) -> None:
        """Has the model hold a version, or the base, instead of what it holds: all of it, or nothing of it.

        Raises:
            FinepointError: the weights were replaced by somebody else.
        """
        self._refuse_other_weights(contents)
        now, done = self._now, list[Write]()
        stays = now is not None and then is not None and now.places is then.places

        def write(held: Held, values: list[Tensor], before: list[Tensor]) -> None:
            for place, value, old in zip(held.places.each, values, before, strict=True):
                done.append((contents[place.name], place.indices, value, old))
                scatter_(contents[place.name], place.indices, value)

        try:
            if now is not None and not stays:
                write(now, now.base, now.values)
            if then is not None:
                if not then.base:  # the model holds the base everywhere now
                    then.base.extend(gather(contents[place.name], place.indices) for place in then.places.each)
                write(then, then.values, now.values if stays and now is not None else then.base)
        except BaseException:
            for weight, indices, _, old in reversed(done):
                scatter_(weight, indices, old)
            raise
        finally:
            self._stamps = stamps(contents)
        self._now = then

    def _refuse_other_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Looks at every entry that was written, and at all weights where something else has written to one.

        Raises:
            FinepointError: it is not what it was.
        """
        told = "was written to, or replaced, by somebody else; load the base anew, and make another receiver of it"
        if self._now is not None:
            for place, values in zip(self._now.places.each, self._now.values, strict=True):
                if place.name not in weights or not same_bits(gather(weights[place.name], place.indices), values):
                    raise FinepointError(f"{place.name} {told}")
        if stamps(weights) != self._stamps:
            for name, _ in unlike(self.base, self._beneath(self.base.one_in)):
                raise FinepointError(f"{name} {told}")

    def _beneath(self, one_in: int) -> Fingerprint:
        """The fingerprint of the base beneath what the model holds."""
        now = self._now
        held = zip(now.places.each, now.base, now.values, strict=True) if now else ()
        moved = [Moved(place.name, place.indices, base, values) for place, base, values in held]
        return fingerprint(contents_of(self.model), moved, one_in)
