"""SparseTuner: deltas beside the weights; the weights follow.

The chosen entries of every weight are an ordinary float32 `nn.Parameter`, reachable from the model; the model itself
is frozen, keeps its layers and their forward, and always holds base + delta. Two things are attached by module hooks:

- a gradient: a linear layer's output passes through an identity whose backward computes the weight gradient at the
  chosen entries only, from the layer's input and the gradient of its output. Other weights (norms, biases, stacked
  experts) stand in for themselves during their module's forward as an identity whose backward gathers.
- the following: after any torch optimizer's step the weights take their new values, by torch's global post-step
  hook. Tensor version counters do not tell (fused AdamW does not raise them). For optimizers that are not torch's, "a
  backward pass has touched the deltas" and "a state dict was loaded" are second witnesses: the next forward writes
  once more.

With several processes the deltas are what is communicated: DDP sees no other parameter that is trained. Over weights
that FSDP2 has sharded the deltas stay whole in every process and are averaged by a hook of their own; of the weights
each process writes its rows. Sharded later, the deltas are among what FSDP2 shards.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finepoint import ranks
from finepoint.adapters.adapter import Change, SparseAdapter
from finepoint.adapters.entries import checksum, gather, moved
from finepoint.adapters.format import TENSORS
from finepoint.errors import FinepointError
from finepoint.quantised import is_quantised, replace_forwards
from finepoint.training.following import follow_after_steps, stop_following
from finepoint.training.kernels import follow_, sampled_embedding_gradient, sampled_gradient

CONTAINER = "finepoint"  # the name under which the deltas hang on the model


class SparseTuner:
    """Makes chosen entries of a model trainable, in place; the model stays the same object.

    Args:
        model: its parameters are frozen until `close`. Several processes make their tuners together.
        indices: flat positions by weight name, (k,) int64, ascending and unique, as `finepoint.select` gives them.

    Raises:
        FinepointError: no index at all, an unknown weight, indices out of order or range, a model with a tuner.
    """

    def __init__(self, model: nn.Module, indices: Mapping[str, Tensor]) -> None:
        if hasattr(model, CONTAINER):
            raise FinepointError("the model has a SparseTuner already; close that one first")
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.model = model
        self.entries: dict[str, TrainedEntries] = {}
        for name, positions in indices.items():
            if name not in parameters:
                raise FinepointError(f"the model has no weight {name!r} to train entries of")
            if len(positions):
                weight = parameters[name]
                first_name = names[id(weight)]
                if first_name in self.entries:
                    raise FinepointError(f"{name!r} is tied to {first_name!r}: give the indices of one of them")
                kind = QuantisedEntries if is_quantised(weight) else TrainedEntries
                self.entries[first_name] = kind(first_name, model, weight, positions)
        if not self.entries:
            raise FinepointError("there is no index to train; select some first")

        quantised = [entries for entries in self.entries.values() if isinstance(entries, QuantisedEntries)]
        altered = {entries.name: entries.alter_ for entries in quantised}
        self._handles: list[Any] = [*replace_forwards(model, altered)]  # whatever `remove` takes off the model
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(False)
        container = self._deltas = Deltas({name.replace(".", "/"): entries for name, entries in self.entries.items()})
        setattr(model, CONTAINER, container)
        follow_after_steps(container)
        self._handles.append(model.register_forward_pre_hook(container.meet))
        for entries in self.entries.values():
            self._handles += _attach(model, entries)
        leave_out_of_ddp(model)

    def __enter__(self) -> "SparseTuner":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def count(self) -> int:
        """Trained entries in all."""
        return sum(len(entries.indices) for entries in self.entries.values())

    def parameters(self) -> list[nn.Parameter]:
        """The deltas, one (k,) parameter for each weight: what an optimizer needs."""
        return [entries.delta for entries in self.entries.values()]

    def trained(self) -> dict[str, nn.Parameter]:
        """The deltas by weight name."""
        return {name: entries.delta for name, entries in self.entries.items()}

    def follow_(self) -> None:
        """Writes base + delta into the weights now. Only needed after changing deltas by hand."""
        for entries in self.entries.values():
            entries.follow_()

    def train_together(self) -> None:
        """From now on several processes train, each on batches of its own, and call `average_` before each step.

        Raises:
            FinepointError: other entries, or other weights there, in another process.
        """
        self._deltas.by_hand = True
        self._deltas.compare()

    def average_(self) -> None:
        """The gradient of every delta becomes the mean over all processes: one message of `count` numbers."""
        self._deltas.average_()

    def changed(self) -> int:
        """How many chosen entries hold another stored value than the base's (bits; the effective count)."""
        self.follow_()
        return sum(entries.changed() for entries in self.entries.values())

    def norm(self, exclude: Iterable[str] = ()) -> float:
        """The Euclidean norm of all deltas but those of the excluded weights (a new head has no base to compare)."""
        left_out = set(exclude)
        norms = [ranks.whole(entries.delta).detach().double().norm() for name, entries in self.entries.items()
                 if name not in left_out]  # fmt: skip
        return torch.stack(norms).norm().item() if norms else 0.0

    def adapter(
        self, store: str = "auto", full: Iterable[str] = (), info: Mapping[str, Any] | None = None
    ) -> SparseAdapter:
        """The change so far, as an adapter on the CPU.

        Args:
            store: `delta` keeps float32 deltas, `value` the exact trained values in the weight's dtype, `auto` values
                of half-precision weights and deltas of others. All reproduce the trained weights bit for bit.
            full: weights to store whole, without a base to compare with (a new classification head).
            info: where it comes from; JSON-ready.
        """
        if store not in ("auto", "delta", "value"):
            raise FinepointError(f"store is {store!r}; give 'auto', 'delta' or 'value'")
        self.follow_()
        whole = set(full)
        changes = {
            name: entries.whole() if name in whole else entries.change(store) for name, entries in self.entries.items()
        }
        return SparseAdapter(changes, dict(info or {}))

    def save(self, folder: Path, adapter: SparseAdapter, compact: bool = False) -> Path:
        """Writes an adapter of this tuner over whatever is in the folder; returns the file with the tensors."""
        return adapter.save(folder, overwrite=True, compact=compact) / TENSORS

    def close(self) -> None:
        """Gives back the plain model with the trained values in its weights; closing twice is harmless.

        `adapter()` beforehand keeps the change; `revert_()` beforehand gives back the base. A quantised weight cannot
        take the trained values: it is the base's again.
        """
        if not self._handles:
            return
        self.follow_()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        stop_following(getattr(self.model, CONTAINER))
        delattr(self.model, CONTAINER)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags[name])

    def round_(self, dtype: torch.dtype) -> None:
        """Rounds base + delta to a narrower dtype, as if nothing wider were kept: the negative control to deltas."""
        with torch.no_grad():
            for entries in self.entries.values():
                base = entries.base.to(entries.delta.dtype)
                stored = (base + entries.delta).to(dtype).to(entries.delta.dtype)
                entries.delta.copy_(torch.where(entries.delta == 0, 0.0, stored - base))
        self.follow_()

    def revert_(self) -> None:
        """Sets all deltas to zero and restores the base's exact bits."""
        with torch.no_grad():
            for entries in self.entries.values():
                entries.delta.zero_()
        self.follow_()


