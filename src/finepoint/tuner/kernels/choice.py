"""Which of several ways to the same numbers: measured on this machine, by shape, and from then on the same.

The fastest way depends on processor, libraries, threads, dtype and shape, by factors of 2 to 25, and no table of
constants has held on the next machine. So each case is tried once, for some milliseconds, on numbers of its shape, and
what was found is kept on disk. Whatever that file says can cost time, but no digit: only ways that are right for a case
are ever taken. A way once taken stays for as long as the process lasts, and a run that is resumed takes those of the
run before (`told`, `take_`), so that its bits are the same.

FINEPOINT_KERNELS=fixed in the environment measures nothing, and takes what is the fastest on most machines.
"""

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finepoint.errors import FinepointError
from finepoint.models.packages import cache_folder
from finepoint.runtime.devices import capturing
from finepoint.runtime.files import write_json
from finepoint.tuner.kernels.plain import HALF, PRODUCTS, rounds_once

logger = logging.getLogger(__name__)
SWITCH = "FINEPOINT_KERNELS"
LIBRARIES = ("finepoint", "torch", "numba")
AREA = 1 << 21  # entries of a weight that is measured; a larger one goes by its first rows
WORK, TOKENS = 1 << 26, (64, 512)  # multiplications of one product that is measured, within so many tokens
# A GPU is done with that before it is told to begin: there a call would be measured, not the work.
AREA_THERE, TOKENS_THERE = 1 << 24, 1024
LEAST_TURNS, TURNS, ENOUGH = 2, 9, 10.0  # of each way; no more of them after so many milliseconds
SLOW, HOPELESS = 2.0, 10.0  # times the fastest: not looked at further, after some turns, and after the first
CLEARLY = 0.8  # of the fastest exact way's time has to do for one that rounds its results
GATHERED = 1 << 22  # products of entries and tokens: gathering more of them takes seconds
Way = Callable[..., Tensor]


class Case(NamedTuple):
    """What decides which way is the fastest."""

    device: str
    dy: torch.dtype
    x: torch.dtype
    height: int
    width: int
    entries: int | None = None
    """chosen ones, as the nearest power of two; None for all there are"""
    blocks: int = 1
    """matrices of this shape, multiplied together"""

    @property
    def label(self) -> str:
        """The case in words, as the file and a run's record call it."""
        dtypes = " x ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys((self.dy, self.x)))
        shape = f"{self.height} x {self.width}" + (f" x {self.blocks} blocks" if self.blocks > 1 else "")
        return f"{self.device}, {dtypes}, {shape}, {self.entries or 'all'} entries"


