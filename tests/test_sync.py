"""Live models: a receiver holds one of the versions that its sender had, to the bit, whatever happens to the messages,
to the two processes, or to the entries that are chosen."""

import copy
import itertools
import json
import queue
import random
import socket
import time
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import finepoint
from conftest import assert_same_bits, random_batches, snapshot, tiny_llama
from finepoint import sync
from finepoint.errors import FinepointError
from finepoint.sync import receiver as receiver_module
from finepoint.sync.messages import DIGEST, PREFIX, pack, unpack
from sync_worker import digest, logits, move_, tuned

WORKER = Path(__file__).parent / "sync_worker.py"


class Mailbox:
    """A line on which a test is the postman: what was sent lies in `out`, what is put into `into` arrives."""

    def __init__(self):
        self.out, self.into = [], queue.Queue()

    def send(self, message):
        self.out.append(message)

    def receive(self, most):
        message = self.into.get()
        if message is None:
            raise EOFError
        return message

    def close(self):
        self.into.put(None)


def versions(dtype=torch.float32, count=3, change=lambda tuner, step: None):
    """The messages of so many versions, with the digest of the model that each stands for; 0 is the base."""
    tuner, other = tuned(dtype)
    line, expected = Mailbox(), {0: digest(other)}
    sender = sync.Sender(tuner, line)
    line.into.put(pack({"kind": "hello"}))
    until(lambda: sender.receivers)
    for step in range(1, count + 1):
        move_(tuner, step)
        change(tuner, step)
        sender.send()
        expected[step] = digest(tuner.model)
    assert len(line.out) == count
    messages = dict(enumerate(line.out, 1))
    sender.close()
    return messages, expected, other


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