class Deltas(nn.ModuleDict):
    """The trained entries of a model, by weight name with slashes for dots."""

    def __init__(self, entries: Mapping[str, "TrainedEntries"]) -> None:
        super().__init__(entries)
        self.met = False
        self.averaging = False
        self.by_hand = False
        """whether somebody else calls `average_`"""
        if any(member.sharded for member in entries.values()):
            for member in entries.values():
                member.delta.register_post_accumulate_grad_hook(self.gradient_made)

    def members(self) -> list["TrainedEntries"]:
        return list(self.values())  # type: ignore[arg-type]

    def meet(self, model: nn.Module, args: Any) -> None:
        """Before the first forward of a model that several processes train: they compare what they train.

        Raises:
            FinepointError: other entries, or other weights there, in another process; FSDP1 or ZeRO-3.
        """
        if torch.compiler.is_compiling() or self.met or ranks.count() == 1:
            return
        refuse_flattened(model, self.members())
        if within_ddp() or is_fsdp(model):
            for entries in self.members():
                entries.sharded = is_fsdp(model)
            self.compare()

    def compare(self) -> None:
        """Has all processes compare what they train.

        Raises:
            FinepointError: other entries, or other weights there, in another process.
        """
        parts = (part for entries in self.members() for part in entries.identity())
        ranks.check_alike("the choice of entries", parts)
        self.met = True

    def gradient_made(self, delta: Tensor) -> None:
        """Has the deltas beside a sharded model averaged when this backward pass is over, which happens once."""
        if not (self.averaging or self.by_hand):
            self.averaging = True
            torch.autograd.Variable._execution_engine.queue_callback(self.average_)

    def average_(self) -> None:
        """Every gradient becomes the mean over all processes. What earlier batches added is alike everywhere: it stays.

        In one message and one order: which gradients a batch made, and when, may differ from process to process.
        """
        self.averaging = False
        deltas = [member.delta for member in self.members()]
        gradients = [torch.zeros_like(delta) if delta.grad is None else delta.grad for delta in deltas]
        together = torch.cat(gradients)
        ranks.add_up_(together)
        together /= ranks.count()
        for delta, mean in zip(deltas, together.split([len(delta) for delta in deltas]), strict=True):
            delta.grad = mean.to(delta.dtype)


