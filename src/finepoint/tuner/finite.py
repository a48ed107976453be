"""A gradient that is NaN or infinite stops training before the step that would carry it into the weights.

Likewise, a model with NaN or infinite logits is not evaluated.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from finepoint.errors import FinepointError
from finepoint.runtime import distributed

SMALL = 1 << 20  # numbers: up to there a copy costs less than a call


class TrainingFailedError(FinepointError):
    """Training failed because of its settings, not because of the data or the disk."""


class NotFiniteError(TrainingFailedError):
    """The loss or a gradient became NaN or infinite; what is trained is as the last good step left it."""


def refuse_not_finite(trained: Mapping[str, nn.Parameter], when: str) -> None:
    """Stops before a step whose gradient is not finite.

    Raises:
        NotFiniteError: the first parameter with such a gradient is named.
    """
    gradients: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in trained.items():
        if (gradient := parameter.grad) is not None:
            own = distributed.own_rows(gradient)[0] if distributed.is_sharded(gradient) else gradient
            gradients[own.device][name] = own.detach()
    # One synchronisation per device; which parameter it was is looked up only when the check fails.
    for found in gradients.values():
        if not _are_finite(list(found.values())):
            for name, gradient in found.items():
                if not bool(gradient.isfinite().all()):
                    raise NotFiniteError(f"the gradient of {name} is not finite{when}")


def _are_finite(gradients: list[Tensor]) -> bool:
    """Whether all numbers are certainly finite: their sum is, which no number that is not leaves it. One pass over
    them, where asking each takes four."""
    small = [gradient.reshape(-1) for gradient in gradients if gradient.numel() <= SMALL]
    sums = [gradient.sum() for gradient in gradients if gradient.numel() > SMALL]
    if small:
        sums.append(torch.cat(small).sum())
    return bool(torch.stack(sums).isfinite().all())


def refuse_not_numbers(values: Tensor, what: str = "the model's logits are") -> None:
    """Refuses to measure what is NaN or +inf; -inf only rules a token out.

    Raises:
        FinepointError: a value is.
    """
    if not bool((values < float("inf")).all()):  # NaN is not less either
        raise FinepointError(f"{what} NaN or infinite, so that nothing can be measured: its weights are damaged, or "
                             "too large for their dtype (then try --dtype float32)")  # fmt: skip
