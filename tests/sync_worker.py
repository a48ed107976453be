"""The other process of tests/test_sync.py: a receiver, a sender, or a rank of a torch.distributed group.

python sync_worker.py receive ADDRESS LAST | send ADDRESS SEED COUNT | group RANK PORT
"""

import copy
import hashlib
import sys
import time
from pathlib import Path

import torch

import finepoint
from conftest import random_batches, tiny_llama
from finepoint import sync


def tuned(dtype=torch.float32, density=0.1):
    """A tuner on a tiny model, and an untouched copy of that model."""
    model = tiny_llama(dtype)
    other = copy.deepcopy(model)
    return finepoint.SparseTuner(
        model, finepoint.select(model, rule="random", density=density, seed=0), audit=False
    ), other


def move_(tuner, seed):
    """Deltas that depend on the seed alone, whatever they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in tuner.parameters():
            delta.copy_(torch.randn(delta.shape, generator=generator) * 0.1)
    tuner.follow_()


def digest(model):
    """Of every bit of the model."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith("finepoint"):
            found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def logits(model):
    with torch.no_grad():
        return model(random_batches(1)[0]["input_ids"]).logits


def receive(address, last):
    with sync.Receiver(tiny_llama(), address, name="other") as receiver:
        while receiver.version < int(last):
            receiver.wait(receiver.version + 1)
            print(receiver.version, digest(receiver.model), flush=True)


def send(address, seed, count):
    tuner, _ = tuned()
    with sync.Sender(tuner, address) as sender:
        for step in range(1, int(count) + 1):
            move_(tuner, int(seed) + step)
            sender.send()
            if step == 1:
                sender.wait()
                print("held", flush=True)
        sender.wait()


def group(rank, port):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=2)
    tuner, other = tuned()
    if rank == "0":
        with sync.Sender(tuner, sync.GroupLine(1)) as sender:
            for step in range(1, 4):
                move_(tuner, step)
                sender.wait(sender.send())
            Path("all-held").touch()
            print(digest(tuner.model), flush=True)
    else:
        with sync.Receiver(other, sync.GroupLine(0)) as receiver:
            while receiver.version < 3:
                receiver.wait(receiver.version + 1)
            while not Path("all-held").exists():  # a process that ends takes its last answer with it
                time.sleep(0.01)
            print(digest(other), flush=True)


if __name__ == "__main__":
    {"receive": receive, "send": send, "group": group}[sys.argv[1]](*sys.argv[2:])
