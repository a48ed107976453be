"""What Numba's own loops do badly, for code that it compiles: numbers transposed in registers, two to four times as
fast as one by one, and loads that are for the caches alone.

Numba's cache on disk does not notice a change here; touch `numba.py` with it.
"""

from typing import Any

import numba
from llvmlite import ir
from numba.extending import intrinsic

LINE = 8
STAGES = [  # how far apart the mixed vectors are, and which numbers of the two the first and the second become
    (1, (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)),
    (2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)),
    (4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)),
]  # of AVX2 one instruction a vector each: none but the last crosses a register's halves
ENDS = (0, 2, 1, 3, 4, 6, 5, 7)  # where each column is after them
INT32 = ir.IntType(32)


@intrinsic
def transpose_(typing: Any, operand: Any, token: Any, column: Any, tile: Any, place: Any) -> Any:
    """tile[column + j, place + i] = operand[token + i, column + j] for i and j below 8, without a check of bounds.

    Args:
        operand: (tokens, columns), contiguous; of uint16 the bits of bfloat16, which are widened.
        tile: (columns, tokens of a tile), contiguous: float32 or float64.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = context.make_array(operand)(context, builder, arguments[0])
        target = context.make_array(tile)(context, builder, arguments[3])
        at, start, end = arguments[1], arguments[2], arguments[4]
        vectors = []
        for line in range(LINE):
            address = _address(builder, source, builder.add(at, _number(line)), start, operand.dtype, context)
            vectors.append(_widened(builder, builder.load(address, align=operand.dtype.bitwidth // 8)))
        for step, first, second in STAGES:
            pairs = [(low, low + step) for low in range(LINE) if not low & step]
            mixed = {low: _mixed(builder, vectors[low], vectors[high], first) for low, high in pairs}
            mixed |= {high: _mixed(builder, vectors[low], vectors[high], second) for low, high in pairs}
            vectors = [mixed[number] for number in range(LINE)]
        for line, number in enumerate(ENDS):
            address = _address(builder, target, builder.add(start, _number(line)), end, tile.dtype, context)
            builder.store(vectors[number], address, align=tile.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return numba.types.void(operand, numba.types.intp, numba.types.intp, tile, numba.types.intp), code


@intrinsic
def fetch(typing: Any, operand: Any, place: Any) -> Any:
    """Loads the number at a flat place to have its cache line at hand: a prefetch the processor may skip."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = context.make_array(operand)(context, builder, arguments[0])
        number = builder.load(builder.gep(source.data, [arguments[1]]))
        if operand.dtype in (numba.types.float32, numba.types.float64):
            number = builder.bitcast(number, ir.IntType(operand.dtype.bitwidth))
        # An instruction that is none but takes the number, so that the load is not left out.
        builder.asm(ir.FunctionType(ir.VoidType(), [number.type]), "", "r", [number], side_effect=True)
        return context.get_dummy_value()

    return numba.types.void(operand, numba.types.intp), code


def _number(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


def _address(builder: Any, array: Any, row: Any, column: Any, dtype: Any, context: Any) -> Any:
    """Of eight numbers of a row."""
    place = builder.add(builder.mul(row, builder.extract_value(array.shape, 1)), column)
    vector = ir.VectorType(context.get_value_type(dtype), LINE)
    return builder.bitcast(builder.gep(array.data, [place]), vector.as_pointer())


def _widened(builder: Any, vector: Any) -> Any:
    """The numbers of bfloat16, which is the upper half of a float32's bits; others as they are."""
    if vector.type.element != ir.IntType(16):
        return vector
    wide = ir.VectorType(INT32, LINE)
    shifted = builder.shl(builder.zext(vector, wide), ir.Constant(wide, [16] * LINE))
    return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), LINE))


def _mixed(builder: Any, first: Any, second: Any, places: tuple[int, ...]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT32, LINE), places))
