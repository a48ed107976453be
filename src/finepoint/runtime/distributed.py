"""Several processes that train together: who they are, what one does for all, what they sum and compare.

They are started by `torchrun` or `accelerate launch` and speak through torch.distributed. In a single process every
function here does the obvious thing without it. A weight that FSDP2 has sharded is a tensor of which this process
holds some rows; whatever asks for its entries asks all processes at once.
"""

import os
import sys
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any, TypeVar

from finepoint.errors import FinepointError

Result = TypeVar("Result")


def _group() -> Any:
    """torch.distributed where it is in use, else None; torch is not imported for the question."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None


def count() -> int:
    """How many processes train together."""
    group = _group()
    return group.get_world_size() if group else 1


def rank() -> int:
    """The number of this process, from 0; before they have joined, the one that the launcher gave it."""
    group = _group()
    return group.get_rank() if group else int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return rank() == 0


def launched() -> bool:
    """Whether a launcher has started other processes along with this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> None:
    """Joins the processes that a launcher has started along with this one; does nothing where there is none.

    Raises:
        FinepointError: the launcher asks for FSDP1 or DeepSpeed.
    """
    if not launched():
        return
    refuse_unfit(os.environ)
    if count() > 1:
        return
    import torch
    from accelerate import PartialState

    if not torch.accelerator.is_available():
        # Without this word accelerate would let every process on a CPU train alone.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    PartialState(cpu=not torch.accelerator.is_available())


FSDP1 = ("FSDP1 flattens weights, so that their entries have no positions to train; "
         "use FSDP2: accelerate launch --use_fsdp --fsdp_version 2")  # fmt: skip
ZERO3 = ("ZeRO-3 takes the weights apart, so that their entries cannot be trained in place; "
         "use FSDP2: accelerate launch --use_fsdp --fsdp_version 2")  # fmt: skip
ZERO = ("ZeRO-1 and ZeRO-2 spread gradients and optimizer state over the processes, which are small here: a few "
        "numbers for each trained entry; start it without DeepSpeed")  # fmt: skip


def refuse_unfit(environment: Any) -> None:
    """Refuses what accelerate's launcher was told and sparse training in place cannot do.

    Raises:
        FinepointError: FSDP1 or DeepSpeed.
    """
    if environment.get("ACCELERATE_USE_FSDP") == "true" and environment.get("FSDP_VERSION", "1") != "2":
        raise FinepointError(FSDP1)
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise FinepointError(ZERO3 if environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else ZERO)


def device() -> Any:
    """Where tensors are to be that this process and others add up: NCCL knows none on the CPU."""
    import torch

    group = _group()
    nccl = group and "nccl" in group.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def on_first(work: Callable[[], Result]) -> Result:
    """What `work` returns, done by the first process alone, once all have come here; its mistake is that of all.

    Raises:
        FinepointError: raised by `work`, in every process.
    """
    if count() == 1:
        return work()
    outcome: list[Any] = [None, None]
    _group().barrier()
    try:
        if is_first():
            outcome[0] = work()
    except FinepointError as error:
        outcome[1] = str(error)
    _group().broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise FinepointError(outcome[1])
    return outcome[0]


def check_alike(what: str, parts: Iterable[bytes]) -> None:
    """Compares a digest of the parts over all processes.

    Raises:
        FinepointError: they differ; in every process.
    """
    if count() == 1:
        return
    digest = sha256()
    for part in parts:
        digest.update(part)
    found: list[Any] = [None] * count()
    _group().all_gather_object(found, digest.hexdigest())
    strangers = [number for number, other in enumerate(found) if other != found[0]]
    if strangers:
        raise FinepointError(f"{what} of process {strangers[0]} is not that of process 0; start all processes with the "
                             "same model, data and settings")  # fmt: skip


def add_up_(tensor: Any) -> None:
    """Replaces a tensor by its sum over all processes; every one ends with the same bits."""
    if count() > 1:
        _group().all_reduce(tensor)


def largest_(tensor: Any) -> None:
    """Replaces every element by the largest that any process has there."""
    if count() > 1:
        distributed = _group()
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds a part of the tensor only."""
    # Nobody has sharded anything where the module of sharded tensors was never imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_fsdp(module: Any) -> bool:
    """Whether FSDP2 shards the parameters of this module."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def whole(tensor: Any) -> Any:
    """All of a sharded tensor, on every process; any other is returned as it is."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor


def own_rows(weight: Any) -> tuple[Any, int]:
    """The rows of a sharded weight that lie in this process, sharing its memory, and their first flat position.

    Raises:
        FinepointError: the weight is not sharded by rows (as tensor parallelism does).
    """
    mesh, placements = weight.device_mesh, weight.placements
    sharding = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    if [placements[axis].is_shard(0) for axis in sharding] != [True]:
        raise FinepointError(
            f"a weight is distributed as {placements}; finepoint trains weights sharded by rows (FSDP2)"
        )
    height, width = weight.shape[0], weight.shape[1:].numel()
    rows = -(-height // mesh.size(sharding[0]))  # as torch.chunk deals them out: the last get fewer, or none
    return weight.detach().to_local(), min(rows * mesh.get_local_rank(sharding[0]), height) * width
