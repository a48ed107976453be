"""Two rules. Their parameters say what they need; the first line of a docstring is what `finepoint rules` shows."""

from torch import Tensor


def row_share(gradient: Tensor, power: float = 1.0) -> Tensor:
    """|mean g|^power / its sum over the entry's row

    What an entry is to its own output neuron, so that no neuron takes the whole budget.
    """
    size = gradient.abs() ** power
    return size / size.sum(-1, keepdim=True).clamp_min(1e-30)


def near_the_mean(weight: Tensor) -> Tensor:
    """-|w - mean of w|"""
    weight = weight.float()
    return -(weight - weight.mean()).abs()
