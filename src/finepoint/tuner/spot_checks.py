"""Whether a training's own steps give every chosen entry its gradient: a few of them are looked at as they happen.

The audit (see `audit`) knows neither what a loop of the user's does with weights outside the model's forward (a head by
hand, a term of the weights beside the loss) nor what longer inputs bring about. So in the second step, the third, the
fifth, the ninth .., and where an input is longer than any before, weights get their dense gradient as well, which is
reduced to the chosen entries as soon as it is made. The product of a plain layer that alone has its weight is left out
of it: the audit has tried that, and all of the layer's input would have to be kept for it. The first step is left
alone: who makes an optimizer after a first forward asks for the parameters with a gradient, and is to find the deltas.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from finepoint.errors import FinepointError
from finepoint.runtime import distributed
from finepoint.selection.rules import wide
from finepoint.tuner.audit import Seen, collect_, epsilon_of, look_
from finepoint.tuner.autograd import Aside
from finepoint.tuner.sparse_weight import SparseWeight

LONGER = 1.25  # times the longest input looked at so far


class SpotChecks:
    """Looks at some steps of a training.

    Args:
        members: the trained entries by name; those of sharded and quantised weights are left out.
    """

    def __init__(self, members: Mapping[str, SparseWeight]) -> None:
        self.members = members
        self.steps = 0
        self.next = 1
        self.longest = 0
        self._seen: dict[str, Seen] = {}
        self._made: dict[str, Tensor] = {}
        self._open: list[Tensor] = []
        self._undo: list[Callable[[], Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model looks at steps of its own; weights that were copied with a gradient are closed there."""
        return {**vars(self), "_seen": {}, "_made": {}, "_undo": []}

    @torch.compiler.disable
    def before_forward(self, inputs: Any) -> None:
        """Ends the look at the step before, if it has come to its backward pass, and begins another if it is time.

        Raises:
            FinepointError: entries got another gradient than their loss gives them.
        """
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        self.conclude()
        if self._open and not self._seen:  # of a copy
            self.cancel()
        if self._seen or not self.steps:
            return
        lengths = [part.shape[1] for part in tree_leaves(inputs) if isinstance(part, Tensor) and part.ndim > 1]
        length = max(lengths, default=0)
        if self.steps >= self.next or length > LONGER * self.longest:
            members = {name: entries for name, entries in self.members.items() if self._can_be_told(entries)}
            if all(_is_fresh(entries.delta) for entries in members.values()):
                self.next, self.longest = 2 * self.steps, max(length, self.longest)
                self._begin(members)

    def before_step(self) -> None:
        """Before an optimizer's step: ends the look that is going on.

        Raises:
            FinepointError: entries got another gradient than their loss gives them.
        """
        if torch._C._current_graph_task_id() == -1:  # else it is one of many optimizers that step as gradients come
            self.conclude()
            self.cancel()

    def stepped(self) -> None:
        """After an optimizer's step."""
        self.steps += 1

    def conclude(self) -> None:
        """Ends the look that is going on, if a gradient has been made; called outside of backward passes.

        Raises:
            FinepointError: entries got another gradient than their loss gives them.
        """
        begun = self._made or any(seen.dense is not None for seen in self._seen.values())
        if torch._C._current_graph_task_id() != -1 or not begun:
            return
        for name, seen in self._seen.items():
            seen.sparse = self._made.get(name)
            if self.members[name].alone and seen.dense is not None and seen.sparse is not None:
                seen.dense = seen.dense + seen.sparse  # the layer's own product, which was left out
        found, step = self._seen, self.steps + 1
        self.cancel()
        for name, seen in found.items():
            # Where no dense gradient was made, gradients were asked for by name (`torch.autograd.grad`).
            if seen.dense is not None and len(seen.dense) and not (seen.none or seen.agrees()):
                raise FinepointError(f"in step {step} the chosen entries of {name} got another gradient than the loss "
                                     f"gives them (off by {100 * seen.error():.0f} %): the weight is used outside the "
                                     "model's forward, or by longer inputs in another way; call its layer instead, or "
                                     "leave it out of the targets")  # fmt: skip

    def cancel(self) -> None:
        """Ends the look that is going on, whatever it has seen."""
        for undo in self._undo:
            undo()
        for weight in self._open:
            weight.requires_grad_(False)
        self._seen, self._made, self._open, self._undo = {}, {}, [], []

    def _can_be_told(self, entries: SparseWeight) -> bool:
        weight, delta = entries.weight, entries.delta
        plain = not (entries.quantised or distributed.is_sharded(weight) or distributed.is_sharded(delta))
        frozen = weight.is_leaf and not weight.requires_grad and not weight.is_inference()
        return plain and frozen and delta.is_leaf and delta.requires_grad and len(entries.indices) > 0

    def _begin(self, members: Mapping[str, SparseWeight]) -> None:
        for name, entries in members.items():
            weight, seen = entries.weight, Seen(epsilon_of(entries.weight), entries.weight.numel())
            self._seen[name] = seen
            self._open.append(weight.requires_grad_(True))
            self._undo += [
                entries.delta.register_post_accumulate_grad_hook(partial(self._keep, name)).remove,
                weight.register_post_accumulate_grad_hook(partial(collect_, seen, entries)).remove,
                entries._owner[0].register_forward_pre_hook(partial(look_, seen)).remove,
            ]
            if entries.alone:
                owner = entries._owner[0]
                self._undo += [hook.remove for hook in Aside(entries, [(owner, "weight")]).around(owner)]

    def _keep(self, name: str, delta: Tensor) -> None:
        assert delta.grad is not None
        self._made[name] = wide(delta.grad.detach().clone())


def _is_fresh(delta: nn.Parameter) -> bool:
    return delta.grad is None or not bool(delta.grad.any())
