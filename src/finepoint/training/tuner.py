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
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from finepoint.adapters.adapter import Change, SparseAdapter
from finepoint.adapters.entries import checksum, gather, moved
from finepoint.adapters.format import TENSORS
from finepoint.errors import FinepointError
from finepoint.quantised import Replaced, is_quantised, replace_forwards
from finepoint.training.following import follow_after_steps, stop_following
from finepoint.training.kernels import follow_, sampled_embedding_gradient, sampled_gradient

CONTAINER = "finepoint"  # the name under which the deltas hang on the model


class SparseTuner:
    """Makes chosen entries of a model trainable, in place; the model stays the same object.

    Args:
        model: its parameters are frozen until `close`.
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
                self.entries[first_name] = kind(first_name, weight, positions)
        if not self.entries:
            raise FinepointError("there is no index to train; select some first")

        quantised = [entries for entries in self.entries.values() if isinstance(entries, QuantisedEntries)]
        altered = {entries.name: entries.alter_ for entries in quantised}
        self._handles: list[RemovableHandle | Replaced] = [*replace_forwards(model, altered)]
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(False)
        container = nn.ModuleDict({name.replace(".", "/"): entries for name, entries in self.entries.items()})
        setattr(model, CONTAINER, container)
        follow_after_steps(container)
        for entries in self.entries.values():
            self._handles += _attach(model, entries)

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

    def changed(self) -> int:
        """How many chosen entries hold another stored value than the base's (bits; the effective count)."""
        self.follow_()
        return sum(entries.changed() for entries in self.entries.values())

    def norm(self, exclude: Iterable[str] = ()) -> float:
        """The Euclidean norm of all deltas but those of the excluded weights (a new head has no base to compare)."""
        left_out = set(exclude)
        norms = [entries.delta.detach().double().norm() for name, entries in self.entries.items()
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


class TrainedEntries(nn.Module):
    """The chosen entries of one weight: where they are, what they were, how far they have moved."""

    delta: nn.Parameter
    indices: Tensor
    base: Tensor

    def __init__(self, name: str, weight: nn.Parameter, indices: Tensor) -> None:
        super().__init__()
        _check(name, weight, indices)
        self.name = name
        self._weight = (weight,)  # in a tuple: the weight belongs to the model, not to this module
        # In four bytes where they fit: they stay in memory as long as the training lasts.
        indices = indices.to(weight.device, torch.int32 if weight.numel() <= 1 << 31 else torch.long)
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("base", gather(weight, indices), persistent=False)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.delta = nn.Parameter(torch.zeros(len(indices), dtype=wide, device=weight.device))
        self.stale = False
        self.register_load_state_dict_post_hook(lambda module, keys: setattr(module, "stale", True))

    @property
    def weight(self) -> nn.Parameter:
        return self._weight[0]

    def follow_(self) -> None:
        """weight[indices] = base + delta, rounded once to the weight's dtype."""
        self._write_(self.weight)

    def _write_(self, weight: Tensor) -> None:
        wide = torch.promote_types(self.base.dtype, torch.float32)
        if weight.dtype != self.base.dtype or self.delta.dtype != wide:
            raise FinepointError(f"{self.name} was cast after SparseTuner; cast the model first, then make the tuner")
        follow_(weight, self.indices, self.base, self.delta)
        self.stale = False

    def changed(self) -> int:
        """Entries whose stored value differs from the base's."""
        return int((gather(self.weight, self.indices) != self.base).sum())

    def change(self, store: str) -> Change:
        shape, dtype = tuple(self.weight.shape), str(self.weight.dtype).removeprefix("torch.")
        indices, base = self.indices.cpu().long(), checksum(self.base)
        if store == "value" or (store == "auto" and self.weight.itemsize == 2):
            return Change(shape, dtype, "value", indices, gather(self.weight, self.indices).cpu(), base)
        return Change(shape, dtype, "delta", indices, self.delta.detach().cpu().clone(), base)

    def whole(self) -> Change:
        return Change.whole(self.weight.detach().cpu().clone())

    # The hooks. Bound methods, not closures, so that a deep copy of the model has hooks on its own copies.

    def before_forward(self, module: nn.Module, args: Any) -> None:
        if self.stale:
            # Through .data: if the deltas did not change after all, graphs that saved the weight stay valid.
            self._write_(self.weight.data)

    def after_linear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.delta.requires_grad):
            return output
        x = args[0] if args else kwargs["input"]
        return _SampledLinear.apply(output, self.delta, x, self)

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
        follow_(weight, self.indices, self.base, self.delta)

    def values(self) -> Tensor:
        """base + delta, rounded once to the weight's float dtype: (k,)."""
        return moved(self.base, self.delta.detach())

    def _write_(self, weight: Tensor) -> None:
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

    def __init__(self, entries: TrainedEntries, attribute: str) -> None:
        self.entries = entries
        self.attribute = attribute

    def enter(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and self.entries.delta.requires_grad:
            weight = self.entries.weight
            stand_in = _GatheredWeight.apply(weight.detach(), self.entries.delta, self.entries)
            module._parameters[self.attribute] = stand_in

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        module._parameters[self.attribute] = self.entries.weight


def _attach(model: nn.Module, entries: TrainedEntries) -> list[RemovableHandle]:
    """Hooks every module that uses the weight (several, if it is tied)."""
    handles: list[RemovableHandle] = []
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
                stand_in = _StandIn(entries, attribute)
                handles.append(module.register_forward_pre_hook(stand_in.enter))
                handles.append(module.register_forward_hook(stand_in.leave, always_call=True))
    return handles


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
