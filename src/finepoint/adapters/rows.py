"""Each row of a batch with an adapter of its own, on one base whose weights stay as they are.

A layer multiplies all rows by the base's weight, and each row's adapter adds its own delta @ x: of all adapters of the
batch in one product, which is small and dense where their entries lie in few columns, and else sparse, block by block.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finepoint.data.small_input import made_up
from finepoint.errors import FinepointError
from finepoint.models.probing import agrees, undisturbed

FEW = 4  # a dense product of so many times the entries takes less time than a sparse one
BY_THEMSELVES = "answer each adapter's requests by themselves, with using"


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to a weight: (k,) numbers, float32 (float64 over float64), where it is not 0."""

    shape: tuple[int, ...]
    indices: Tensor
    """flat, ascending, int64"""
    numbers: Tensor

    @cached_property
    def columns(self) -> Tensor:
        """Those that it lies in, ascending."""
        return (self.indices % self.shape[-1]).unique()

    @cached_property
    def is_narrow(self) -> bool:
        return len(self.columns) * self.shape[0] <= FEW * len(self.indices)

    @cached_property
    def dense(self) -> Tensor:
        """Within its columns: (columns, out)."""
        found = self.numbers.new_zeros(len(self.columns), self.shape[0])
        at = torch.searchsorted(self.columns, self.indices % self.shape[-1])
        found[at, self.indices // self.shape[-1]] = self.numbers
        return found


class Term(Protocol):
    """What the adapters of a batch, a in all, add to a layer's output."""

    def __call__(self, x: Tensor) -> Tensor:
        """From the layer's inputs, (a, n, in), or tokens, (a, n), to what is added: (a, n, out) or (a, 1, out)."""


class _Narrow:
    """Deltas of a matrix within few columns of each: one batched product."""

    def __init__(self, deltas: Sequence[Delta | None]) -> None:
        held = [delta for delta in deltas if delta is not None]
        most, like = max(len(delta.columns) for delta in held), held[0].numbers
        self.columns = torch.zeros(len(deltas), 1, most, dtype=torch.long, device=like.device)
        self.dense = like.new_zeros(len(deltas), most, held[0].shape[0])
        for at, delta in enumerate(deltas):
            if delta is not None:
                self.columns[at, 0, : len(delta.columns)] = delta.columns
                self.dense[at, : len(delta.columns)] = delta.dense

    def __call__(self, x: Tensor) -> Tensor:
        return x.gather(2, self.columns.expand(-1, x.shape[1], -1)).to(self.dense.dtype) @ self.dense


class _Wide:
    """Deltas of a matrix anywhere in it: one sparse product of a matrix with a block for each adapter."""

    def __init__(self, deltas: Sequence[Delta | None]) -> None:
        held = [(at, delta) for at, delta in enumerate(deltas) if delta is not None]
        self.count, (self.out, self.width) = len(deltas), held[0][1].shape
        self.lines = torch.cat([delta.indices // self.width + at * self.out for at, delta in held])
        self.columns = torch.cat([delta.indices % self.width for _, delta in held])
        self.numbers = torch.cat([delta.numbers for _, delta in held])

    @cached_property
    def starts(self) -> Tensor:
        """Where each line's entries begin, and the end: (lines + 1,)."""
        counts = torch.bincount(self.lines, minlength=self.count * self.out)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @cached_property
    def places(self) -> Tensor:
        """Where each entry's column lies in the inputs of all adapters, one below the other: (k,)."""
        return self.columns + self.lines // self.out * self.width

    @cached_property
    def matrix(self) -> Tensor | None:
        """(a * out, a * in), where there is a library that multiplies by such matrices."""
        if self.numbers.device.type != "cpu" or not torch.backends.mkl.is_available():
            return None
        with warnings.catch_warnings():  # that they are in beta
            warnings.simplefilter("ignore")
            return torch.sparse_csr_tensor(self.starts, self.places, self.numbers, check_invariants=False,
                                           size=(self.count * self.out, self.count * self.width))  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        given = x.to(self.numbers.dtype).transpose(1, 2).reshape(self.count * self.width, -1)
        if self.matrix is not None:
            found = self.matrix @ given
        else:
            found = given.new_zeros(self.count * self.out, given.shape[1])
            found.index_add_(0, self.lines, given[self.places] * self.numbers[:, None])
        return found.view(self.count, self.out, -1).transpose(1, 2)


class _Tokens(_Wide):
    """Deltas of an embedding: of each token the entries of its line."""

    def __call__(self, x: Tensor) -> Tensor:
        lines = (x + torch.arange(self.count, device=x.device)[:, None] * self.out).reshape(-1)
        first, counts = self.starts[lines], self.starts[lines + 1] - self.starts[lines]
        token = torch.arange(len(lines), device=x.device).repeat_interleave(counts)
        at = torch.arange(len(token), device=x.device) - (counts.cumsum(0) - counts - first)[token]
        found = self.numbers.new_zeros(len(lines), self.width)
        found[token, self.columns[at]] = self.numbers[at]
        return found.view(*x.shape, self.width)


class _Bias:
    """Deltas of a bias."""

    def __init__(self, deltas: Sequence[Delta | None]) -> None:
        held = next(delta for delta in deltas if delta is not None)
        self.dense = held.numbers.new_zeros(len(deltas), 1, held.shape[0])
        for at, delta in enumerate(deltas):
            if delta is not None:
                self.dense[at, 0, delta.indices] = delta.numbers

    def __call__(self, x: Tensor) -> Tensor:
        return self.dense


def terms_of(name: str, module: nn.Module, attribute: str, deltas: Sequence[Delta | None]) -> list[Term]:
    """What adapters add where a module has this weight; of each its delta, or None.

    Raises:
        FinepointError: the module computes something of the weight that has no such form.
    """
    forward = type(module).forward if "forward" not in vars(module) else None
    if attribute == "bias" and forward is nn.Linear.forward:
        return [_Bias(deltas)]
    if attribute == "weight" and forward is nn.Embedding.forward and module.max_norm is None:
        return [_Tokens(deltas)]
    if attribute == "weight" and forward is nn.Linear.forward:
        kinds: list[tuple[type, bool]] = [(_Narrow, True), (_Wide, False)]
        parts = [(kind, [delta if delta and delta.is_narrow is narrow else None for delta in deltas])
                 for kind, narrow in kinds]  # fmt: skip
        return [kind(part) for kind, part in parts if any(part)]
    raise FinepointError(f"{name} is used by {type(module).__name__}, and rows of a batch can differ in plain linear "
                         f"layers and embeddings alone; {BY_THEMSELVES}")  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch are whose."""

    count: int
    """of names, the base's among them"""
    each: int
    """rows of the batch for a name, in one piece"""
    given: Tensor
    """(a, m): the names' places by adapter, those of fewer than m filled up with any"""
    own: Tensor
    """(n,): the places that have an adapter"""
    slots: Tensor
    """(n,): where in `given` they stand, flat"""

    @staticmethod
    def of(names: Sequence[str | None], known: Sequence[str], each: int = 1) -> "Rows":
        """`known`: the adapters among the names, each once."""
        if each < 1:
            raise FinepointError(f"each is {each}; give the rows of the batch for a name, 1 or more")
        places = [[at for at, name in enumerate(names) if name == one] for one in known]
        most = max(map(len, places))
        given = [mine + mine[:1] * (most - len(mine)) for mine in places]
        own = [(at, whose * most + slot) for whose, mine in enumerate(places) for slot, at in enumerate(mine)]
        return Rows(len(names), each, *map(torch.tensor, (given, *zip(*own, strict=True))))

    def added(self, y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
        """A layer's output with what each row's adapter adds to it; summed in float32 at least, and rounded once."""
        given, own, slots = (part.to(x.device) for part in (self.given, self.own, self.slots))
        inputs = x.reshape(self.count, -1, *(x.shape[-1:] if x.is_floating_point() else ()))[given].flatten(1, 2)
        found = sum(term(inputs) for term in terms)
        assert isinstance(found, Tensor)
        found = found.expand(-1, inputs.shape[1], -1).unflatten(1, (given.shape[1], -1)).flatten(0, 1)[slots]
        wide = y.to(found.dtype).reshape(self.count, -1, y.shape[-1])
        return wide.index_add(0, own, found).to(y.dtype).view(y.shape)

    def refuse_other(self, name: str, x: Tensor) -> None:
        """Refuses a batch of another size. A matrix may hold all rows' tokens, one below the other."""
        wanted, held = self.count * self.each, len(x)
        flat = x.is_floating_point() and x.ndim == 2 and not held % wanted
        if x.ndim < 2 or (held not in (self.count, wanted) and not flat):
            raise FinepointError(f"{name} is given {held} rows, and adapters are named for {self.count}"
                                 f"{f', {self.each} rows each' if self.each > 1 else ''}; name one for each row of the "
                                 "batch (beams: each=.., rows of the batch for a name)")  # fmt: skip


class _Stand:
    """Stands in for a module's forward."""

    def __init__(self, name: str, module: nn.Module, rows: Rows, terms: Sequence[Term]) -> None:
        self.name, self.module, self.rows, self.terms = name, module, rows, terms

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - the layers' own name for it
        self.rows.refuse_other(self.name, input)
        return self.rows.added(type(self.module).forward(self.module, input), input, self.terms)


@contextmanager
def answering(model: nn.Module, rows: Rows, terms: Mapping[str, Sequence[Term]]) -> Iterator[None]:
    """Inside, the modules of these names add what each row's adapter adds.

    Their forward is replaced, which compiled code notices, as it does not notice hooks.
    """
    with ExitStack() as stack:
        for name, found in terms.items():
            module = model.get_submodule(name)
            module.forward = _Stand(name, module, rows, found)
            stack.callback(delattr, module, "forward")
        yield


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """What a model says of a small input that is made up for it: (2, .., width).

    Raises:
        FinepointError: none can be.
    """
    inputs = made_up(model)
    if inputs is None:
        raise FinepointError(f"no input can be made up for {type(model).__name__}, to try that rows keep apart; "
                             f"{BY_THEMSELVES}")  # fmt: skip
    with undisturbed(model):
        output = model(**inputs)
    found: Tensor = output["logits"] if "logits" in output else output[0]
    return found


def refuse_mixed(
    model: nn.Module, trial: Rows, terms: Mapping[str, Sequence[Term]], expected: Sequence[Tensor]
) -> None:
    """Refuses a model in which the first row is not that of the changed model, or the second one not the base's.

    Args:
        trial: of an adapter and the base.
        expected: what the model says when all of it is changed, and at the base.

    Raises:
        FinepointError: it is so: it uses a weight beside its layers' calls, or rows of its batches meet.
    """
    changed, base = expected
    with suppress(FinepointError), answering(model, trial, terms):
        if agrees(outputs(model), torch.cat([changed[:1], base[1:]]), torch.cat([base[:1], changed[1:]])):
            return
    raise FinepointError(f"in {type(model).__name__} the rows of a batch cannot be told apart where these adapters "
                         f"change it; {BY_THEMSELVES}")  # fmt: skip
