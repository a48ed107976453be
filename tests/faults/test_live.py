"""kill -9 at random moments of whoever sends and of whoever follows, and lines that break within a message, bring it
twice, late or damaged: a model holds one of the versions that were sent, to the bit, and never goes back by itself."""

import random
import socket
import threading
import time
from contextlib import suppress

import pytest

from finepoint import sync
from finepoint.sync.messages import PREFIX, length_after
from sync_worker import digest, move_, tuned
from test_sync import WORKER, until

KILLS = {"receiver": 70, "sender": 70, "line": 60}
"""200 in all"""


@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("address", ["127.0.0.1:0", "shm:test-kills"])
def test_receivers_killed_at_any_moment_have_held_versions_as_they_were_sent(address, warm, tmp_path):
    draw, seen = random.Random(address), 0
    tuner, _ = tuned()
    expected, going = {}, threading.Event()
    with sync.Sender(tuner, address, timeout=5) as sender:

        def send():
            while not going.is_set():
                move_(tuner, sender.version + 1)
                expected[sender.version + 1] = digest(tuner.model)
                sender.send()
                time.sleep(0.003)

        sending = threading.Thread(target=send)
        sending.start()
        try:
            for kill in range(KILLS["receiver"] // 2):
                said = tmp_path / str(kill)
                started = warm.start("python", WORKER, "receive", sender.address, 10**9, folder=tmp_path, said=said)
                until(lambda said=said: said.exists() and "\n" in said.read_text(), 120)
                time.sleep(draw.uniform(0, 0.2))
                started.kill()
                started.wait()
                held = [line.split() for line in said.read_text().splitlines() if len(line.split()) == 2]
                assert all(expected[int(version)] == found for version, found in held if len(found) == 64)
                assert [int(version) for version, _ in held] == sorted({int(version) for version, _ in held})
                seen += len(held)
        finally:
            going.set()
            sending.join()
        until(lambda: not sender.receivers, 60)
    assert seen > KILLS["receiver"]


@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("address", ["tcp", "shm:test-kills-of-senders"])
def test_a_receiver_holds_a_version_of_each_sender_that_was_killed(address, warm, tmp_path):
    draw = random.Random(address)
    if address == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
    tuner, other = tuned()
    with sync.Receiver(other, address) as receiver:
        for kill in range(KILLS["sender"] // 2):
            session, seed = receiver._session, 1000 * (kill + 1)
            said = tmp_path / str(kill)
            started = warm.start("python", WORKER, "send", address, seed, 10**9, folder=tmp_path, said=said)
            end = time.monotonic() + draw.uniform(0, 0.3)
            while receiver._session == session or time.monotonic() < end:
                receiver.poll()
                if receiver._session != session:
                    move_(tuner, seed + receiver.version)
                    assert digest(other) == digest(tuner.model)
            started.kill()
            started.wait()
            for _ in range(20):  # what was on its way
                receiver.poll()
                time.sleep(0.005)
            move_(tuner, seed + receiver.version)
            assert digest(other) == digest(tuner.model)


class Relay:
    """A line between the two that breaks within a message, and brings messages twice, late, damaged or again."""

    def __init__(self, address, seed):
        host, _, port = address.rpartition(":")
        self.there, self.draw = (host, int(port)), random.Random(seed)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        self.kept, self.cuts, self.faults = [], 0, 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with suppress(OSError), self.server:
            while True:
                here, _ = self.server.accept()
                threading.Thread(target=self.carry, args=(here,), daemon=True).start()

    def carry(self, here):
        with suppress(OSError), here, socket.create_connection(self.there) as there:
            answers = threading.Thread(target=self.answers, args=(here, there), daemon=True)
            answers.start()
            with there.makefile("rb") as stream:
                self.pass_on(stream, here)
            for each in (there, here):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            answers.join()

    def answers(self, source, target):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def pass_on(self, stream, target):
        """Message by message; a cut one ends the line."""
        with suppress(OSError):
            while len(prefix := stream.read(PREFIX.size)) == PREFIX.size:
                message = prefix + stream.read(length_after(prefix, 1 << 30))
                self.kept = [*self.kept[-8:], message]
                what = self.draw.choice(["whole", "whole", "whole", "cut", "twice", "old", "late", "damaged"])
                self.faults += what != "whole"
                match what:
                    case "cut":
                        self.cuts += 1
                        target.sendall(message[: self.draw.randrange(len(message))])
                        break
                    case "twice":
                        target.sendall(message + message)
                    case "old":
                        target.sendall(self.draw.choice(self.kept) + message)
                    case "late":
                        target.sendall(message + self.draw.choice(self.kept))
                    case "damaged":
                        damaged = bytearray(message)
                        damaged[self.draw.randrange(PREFIX.size, len(damaged))] ^= 1 << self.draw.randrange(8)
                        target.sendall(damaged)
                    case _:
                        target.sendall(message)


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_a_line_that_breaks_within_messages_and_repeats_them_leaves_versions_as_they_were_sent():
    tuner, other = tuned()
    expected, last = {}, 0
    with sync.Sender(tuner, "127.0.0.1:0", timeout=5) as sender:
        relay = Relay(sender.address, 0)
        with sync.Receiver(other, relay.address) as receiver:
            while relay.cuts < KILLS["line"]:
                move_(tuner, sender.version + 1)
                expected[sender.version + 1] = digest(tuner.model)
                sender.send()
                time.sleep(relay.draw.uniform(0, 0.02))
                if receiver.poll():
                    assert receiver.version > last
                    assert digest(other) == expected[receiver.version]
                    last = receiver.version
            assert last > 1
            assert relay.faults > 3 * KILLS["line"]
            relay.server.shutdown(socket.SHUT_RDWR)
        receiver.rollback()
        _, base = tuned()
        assert digest(other) == digest(base)
