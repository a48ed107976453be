"""What a layer's input can be made of again: then it need not be kept until the backward pass.

A linear layer's input is often a product (a norm's output, what goes down again in a gated MLP), and autograd keeps its
factors for the product's own backward, which comes after that of the layer. The input itself, which a frozen layer
throws away, is then the same multiplication once more, of the same numbers: the same bits, at the memory of one layer.

Unless somebody has changed the input after it was made, behind autograd's back (under `no_grad`, through `.data`). So
what is made again is compared with the input itself: the first time, the second, the fourth, the eighth ..
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finepoint.adapters.entries import same_bits
from finepoint.runtime import distributed

logger = logging.getLogger(__name__)
LEAST = 1 << 20  # bytes of an input from which on it is worth the calls
MADE = "_finepoint_made"  # on a tensor: how it is made again, for all layers that read it
Steps = int | tuple[Any, ...]
"""The place of a factor, or (torch.dtype, steps) for a conversion, or (steps, steps) for a product."""


@dataclass
class Again:
    """How an input is made again, once for all layers that read it."""

    steps: Steps
    readers: int = 0
    done: int = 0
    value: Tensor | None = None

    def made(self, factors: tuple[Tensor, ...]) -> Tensor:
        """The input; held until the last of its readers has asked for it."""
        if self.value is None:
            with torch.no_grad():
                self.value = _carried_out(self.steps, factors)
        found, self.done = self.value, self.done + 1
        if self.done == self.readers:
            self.value, self.done = None, 0
        return found


@dataclass
class Record:
    """How often the input of a weight's layer was to be made again, and whether that was found to give another."""

    name: str
    uses: int = 0
    differs: bool = False

    def holds(self, x: Tensor, steps: Steps, factors: tuple[Tensor, ...]) -> bool:
        """Whether the steps give x, bit for bit; looked at in powers of two of the uses, and taken for true between."""
        self.uses += 1
        if self.uses & (self.uses - 1) or x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return True
        with torch.no_grad():
            self.differs = not same_bits(x, _carried_out(steps, factors))
        if self.differs and self.uses > 1:
            logger.warning(
                "the input of %s is changed after it is made, in a way that autograd is not told of (no_grad, .data), "
                "and was not when it was last looked at, %d forward passes ago: gradients of its entries may have been "
                "wrong in between, and are right from now on", self.name, self.uses // 2,
            )  # fmt: skip
        return not self.differs


def made_again(x: Tensor, record: Record) -> tuple[Again, tuple[Tensor, ...]] | None:
    """How a layer's input can be made again, and of what, which autograd keeps anyway; None where it must be kept."""
    # A version other than 0: written to after it was made.
    if x.grad_fn is None or x.nbytes < LEAST or x._version or record.differs or _kept_elsewhere():
        return None
    factors: list[Tensor] = []
    try:
        steps = _traced(x.grad_fn, x.device, factors)
    except (RuntimeError, AttributeError):  # written over since, which is its own backward's to tell; an earlier torch
        return None
    if steps is None or any(map(distributed.is_sharded, factors)):
        return None
    again: Again = vars(x).setdefault(MADE, Again(steps))
    if again.steps != steps or not record.holds(x, steps, tuple(factors)):  # x was changed in place
        return None
    again.readers += 1
    return again, tuple(factors)


def _kept_elsewhere() -> bool:
    """Whether somebody packs what autograd keeps (activation checkpointing, offloading), so that asking would cost."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def _traced(node: Any, device: torch.device, factors: list[Tensor]) -> Steps | None:
    """The steps from kept factors, which are added to the list, to what this node of the graph gave."""
    if node is None or node._input_metadata[0].device != device:
        return None
    if node.name() == "ToCopyBackward0":
        source = _traced(node.next_functions[0][0], device, factors)
        return None if source is None else (node._input_metadata[0].dtype, source)
    if node.name() != "MulBackward0":
        return None
    parts: list[Steps] = []
    for factor, (source, _) in zip((node._saved_self, node._saved_other), node.next_functions, strict=True):
        if factor is None:
            part = _traced(source, device, factors)
        else:  # of a number, torch forgets that it had no dtype of its own
            part = len(factors) if factor.ndim else None
            factors.append(factor.detach())
        if part is None:
            return None
        parts.append(part)
    return tuple(parts)


def _carried_out(steps: Steps, factors: tuple[Tensor, ...]) -> Tensor:
    if isinstance(steps, int):
        return factors[steps]
    first, second = steps
    if isinstance(first, torch.dtype):
        return _carried_out(second, factors).to(first)
    return _carried_out(first, factors) * _carried_out(second, factors)
