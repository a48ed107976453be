"""An adapter in vLLM: laid over the base's weights while vLLM reads them, and exchanged for another while it runs.

vLLM finds `register` by the entry point `vllm.general_plugins`. Then

    vllm serve BASE --load-format finepoint --model-loader-extra-config '{"adapter": "adapters/movies"}'

serves the base with the adapter; no merged copy is written. The values lie in the stream of weights in the files' own
coordinates, so that whatever vLLM does with them afterwards (fused layers, packing, sharding) needs no other code.

With `"in_place": true` beside it vLLM's weights stay as they were read, unpacked, and are written to where they lie: an
adapter is exchanged in milliseconds, and a `finepoint.sync.Receiver` can follow a training.
"""

from collections.abc import Iterator, Mapping
from copy import copy, deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.adapter_set import AdapterSet
from finepoint.adapters.entries import scatter_
from finepoint.adapters.fingerprint import contents_of, fingerprint, unlike
from finepoint.adapters.format import TENSORS
from finepoint.errors import FinepointError
from finepoint.exchange.checkpoint import Checkpoint, open_checkpoint
from finepoint.exchange.overlay import Patch, lay_over

FORMAT = "finepoint"
ADAPTER, IN_PLACE = "adapter", "in_place"  # keys in vLLM's extra configuration of the loader
VIEWS, SET = "_finepoint_views", "_finepoint_set"  # where a model of vLLM's keeps itself as transformers has it
opened = lru_cache(maxsize=4)(open_checkpoint)  # a base is read through and compared once in a process


def register() -> None:
    """Makes `--load-format finepoint` known to vLLM, in every process of its; may be called again."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.v1.worker.worker_base import WorkerBase

    if FORMAT in _LOAD_FORMAT_TO_MODEL_LOADER:
        return

    @register_model_loader(FORMAT)
    class AdapterLoader(DefaultModelLoader):
        """Reads safetensors as vLLM does, with an adapter's values in their places."""

        def __init__(self, load_config: Any) -> None:
            given, plain = dict(load_config.model_loader_extra_config or {}), copy(load_config)
            self._adapter, self._in_place = given.pop(ADAPTER, None), bool(given.pop(IN_PLACE, False))
            plain.load_format, plain.model_loader_extra_config = "safetensors", given
            super().__init__(plain)

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
            stream = super().get_all_weights(model_config, model)
            if not self._adapter or self._in_place:
                return stream
            return laid_over(stream, self._adapter, model_config.model, model_config.dtype)

        def create_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super().create_model(*args, **kwargs)
            for layer in model.modules() if self._in_place else ():
                layer._cpu_skip_gemm_dispatch = True  # vLLM's own word for: multiply by the weight as it is
            return model

        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
            model = super().load_model(vllm_config, model_config, prefix)
            if self._in_place:
                for layer in model.modules():
                    if hasattr(layer, "cpu_linear"):
                        layer.cpu_linear = nn.functional.linear
                vars(model)[VIEWS] = views = as_transformers(model, model_config.model, model_config.dtype)
                vars(model)[SET] = AdapterSet(views)
                _exchange(vars(model)[SET], self._adapter)
            return model

    def finepoint_switch(worker: Any, adapter: str | None) -> None:
        _exchange(vars(worker.model_runner.get_model())[SET], adapter)

    WorkerBase.finepoint_switch = finepoint_switch  # called by its name, in whatever process


