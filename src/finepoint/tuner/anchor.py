"""A pull towards the base at whatever is trained, whole weights or chosen entries alone: EWC's, or L2-SP's."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class Anchor:
    """The penalty (strength / 2) x the sum of F (w - w0)^2, as the gradient it adds, strength x F (w - w0).

    With F the Fisher information it is EWC (arXiv:1612.00796), with 1 everywhere L2-SP (arXiv:1802.01483).

    Args:
        trained: gives what is trained, by name; asked anew at every step.
        fisher: F by these names, of the same shapes or one number; what has none is not held back.
        start: w0 by these names; empty when deltas are trained, since they start from 0.
        anew: recomputes F after the set of trained entries has changed; at the first step too, if `fisher` is empty.
    """

    def __init__(
        self, trained: Callable[[], Mapping[str, nn.Parameter]], fisher: Mapping[str, Tensor], strength: float,
        start: Mapping[str, Tensor] | None = None, anew: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        self.trained, self.fisher, self.strength, self.start, self.anew = trained, fisher, strength, start, anew
        self._measured = trained() if fisher else {}

    def holds(self) -> list[Tensor]:
        """What is kept in memory: F, and w0 where that is not 0."""
        return [*self.fisher.values(), *(self.start or {}).values()]

    @torch.no_grad()
    def add_(self, step: int = 0) -> None:
        """Adds the penalty's gradient to the gradients of what is trained."""
        trained = self.trained()
        if self.anew and any(value is not self._measured.get(name) for name, value in trained.items()):
            self.fisher, self._measured = self.anew(), trained
        for name, value in trained.items():
            if name in self.fisher:
                fisher = self.fisher[name]
                pull = (value - self.start[name]).mul_(fisher) if self.start else value * fisher
                pull.mul_(self.strength)
                value.grad = pull if value.grad is None else value.grad.add_(pull)
