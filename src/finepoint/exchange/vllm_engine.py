"""An adapter in vLLM: laid over the base's weights while vLLM reads them, and exchanged for another while it runs.

vLLM finds `register` by the entry point `vllm.general_plugins`. Then

    vllm serve BASE --load-format finepoint --model-loader-extra-config '{"adapter": "adapters/movies"}'

serves the base with the adapter; no merged copy is written. The values lie in the stream of weights in the files' own
coordinates, so that whatever vLLM does with them afterwards (fused layers, packing, sharding) needs no other code.
"""

from collections.abc import Iterator
from copy import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.entries import scatter_
from finepoint.errors import FinepointError
from finepoint.exchange.checkpoint import Checkpoint, open_checkpoint
from finepoint.exchange.overlay import Patch, lay_over

FORMAT = "finepoint"
ADAPTER = "adapter"  # its key in vLLM's extra configuration of the loader
opened = lru_cache(maxsize=4)(open_checkpoint)  # a base is read through and compared once in a process


def register() -> None:
    """Makes `--load-format finepoint` known to vLLM, in every process of its; may be called again."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    if FORMAT in _LOAD_FORMAT_TO_MODEL_LOADER:
        return

    @register_model_loader(FORMAT)
    class AdapterLoader(DefaultModelLoader):
        """Reads safetensors as vLLM does, with an adapter's values in their places."""

        def __init__(self, load_config: Any) -> None:
            given, plain = dict(load_config.model_loader_extra_config or {}), copy(load_config)
            self._adapter = given.pop(ADAPTER, None)
            plain.load_format, plain.model_loader_extra_config = "safetensors", given
            super().__init__(plain)

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
            stream = super().get_all_weights(model_config, model)
            if not self._adapter:
                return stream
            return laid_over(stream, self._adapter, model_config.model, model_config.dtype)


def switch(engine: Any, adapter: str | None) -> None:
    """Has a running engine, loaded with this format, answer with another adapter, or as its base (None).

    To be called while no request is under way. vLLM reads its weights again, with the values in their places, and
    drops what it has computed of earlier prompts.

    Args:
        engine: a `vllm.LLM`.
        adapter: its folder.

    Raises:
        FinepointError: the adapter does not belong to the engine's base, or one of the two changes a tied weight, of
            which vLLM reads but one use again; the engine was loaded in another format; requests are under way. Nothing
            is changed then.
    """
    config = engine.llm_engine.vllm_config
    if (held := config.load_config.load_format) != FORMAT:
        raise FinepointError(f"the engine's load format is {held!r}, which knows no adapter; make it with {FORMAT!r}")
    if engine.llm_engine.has_unfinished_requests():
        raise FinepointError("requests are under way; switch between two")
    extra = dict(config.load_config.model_loader_extra_config or {})
    for folder in filter(None, (extra.get(ADAPTER), adapter)):
        _refuse_tied(folder, patches_for(folder, config.model_config.model, config.model_config.dtype), config)
    extra[ADAPTER] = adapter
    engine.collective_rpc("update_config", args=({"load_config": {"model_loader_extra_config": extra}},))
    engine.collective_rpc("reload_weights")
    if not engine.reset_prefix_cache():
        raise FinepointError("vLLM could not drop what it has computed of earlier prompts; make the engine anew")


def _refuse_tied(folder: str, patches: dict[str, Patch], config: Any) -> None:
    checkpoint = opened(config.model_config.model)
    for name in patches:
        if others := [other for other in checkpoint.ties[name] if other != name]:
            raise FinepointError(f"{folder} changes {name}, which is tied to {others[0]}, and a running vLLM reads one "
                                 "of the two alone again; start it with this adapter instead")  # fmt: skip


def laid_over(
    stream: Iterator[tuple[str, Tensor]], adapter: str, base: str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the base's files, by the names they have there, with the adapter's values in their places.

    Raises:
        FinepointError: at once, before anything is read: the adapter does not belong to the base; at the end: a weight
            that it changes did not come.
    """
    patches = patches_for(adapter, base, dtype)
    return _patched(stream, opened(base), patches)


def _patched(
    stream: Iterator[tuple[str, Tensor]], checkpoint: Checkpoint, patches: dict[str, Patch]
) -> Iterator[tuple[str, Tensor]]:
    left = set(patches)
    for tensor, values in stream:
        name = checkpoint.weight_of(tensor)
        if name is not None and name in patches:
            left.discard(name)
            patch = patches[name]
            values = values.to(patch.values.dtype, copy=True)
            scatter_(values, patch.indices, patch.values)
        yield tensor, values
    if left:
        raise FinepointError(f"vLLM did not read {min(left)}, which the adapter changes")


def patches_for(adapter: str, base: str, dtype: torch.dtype) -> dict[str, Patch]:
    """What an adapter writes into the base's weights.

    Args:
        dtype: that vLLM computes with.

    Raises:
        FinepointError: the adapter does not belong to the base, changes more than a base's weights, or was trained in
            another dtype than vLLM computes with.
    """
    found, checkpoint = SparseAdapter.load(adapter), opened(base)
    if found.info.get("task") == "classification":
        raise FinepointError(f"{adapter} is a classifier's, with a head of its own; export it as merged and serve that")
    for name, change in found.changes.items():
        trained: torch.dtype = getattr(torch, change.dtype)
        if trained != dtype:
            here = str(dtype).removeprefix("torch.")
            raise FinepointError(f"{name} was trained in {change.dtype} and vLLM computes with {here}; start it with "
                                 f"--dtype {change.dtype}")  # fmt: skip
    return lay_over(found, checkpoint)
