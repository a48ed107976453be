"""Whether a draw of columns has more than its share of a model's few very large inputs.

A few inputs of a language model are thousands of times as large as the rest (massive activations, arXiv:2402.17762).
A random entry meets them by its share; of whole columns most draws have none, and a few have one whole, and then the
model moves several times as far on any text (docs/study-keeping.md).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.errors import FinepointError
from finepoint.selection.input_norms import input_norms
from finepoint.selection.passes import Batch

logger = logging.getLogger(__name__)
MUCH = 2.0  # times what as many entries hold on average


@dataclass(frozen=True)
class LargeInputs:
    """What chosen entries multiply."""

    times: float
    """the sum of their inputs' squares, over what as many entries of the same weights hold on average"""
    weight: str
    input: int
    share: float
    """of that sum, of the one input that has most of it"""


def large_inputs(
    indices: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], norms: Mapping[str, Tensor]
) -> LargeInputs:
    """What the entries of these indices multiply.

    Args:
        indices: by weight name, (k,) int64; some at least.
        shapes: (rows, columns) of each weight.
        norms: as `input_norms` gives them, (1, columns), or (rows, 1) for layers that store (in, out).
    """
    held = usual = largest = 0.0
    weight, place = "", 0
    for name, chosen in indices.items():
        squares = norms[name].detach().cpu().double().square()
        columns = shapes[name][1]
        of = chosen.cpu() % columns if squares.shape[0] == 1 else chosen.cpu() // columns
        by_input = torch.bincount(of, minlength=squares.numel()) * squares.view(-1)
        held += by_input.sum().item()
        usual += len(chosen) * squares.mean().item()
        most = int(by_input.argmax())
        if by_input[most].item() >= largest:
            largest, weight, place = by_input[most].item(), name, most
    return LargeInputs(held / usual if usual else 1.0, weight, place, largest / held if held else 0.0)


def warn_of_large_inputs(model: nn.Module, indices: Mapping[str, Tensor], batches: Sequence[Batch]) -> None:
    """A line of the log where entries that were drawn hold far more of the inputs than as many do on average."""
    weights: dict[str, Any] = {name: model.get_parameter(name) for name in indices}
    try:
        norms = input_norms(model, weights, batches)
    except FinepointError:  # no linear layer, or sharded: then it is not known
        return
    found = large_inputs(indices, {name: weight.shape for name, weight in weights.items()}, norms)
    if found.times > MUCH:
        logger.warning(
            "by chance the columns that were drawn hold %.1f times as much of the model's inputs as so many do on "
            "average, %.0f %% of it in input %d of %s: other text will change more for it; give another --seed, or "
            "hold it by --protect own", found.times, 100 * found.share, found.input, found.weight,
        )  # fmt: skip