class Fed:
    """A receiver whose messages arrive when the test says so."""

    def __init__(self, model, **settings):
        self.line = Mailbox()
        self.receiver = sync.Receiver(model, self.line, **settings)

    def feed(self, *messages):
        """They arrive, then the receiver looks."""
        for message in messages:
            self.line.into.put(message)
        marks = len(self.line.out)
        self.line.into.put(b"a mark, which is asked for again once all before it has been taken in")
        until(lambda: any(self.kind(sent) == "hello" for sent in self.line.out[marks:]))
        return self.receiver.poll()

    def kind(self, sent):
        return unpack(sent).kind

    def answers(self):
        return [(head["version"], head["outcome"]) for head in (unpack(sent).head for sent in self.line.out)
                if head["kind"] == "answer"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("address", ["127.0.0.1:0", "shm:test-exact"])
def test_a_receiver_holds_what_was_trained_to_the_bit_after_every_step(address, dtype):
    tuner, other = tuned(dtype)
    base = snapshot(other)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    with sync.Sender(tuner, address) as sender, sync.Receiver(other, sender.address, name="other") as receiver:
        for batch in random_batches(3):
            tuner.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            version = sender.send()
            assert receiver.wait(version) == version
            sender.wait(version)
            assert torch.equal(logits(tuner.model), logits(other))  # log-probabilities differ by nothing at all
            assert digest(tuner.model) == digest(other)
        assert sender.receivers == {"other": 3}
        assert receiver.poll() is None
        receiver.rollback()
        assert_same_bits(base, snapshot(other))


def test_positions_are_sent_once_and_then_two_bytes_an_entry():
    messages, _, _ = versions(torch.bfloat16)
    sizes = [len(unpack(message).payload) for message in messages.values()]
    tuner, _ = tuned()
    assert sizes == [tuner.count * 6, tuner.count * 2, tuner.count * 2]
    assert len(messages[2]) < tuner.count * 2 + 300


def test_messages_in_any_order_and_twice_leave_one_of_the_versions_and_never_an_older_one():
    messages, expected, other = versions()
    for order in itertools.permutations([1, 1, 2, 3]):
        model = copy.deepcopy(other)
        fed, held = Fed(model, keep=0), 0
        for version in order:
            fed.feed(messages[version])
            assert fed.receiver.version >= held
            held = fed.receiver.version
            assert digest(model) == expected[held]
        first = order.index(1)  # without its places no version can be written
        assert held == max(order[first:])
        fed.receiver.close()


def test_what_arrives_between_two_polls_is_written_once_and_newest():
    messages, expected, other = versions(count=5)
    fed = Fed(other)
    assert fed.feed(*messages.values(), messages[2]) == 5
    assert digest(other) == expected[5]
    assert fed.answers() == [(2, "ignored"), (5, "applied")]


def test_cut_and_damaged_messages_change_nothing_and_are_asked_for_again():
    messages, expected, other = versions()
    fed = Fed(other)
    draw = random.Random(0)
    for damaged in (messages[1][: draw.randrange(len(messages[1]))] for _ in range(20)):
        assert fed.feed(damaged) is None
    assert fed.feed(messages[1]) == 1
    for _ in range(60):
        place, damaged = draw.randrange(len(messages[2])), bytearray(messages[2])
        damaged[place] ^= 1 << draw.randrange(8)
        assert fed.feed(bytes(damaged)) is None
        assert digest(other) == expected[1]
    asked = [unpack(sent).head for sent in fed.line.out if fed.kind(sent) == "hello"]
    assert len(asked) > 80
    assert asked[-1]["version"] == 1
    assert fed.feed(messages[2]) == 2
    assert digest(other) == expected[2]


def altered(message, change, payload=None):
    """A whole message with another head: as an enemy would make it."""
    found = unpack(message)
    head = json.loads(json.dumps(found.head))
    change(head)
    return pack(head, found.payload if payload is None else payload)


HOSTILE = {
    "no such weight": lambda head: head["weights"][0].update(name="x"),
    "another shape": lambda head: head["weights"][0].update(shape=[1, 2, 3, 4, 1000]),
    "negative count": lambda head: head["weights"][0].update(count=-1),
    "huge count": lambda head: head["weights"][0].update(count=1 << 40),
    "not a list": lambda head: head.update(weights={"a": 1}),
    "no weights": lambda head: head.update(weights=[]),
    "twice": lambda head: head["weights"].append(head["weights"][0]),
    "another dtype": lambda head: head["weights"][0].update(dtype="bfloat16"),
    "a dtype that is none": lambda head: head["weights"][0].update(dtype="Tensor"),
    "no base": lambda head: head.pop("base"),
    "a base that is none": lambda head: head.update(base={"one_in": 0}),
    "other places": lambda head: head.update(places="0" * 32),
    "one weight less": lambda head: head["weights"].pop(),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_message_that_says_what_cannot_be_is_refused_in_a_line(what):
    messages, expected, other = versions(count=1)
    fed = Fed(other)
    with pytest.raises(FinepointError) as told:
        fed.feed(altered(messages[1], HOSTILE[what]))
    assert "\n" not in str(told.value)
    assert digest(other) == expected[0]
    assert fed.answers() == [(1, "refused")]
    assert fed.feed(messages[1]) == 1  # the line lives on


@pytest.mark.parametrize("head", [{}, {"kind": "state", "version": -1}, {"kind": "state", "version": "1"}, [1], "x"])
def test_a_head_that_is_none_is_no_message(head):
    with pytest.raises(FinepointError, match="head"):
        unpack(pack(head))


def test_positions_that_are_not_ascending_are_refused():
    messages, expected, other = versions(count=1)
    found = unpack(messages[1])
    payload = bytearray(found.payload)
    payload[:4], payload[4:8] = payload[4:8], payload[:4]
    with pytest.raises(FinepointError, match="ascending"):
        Fed(other).feed(pack(found.head, bytes(payload)))
    assert digest(other) == expected[0]


def other_base(change):
    def made(model):
        with torch.no_grad():
            change(model)
        return model

    return made


OTHER_BASES = {
    "one number is the next one": other_base(
        lambda model: model.model.norm.weight[0].copy_(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))
    ),
    "another seed": lambda model: tiny_llama(seed=1),
    "another size": lambda model: tiny_llama(layers=1),
    "untied": lambda model: tiny_llama(tied=False),
}


@pytest.mark.parametrize("which", OTHER_BASES)
def test_another_base_is_refused_and_the_sender_hears_why(which):
    tuner, other = tuned()
    other = OTHER_BASES[which](other)
    before = digest(other)
    with sync.Sender(tuner, "shm:test-base") as sender, sync.Receiver(other, sender.address, name="far") as receiver:
        version = sender.send()
        with pytest.raises(FinepointError):
            receiver.wait(version)
        with pytest.raises(FinepointError, match="receiver far refused version 1: "):
            sender.wait(version)
    assert digest(other) == before


@pytest.mark.parametrize("keep", [False, True])
def test_entries_that_are_chosen_anew_send_their_places_again(keep):
    tuner, other = tuned()
    with sync.Sender(tuner, "shm:test-refresh") as sender, sync.Receiver(other, sender.address) as receiver:
        for seed in range(4):
            move_(tuner, seed)
            receiver.wait(sender.send())
            assert digest(tuner.model) == digest(other)
            if seed % 2 == 0:
                chosen = finepoint.select(tuner.model, rule="random", density=0.1, seed=seed + 7)
                tuner.choose_({name: chosen[name] for name in chosen if name in tuner.entries}, keep=keep)
        receiver.rollback(3)
        receiver.rollback(2)  # whose places are others
        receiver.rollback()
    tuner.revert_()
    assert digest(tuner.model) == digest(other)


def test_an_earlier_version_can_be_gone_back_to_and_newer_ones_come_again():
    messages, expected, other = versions(count=5)
    fed = Fed(other, keep=3)
    for version in (1, 2, 3, 4):
        fed.feed(messages[version])
    fed.receiver.rollback(2)
    assert digest(other) == expected[2]
    assert fed.receiver.version == 2
    assert fed.feed(messages[4]) is None  # it is no newer than what was seen
    with pytest.raises(FinepointError, match="version 3 is not kept; there are 0, 1"):
        fed.receiver.rollback(3)
    assert fed.feed(messages[5]) == 5
    assert digest(other) == expected[5]
    fed.receiver.rollback(2)
    fed.receiver.rollback()
    assert digest(other) == expected[0]
    assert fed.answers()[-1] == (5, "rolled back")


def test_a_receiver_in_another_dtype_holds_the_rounded_values_and_is_told_by_name(caplog):
    tuner, other = tuned()
    narrow = copy.deepcopy(other).to(torch.bfloat16)
    with (
        sync.Sender(tuner, "127.0.0.1:0") as sender,
        sync.Receiver(narrow, sender.address) as receiver,
        pytest.raises(FinepointError, match=r"not the base that is trained.*dtype=torch.bfloat16"),
    ):
        receiver.wait(sender.send())
    with sync.Sender(tuner, "127.0.0.1:0", dtype=torch.bfloat16) as sender:  # noqa: SIM117
        with sync.Receiver(narrow, sender.address) as receiver:
            move_(tuner, 1)
            receiver.wait(sender.send())
            expected = copy.deepcopy(other)
            expected.load_state_dict({name: value for name, value in tuner.model.state_dict().items()
                                      if not name.startswith("finepoint")})  # fmt: skip
            assert digest(narrow) == digest(expected.to(torch.bfloat16))
            with torch.no_grad():
                tuner.parameters()[0][0] = 3.4e38
            with pytest.raises(FinepointError, match="a trained value is too large a number for bfloat16"):
                sender.send()
    assert caplog.messages == []


@pytest.mark.parametrize(("ours", "theirs", "told"), [
    (torch.bfloat16, torch.float32, "values are the same"),
    (torch.float32, torch.bfloat16, "values are rounded"),
])  # fmt: skip
def test_a_base_of_equal_numbers_in_another_dtype_takes_the_values_and_says_so(ours, theirs, told, caplog):
    base = tiny_llama(torch.bfloat16)
    model, other = copy.deepcopy(base).to(ours), copy.deepcopy(base).to(theirs)
    tuner = finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=0.1, seed=0), audit=False)
    with sync.Sender(tuner, "127.0.0.1:0") as sender, sync.Receiver(other, sender.address) as receiver:
        for step in range(2):
            move_(tuner, step)
            receiver.wait(sender.send())
            for name, weight in other.named_parameters():
                assert torch.equal(weight, model.get_parameter(name).to(theirs))
    assert len([message for message in caplog.messages if told in message]) == 1


