"""Ways for bytes: TCP, memory that two processes share, a torch.distributed group.

A line takes whole messages and gives whole messages, in order; it neither knows nor trusts what they say. Another way
is another class with these three methods.
"""

import fcntl
import logging
import mmap
import os
import re
import secrets
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from finepoint.errors import FinepointError
from finepoint.sync.messages import DIGEST, PREFIX, length_after

logger = logging.getLogger(__name__)
GONE = (OSError, EOFError, RuntimeError)  # what a line raises whose other end is; torch.distributed: RuntimeError
RING = 1 << 20  # bytes on their way through shared memory, in each direction
RING_HEAD = struct.Struct("<QQ")


class Line(Protocol):
    """Carries messages, both ways, between two processes."""

    def send(self, message: bytes) -> None:
        """Hands a message over; any of `GONE` if the other end is gone or takes nothing."""

    def receive(self, most: int) -> bytes:
        """Waits for the next message; any of `GONE` if the other end is gone.

        Raises:
            FinepointError: no message of ours, or one of more than `most` bytes.
        """

    def close(self) -> None:
        """Ends it; whoever waits in `receive` is woken."""


class Listener(Protocol):
    """Where receivers come to."""

    address: str

    def accept(self) -> Line:
        """Waits for the next one; any of `GONE` once it is closed."""

    def close(self) -> None: ...


def listen(address: str, timeout: float) -> Listener:
    """Where receivers reach a sender: `host:port` (port 0: any that is free), or `shm:name` on one machine.

    Raises:
        FinepointError: it cannot be had.
    """
    try:
        return SharedListener(address[4:], timeout) if address.startswith("shm:") else TcpListener(address, timeout)
    except OSError as error:
        raise FinepointError(f"cannot listen at {address!r}: {error.strerror or error}; give another port or name, or "
                             "close the sender that has it") from error  # fmt: skip


def dial(address: str, timeout: float) -> Line:
    """A line to the sender at an address; OSError where none is there."""
    if address.startswith("shm:"):
        return shared_line(address[4:], timeout)
    return TcpLine(socket.create_connection(host_and_port(address), timeout=timeout), timeout)


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of `host:port`; this machine where there is no host.

    Raises:
        FinepointError: it is something else.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise FinepointError(f"the address is {address!r}; expected host:port, as 127.0.0.1:5555, or shm:name")
    return host.strip("[]") or "127.0.0.1", int(port)


def _framed(read: Callable[[int], bytes], most: int) -> bytes:
    prefix = read(PREFIX.size)
    return prefix + read(length_after(prefix, most))


# TCP.


