"""A model in another process that follows SmolLM2-135M in training, over loopback: by its entries' exact values, by all
of its weights, by LoRA's merged weights, by LoRA's factors.

python benchmarks/sync.py

Bytes a step; the pause of the trainer (until all is handed over); the milliseconds until the other model holds it; the
largest difference of log-probabilities between the two models; and, for ours, how many bits differ after many versions
and after going back. The other arms send safetensors through the same kind of socket, which the other process writes
into its weights with `copy_`; LoRA's factors stay factors there.
"""

import socket
import statistics
import struct
import subprocess
import sys
import time

import torch
from safetensors.torch import load, save

from common import options, report, text_batches

ARMS = ("entries 0.1 %", "entries 1 %", "all weights", "LoRA r8 merged", "LoRA r8 factors")
LENGTH = struct.Struct("<Q")


def main() -> None:
    given = options(__doc__, steps=20, versions=1000, dtype="bfloat16")
    steps = 5 if given.quick else given.steps
    rows = [arm(name, given.dtype, steps) for name in ARMS]
    rows[0] |= drift(given.dtype, 100 if given.quick else given.versions)
    columns = ["arm", "bytes a step", "first bytes", "pause ms", "held after ms", "log-probability gap", "versions",
               "bits that differ", "bits that differ after going back"]  # fmt: skip
    report("sync", given.output, columns, rows, dtype=given.dtype, steps=steps)


def built(name: str, dtype: str):
    """A model ready to be trained, its parameters, and the tuner or PEFT's model."""
    import finepoint
    from finepoint.models.loading import load_model

    torch.manual_seed(0)
    model = load_model("smollm2", dtype)
    if name.startswith("entries"):
        finepoint.sparsify(model, density=float(name.split()[1]) / 100)
        tuner = finepoint.tuner_of(model)
        return model, tuner.parameters(), tuner
    if name == "all weights":
        return model, list(model.parameters()), None
    import peft

    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=linear))
    return adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad], adapted


def arm(name: str, dtype: str, steps: int) -> dict[str, object]:
    """Trains so many steps, each sent to another process."""
    from finepoint import sync

    model, parameters, tuned = built(name, dtype)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2 if name.startswith("entries") else 1e-4)
    sender = sync.Sender(tuned, "127.0.0.1:0") if name.startswith("entries") else None
    listener = socket.create_server(("127.0.0.1", 0))
    address = sender.address if sender else ""
    port = str(listener.getsockname()[1])
    other = subprocess.Popen([sys.executable, __file__, "--follow", name, dtype, port, address])
    line, _ = listener.accept()  # of requests, and of the arms that are not ours
    batches, pauses, held, gaps, sizes = text_batches(2, 64), [], [], [], []
    if sender:
        watch_sizes(sender, sizes)
    for step in range(steps):
        model.train()
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        started = time.perf_counter()
        if sender:
            put(line, LENGTH.pack(sender.send()))
        else:
            message = save(tensors(name, model))
            sizes.append(len(message))
            put(line, message)
        pauses.append(1e3 * (time.perf_counter() - started))
        assert get(line) == b"held"
        held.append(1e3 * (time.perf_counter() - started))
        theirs = load(get(line))["found"]
        gaps.append(float((log_probabilities(model.eval(), batches[0]) - theirs).abs().max()))
    line.close()
    other.wait()
    if sender:
        sender.close()
    median = statistics.median
    return {"arm": name, "bytes a step": sizes[steps - 1], "first bytes": sizes[0], "pause ms": median(pauses[1:]),
            "held after ms": median(held[1:]), "log-probability gap": max(gaps)}  # fmt: skip


def watch_sizes(sender, sizes: list[int]) -> None:
    """Has the length of each message noted."""
    deadline = time.monotonic() + 120
    while not sender.receivers and time.monotonic() < deadline:
        time.sleep(0.01)
    (peer,) = sender._peers
    send = peer.line.send

    def noted(message: bytes) -> None:
        sizes.append(len(message))
        send(message)

    peer.line.send = noted


def tensors(name: str, model) -> dict[str, torch.Tensor]:
    """What an arm sends: all weights, LoRA's merged ones, LoRA's factors."""
    if name == "all weights":
        return {key: value.detach() for key, value in model.named_parameters()}
    if name == "LoRA r8 factors":
        return {key: value.detach() for key, value in model.named_parameters() if "lora_" in key}
    found = {}
    for key, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.base_layer.weight.detach()
            found[f"{key}.weight"] = (weight + module.get_delta_weight("default").detach()).to(weight.dtype)
    return found


def follow(name: str, dtype: str, port: str, address: str) -> None:
    """The other process: takes each version, says so, then sends its log-probabilities."""
    from finepoint import sync
    from finepoint.models.loading import load_model

    model = built(name, dtype)[0] if name == "LoRA r8 factors" else load_model("smollm2", dtype)
    weights, batch = dict(model.named_parameters()), text_batches(2, 64)[0]
    receiver = sync.Receiver(model, address) if address else None
    with socket.create_connection(("127.0.0.1", int(port))) as line:
        while message := get(line):
            if receiver:
                receiver.wait(*LENGTH.unpack(message))
            else:
                with torch.no_grad():
                    for key, value in load(message).items():
                        weights[key].copy_(value)
            put(line, b"held")
            put(line, save({"found": log_probabilities(model.eval(), batch)}))


def log_probabilities(model, batch) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"]).logits[:, :-1].float().log_softmax(-1)
    return found.gather(2, batch["input_ids"][:, 1:, None])[..., 0]


def put(line: socket.socket, message: bytes) -> None:
    line.sendall(LENGTH.pack(len(message)))
    line.sendall(message)


def get(line: socket.socket) -> bytes:
    """The next message; empty at the end."""
    found = bytearray()
    while len(found) < LENGTH.size:
        if not (piece := line.recv(LENGTH.size - len(found))):
            return b""
        found += piece
    (length,) = LENGTH.unpack(found)
    body = bytearray(length)
    view, got = memoryview(body), 0
    while got < length:
        got += line.recv_into(view[got:])
    return bytes(body)


def drift(dtype: str, versions: int) -> dict[str, object]:
    """Bits that differ between the two models after so many random versions, and from the base after going back."""
    from finepoint import sync
    from finepoint.models.loading import load_model

    model, _, tuner = built("entries 0.1 %", dtype)
    other = load_model("smollm2", dtype)
    base = {name: weight.clone() for name, weight in other.state_dict().items()}
    with sync.Sender(tuner, "127.0.0.1:0") as sender, sync.Receiver(other, sender.address) as receiver:
        for version in range(1, versions + 1):
            torch.manual_seed(version)
            for delta in tuner.parameters():
                delta.data.normal_(std=1e-2)
            sender.send()
            receiver.wait(version)
        tuner.follow_()
        ours = {name: weight for name, weight in model.state_dict().items() if not name.startswith("finepoint")}
        differ = differing(ours, other.state_dict())
        receiver.rollback()
        return {"versions": versions, "bits that differ": differ,
                "bits that differ after going back": differing(base, other.state_dict())}  # fmt: skip


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    found = 0
    for name, weight in one.items():
        kind = torch.int16 if weight.itemsize == 2 else torch.int32
        unlike = weight.view(-1).view(kind) ^ other[name].view(-1).view(kind)
        found += sum(int(((unlike >> bit) & 1).sum()) for bit in range(8 * weight.itemsize)) if unlike.any() else 0
    return found


if __name__ == "__main__":
    follow(*sys.argv[2:]) if sys.argv[1:2] == ["--follow"] else main()