def test_an_interruption_while_values_are_written_leaves_the_old_ones(monkeypatch):
    messages, expected, other = versions()
    fed = Fed(other)
    fed.feed(messages[1])
    write = receiver_module.scatter_
    for at in (1, 3, 5):
        calls = itertools.count(1)

        def interrupted(*given, at=at, calls=calls):
            write(*given)
            if next(calls) == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(receiver_module, "scatter_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fed.feed(messages[2])
        monkeypatch.setattr(receiver_module, "scatter_", write)
        assert digest(other) == expected[1]
        fed.receiver._seen = 1  # it will come again
    assert fed.feed(messages[2]) == 2
    assert digest(other) == expected[2]


@pytest.mark.parametrize("where", ["an entry", "beside the entries"])
def test_weights_that_somebody_else_has_written_to_are_never_written_over(where):
    messages, _, other = versions()
    fed = Fed(other)
    fed.feed(messages[1])
    tuner, _ = tuned()
    name = next(iter(tuner.entries))
    place = int(tuner.entries[name].indices[0]) if where == "an entry" else None
    with torch.no_grad():
        if place is None:
            other.model.norm.weight[3] += 1
        else:
            other.get_parameter(name).view(-1)[place] += 1
    before = digest(other)
    with pytest.raises(FinepointError, match="by somebody else; load the base anew"):
        fed.feed(messages[2])
    assert digest(other) == before
    assert fed.answers()[-1] == (2, "refused")


def test_hundreds_of_versions_leave_no_trace():
    tuner, other = tuned(torch.bfloat16)
    base, line = digest(other), Mailbox()
    fed = Fed(other)
    sender = sync.Sender(tuner, line)
    line.into.put(pack({"kind": "hello"}))
    until(lambda: sender.receivers)
    deltas = tuner.parameters()
    for step in range(200):
        deltas[step % len(deltas)].data += 0.01  # of one weight at a time
        sender.send()
        fed.receiver._take(line.out.pop())
        fed.receiver.poll()
    assert fed.receiver.version == 200
    tuner.follow_()
    assert digest(tuner.model) == digest(other)
    fed.receiver.rollback()
    assert digest(other) == base


def killed_at(started, said, text):
    """Kills a process as soon as it has said something."""
    until(lambda: text in said.read_text(), 60)
    started.kill()
    started.wait()


@pytest.mark.parametrize("address", ["tcp", "shm:test-killed"])
def test_a_killed_receiver_is_let_go_and_another_one_gets_what_it_lacks(address, warm, tmp_path):
    tuner, _ = tuned()
    with sync.Sender(tuner, "127.0.0.1:0" if address == "tcp" else address, timeout=5) as sender:
        said, expected = tmp_path / "said", {}
        started = warm.start("python", WORKER, "receive", sender.address, 99, folder=tmp_path, said=said)
        for step in range(1, 4):
            move_(tuner, step)
            expected[sender.send()] = digest(tuner.model)
        killed_at(started, said, "\n")
        for version, found in (line.split() for line in said.read_text().splitlines()):
            assert found == expected[int(version)]
        for _ in range(3):  # nobody is there, or somebody who is dead
            move_(tuner, step := step + 1)
            sender.send()
        until(lambda: not sender.receivers)
        again = tmp_path / "again"
        started = warm.start("python", WORKER, "receive", sender.address, 99, folder=tmp_path, said=again)
        sender.wait(timeout=60)
        killed_at(started, again, f"{sender.version} {digest(tuner.model)}\n")


@pytest.mark.parametrize("address", ["tcp", "shm:test-sender"])
def test_a_killed_sender_leaves_one_of_its_versions_and_the_next_one_is_followed(address, warm, tmp_path):
    if address == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
    tuner, other = tuned()
    with sync.Receiver(other, address) as receiver:
        for round_, count in ((1000, 10_000_000), (2000, 3)):
            said = tmp_path / f"said {round_}"
            started = warm.start("python", WORKER, "send", address, round_, count, folder=tmp_path, said=said)
            receiver.wait(1)
            if count > 3:
                killed_at(started, said, "held")
                time.sleep(0.3)
            else:
                receiver.wait(count)
            receiver.poll()
            move_(tuner, round_ + receiver.version)
            assert digest(other) == digest(tuner.model)
            receiver.rollback() if count > 3 else started.wait()


def test_a_torch_distributed_group_carries_the_same(warm, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = [tmp_path / str(rank) for rank in range(2)]
    started = [warm.start("python", WORKER, "group", rank, port, folder=tmp_path, said=said[rank]) for rank in range(2)]
    assert [each.wait() for each in started] == [0, 0], [each.read_text() for each in said]
    assert said[0].read_text() == said[1].read_text() != ""


def test_a_trainer_sends_after_each_step(tmp_path):
    model = tiny_llama()
    other = copy.deepcopy(model)
    finepoint.sparsify(model, density=0.1)
    rows = [{key: value[i] for key, value in batch.items()} for batch in random_batches(2) for i in range(4)]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
                                  save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
                                  dataloader_pin_memory=False)  # fmt: skip
    with (
        sync.Sender(finepoint.tuner_of(model), "127.0.0.1:0") as sender,
        sync.Receiver(other, sender.address) as receiver,
    ):
        Trainer(model, arguments, train_dataset=rows, callbacks=[sync.SendEachStep(sender)]).train()
        assert sender.version == 3  # before the first step, and after each
        receiver.wait(3)
    assert digest(model) == digest(other)


def test_what_cannot_be_is_said_in_a_line(llama):
    tuner, other = tuned()
    for address in ("nowhere", "shm:a/b", "127.0.0.1:99999", "127.0.0.1:x"):
        with pytest.raises(FinepointError, match="the address is"):
            sync.Sender(tuner, address)
    with sync.Sender(tuner, "127.0.0.1:0") as sender:
        with pytest.raises(FinepointError, match="cannot listen at"):
            sync.Sender(tuner, sender.address)
        with pytest.raises(FinepointError, match="0 of 0 receivers hold version 1, and 1 are expected"):
            sender.wait(sender.send(), timeout=0.01)
    with sync.Sender(tuner, "shm:test-two") as sender, pytest.raises(FinepointError, match="cannot listen at"):
        sync.Sender(tuner, sender.address)
    with pytest.raises(FinepointError, match="the sender is closed"):
        sender.send()
    with pytest.raises(FinepointError, match="torch.distributed is not in use"):
        sync.GroupLine(1)
    with pytest.raises(FinepointError, match="the model is being trained"):
        sync.Receiver(tuner.model, "127.0.0.1:1")
    with pytest.raises(FinepointError, match="the address is"):
        sync.Receiver(other, "nowhere")
    adapter = tuner.adapter()
    tuner.close()
    with adapter.applied(llama):
        with pytest.raises(FinepointError, match="an adapter is in the model's weights"):
            sync.Receiver(llama, "127.0.0.1:1")
        above = finepoint.SparseTuner(llama, finepoint.select(llama, rule="random", density=0.1), audit=False)
        with above, pytest.raises(FinepointError, match="an adapter is applied beneath what is trained"):
            sync.Sender(above)
    with sync.Receiver(other, "127.0.0.1:1") as receiver, pytest.raises(FinepointError, match="has not come within"):
        receiver.wait(1, timeout=0.01)


def test_who_speaks_otherwise_is_let_go(caplog):
    tuner, _ = tuned()
    with sync.Sender(tuner, "127.0.0.1:0") as sender:
        host, port = sender.address.split(":")
        for said in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", PREFIX.pack(b"FPS1", 1 << 20, 1 << 40)):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(said)
                assert stranger.recv(DIGEST) == b""
        assert sender.receivers == {}
    assert len([message for message in caplog.messages if "is let go" in message]) == 2


def test_listening_beyond_this_machine_is_warned_of(caplog):
    tuner, _ = tuned()
    with sync.Sender(tuner, "0.0.0.0:0"):
        assert any("there is no password" in message for message in caplog.messages)