class TcpLine:
    """A connected socket."""

    def __init__(self, connected: socket.socket, timeout: float) -> None:
        connected.settimeout(None)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Of sending alone: to wait for a message may take as long as it likes.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", max(1, round(timeout)), 0))
        self._socket = connected

    def send(self, message: bytes) -> None:
        self._socket.sendall(message)

    def receive(self, most: int) -> bytes:
        return _framed(self._exactly, most)

    def _exactly(self, count: int) -> bytes:
        found = bytearray(count)
        view, got = memoryview(found), 0
        while got < count:
            size = self._socket.recv_into(view[got:])
            if not size:
                raise EOFError("the other end is gone")
            got += size
        return bytes(found)

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class TcpListener:
    """A port at which receivers connect."""

    def __init__(self, address: str, timeout: float) -> None:
        host, port = host_and_port(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket, self._timeout = socket.create_server((host, port), family=family), timeout
        host, port = self._socket.getsockname()[:2]
        self.address = f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
        if not (host.startswith("127.") or host == "::1"):
            logger.warning("listening at %s: whoever reaches it is sent what is trained, for there is no password and "
                           "no encryption", self.address)  # fmt: skip

    def accept(self) -> Line:
        return TcpLine(self._socket.accept()[0], self._timeout)

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


# Shared memory. A folder in memory has a file for each receiver, which the receiver makes: two rings of bytes, one for
# each direction. Whoever lives holds a lock on a file of its own, which the system takes from the dead.


class Ring:
    """Bytes on their way from one process to one other: how many were written, how many read, and the last of them."""

    def __init__(self, memory: mmap.mmap, start: int) -> None:
        self._memory, self._start = memory, start

    def _count(self, which: int) -> int:
        return int(struct.unpack_from("<Q", self._memory, self._start + 8 * which)[0])

    def put(self, data: memoryview) -> int:
        """Puts in as many bytes as there is room for, and says how many."""
        written = self._count(0)
        at, size = written % RING, min(len(data), RING - (written - self._count(1)))
        size = min(size, RING - at)
        first = self._start + RING_HEAD.size + at
        self._memory[first : first + size] = bytes(data[:size])
        struct.pack_into("<Q", self._memory, self._start, written + size)
        return size

    def take(self, most: int) -> bytes:
        """Takes out as many bytes as there are, `most` at most."""
        read = self._count(1)
        at, size = read % RING, min(most, self._count(0) - read)
        first, size = self._start + RING_HEAD.size + at, min(size, RING - at)
        found = bytes(self._memory[first : first + size])
        struct.pack_into("<Q", self._memory, self._start + 8, read + size)
        return found


class SharedLine:
    """Two rings in a file in memory."""

    def __init__(self, path: Path, file: int, mine: int, alive: Callable[[], bool], timeout: float) -> None:
        self._path, self._file, self._alive, self._timeout = path, file, alive, timeout
        memory = mmap.mmap(file, 2 * (RING_HEAD.size + RING))
        rings = [Ring(memory, 0), Ring(memory, RING_HEAD.size + RING)]
        self._out, self._in = rings[mine], rings[1 - mine]
        self._closed = False

    def send(self, message: bytes) -> None:
        rest, pause = memoryview(message), _Pause(self, self._timeout)
        while len(rest):
            size = self._out.put(rest)
            rest = rest[size:]
            pause.after(size)

    def receive(self, most: int) -> bytes:
        return _framed(self._exactly, most)

    def _exactly(self, count: int) -> bytes:
        found, pause = bytearray(), _Pause(self, None)
        while len(found) < count:
            piece = self._in.take(count - len(found))
            found += piece
            pause.after(len(piece))
        return bytes(found)

    def check(self) -> None:
        """Raises EOFError where the line is closed or the other end gone."""
        if self._closed or not os.fstat(self._file).st_nlink or not self._alive():
            raise EOFError("the other end is gone")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._path.unlink(missing_ok=True)
            os.close(self._file)  # and with it our lock


class _Pause:
    """Waits a little longer each time that nothing moves, and looks whether anybody is there."""

    def __init__(self, line: SharedLine, timeout: float | None) -> None:
        self._line, self._timeout = line, timeout
        self._length, self._since = 5e-5, time.monotonic()

    def after(self, moved: int) -> None:
        if moved:
            self._length, self._since = 5e-5, time.monotonic()
            return
        if self._length > 2e-3:
            self._line.check()
            if self._timeout is not None and time.monotonic() - self._since > self._timeout:
                raise TimeoutError("the other end takes nothing")
        time.sleep(self._length)
        self._length = min(2 * self._length, 4e-3)


class SharedListener:
    """A folder in memory in which receivers leave files."""

    def __init__(self, name: str, timeout: float) -> None:
        self.address, self._timeout = f"shm:{name}", timeout
        self._folder, self._known = shared_folder(name), set[str]()
        self._lock = os.open(self._folder / "sender", os.O_RDWR | os.O_CREAT, 0o600)
        for _ in range(20):  # a receiver looks at the lock for a moment
            if _locked(self._lock):
                break
            time.sleep(0.01)
        else:
            os.close(self._lock)
            raise OSError("another sender listens there")
        for old in self._folder.glob("line-*"):  # of an earlier sender: whoever waits there comes again
            old.unlink(missing_ok=True)

    def accept(self) -> Line:
        while True:
            if not self._folder.is_dir():
                raise EOFError("closed")
            for path in sorted(self._folder.glob("line-*")):
                if path.name not in self._known:
                    self._known.add(path.name)
                    with suppress(FileNotFoundError):
                        file = os.open(path, os.O_RDWR)
                        return SharedLine(path, file, 0, lambda held=file: not _locked(held), self._timeout)  # type: ignore[misc]
            time.sleep(0.02)

    def close(self) -> None:
        for path in [*self._folder.glob("line-*"), self._folder / "sender"]:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()
        with suppress(OSError):
            os.close(self._lock)


def shared_line(name: str, timeout: float) -> Line:
    """A line to the sender of this name on this machine; OSError where there is none."""
    folder = shared_folder(name, make=False)
    sender = os.open(folder / "sender", os.O_RDWR)
    os.close(sender)
    if not _held(folder / "sender"):
        raise ConnectionRefusedError("its sender is gone")
    unfinished = folder / f"new-{secrets.token_hex(8)}"
    file = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.ftruncate(file, 2 * (RING_HEAD.size + RING))
    fcntl.flock(file, fcntl.LOCK_EX)
    path = folder / f"line-{unfinished.name[4:]}"
    unfinished.rename(path)
    return SharedLine(path, file, 1, lambda: _held(folder / "sender"), timeout)


def shared_folder(name: str, make: bool = True) -> Path:
    """The folder behind `shm:name`, which nobody else may look into.

    Raises:
        FinepointError: a name that is none; the folder is another user's.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise FinepointError(f"the address is 'shm:{name}'; expected a name of letters, digits, dots and dashes")
    memory = Path("/dev/shm")
    folder = (memory if memory.is_dir() else Path(tempfile.gettempdir())) / f"finepoint-{os.getuid()}-{name}"
    if make:
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise FinepointError(f"{folder} is another user's; take another name")
    return folder


def _locked(file: int) -> bool:
    """Whether the lock could be had: nobody else who lives holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _held(path: Path) -> bool:
    """Whether somebody who lives holds a lock on a file."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _locked(file)
    finally:
        os.close(file)


# torch.distributed.


class GroupLine:
    """Messages between two ranks of a torch.distributed group on the CPU (gloo).

    Give it a group of its own: what else is sent to this rank there would be taken for messages.

    Args:
        peer: the other's rank, among all processes.
        group: e.g. `torch.distributed.new_group(backend="gloo")`; the whole world where not given.

    Raises:
        FinepointError: torch.distributed is not in use, or the group's backend cannot send from the CPU.
    """

    def __init__(self, peer: int, group: Any = None) -> None:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            raise FinepointError("torch.distributed is not in use; call init_process_group first, or give host:port")
        if "gloo" not in (backend := distributed.get_backend(group)):
            raise FinepointError(f"the group's backend is {backend}; give one made with "
                                 "torch.distributed.new_group(backend='gloo')")  # fmt: skip
        self._peer, self._group = peer, group

    def send(self, message: bytes) -> None:
        for tensor in (torch.tensor([len(message)]), torch.frombuffer(bytearray(message), dtype=torch.uint8)):
            torch.distributed.send(tensor, self._peer, self._group)

    def receive(self, most: int) -> bytes:
        size = torch.zeros(1, dtype=torch.long)
        torch.distributed.recv(size, self._peer, self._group)
        if not PREFIX.size + DIGEST <= int(size) <= most + PREFIX.size + DIGEST:
            raise FinepointError(f"a message of {int(size):,} bytes was announced, where at most {most:,} are expected")
        found = torch.empty(int(size), dtype=torch.uint8)
        torch.distributed.recv(found, self._peer, self._group)
        return found.numpy().tobytes()

    def close(self) -> None:
        """Nothing: whoever waits in `receive` does so until a message comes, or the process ends."""
