"""Rules written as formulas: `abs(g) / (abs(w) + 1e-6)`, parsed into tensor operations, never evaluated as Python.

Names: `w` the weight, `g` the mean gradient, `f` the mean squared per-example gradient (all wide, of the weight's
shape), `x` the norms of its inputs (which broadcast against it);
`k`, `k_mean` and `k_x` the Fisher information of text that is to be kept, its mean over all target weights, and the
norms of the inputs under that text; `step` and `room` how far numbers of a quantised base's grid lie apart, and how far
an entry can go there; any other name is an option of the rule, so that a study can sweep `abs(g)**a / abs(w)**b`.
"""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from finepoint.errors import FinepointError

if TYPE_CHECKING:  # imported when a formula scores
    from torch import Tensor

TENSORS = {"w": "weight", "g": "gradient", "f": "squared_gradient", "x": "input_norm",
           "k": "kept_squared_gradient", "k_mean": "kept_mean", "k_x": "kept_input_norm",
           "step": "grid_step", "room": "grid_room"}  # fmt: skip
FUNCTIONS = {"abs": "abs", "sqrt": "sqrt", "log": "log", "exp": "exp", "sign": "sign", "min": "minimum",
             "max": "maximum"}  # fmt: skip
"""by what PyTorch calls them"""
TAKES = {name: 2 if name in ("min", "max") else 1 for name in FUNCTIONS}
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}  # fmt: skip
LONGEST = 1000  # characters: a formula, not a program


def is_expression(text: str) -> bool:
    """Whether a rule's name is rather a formula: it has an operator or a call, or is one of the names alone."""
    text = text.strip()
    return any(sign in text for sign in "()*/+") or " - " in text or text.removeprefix("-").strip() in TENSORS


def expression(text: str) -> Callable[..., Tensor]:
    """The formula as a function whose parameters are what it needs, options without a default among them.

    Raises:
        FinepointError: no formula; something in it other than numbers, names, + - * / **, and the functions above; no
            tensor in it.
    """
    try:
        if len(text) > LONGEST:
            raise ValueError(f"it has {len(text)} characters, at most {LONGEST} are read")
        tree = ast.parse(text.strip(), mode="eval").body
        _check(tree)
    except (SyntaxError, ValueError, RecursionError) as error:
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise FinepointError(f"rule {text!r} is no formula: {said}") from error
    names = list(dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)))
    names = [name for name in names if name not in FUNCTIONS]
    tensors = [name for name in names if name in TENSORS]
    if not any(name != "k_mean" for name in tensors):
        raise FinepointError(f"rule {text!r} looks at no weight; give a formula of w, g, f, x, k, step or room")

    def score(**given: Any) -> Tensor:
        import torch

        values = {name: given[TENSORS.get(name, name)] for name in names}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                values[name] = value.to(torch.promote_types(value.dtype, torch.float32))
        return _value(tree, values, values[tensors[0]])

    parameters = [TENSORS.get(name, name) for name in names]
    score.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in parameters]
    )
    return score


def _check(node: ast.expr) -> None:
    """Refuses everything that a formula does not need."""
    match node:
        case ast.Constant(value) if type(value) in (int, float):
            parts: list[ast.expr] = []
        case ast.Name(name) if name not in FUNCTIONS:
            parts = []
        case ast.UnaryOp(ast.USub() | ast.UAdd(), operand):
            parts = [operand]
        case ast.BinOp(left, op, right) if type(op) in BINARY:
            parts = [left, right]
        case ast.Call(ast.Name(name), arguments, []) if name in FUNCTIONS:
            if len(arguments) != TAKES[name]:
                raise ValueError(f"{name} takes {TAKES[name]} values, got {len(arguments)}")
            parts = arguments
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not understood; formulas are made of w, g, f, x, k, step, "
                             f"room, numbers, options, + - * / **, and {', '.join(FUNCTIONS)}")  # fmt: skip
    for part in parts:
        _check(part)


def _value(node: ast.expr, values: Mapping[str, Any], like: Tensor) -> Any:
    import torch

    match node:
        case ast.Constant(int() | float() as number):
            return like.new_tensor(float(number))
        case ast.Name(name):
            value = values[name]
            return value if isinstance(value, torch.Tensor) else like.new_tensor(float(value))
        case ast.UnaryOp(op, operand):
            value = _value(operand, values, like)
            return -value if isinstance(op, ast.USub) else value
        case ast.BinOp(left, op, right):
            return BINARY[type(op)](_value(left, values, like), _value(right, values, like))
        case ast.Call(ast.Name(name), arguments):
            return getattr(torch, FUNCTIONS[name])(*(_value(argument, values, like) for argument in arguments))
    raise AssertionError(node)