def case_of(dy: Tensor, x: Tensor, count: int | None = None) -> Case:
    """The case of a gradient at so many entries, None for all; dy: (.., out), x: (.., in)."""
    height, width = dy.shape[-1], x.shape[-1]
    rows = min(height, max(1, (AREA if dy.device.type == "cpu" else AREA_THERE) // width))
    entries = None if count is None else 1 << round(math.log2(max(1, count * rows // height)))
    return Case(dy.device.type, dy.dtype, x.dtype, rows, width, entries)


KNOWN: dict[Any, Way] = {}
"""by what is known of a layer before its case is worked out, which each layer asks for at each step"""
_TAKEN: dict[Case, str] = {}
_RECORDED: dict[str, str] = {}
"""what the run that is gone on with took, by label"""


def way(case: Case, ways: Mapping[str, Way], usual: str) -> Way:
    """One of the ways, each right for the case: the one taken before, or recorded, or measured; else the usual one."""
    if case not in _TAKEN:
        taken = _RECORDED.get(case.label, "")
        if taken and taken not in ways:
            logger.warning("the run took kernel %r for %s, which is not to be had here: sums may be rounded otherwise "
                           "than they were", taken, case.label)  # fmt: skip
        if taken not in ways and not measurable(case):
            return ways[usual]
        try:
            _TAKEN[case] = taken if taken in ways else _kept(case, ways) or measured(case, ways)[0]
        except RuntimeError as error:  # the device has no room for it, perhaps: the step itself may do without
            logger.debug("nothing was measured for %s: %s", case.label, error)
            return ways[usual]
    return ways[_TAKEN[case]]


def measurable(case: Case) -> bool:
    """Whether time can be taken here, and is to be.

    Raises:
        FinepointError: the environment says neither yes nor no.
    """
    told = os.environ.get(SWITCH) or "measure"  # empty as if it were not there
    if told not in ("measure", "fixed"):
        raise FinepointError(f"{SWITCH} is {told!r} in the environment; it is measure or fixed")
    return told == "measure" and case.device != "meta" and not capturing()


def measured(case: Case, ways: Mapping[str, Way]) -> tuple[str, dict[str, float]]:
    """The fastest way, and the milliseconds of all that were tried, each the best of some turns; kept on disk.

    A way that rounds its results has to be clearly faster than all that do not.
    """
    operands, found = _operands(case), dict[str, float]()
    for name, one in ways.items():
        if name == "gather" and len(ways) > 1 and len(operands[2]) * len(operands[0]) > GATHERED:
            continue
        with suppress(RuntimeError):  # a device without this product
            found[name] = round(_milliseconds(one, operands, min(found.values(), default=torch.inf)), 4)
    if not found:
        raise RuntimeError(f"none of {', '.join(ways)} runs for {case.label}")
    taken = min(found, key=lambda name: found[name] / (CLEARLY if name in HALF else 1))
    _keep(case, {"taken": taken, "milliseconds": found, "ways": [*ways]})
    return taken, found


def _operands(case: Case) -> tuple[Tensor, ...]:
    """Numbers like those of a layer: dy (tokens, out), x (tokens, in), indices; or the matrices of a product."""
    draw = torch.Generator().manual_seed(0)
    area = case.height * case.width * case.blocks
    tokens = min(max(WORK // area // 64 * 64, TOKENS[0]), TOKENS[1])
    sizes = (case.height, case.dy), (case.width, case.x)
    if case.device == "cpu":
        dy, x = (torch.randn(tokens, case.blocks, size, generator=draw).to(dtype) for size, dtype in sizes)
    else:  # any numbers do, and drawing them would take longer than multiplying
        dy, x = (torch.full((TOKENS_THERE, case.blocks, size), 0.5, dtype=dtype, device=case.device)
                 for size, dtype in sizes)  # fmt: skip
    if case.blocks > 1:
        return dy.permute(1, 2, 0), x.transpose(0, 1)
    dy, x = dy[:, 0], x[:, 0]
    if case.entries is None:
        return dy.T, x
    count = min(case.entries, area)
    step = area // count
    indices = torch.arange(count) * step + torch.randint(step, (count,), generator=draw)
    return dy, x, indices.to(case.device, torch.int32)


@torch.no_grad()
def _milliseconds(one: Way, operands: tuple[Tensor, ...], best: float) -> float:
    """The least of some turns, the first of which compiles and is not counted: others' work may come in between."""
    alone = operands[0].device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    times: list[float] = []
    if operands[0].device.type != "cpu":  # the first call of a kernel loads it, whatever it is worth
        one(*operands)
        _wait(operands[0])
    started = time.perf_counter()
    one(*operands)
    _wait(operands[0])
    if (first := 1e3 * (time.perf_counter() - started)) > max(HOPELESS * best, ENOUGH):
        return first
    while len(times) < LEAST_TURNS or (len(times) < TURNS and sum(times) < ENOUGH and min(times) < SLOW * best):
        _wait(operands[0])
        started = clock()
        one(*operands)
        _wait(operands[0])
        times.append(1e3 * (clock() - started))
    return min(times)


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    elif tensor.device.type != "cpu":
        getattr(torch, tensor.device.type).synchronize()


def multiplied(dy: Tensor, x: Tensor) -> Tensor:
    """The products dy^T x, (.., out, in), summed in float32 (float64 where an operand is), by the fastest way.

    Args:
        dy: (tokens, out), or for several products (tokens, blocks, out).
        x: (tokens, in), or (tokens, blocks, in).
    """
    key = dy.device.type, dy.dtype, x.dtype, *dy.shape[1:], x.shape[-1], None
    if (one := KNOWN.get(key)) is None:
        case = case_of(dy, x)._replace(blocks=dy.shape[1] if dy.ndim == 3 else 1)
        one = KNOWN[key] = way(case, products(case), usual_product(case))
    return one(dy.T, x) if dy.ndim == 2 else one(dy.permute(1, 2, 0), x.transpose(0, 1))


def usual_product(case: Case) -> str:
    """The name of the dense product that is taken where nothing is measured."""
    return "turned" if case.height > case.width else "dense"


def products(case: Case) -> Mapping[str, Way]:
    """The dense products that are right for a case."""
    return {name: one for name, one in PRODUCTS.items() if name not in HALF or may_round(case)}


def may_round(case: Case) -> bool:
    """Whether a product in the operands' own dtype is summed in float32 and rounded once here, as a layer's own is.

    Float16 is not, whose range sums would leave; nor is anything off the CPU, where sums come out in float32.
    """
    return case.device == "cpu" and case.dy == case.x == torch.bfloat16 and rounds_once(case.dy)


# The file, one for each device, set of libraries and number of threads.


@lru_cache
def _place(device: str, threads: int) -> tuple[Path, dict[str, Any]]:
    machine = {"device": device_name(device), "threads": threads, **{name: _version(name) for name in LIBRARIES}}
    return cache_folder() / f"kernels-{sha256(json.dumps(machine).encode()).hexdigest()[:12]}.json", machine


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """The name of a processor or a GPU, where the system tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if device == "cpu" and told.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    named = names[0] if names else platform.processor() or platform.machine()
    return f"{named} ({torch.backends.cpu.get_cpu_capability()})" if device == "cpu" else device


def kept(device: str) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The file of what was measured, and what it says by label; nothing where it cannot be read."""
    place, _ = _place(device, torch.get_num_threads())
    with suppress(OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        if not place.is_file():  # a pipe in its place would be waited for
            return place, {}
        found = json.loads(place.read_text("utf-8"))["choices"]
        return place, {label: each for label, each in found.items() if isinstance(each, dict) and label.isprintable()}
    return place, {}


def _kept(case: Case, ways: Mapping[str, Way]) -> str | None:
    found = kept(case.device)[1].get(case.label, {})
    taken, ways_then = found.get("taken"), found.get("ways")
    # One that could not be had then, such as a library that was broken, may be the fastest.
    if not isinstance(ways_then, list) or not all(name in ways_then for name in ways):
        return None
    return taken if isinstance(taken, str) and taken in ways else None


def _keep(case: Case, found: dict[str, Any]) -> None:
    place, choices = kept(case.device)
    machine = _place(case.device, torch.get_num_threads())[1]
    try:
        write_json(place, {"machine": machine, "choices": {**choices, case.label: found}})
    except (FinepointError, OSError, ValueError) as error:  # ValueError: a damaged file's labels, which no file takes
        logger.debug("what was measured is not kept: %s", error)


def told() -> dict[str, str]:
    """What this process takes, by label: for the record of a run, which is resumed with the same."""
    return {case.label: name for case, name in _TAKEN.items()}


def take_(recorded: Mapping[str, str]) -> None:
    """From now on takes what a run has recorded, where that can be taken at all, whatever was measured here."""
    KNOWN.clear()
    _RECORDED.update({label: name for label, name in recorded.items() if isinstance(name, str)})
    for case in [case for case in _TAKEN if case.label in recorded]:
        del _TAKEN[case]


def forget_() -> None:
    """As if nothing had been taken or recorded in this process."""
    KNOWN.clear()
    _TAKEN.clear()
    _RECORDED.clear()
