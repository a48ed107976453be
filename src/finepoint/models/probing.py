"""What a model does with a batch, found by asking the model itself, with negative controls.

How examples can be padded is not read off a list of architectures: a short and a long row are computed alone and
together, in every layout there is, and the first layout that gives what each row gives alone is taken.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from finepoint.errors import FinepointError, reason_of
from finepoint.runtime import distributed
from finepoint.runtime.devices import in_float64

REFUSED = (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError)
"""what a model raises that cannot compute a batch as it is"""
CONTEXTS = ("max_position_embeddings", "max_seq_len")  # what configurations call the longest text they take
LENGTHS = (6, 150)  # of the rows to try where no data are given: longer than the windows of local attention
# How far logits may differ before two ways of computing them count as different.
ROUNDING = 16  # up to so many times the dtype's precision, relative to the logits' scale: certainly rounding
NOISE = 1024  # up to so many times: rounding only where it is small beside the control, in which padding does leak
LEAKING = 0.05  # small beside the control: this share of the control's difference, at any position
HALF = 0.1  # the same for half precision, of the mean over the positions
FLOAT32 = torch.finfo(torch.float32).eps
Side = Literal["left", "right", "none"]


@dataclass(frozen=True)
class Layout:
    """How rows of unequal length become a batch in which each gives what it gives alone."""

    side: Side = "left"
    """where padding goes; `none`: it would be seen on either side, so that a batch holds rows of one length"""
    positions: bool = False
    """the model is given `position_ids` that start at every row's first token"""
    mask: bool = True
    """the model takes an `attention_mask`"""
    causal: bool = True
    """no token sees a later one (or the model is a classifier, whose labels are not tokens)"""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model is frozen, in eval mode and without gradients; afterwards it is exactly as before.

    That covers requires_grad, gradients, the train/eval mode of every module, the random state of every device and
    the configurations' `use_cache`, which is off inside.
    """
    parameters = list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    with _random_state_kept(parameters), torch.enable_grad(), evaluating(model), _without_cache(model):
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
        finally:
            for parameter, flag, gradient in zip(parameters, flags, gradients, strict=True):
                parameter.requires_grad_(flag)
                parameter.grad = gradient


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; afterwards each has the mode it had, also after an exception.

    Weights that FSDP2 has put together for a forward pass, and keeps for a backward pass that does not come, are
    sharded again.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
            if distributed.is_fsdp(module):
                module.reshard()  # type: ignore[operator]


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, the model keeps no cache unless it is told to: some change theirs in place, and have no gradient then."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    asking = [config for config in found if getattr(config, "use_cache", None) is True]
    for config in asking:
        config.use_cache = False
    try:
        yield
    finally:
        for config in asking:
            config.use_cache = True


@contextmanager
def _random_state_kept(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Afterwards the random state of the CPU, and of every device that holds one of the parameters, is as before."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        elsewhere = {parameter.device for parameter in parameters} - {torch.device("cpu"), torch.device("meta")}
        for kind in {device.type for device in elsewhere}:
            devices = [device for device in elsewhere if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=devices, device_type=kind))
        yield


def accepted(model: Any) -> Set[str]:
    """What a model's forward takes, by name; of a model wrapped by PEFT, what the model inside takes."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(inside.forward).parameters.keys()


def padded(rows: Sequence[Sequence[int]], filler: int, side: Side) -> Tensor:
    """Rows as one tensor, (rows, longest) int64, filled on one side; with side `none` rows must have equal length."""
    width = max(len(row) for row in rows)
    assert side != "none" or all(len(row) == width for row in rows)
    found = torch.full((len(rows), width), filler)
    for row, line in zip(rows, found, strict=True):
        start = 0 if side == "right" else width - len(row)
        line[start : start + len(row)] = torch.tensor(row)
    return found


def laid_out(rows: Sequence[Sequence[int]], padding: int, layout: Layout) -> dict[str, Tensor]:
    """Token ids as a batch: `input_ids` and, where the layout says so, `attention_mask` and `position_ids`."""
    batch = {"input_ids": padded(rows, padding, layout.side)}
    mask = padded([[1] * len(row) for row in rows], 0, layout.side)
    if layout.mask:
        batch["attention_mask"] = mask
    if layout.positions:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


