"""AdamW of our own: entries that join at different times, MoFO's, which moves the largest momenta alone, and one that
leaves some directions as they are.

A step is taken parameter by parameter. Of any optimizer's step a share can be taken, another one for each number. And
the moving average of what is trained.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finepoint.adapters.entries import gather, scatter_

STEPS = "average.steps"


class AdamWByParameter(Optimizer):
    """Calls `step_` for every parameter that has a gradient."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8, weight_decay: float = 0.0, **more: Any,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "epsilon": epsilon, "weight_decay": weight_decay}
        super().__init__(parameters, defaults | more)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_(parameter, parameter.grad, self.state[parameter], group)

    def step_(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Moves one parameter, in place."""
        raise NotImplementedError


def _moments_(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The running means of a gradient and of its square, after taking it in."""
    beta1, beta2 = group["betas"]
    square = state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    return state["momentum"].lerp_(gradient, 1 - beta1), square


class PerEntryAdamW(AdamWByParameter):
    """AdamW (arXiv:1711.05101) whose bias correction goes by the age of each entry, as SpIEL's does (arXiv:2401.16405).

    torch's counts the steps of a whole parameter. Under a constant gradient an entry whose moments begin at zero when
    that count is high would take steps of 3.2 times the learning rate at first, and of 6.6 times a dozen steps later.
    """

    def step_(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {name: torch.zeros_like(parameter) for name in ("age", "momentum", "square")}
        age = state["age"].add_(1)
        beta1, beta2 = group["betas"]
        momentum, square = _moments_(gradient, state, group)
        first = momentum / _correction(beta1, age)
        root = square.div(_correction(beta2, age)).sqrt_().add_(group["epsilon"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(first, root, value=-group["lr"])


def _correction(beta: float, age: Tensor) -> Tensor:
    """1 - beta^age; the plain difference would lose most of its digits at the first steps."""
    return -torch.expm1(age * math.log(beta))


class MoFOAdamW(AdamWByParameter):
    """AdamW whose step is applied only where |momentum| is among the largest of its tensor (MoFO, arXiv:2407.20999).

    Momentum and second moment of all entries are kept up all the while; decoupled weight decay belongs to the step and
    is filtered with it.

    Args:
        share: of each tensor's entries to move, in (0, 1]; at least one.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], share: float, lr: float, **more: Any) -> None:
        super().__init__(parameters, lr, share=share, **more)

    def step_(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "momentum": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        state["step"] += 1
        beta1, beta2 = group["betas"]
        momentum, square = _moments_(gradient, state, group)

        moving = max(1, int(group["share"] * parameter.numel()))
        chosen = momentum.abs().reshape(-1).topk(moving, sorted=False).indices
        first = gather(momentum, chosen) / (1 - beta1 ** state["step"])
        root = (gather(square, chosen) / (1 - beta2 ** state["step"])).sqrt()
        value = gather(parameter, chosen) * (1 - group["lr"] * group["weight_decay"])
        scatter_(parameter, chosen, value - group["lr"] * first / (root + group["epsilon"]))


class OrthogonalAdamW(AdamWByParameter):
    """AdamW whose steps leave a matrix's outputs and inputs in some directions as they are (after OSF,
    arXiv:2504.07097, which trains the factors of what is left instead).

    A step D becomes (I - U U^T) D (I - V V^T), so that all steps together are orthogonal to U and V, decay too. Where a
    share of each step is taken, D is that share.

    Args:
        frozen: U and V for each matrix that has some, see `largest_directions`.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], frozen: Mapping[Tensor, tuple[Tensor, Tensor]], lr: float, **more: Any
    ) -> None:
        super().__init__(parameters, lr, **more)
        self.frozen = frozen
        self.shares: dict[Tensor, Tensor] = {}
        """of its steps, see `scale_steps_`"""

    def step_(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "momentum": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        state["step"] += 1
        beta1, beta2 = group["betas"]
        momentum, square = _moments_(gradient, state, group)
        first = momentum / (1 - beta1 ** state["step"])
        root = square.div(1 - beta2 ** state["step"]).sqrt_().add_(group["epsilon"])
        step = first.div_(root).add_(parameter, alpha=group["weight_decay"])
        if parameter in self.shares:
            step *= self.shares[parameter]
        if parameter in self.frozen:
            left, right = self.frozen[parameter]
            step = step - left @ (left.mT @ step)
            step = step - (step @ right) @ right.mT
        parameter.sub_(step, alpha=group["lr"])


def largest_directions(matrix: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The left and right singular vectors of the largest singular values, a share of all: (.., m, r) and (.., n, r)."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    count = round(share * left.shape[-1])
    return left[..., :count].clone(), right[..., :count, :].mT.clone()


def scale_steps_(optimizer: Optimizer, trained: Mapping[str, nn.Parameter], shares: Mapping[str, Tensor]) -> None:
    """From now on parameters move by `shares` of what a step of the optimizer would move them by.

    Its state knows nothing of that. A share of 1 is the step itself, to the bit.

    Args:
        shares: by the names of `trained`, of their shapes; what has none is moved as ever.
    """
    if isinstance(optimizer, OrthogonalAdamW):  # shares of what it has projected would leave its directions
        optimizer.shares = {trained[name]: share for name, share in shares.items()}
        return
    before: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        before.update({name: trained[name].detach().clone() for name in shares})

    @torch.no_grad()
    def take(*_: Any) -> None:
        for name, share in shares.items():
            trained[name].copy_(before.pop(name).lerp(trained[name], share))

    # torch calls an optimizer's own hooks around its step before those of all, by which weights follow.
    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(take)


class MovingAverage:
    """The mean of what is trained over all steps so far, a step counting `decay` times as much as the next one.

    Held beside what is trained, in its dtype.

    Args:
        trained, put_: the tuner's.
    """

    def __init__(
        self, trained: Callable[[], Mapping[str, Tensor]], put_: Callable[[Mapping[str, Tensor]], None], decay: float
    ) -> None:
        self.trained, self.put_, self.decay, self.steps = trained, put_, decay, 0
        self.values = {name: value.detach().clone() for name, value in trained().items()}

    @torch.no_grad()
    def step_(self) -> None:
        """Takes in what a step has left."""
        self.steps += 1
        share = (1 - self.decay) / (1 - self.decay**self.steps)  # the first step's is the average itself
        for name, value in self.trained().items():
            self.values[name].lerp_(value, share)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, what is trained is the average, and the model computes with it."""
        held = {name: value.detach().clone() for name, value in self.trained().items()}
        try:
            self.put_(self.values)
            yield
        finally:
            self.put_(held)

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""
        averages = {f"{name}.average": value for name, value in self.values.items()}
        return averages | {STEPS: torch.tensor(float(self.steps))}

    def restore_(self, kept: Mapping[str, Tensor]) -> None:
        """Puts back what `kept` gave."""
        self.steps = int(kept[STEPS])
        for name, value in self.values.items():
            value.copy_(kept[f"{name}.average"])
