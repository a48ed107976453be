"""bitsandbytes' weights in a tensor: its shape, its values, what torch does with it."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from finepoint.errors import FinepointError
from finepoint.models.bitsandbytes import Packed, nf4, of_four_bits
from finepoint.models.quantised import is_quantised
from reference import four_bit_values

functional = pytest.importorskip("bitsandbytes").functional


def random_weight(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def four_bits(weight, **options):
    codes, state = functional.quantize_4bit(weight, **options)
    return of_four_bits(codes, state, weight.dtype), four_bit_values(codes, state)


# Rows that are no multiple of a block bitsandbytes 0.50 itself reads wrongly on CPUs with AVX-512.
@pytest.mark.parametrize(
    "shape", [(48, 40), (3, 7), (1, 2), (64, 64), (1, 1), (128, 257), (32, 32), (48, 160), (10, 576)]
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_it_has_the_shape_and_the_values(shape, kind, nested):
    weight = random_weight(*shape)
    packed, expected = four_bits(weight, quant_type=kind, compress_statistics=nested)
    assert packed.shape == weight.shape
    assert packed.dtype == torch.float32
    assert is_quantised(packed)
    assert torch.equal(packed.dequantize(), expected)
    assert (
        expected - weight
    ).abs().max() < 0.2 * weight.abs().max()  # half of the widest gap between two of 16 numbers
    if shape[1] % 64 == 0:
        theirs = functional.dequantize_4bit(
            *functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        )
        torch.testing.assert_close(packed.dequantize(), theirs, rtol=1e-6, atol=1e-7)
    assert set(packed.__tensor_flatten__()[0]) == {"codes", "scales"} | (
        {"nested_scales", "nested_code", "offset"} if nested else set()
    )
    again = Packed.__tensor_unflatten__(packed.parts, packed.__tensor_flatten__()[1], packed.shape, None)
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_the_bytes_may_be_stored_in_another_dtype_and_shape():
    weight = random_weight(48, 64)
    packed, expected = four_bits(weight, quant_storage=torch.bfloat16, quant_type="nf4")
    assert torch.equal(packed.dequantize(), expected)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(of_four_bits(codes.t(), state, weight.dtype).dequantize(), expected)  # as bitsandbytes once did


def test_nf4_takes_half_a_byte_an_entry_and_a_scale_for_64():
    packed = nf4(random_weight(128, 256))
    assert sum(part.nbytes for part in packed.parts.values()) == 128 * 256 * (1 / 2 + 4 / 64)
    shapes = nf4(torch.empty(128, 256, device="meta"))
    assert shapes.device.type == shapes.dequantize().device.type == "meta"
    assert {name: (part.shape, part.dtype) for name, part in shapes.parts.items()} == {
        name: (part.shape, part.dtype) for name, part in packed.parts.items()
    }


def a_layer():
    layer = nn.Linear(40, 48)
    layer.weight = nn.Parameter(nf4(random_weight(48, 40)), requires_grad=False)
    return layer


def test_a_linear_layer_computes_with_the_values_and_passes_gradients():
    layer = a_layer()
    x = torch.randn(2, 3, 40, requires_grad=True)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    expected = linear(x, layer.weight.dequantize(), layer.bias)
    assert torch.equal(y, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected.square().sum(), x)[0])
    with torch.inference_mode():
        assert torch.equal(layer(x), y)


def test_copies_casts_moves_and_files_keep_it_packed():
    layer = a_layer()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin, half, meta = (copy.deepcopy(layer) for _ in range(3))
    half, meta = half.to(torch.bfloat16), meta.to("meta")
    for weight in (twin.weight, half.weight, meta.weight, torch.load(file, weights_only=False)["weight"]):
        assert type(weight) is Packed
        assert weight.codes.dtype == torch.uint8
        assert weight.codes.data_ptr() != layer.weight.codes.data_ptr()
    assert isinstance(twin.weight, nn.Parameter)
    assert torch.equal(half.weight.dequantize(), layer.weight.dequantize().bfloat16())
    assert half(torch.ones(1, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert meta.weight.codes.is_meta
    assert layer.weight.detach().codes.data_ptr() == layer.weight.codes.data_ptr()
    assert repr(layer.weight) == "Packed(nf4, shape=(48, 40), dtype=torch.float32, device=cpu)"


def test_nothing_is_written_into_it():
    weight = a_layer().weight
    before = {name: part.clone() for name, part in weight.parts.items()}
    plain = weight.dequantize()
    for write in (lambda: weight.data.add_(1), lambda: weight.copy_(plain), lambda: nn.init.zeros_(weight)):
        with pytest.raises(FinepointError, match="would write into a weight in nf4, whose entries share scales"):
            write()
    assert torch.zeros(48, 40).copy_(weight).equal(plain)
    assert all(torch.equal(part, before[name]) for name, part in weight.parts.items())
