"""A half-precision weight that is trained whole has a float32 master, or small steps would be lost to rounding."""

from functools import partial

import torch
from torch import Tensor, nn


class Master(nn.Module):
    """The float32 value of a half-precision weight, which takes over the weight's gradients."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self._weight = (weight,)  # in a tuple: the weight belongs to the model, not to this module
        self.value = nn.Parameter(weight.detach().float())
        self.handle = weight.register_post_accumulate_grad_hook(partial(_move_gradient, self.value))

    def check_fit(self) -> None:
        """A weight of any floating-point dtype can take the master's value."""

    @torch.no_grad()
    def follow_(self) -> None:
        """The weight takes the master's value, rounded once."""
        self._weight[0].detach().copy_(self.value.detach())


def _move_gradient(value: nn.Parameter, weight: Tensor) -> None:
    assert weight.grad is not None
    gradient = weight.grad.float()
    value.grad = gradient if value.grad is None else value.grad.add_(gradient)
    weight.grad = None