_LAYOUTS: "WeakKeyDictionary[nn.Module, tuple[int, int, Layout]]" = WeakKeyDictionary()
"""by model: the padding and the longest row it was tried with, and what was found"""


def layout_of(model: Any, padding: int, rows: Sequence[Sequence[int]] = ()) -> Layout:
    """The layout in which rows up to the longest of these give in a batch what they give alone.

    A model is tried again when longer rows come, which may leave the windows of its attention.

    Raises:
        FinepointError: the model cannot compute rows of tokens.
    """
    taken = accepted(model)
    usual = Layout("left", "position_ids" in taken, "attention_mask" in taken or "kwargs" in taken)
    if any(parameter.is_meta for parameter in model.parameters()):
        return usual
    longest = max(map(len, rows), default=0)
    if model in _LAYOUTS and _LAYOUTS[model][0] == padding and longest <= _LAYOUTS[model][1]:
        return _LAYOUTS[model][2]
    pair = _pair(rows) if longest > 1 else _made_up(model, padding)
    with undisturbed(model), torch.no_grad():
        layout = _tried(model, padding, pair, usual)
    if layout is None:
        return usual
    _LAYOUTS[model] = padding, len(pair[1]), layout
    return layout


def _pair(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """A short and a long row to try; where all are of one length, the short one is the end of a row."""
    short, long = min(rows, key=len), max(rows, key=len)
    return list(short if 1 < len(short) < len(long) else long[len(long) // 2 :]), list(long)


def _made_up(model: Any, padding: int) -> tuple[list[int], list[int]]:
    """A short and a long row of arbitrary tokens; of an encoder-decoder they end in the token that it may look for."""
    config = model.config.get_text_config()
    count = model.get_input_embeddings().num_embeddings
    most = next((length for name in CONTEXTS if (length := getattr(config, name, None))), max(LENGTHS))
    # Positions may start behind the padding token's number.
    short, long = (max(2, min(length, most - padding - 2)) for length in LENGTHS)
    end = config.eos_token_id
    usual = [token for token in range(count) if token not in (padding, end)] or [0]
    rows = [[usual[(7 * i + 3 * length) % len(usual)] for i in range(length)] for length in (short, long)]
    if model.config.is_encoder_decoder and isinstance(end, int) and end < count:
        rows = [[*row[:-1], end] for row in rows]
    return rows[0], rows[1]


def _tried(model: Any, padding: int, pair: tuple[list[int], list[int]], usual: Layout) -> Layout | None:
    """The first layout that changes nothing; the usual one of decoders before the others."""
    one = replace(usual, side="none", positions=False)
    try:
        alone = torch.cat([_outputs(model, laid_out([row], padding, one), [row], "none") for row in pair])
    except REFUSED as error:
        raise FinepointError(f"{type(model).__name__} cannot compute rows of tokens: {reason_of(error)}") from error
    if not bool(alone.isfinite().all()):
        return None  # a damaged model, of which nothing can be told; whoever measures or trains it will say so
    causal = len(alone) == len(pair) or _is_causal(model, padding, pair[1], alone[len(pair[0]) :], one)
    # The control: padding as if it were text.
    ones = {"attention_mask": torch.ones(2, len(pair[1]), dtype=torch.long)} if usual.mask else {}
    try:
        joined = _outputs(model, laid_out(pair, padding, replace(one, side="left")) | ones, pair, "left")
    except REFUSED:
        joined = -alone
    for side in ("left", "right"):
        for positions in dict.fromkeys((usual.positions and side == "left", False, usual.positions)):
            layout = replace(usual, side=side, positions=positions, causal=causal)
            try:
                found = _outputs(model, laid_out(pair, padding, layout), pair, side)
            except REFUSED:
                continue
            if agrees(found, alone, joined):
                return layout
    return replace(one, causal=causal)


def counts_from_zero(model: Any, row: Sequence[int]) -> bool:
    """Whether positions that start at 0 are those the model takes by itself, if it can be given any."""
    if "position_ids" not in accepted(model):
        return True
    one = Layout("none", mask="attention_mask" in accepted(model))
    with undisturbed(model), torch.no_grad():
        own, given = (_outputs(model, laid_out([row], 0, layout), [row], "none")
                      for layout in (one, replace(one, positions=True)))  # fmt: skip
    return agrees(given, own, -own)


def _is_causal(model: Any, padding: int, row: list[int], before: Tensor, layout: Layout) -> bool:
    """Whether other tokens in the second half of a row leave the first half as it is."""
    half = len(row) // 2
    other = row[:half] + [row[0] if token != row[0] else row[half - 1] for token in row[half:]]
    after = _outputs(model, laid_out([other], padding, layout), [row], "none")
    return other == row or agrees(
        after[:half], before[:half], before[:half] + (after - before)[half:].norm(dim=-1).max()
    )


def _outputs(model: Any, batch: Mapping[str, Tensor], rows: Sequence[Sequence[int]], side: Side) -> Tensor:
    """What the model says of every real token, (all rows' tokens, width); of a classifier, of every row."""
    states = states_of(model, batch)
    if states.ndim == 2 or states.shape[1] != batch["input_ids"].shape[1]:
        return states.flatten(1)
    width = states.shape[1]
    starts = [0 if side == "right" else width - len(row) for row in rows]
    return torch.cat([line[at : at + len(row)] for line, at, row in zip(states, starts, rows, strict=True)])


def states_of(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """What the model's head is given, which spares the logits of a vocabulary; or the logits themselves."""
    head, found = getattr(model, "get_output_embeddings", lambda: None)(), []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].ndim != 3:
            return None
        found.append(args[0])
        return (args[0][:, -1:], *args[1:])

    inputs = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    inputs.pop("logits_to_keep", None)
    if "use_cache" in accepted(model):
        inputs["use_cache"] = False
    with ExitStack() as stack:
        if head is not None:
            stack.enter_context(head.register_forward_pre_hook(take))
        output = model(**inputs)
    return found[0] if len(found) == 1 else output["logits"] if "logits" in output else output[0]


def agrees(found: Tensor, expected: Tensor, control: Tensor) -> bool:
    """Whether `found` is `expected` up to rounding: far closer than `control`, where something does leak.

    All are (.., width). In half precision rounding can be large at single positions, so that their mean is judged.
    """
    wide = in_float64(expected)
    error, leak = ((in_float64(tensor) - wide).norm(dim=-1) for tensor in (found, control))
    # Models of float64 weights, too, compute some of it in float32.
    scale, precision = wide.norm(dim=-1).max(), max(torch.finfo(expected.dtype).eps, FLOAT32)
    if precision > 1e-4:
        return bool(error.mean() <= HALF * leak.mean())
    return bool(error.max() <= max(ROUNDING * precision * scale, min(LEAKING * leak.max(), NOISE * precision * scale)))


# Attention that reads boundaries off `position_ids` in all rows of a batch; flash attention does so in a single row.
PACKABLE = ("sdpa", "eager")


def keeps_apart(model: Any, longest: int = 5) -> bool:
    """Whether an example behind another, with positions of its own, gives the logits it gives alone.

    Models with a state that runs along the row (convolutions, recurrences) may take `position_ids` and yet leak.

    Args:
        longest: tokens of the longest example, which may reach beyond a window of the model's attention.
    """
    count = model.get_input_embeddings().num_embeddings
    first = min(longest, max(5, count // 2))
    ids = (torch.arange(first + longest, device=model.device)[None] * 7) % count
    positions = torch.cat([torch.arange(length, device=model.device) for length in (first, longest)])[None]
    whole = torch.arange(first + longest, device=model.device)[None]
    with undisturbed(model), torch.no_grad():
        alone = states_of(model, {"input_ids": ids[:, first:]})
        packed = states_of(model, {"input_ids": ids, "position_ids": positions})[:, first:]
        joined = states_of(model, {"input_ids": ids, "position_ids": whole})[:, first:]
    return agrees(packed, alone, joined)
