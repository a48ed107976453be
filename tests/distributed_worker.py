"""Several real processes for a test: forked from a server that has imported everything, joined by gloo."""

import multiprocessing
import os
import pickle
import socket
import traceback

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "finepoint.training.run", "finepoint.training.context", "torch.distributed.tensor"]
)
DEADLINE = 240  # seconds; nothing here takes a tenth of it


def together(count, work, *arguments):
    """What `work(*arguments)` returns in each of so many processes, by rank; an exception is returned, not raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = SERVER.Queue()
    started = [
        SERVER.Process(target=_run, args=(rank, count, port, results, work, arguments), daemon=True)
        for rank in range(count)
    ]
    for process in started:
        process.start()
    try:
        found = {rank: pickle.loads(outcome) for rank, outcome in (results.get(timeout=DEADLINE) for _ in started)}
    finally:
        for process in started:
            process.join(5)
            process.kill()
    for outcome in found.values():
        if isinstance(outcome, str) and outcome.startswith("Traceback"):
            raise AssertionError(outcome)
    return [found[rank] for rank in range(count)]


def _run(rank, count, port, results, work, arguments):
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ |= {name: str(value) for name, value in launched.items() if count > 1}
    import torch

    from finepoint.runtime import distributed

    torch.set_num_threads(1)
    try:
        distributed.join()
        outcome = work(*arguments)
    except Exception:
        outcome = traceback.format_exc()
    # Pickled here: a queue would share the memory of tensors with a process that is about to end.
    results.put((rank, pickle.dumps(outcome)))
    if count > 1:
        torch.distributed.destroy_process_group()