class TrainedEntries(nn.Module):
    """The chosen entries of one weight: where they are, what they were, how far they have moved."""

    delta: nn.Parameter
    indices: Tensor
    base: Tensor

    def __init__(self, name: str, model: nn.Module, weight: nn.Parameter, indices: Tensor) -> None:
        super().__init__()
        _check(name, weight, indices)
        self.name = name
        owner, _, self.attribute = name.rpartition(".")
        # In a tuple: it belongs to the model, not to this module. The owner, not the weight: FSDP2 exchanges that.
        self._owner = (model.get_submodule(owner),)
        self.sharded = ranks.is_sharded(weight)
        # In four bytes where they fit: they stay in memory as long as the training lasts.
        indices = indices.to(weight.device, torch.int32 if weight.numel() <= 1 << 31 else torch.long)
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("base", gather(weight, indices), persistent=False)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.delta = nn.Parameter(torch.zeros(len(indices), dtype=wide, device=weight.device))
        self.stale = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes deltas from a state dict; where that says which entries they are of, they must be these.

        Raises:
            FinepointError: the deltas are of other entries.
        """
        kept = state_dict.pop(f"{prefix}indices", None)
        if kept is not None and not torch.equal(kept.to(self.indices), self.indices):
            raise FinepointError(f"the deltas of {self.name} to be loaded belong to other entries than the model's; "
                                 "choose the entries as that run did")  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.stale = True

    @property
    def weight(self) -> nn.Parameter:
        weight = self._owner[0]._parameters[self.attribute]
        assert weight is not None
        return weight

    def identity(self) -> tuple[bytes, ...]:
        """What all processes must have alike: the name, the positions and the base's values."""
        return self.name.encode(), self.indices.cpu().numpy().tobytes(), checksum(self.base).encode()

    def follow_(self) -> None:
        """weight[indices] = base + delta, rounded once to the weight's dtype."""
        self.write_(self.weight)

    def write_(self, weight: Tensor) -> None:
        """The same into a tensor of the weight's own memory, e.g. its `.data`, which has no version counter."""
        wide = torch.promote_types(self.base.dtype, torch.float32)
        if weight.dtype != self.base.dtype or self.delta.dtype != wide:
            raise FinepointError(f"{self.name} was cast after SparseTuner; cast the model first, then make the tuner")
        follow_(weight, self.indices, self.base, ranks.whole(self.delta))
        self.stale = False

    def changed(self) -> int:
        """Entries whose stored value differs from the base's."""
        return int((gather(self.weight, self.indices) != self.base).sum())

    def change(self, store: str) -> Change:
        shape, dtype = tuple(self.weight.shape), str(self.weight.dtype).removeprefix("torch.")
        indices, base = self.indices.cpu().long(), checksum(self.base)
        if store == "value" or (store == "auto" and self.weight.itemsize == 2):
            return Change(shape, dtype, "value", indices, gather(self.weight, self.indices).cpu(), base)
        return Change(shape, dtype, "delta", indices, ranks.whole(self.delta).detach().cpu().clone(), base)

    def whole(self) -> Change:
        return Change.whole(ranks.whole(self.weight).detach().cpu().clone())

    # The hooks. Bound methods, not closures, so that a deep copy of the model has hooks on its own copies.

    @torch.compiler.disable
    def before_forward(self, module: nn.Module, args: Any) -> None:
        # A sharded weight stands here put together for one forward: what is written to it is lost, and was written to
        # the shards after the step.
        if self.stale and not self.sharded:
            # Through .data: if the deltas did not change after all, graphs that saved the weight stay valid.
            self.write_(self.weight.data)

    @torch.compiler.disable
    def after_linear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.delta.requires_grad):
            return output
        x = args[0] if args else kwargs["input"]
        return _SampledLinear.apply(output, self.delta, x, self)

    @torch.compiler.disable
    def after_embedding(
        self, module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if not (torch.is_grad_enabled() and self.delta.requires_grad):
            return output
        tokens = args[0] if args else kwargs["input"]
        return _SampledEmbedding.apply(output, self.delta, tokens, self, module.padding_idx)


class QuantisedEntries(TrainedEntries):
    """The chosen entries of a quantised weight, which stays as it is: its layer's forward adds the deltas."""

    def alter_(self, weight: Tensor) -> None:
        """weight[indices] = base + delta in the dequantised weight, which is a copy."""
        follow_(weight, self.indices, self.base, ranks.whole(self.delta))

    def values(self) -> Tensor:
        """base + delta, rounded once to the weight's float dtype: (k,)."""
        return moved(self.base, ranks.whole(self.delta).detach())

    def write_(self, weight: Tensor) -> None:
        self.stale = False

    def changed(self) -> int:
        return int((self.values() != self.base).sum())

    def change(self, store: str) -> Change:
        change = super().change("delta")
        if store == "value" or (store == "auto" and self.base.itemsize == 2):
            return replace(change, kind="value", numbers=self.values().cpu())
        return change


class _SampledLinear(torch.autograd.Function):
    """Identity on a linear layer's output; its backward adds the sampled weight gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, delta: Tensor, x: Tensor, entries: TrainedEntries) -> Tensor:
        ctx.save_for_backward(x)
        ctx.entries = entries
        # Declared as changed in place, so that the output is itself and no view: models may add to it in place.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.entries.stale = True
        return dy, sampled_gradient(dy, x, ctx.entries.indices), None, None


class _SampledEmbedding(torch.autograd.Function):
    """Identity on an embedding's output; its backward adds the sampled gradient."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, delta: Tensor, tokens: Tensor, entries: TrainedEntries, padding: int | None
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.entries, ctx.padding = entries, padding
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        ctx.entries.stale = True
        gradient = sampled_embedding_gradient(dy, tokens, ctx.entries.indices, ctx.padding)
        return dy, gradient.to(ctx.entries.delta.dtype), None, None, None


class _GatheredWeight(torch.autograd.Function):
    """The weight itself; its backward keeps the gradient at the chosen entries and drops the rest."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, delta: Tensor, entries: TrainedEntries) -> Tensor:
        ctx.entries = entries
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dense: Tensor) -> tuple[Tensor | None, ...]:
        ctx.entries.stale = True
        return None, gather(dense, ctx.entries.indices).to(ctx.entries.delta.dtype), None


class _StandIn:
    """Puts the gathering identity in a weight's place while its module runs, for modules of any kind."""

    def __init__(self, entries: TrainedEntries, owner: nn.Module, attribute: str) -> None:
        self.entries = entries
        self.owner = owner
        self.attribute = attribute
        self.replaced: list[Tensor | None] = []

    @torch.compiler.disable
    def enter(self, module: nn.Module, args: Any) -> None:
        weight = self.owner._parameters[self.attribute]
        self.replaced.append(weight)
        if torch.is_grad_enabled() and self.entries.delta.requires_grad and weight is not None:
            stand_in = _GatheredWeight.apply(weight.detach(), self.entries.delta, self.entries)
            self.owner._parameters[self.attribute] = stand_in

    @torch.compiler.disable
    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.replaced:  # empty where a hook before `enter` has raised
            self.owner._parameters[self.attribute] = self.replaced.pop()  # type: ignore[assignment]


def within_ddp() -> bool:
    """Whether the forward that is running is that of a model wrapped in DistributedDataParallel."""
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None


def is_fsdp(model: nn.Module) -> bool:
    """Whether the model's parameters are sharded by FSDP2."""
    return any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)