def switch(engine: Any, adapter: str | None) -> None:
    """Has a running engine, loaded with this format, answer with another adapter, or as its base (None).

    To be called while no request is under way. vLLM reads its weights again, with the values in their places, or, made
    with `"in_place": true`, the values alone are written; it drops what it has computed of earlier prompts.

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
    if extra.get(IN_PLACE):
        engine.collective_rpc("finepoint_switch", args=(adapter,))
        _forget(engine)
        return
    for folder in filter(None, (extra.get(ADAPTER), adapter)):
        _refuse_tied(folder, patches_for(folder, config.model_config.model, config.model_config.dtype), config)
    extra[ADAPTER] = adapter
    engine.collective_rpc("update_config", args=({"load_config": {"model_loader_extra_config": extra}},))
    engine.collective_rpc("reload_weights")
    _forget(engine)


def model_of(engine: Any) -> nn.Module:
    """The model of an engine made with `"in_place": true`, as transformers has it, over vLLM's own weights: what an
    adapter, or a `finepoint.sync.Receiver`, writes there, vLLM answers with. Between two requests alone, and followed
    by `engine.reset_prefix_cache()`.

    Raises:
        FinepointError: the engine runs in another process, or was made otherwise.
    """
    core = getattr(engine.llm_engine.engine_core, "engine_core", None)
    if core is None:
        raise FinepointError("the engine runs in a process of its own, and so do its weights; set "
                             "VLLM_ENABLE_V1_MULTIPROCESSING=0 before making it")  # fmt: skip
    model = core.model_executor.driver_worker.worker.model_runner.get_model()
    if VIEWS not in vars(model):
        raise FinepointError(f"the engine's weights are packed; make it with load_format={FORMAT!r} and "
                             f"model_loader_extra_config={{{IN_PLACE!r}: True}}")  # fmt: skip
    found: nn.Module = vars(model)[VIEWS]
    return found


def as_transformers(model: nn.Module, base: str, dtype: torch.dtype) -> nn.Module:
    """transformers' names and shapes of a model of vLLM's, each parameter a part of the weight that vLLM computes with.

    Raises:
        FinepointError: a weight lies there in another way than as rows of one, or holds other values than the base.
    """
    checkpoint, weights = opened(base), dict(model.named_parameters(remove_duplicate=False))
    found = deepcopy(checkpoint.outline)
    fused = {part: (whole, parts) for whole, parts in getattr(model, "packed_modules_mapping", {}).items()
             for part in parts}  # fmt: skip
    made: dict[int, nn.Parameter] = {}
    for name, parameter in dict(found.named_parameters(remove_duplicate=False)).items():
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(_rows(name, parameter, weights, fused, found), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        found.get_submodule(owner)._parameters[leaf] = made[id(parameter)]
    there = checkpoint.fingerprint(dtype=str(dtype).removeprefix("torch."))
    for name, _ in unlike(there, fingerprint(contents_of(found), one_in=there.one_in)):
        raise FinepointError(f"{name} has other values in vLLM than in {base}; leave out {IN_PLACE!r}")
    return found


def _rows(
    name: str,
    parameter: Tensor,
    weights: Mapping[str, Tensor],
    fused: Mapping[str, tuple[str, list[str]]],
    model: nn.Module,
) -> Tensor:
    """Where a parameter lies in vLLM's weights: a view."""
    owner, _, leaf = name.rpartition(".")
    above, _, own = owner.rpartition(".")
    whole, first, total = weights.get(name), 0, len(parameter)
    if whole is None and own in fused:
        joined, parts = fused[own]
        sizes = [len(model.get_parameter(f"{above}.{part}.{leaf}")) for part in parts]
        whole, first, total = weights.get(f"{above}.{joined}.{leaf}"), sum(sizes[: parts.index(own)]), sum(sizes)
    padded = own in ("embed_tokens", "lm_head")  # to a multiple of rows
    if whole is None or whole.shape[1:] != parameter.shape[1:] or (len(whole) != total and not padded):
        raise FinepointError(f"vLLM keeps {name} in another way than as rows of a weight (sharded, quantised, "
                             f"renamed), so leave out {IN_PLACE!r}")  # fmt: skip
    return whole.data[first : first + len(parameter)]


def _exchange(adapters: AdapterSet, folder: str | None) -> None:
    """Has a model hold an adapter, or none, instead of what it holds; one that is known already in milliseconds.

    Raises:
        FinepointError: it does not belong to the model, which holds what it held then.
    """
    if folder is None:
        adapters.disable()
        return
    name = f"{folder} {_stamp(folder)}"
    if name not in adapters:
        adapters.add(name, SparseAdapter.load(folder))
    adapters.set(name)


def _forget(engine: Any) -> None:
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
    return _patches_for(adapter, _stamp(adapter), base, dtype)


def _stamp(adapter: str) -> tuple[int, int] | None:
    """What tells that an adapter's file is another than before; None of one that is not on this disk yet."""
    place = Path(adapter) / TENSORS
    known = place.stat() if place.is_file() else None
    return known and (known.st_mtime_ns, known.st_size)


@lru_cache(maxsize=4)
def _patches_for(adapter: str, stamp: object, base: str, dtype: torch.dtype) -> dict[str, Patch]:
    """The same, once for each state of the adapter's file."""
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
