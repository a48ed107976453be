"""Quantised weights: tensors that hold a linear layer's weight in few bits and know its float values, torchao's or
`packed`, which are bitsandbytes'.

No entry of such a weight can be set on its own: its float value is one of a few numbers times a scale that it shares
with its row or group. So what is trained is added outside: a layer's forward is replaced, while something is attached
to its model, by one that multiplies by the dequantised weight with the chosen entries as they should be. A weight's
float values exist for one layer at a time, forward and backward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finepoint.errors import FinepointError, needing
from finepoint.models.bitsandbytes import Packed, nf4
from finepoint.models.grids import LevelGrid
from finepoint.runtime.settings import Quantise

GROUP = 32  # entries of a row that share a scale, in int4
Alter = Callable[[Tensor], None]
"""Changes a dequantised weight, which is a copy, in place."""


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight holds integers and scales and can say its float values."""
    return type(weight).dequantize is not Tensor.dequantize


def float_values(weight: Tensor) -> Tensor:
    """The weight's values as an ordinary tensor: itself, or a new one where it is quantised; no autograd."""
    return weight.detach().dequantize() if is_quantised(weight) else weight.detach()


def grid_at(name: str, weight: Tensor, indices: Tensor, base: Tensor) -> LevelGrid:
    """Where chosen entries of a quantised weight can be, its scales staying as they are.

    Args:
        indices: flat positions, (k,).
        base: the dequantised weight's values there, (k,).

    Raises:
        FinepointError: the weight holds floats, or is in a form whose grid is not known here.
    """
    indices = indices.long()
    if isinstance(weight, Packed):
        grid = weight.grid(indices)
    elif is_quantised(weight) and all(hasattr(weight, part) for part in ("qdata", "scale", "zero_point", "block_size")):
        grid = _grid_of_torchao(weight, indices)
    else:
        form = type(weight).__name__ if is_quantised(weight) else str(weight.dtype).removeprefix("torch.")
        raise FinepointError(f"{name} is {form}, whose grid finepoint does not know; leave it out of the targets")
    if not torch.equal(grid.values(grid.at).to(base.dtype), base):
        raise FinepointError(f"{name} is a {type(weight).__name__} whose values are not its codes times its scales; "
                             "leave out --on-grid")  # fmt: skip
    return grid


def _grid_of_torchao(weight: Any, indices: Tensor) -> LevelGrid:
    """Int8Tensor's and IntxUnpackedToInt8Tensor's: integers less their zero point, times the scale of their block."""
    columns, (down, across) = weight.shape[1], map(int, weight.block_size)
    block = indices // columns // down * -(-columns // across) + indices % columns // across
    bits = 4 if str(getattr(weight, "target_dtype", "")) == "torch.int4" else 8
    lowest = -(1 << bits - 1)
    zero = None if weight.zero_point is None else weight.zero_point.reshape(-1)[block].long()
    levels = torch.arange(lowest, -lowest, device=weight.device, dtype=torch.float32)
    at = weight.qdata.reshape(-1)[indices].long() - lowest
    return LevelGrid(at, weight.scale.reshape(-1)[block], zero, levels, partial(_by_torchao, weight.dtype))


def _by_torchao(dtype: torch.dtype, levels: Tensor, scale: Tensor) -> Tensor:
    return (levels.to(dtype) * scale).to(dtype)


def quantise_(model: nn.Module, bits: Quantise, layers: Sequence[str]) -> None:
    """Quantises the weights of linear layers, by their modules' names: `int8` by rows, `int4` by groups of 32, `nf4` by
    blocks of 64.

    Int8WeightOnlyConfig and IntxWeightOnlyConfig of torchao, which run on any device. On the CPU torchao keeps each
    four-bit number in a byte: int4 then costs accuracy and saves no more memory than int8. `nf4` is bitsandbytes',
    without double quantisation, and packs two numbers a byte everywhere.

    Raises:
        FinepointError: torchao or bitsandbytes is not installed, or a layer is too narrow for groups.
    """
    if bits == "nf4":
        for layer in map(model.get_submodule, layers):
            layer.weight = nn.Parameter(nf4(layer.weight), requires_grad=False)  # type: ignore[arg-type]
        return
    with needing(f"--quantise {bits}", "quantised"):
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
    if bits == "int4":
        narrow = [name for name in layers if model.get_submodule(name).in_features % GROUP]  # type: ignore[operator]
        if narrow:
            raise FinepointError(f"int4 has groups of {GROUP} entries, and the rows of {min(narrow)} cannot be divided "
                                 "so; give --quantise int8")  # fmt: skip
    config = (
        Int8WeightOnlyConfig()
        if bits == "int8"
        else IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))  # type: ignore[attr-defined]
    )
    wanted = set(layers)
    quantize_(model, config, filter_fn=lambda module, name: name in wanted)


def quantised_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The model's linear layers with a quantised weight, by the weight's name."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        # Not by the attribute, which a parametrisation computes anew, and may change itself by that.
        and isinstance(weight := module._parameters.get("weight"), Tensor)
        and is_quantised(weight)
    }


class Replaced:
    """Stands in for the forward of a quantised linear layer, until `remove`."""

    def __init__(self, layer: nn.Linear, alter: Alter | None = None) -> None:
        self.layer = layer
        self.alter = alter
        layer.forward = self  # type: ignore[method-assign]

    def weight(self) -> Tensor:
        """What the layer multiplies by: (out, in), the weight's float dtype, a new tensor."""
        weight = float_values(self.layer.weight)
        if self.alter:
            self.alter(weight)
        return weight

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - a linear layer's own name for it
        return _ByFloatValues.apply(input, self)

    def remove(self) -> None:
        """Gives the layer its own forward again; removing twice is harmless."""
        if vars(self.layer).get("forward") is self:
            del self.layer.forward


class _ByFloatValues(torch.autograd.Function):
    """y = x W^T + b with W made for the forward, and made again for the backward: no float weight is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, replaced: Replaced) -> Tensor:
        ctx.replaced = replaced
        y = nn.functional.linear(x, replaced.weight(), replaced.layer.bias)
        return y.clone() if y._is_view() else y  # a view made in here could not be changed in place outside

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy @ ctx.replaced.weight() if ctx.needs_input_grad[0] else None, None


def replace_forwards(model: nn.Module, altered: Mapping[str, Alter]) -> list[Replaced]:
    """Has every quantised layer multiply by its float values, as the named weights' `Alter` changes them.

    Also those that nothing is changed in: the model then computes, and passes gradients, exactly as the model with
    dequantised weights would, whatever kernels the quantised ones have.

    Raises:
        FinepointError: the forward of a layer is replaced already.
    """
    layers = quantised_layers(model)
    if any("forward" in vars(layer) for layer in layers.values()):
        raise FinepointError("something is attached to the quantised model already; remove that first")
    return [Replaced(layer, altered.get(name)) for name, layer in layers.items()]


@contextmanager
def as_floats(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, these weights of the model are ordinary parameters with their float values, for dense gradients.

    All other quantised layers multiply by their float values meanwhile. A model without quantised layers is as it is.
    """
    layers = quantised_layers(model)
    plain = dict(weights)
    replaced = [Replaced(layer) for name, layer in layers.items() if name not in weights]
    try:
        for name in layers.keys() & weights.keys():
            layers[name]._parameters["weight"] = plain[name] = nn.Parameter(float_values(weights[name]), False)
        yield plain
    finally:
        for name in layers.keys() & weights.keys():
            layers[name]._parameters["weight"] = weights[name]
        for one in replaced:
            one.remove()