def leave_out_of_ddp(model: nn.Module) -> None:
    """Has DDP keep its hands off buffers that no checkpoint holds, which it would send along before every forward.

    They are constants: the positions and base values of the trained entries, the frequencies of rotary embeddings.
    """
    names = [f"{prefix}.{name}" if prefix else name for prefix, module in model.named_modules()
             for name in module._non_persistent_buffers_set]  # fmt: skip
    earlier = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, {*earlier, *names})


def refuse_flattened(model: nn.Module, members: Iterable["TrainedEntries"]) -> None:
    """Refuses a model whose weights have lost their entries.

    Raises:
        FinepointError: FSDP1 or ZeRO-3 has taken them.
    """
    for entries in members:
        owner = entries._owner[0]
        weight = owner._parameters.get(entries.attribute)
        if hasattr(weight, "ds_id"):  # DeepSpeed marks what ZeRO-3 has partitioned
            raise FinepointError(ranks.ZERO3)
        # Both kinds of FSDP leave this mark, for torch.compile; the second one is told by the class.
        if getattr(owner, "_is_fsdp_managed_module", False) and not is_fsdp(model):
            raise FinepointError(ranks.FSDP1)


class _Eager:
    """Keeps torch.compile out of a module: code compiled for the weight itself would pass by what stands in for it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.patched = "forward" not in vars(module)
        if self.patched:  # a method, which a deep copy of the module binds to the copy
            vars(module)["forward"] = MethodType(_eagerly, module)

    def remove(self) -> None:
        if self.patched:
            vars(self.module).pop("forward", None)


@torch.compiler.disable
def _eagerly(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


class _Bypass(_StandIn):
    """Stands in for the head's weight while the whole model runs and is told to do without the head's forward.

    TRL's trainers call `model(.., fused_lm_head=True)` and multiply by `lm_head.weight` themselves: hooks on the head
    would see nothing, and its entries would silently get no gradient.
    """

    @torch.compiler.disable
    def enter_if_fused(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("fused_lm_head"):
            self.entries.before_forward(self.owner, args)
            self.enter(module, args)


def _attach(model: nn.Module, entries: TrainedEntries) -> list[Any]:
    """Hooks every module that uses the weight (several, if it is tied)."""
    handles: list[Any] = []
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not entries.weight:
                continue
            handles.append(module.register_forward_pre_hook(entries.before_forward))
            # A subclass with a forward of its own may scale or reuse the weight: the stand-in is right for any use.
            forward = type(module).forward
            if attribute == "weight" and forward is nn.Linear.forward:
                handles.append(module.register_forward_hook(entries.after_linear, with_kwargs=True))
            elif attribute == "weight" and forward is nn.Embedding.forward and _is_plain(module):
                handles.append(module.register_forward_hook(entries.after_embedding, with_kwargs=True))
            else:
                stand_in = _StandIn(entries, module, attribute)
                handles.append(module.register_forward_pre_hook(stand_in.enter))
                handles.append(module.register_forward_hook(stand_in.leave, always_call=True))
                handles.append(_Eager(module))
            if module is _head(model):
                bypass = _Bypass(entries, module, attribute)
                handles.append(model.register_forward_pre_hook(bypass.enter_if_fused, with_kwargs=True))
                handles.append(model.register_forward_hook(bypass.leave, always_call=True))
    return handles


def _head(model: nn.Module) -> nn.Module | None:
    """The module of a language model's output matrix, where the model tells."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def _is_plain(embedding: nn.Module) -> bool:
    return embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse


def _check(name: str, weight: Tensor, indices: Tensor) -> None:
    if not weight.is_floating_point():
        raise FinepointError(f"{name} is {weight.dtype}: a quantised weight cannot be trained in place")
    if indices.ndim != 1 or indices.is_floating_point():
        raise FinepointError(f"the indices of {name} have shape {tuple(indices.shape)}; give flat integer positions")
    if bool((indices[1:] <= indices[:-1]).any()):
        raise FinepointError(f"the indices of {name} are not ascending and unique")
    if int(indices[0]) < 0 or int(indices[-1]) >= weight.numel():
        raise FinepointError(f"an index of {name} lies outside its {weight.numel()} entries")
