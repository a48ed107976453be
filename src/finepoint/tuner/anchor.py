"""EWC's pull towards the base (arXiv:1612.00796), at whatever is trained: whole weights, or chosen entries alone."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class Anchor:
    """The penalty (strength / 2) x the sum of F (w - w0)^2, as the gradient it adds, strength x F (w - w0).

    Args:
        trained: gives what is trained, by name; asked anew at every step.
        fisher: F by these names, of the same shapes; what has none is not held back.
        start: w0 by these names; none where it is deltas that are trained, which start from 0.
    """

    def __init__(
        self, trained: Callable[[], Mapping[str, nn.Parameter]], fisher: Mapping[str, Tensor], strength: float,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.trained, self.fisher, self.strength, self.start = trained, fisher, strength, start

    @torch.no_grad()
    def add_(self) -> None:
        """Adds the penalty's gradient to the gradients of what is trained."""
        for name, value in self.trained().items():
            if name in self.fisher:
                fisher = self.fisher[name]
                pull = (value - self.start[name]).mul_(fisher) if self.start else value * fisher
                pull.mul_(self.strength)
                value.grad = pull if value.grad is None else value.grad.add_(pull)
