"""Counts the bytes of tensors that have a shape and no memory: what a computation would hold, without doing it."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """While active, enters every new storage on the meta device under the current part, and strikes it out when freed.

    What the code asks of numbers that are not there is made up: a bool is true, a number 1, all elements are distinct.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.held: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        """What was held by part when the sum was largest."""
        self._entries: dict[int, tuple[str, int]] = {}

    def enter(self, part: str) -> None:
        """What is made from now on belongs to this part."""
        self.part = part

    def hold(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Enters tensors that exist already, or moves them from another part."""
        for tensor in chain.from_iterable(map(_plain, tensors)):
            if tensor.is_meta:
                self._strike(tensor.untyped_storage()._cdata)
                self._enter(tensor, part)

    def reset_peak(self) -> None:
        self.peak = self.held.copy()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if operation is torch.ops.aten._unique2.default and args[0].is_meta:
            result = tuple(
                torch.empty(args[0].numel(), dtype=dtype, device="meta")
                for dtype in (args[0].dtype, torch.long, torch.long)
            )
        else:
            result = operation(*args, **(kwargs or {}))
        for tensor in chain.from_iterable(map(_plain, tree_leaves(result))):
            if tensor.is_meta:
                self._enter(tensor, self.part)
        return result

    def _enter(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:  # a view, or changed in place
            return
        self._entries[key] = part, storage.nbytes()
        weakref.finalize(storage, self._strike, key).atexit = False
        self.held[part] += storage.nbytes()
        if self.held.total() > self.peak.total():
            self.peak = self.held.copy()

    def _strike(self, key: int) -> None:
        if key in self._entries:
            part, size = self._entries.pop(key)
            self.held[part] -= size


def _plain(value: Any) -> Iterator[Tensor]:
    """The tensors that memory is held by: of a quantised one its integers and scales; none of what is no tensor."""
    if is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
