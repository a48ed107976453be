"""bitsandbytes' weights as tensors of the shape and dtype that they stand for.

bitsandbytes keeps a weight of four bits as a column of bytes, with its scales beside it, and one of eight bits as
integers whose scales lie in the layer. `Packed` holds all of it in one tensor, (out, in) and of the model's dtype, so
that an ordinary linear layer can own it, and says its float values, which are those that bitsandbytes means.
"""

import sys
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from finepoint.errors import FinepointError, needing
from finepoint.models.grids import LevelGrid

aten = torch.ops.aten
KEPT = {aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default}
"""What is done to the parts and not to the values: the result is packed too."""


class Form(NamedTuple):
    """How the parts are to be read, beside themselves."""

    kind: str
    """`nf4` or `fp4`: two entries a byte; `int8`"""
    dtype: torch.dtype
    """that bitsandbytes dequantises to; the values are rounded to it, whatever the model's dtype"""
    block: int = 0
    """entries that share a scale, in four bits"""
    group: int = 0
    """scales that share a scale, where they are quantised themselves"""


class Packed(Tensor):
    """A linear layer's weight in bitsandbytes' four or eight bits: (out, in), a float dtype, never changed.

    Whatever torch computes with it, it computes with its float values.

    Args:
        parts: `codes`, uint8 (n / 2, 1) or int8 (out, in); `scales`, (blocks,) or (out,). Of double quantisation also
            `nested_scales`, `nested_code` and `offset`.
    """

    parts: dict[str, Tensor]
    form: Form

    @staticmethod
    def __new__(cls, parts: dict[str, Tensor], form: Form, shape: torch.Size, dtype: torch.dtype) -> "Packed":
        packed = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts["codes"].device)
        packed.parts, packed.form = parts, form
        return packed

    def dequantize(self) -> Tensor:
        """The values: (out, in), this tensor's dtype, a new ordinary tensor."""
        if self.form.kind == "int8":
            rows = self.parts["codes"].float() * self.parts["scales"].view(-1, 1)
            return (rows * (1 / 127)).to(self.dtype)
        # By ourselves: bitsandbytes 0.50 reads rows that are no multiple of a block wrongly on CPUs with AVX-512.
        pairs = _pairs(self.form.kind, self.device)
        values = nn.functional.embedding(self.parts["codes"].view(-1).int(), pairs).view(-1)[: self.numel()]
        scales = _by_block(self.scales_of_blocks(), self.form.block, len(values))
        return (values * scales).view(self.shape).to(self.form.dtype).to(self.dtype)

    def scales_of_blocks(self) -> Tensor:
        """Of four bits: (blocks,) float32, worked out where they are quantised themselves."""
        scales = self.parts["scales"]
        if not (group := self.form.group):
            return scales
        inner = _by_block(self.parts["nested_scales"], group, len(scales))
        return self.parts["nested_code"][scales.int()] * inner + self.parts["offset"]

    def grid(self, indices: Tensor) -> LevelGrid:
        """Where entries can be. indices: flat, (k,) int64."""
        if self.form.kind == "int8":
            codes, scales = self.parts["codes"].view(-1)[indices].long(), self.parts["scales"].view(-1)
            levels = torch.arange(-127.0, 128.0, device=self.device)
            return LevelGrid(codes + 127, scales[indices // self.shape[1]], None, levels, self._of_eight_bits, 1 / 127)
        byte = self.parts["codes"].view(-1)[indices // 2].long()
        codes = torch.where(indices % 2 == 0, byte >> 4, byte & 15)
        levels, order = _pairs(self.form.kind, self.device)[:16, 1].sort(stable=True)
        scales = self.scales_of_blocks()[indices // self.form.block]
        return LevelGrid(order.argsort()[codes], scales, None, levels, self._of_four_bits)

    def _of_eight_bits(self, levels: Tensor, scales: Tensor) -> Tensor:
        return (levels * scales * (1 / 127)).to(self.dtype)

    def _of_four_bits(self, levels: Tensor, scales: Tensor) -> Tensor:
        return (levels * scales).to(self.form.dtype).to(self.dtype)

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["parts"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.parts), (self.form, self.dtype)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], facts: Any, shape: torch.Size, stride: Any) -> "Packed":
        return Packed(parts, facts[0], shape, facts[1])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Packed({self.form.kind}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in KEPT:
            self: Packed = args[0]
            moved = {key: value for key, value in kwargs.items() if key != "dtype"}
            parts = {name: function(part, *args[1:], **moved) for name, part in self.parts.items()}
            new = Packed(parts, self.form, self.shape, kwargs.get("dtype") or self.dtype)
            return return_and_correct_aliasing(function, args, kwargs, new)
        if function._schema.is_mutable and isinstance(args[0], Packed):
            raise FinepointError(f"{function} would write into a weight in {args[0].form.kind}, whose entries share "
                                 "scales, so that none can be set on its own")  # fmt: skip
        args, kwargs = tree_map_only(Packed, Packed.dequantize, (args, kwargs))
        return function(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


@lru_cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """The two numbers that a byte stands for, the upper half's first: (256, 2) float32."""
    with needing("a weight of bitsandbytes", "bitsandbytes"):
        from bitsandbytes.functional import get_4bit_type
    table = get_4bit_type(kind, device=device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)


def _by_block(scales: Tensor, block: int, count: int) -> Tensor:
    """Each scale as often as it has entries: (count,)."""
    return scales.repeat_interleave(block)[:count]


def nf4(weight: Tensor) -> Packed:
    """A weight in NF4: two entries a byte, one float32 scale for 64 entries, of the weight's shape and dtype.

    Raises:
        FinepointError: bitsandbytes is not installed.
    """
    with needing("--quantise nf4", "bitsandbytes"):
        from bitsandbytes.functional import quantize_4bit
    codes, state = quantize_4bit(weight.detach().contiguous(), blocksize=64, quant_type="nf4")
    return of_four_bits(codes, state, weight.dtype)


def of_four_bits(codes: Tensor, state: Any, dtype: torch.dtype) -> Packed:
    """bitsandbytes' packed bytes, stored in whatever dtype and shape, and their QuantState."""
    parts = {"codes": codes.view(torch.uint8).reshape(-1, 1), "scales": state.absmax}
    if state.nested:
        inner = state.state2
        parts |= {"nested_scales": inner.absmax, "nested_code": inner.code, "offset": state.offset}
    form = Form(state.quant_type, state.dtype, state.blocksize, state.state2.blocksize if state.nested else 0)
    return Packed(parts, form, state.shape, dtype)


def check_weight(name: str, weight: Tensor) -> None:
    """Refuses a weight in bitsandbytes' own form, which is of another shape, and dtype, than it stands for.

    Raises:
        FinepointError: it is one.
    """
    if (found := _imported()) and isinstance(weight, (found.nn.Params4bit, found.nn.Int8Params)):
        raise FinepointError(f"{name} is in a layer of bitsandbytes, in which no entry can be trained; first call "
                             "finepoint.from_bitsandbytes_(model)")  # fmt: skip


def _imported() -> Any:
    """The package, if it has been imported; a model that has one of its layers has imported it."""
    return sys.modules.get("bitsandbytes")


def replace_layers_(model: nn.Module) -> int:
    """Puts an `nn.Linear` with a `Packed` weight in the place of every linear layer of bitsandbytes; how many.

    The bytes are the same and not copied; bias and mode are kept, hooks on these layers are not.

    Raises:
        FinepointError: a layer was never quantised or holds float weights; or bitsandbytes has repacked it already.
    """
    if not (found := _imported()):
        return 0
    kinds = (found.nn.Linear4bit, found.nn.Linear8bitLt)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    owned = {id(layer.weight) for layer in layers.values()}
    floats = (p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in owned)
    dtype = next(floats, torch.get_default_dtype())
    made = {name: _ordinary(name, layer, dtype) for name, layer in layers.items()}
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return len(made)


def _ordinary(name: str, layer: Any, dtype: torch.dtype) -> nn.Linear:
    weight = layer.weight
    if hasattr(layer, "state"):  # eight bits; the scales move from the weight to the layer in its first forward
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        if weight.dtype != torch.int8 or scales is None:
            raise _unfit(name, "holds float weights; load the model with load_in_8bit and has_fp16_weight left out")
        shape = torch.Size((layer.out_features, layer.in_features))
        packed = Packed({"codes": weight.data, "scales": scales}, Form("int8", torch.float32), shape, dtype)
    else:
        state = layer.quant_state if weight.quant_state is None else weight.quant_state
        if state is None:
            raise _unfit(name, "is not quantised yet; move the model to its device, or load it through transformers")
        if getattr(state, "packing_format_for_cpu", False):
            raise _unfit(name, "was repacked for this CPU in its first forward, which rounds the scales; load the "
                               "model anew and convert it before")  # fmt: skip
        packed = of_four_bits(weight.data, state, dtype)
    with torch.device("meta"):
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    new.weight = nn.Parameter(packed, requires_grad=False)
    if layer.bias is not None:  # bitsandbytes casts it to the dtype it computes in
        bias = layer.bias
        new.bias = bias if bias.dtype == dtype else nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
    return new.train(layer.training)


def _unfit(name: str, why: str) -> FinepointError:
    return FinepointError(f"{name}, a layer of bitsandbytes, {why}")
