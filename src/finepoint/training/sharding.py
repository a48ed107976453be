"""FSDP2 for a model that is to be trained in place: every process holds some rows of every weight."""

import os
from functools import lru_cache
from typing import Any

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from finepoint.errors import FinepointError
from finepoint.models.loading import block_of
from finepoint.runtime import distributed


@lru_cache(maxsize=1)
def wanted() -> bool:
    """Whether the launcher was told to shard the model (`accelerate launch --use_fsdp --fsdp_version 2`).

    The word is taken out of the environment: it is done before a trainer comes to see the model.
    """
    found = distributed.count() > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if found:
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    return found


def shard_(model: Any, device: str) -> None:
    """Shards a loaded model over all processes, each decoder block a unit, the rest another.

    Raises:
        FinepointError: the model has no decoder blocks.
    """
    names = {block_of(model, name) for name, _ in model.named_parameters()} - {None}
    if not names:
        raise FinepointError(f"{type(model).__name__} has no list of decoder blocks to shard by; train it without FSDP")
    mesh = init_device_mesh(device, (distributed.count(),))
    for name in sorted(names, key=str):
        fully_shard(model.get_submodule(str(name)), mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
