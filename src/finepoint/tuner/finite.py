"""A gradient that is NaN or infinite stops training before the step that would carry it into the weights.

Likewise, a model with NaN or infinite logits is not evaluated.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from finepoint.errors import FinepointError
from finepoint.runtime import distributed


class TrainingFailedError(FinepointError):
    """Training failed because of its settings, not because of the data or the disk."""


class NotFiniteError(TrainingFailedError):
    """The loss or a gradient became NaN or infinite; what is trained is as the last good step left it."""


def refuse_not_finite(trained: Mapping[str, nn.Parameter], when: str) -> None:
    """Stops before a step whose gradient is not finite.

    Raises:
        NotFiniteError: the first parameter with such a gradient is named.
    """
    finite: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in trained.items():
        if parameter.grad is not None:
            own = distributed.own_rows(parameter.grad)[0] if distributed.is_sharded(parameter.grad) else parameter.grad
            finite[own.device][name] = own.isfinite().all()
    # One synchronisation per device; which parameter it was is looked up only when the check fails.
    for answers in finite.values():
        if not bool(torch.stack(list(answers.values())).all()):
            name = next(name for name, answer in answers.items() if not answer)
            raise NotFiniteError(f"the gradient of {name} is not finite{when}")


def refuse_not_numbers(values: Tensor, what: str = "the model's logits are") -> None:
    """Refuses to measure what is NaN or +inf; -inf only rules a token out.

    Raises:
        FinepointError: a value is.
    """
    if not bool((values < float("inf")).all()):  # NaN is not less either
        raise FinepointError(f"{what} NaN or infinite, so that nothing can be measured: its weights are damaged, or "
                             "too large for their dtype (then try --dtype float32)")  # fmt: skip
