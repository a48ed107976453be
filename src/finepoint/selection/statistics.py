"""What rules are made of: gradients and squared gradients, streamed weight by weight in bounded memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.errors import FinepointError
from finepoint.models.quantised import as_floats
from finepoint.runtime import distributed
from finepoint.runtime.progress import tracked
from finepoint.selection.input_norms import input_norms
from finepoint.selection.on_grid import grids_of, step_and_room
from finepoint.selection.passes import Batch, counts_every_label, label_count, loss_of, on_device, split, undisturbed
from finepoint.selection.rules import FROM_DATA, FROM_GRID, FROM_KEPT, STATISTICS, wide
from finepoint.selection.sums import DISK, Sums, places_for
from finepoint.selection.sums import zeros as zeros  # its former place
from finepoint.selection.warmup import warmed_up


@dataclass(frozen=True)
class Statistics:
    """What is known of one weight; what the rule did not ask for is None."""

    gradient: Tensor | None = None
    squared_gradient: Tensor | None = None
    input_norm: Tensor | None = None
    movement: Tensor | None = None
    change: Tensor | None = None
    kept_squared_gradient: Tensor | None = None
    kept_mean: Tensor | None = None
    kept_input_norm: Tensor | None = None
    grid_step: Tensor | None = None
    grid_room: Tensor | None = None


def stream_statistics(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    needs: Iterable[str],
    memory: float | str = 1.0,
    options: Mapping[str, float] | None = None,
    kept: Sequence[Batch] = (),
    gguf: Path | None = None,
) -> Iterator[tuple[str, Statistics]]:
    """Yields every weight's statistics once, in order, holding those of at most `memory` x all entries at a time.

    A smaller `memory` (in (0, 1]) makes more passes over the same batches and gives the same numbers bit for bit;
    at least one weight is held at a time. So does `disk`, in one pass: what is added up waits in a temporary file
    (TMPDIR) between two batches. Between two yields the model is exactly as it was found.

    Several processes share the examples, and each gets the same sums. Of a sharded model each holds the sums of its own
    rows, and a weight's statistics are put together as it is yielded.

    `movement` and `change` take a short training of all the weights at once, to which `memory` does not apply; they
    then wait in a temporary file.

    Args:
        options: the rule's; `steps` and `lr` are those of this training.
        kept: text that is to be kept; where its labels are drawn from the model (`drawn`), squares of its gradients are
            the Fisher information.
        gguf: the GGUF file that the model was loaded from, if any, for what its grid says.

    Raises:
        FinepointError: data is needed and there is no batch, no label, or a loss that is not finite; or a weight has
            not what the rule asks for.
    """
    needs = set(needs)
    if "grid_room" in needs:
        needs.add("gradient")
    wanted: list[str] = [need for need in ("gradient", "squared_gradient") if need in needs]
    warm = [need for need in ("movement", "change") if need in needs]
    made = needs & set(STATISTICS)
    if not made:
        yield from ((name, Statistics()) for name in weights)
        return
    if made & set(FROM_KEPT) and not kept:
        raise FinepointError(
            "this rule looks at what is to be kept; give text of it by --protect (in Python: protect, kept)"
        )
    if made & set(FROM_DATA) and not batches:
        raise FinepointError("this rule scores by examples and needs data; give --data (in Python: batches)")
    grid = grids_of(model, weights, gguf) if needs & set(FROM_GRID) else None
    if wanted or warm:
        every = counts_every_label(model, batches)
        told = (str(label_count(batch, every)).encode() for batch in batches)
        distributed.check_alike("a label of the scoring examples", told)
    with ExitStack() as stack:
        norms = input_norms(model, weights, batches) if "input_norm" in needs else {}
        kept_norms = input_norms(model, weights, kept) if "kept_input_norm" in needs else {}
        moved: Any = stack.enter_context(warmed_up(model, weights, batches, warm, options or {})) if warm else {}
        chunks = list(_chunks(weights, memory))
        mean = _kept_mean(model, weights, chunks, kept) if "kept_mean" in needs and len(chunks) > 1 else None
        reads = bool({"kept_squared_gradient", "kept_mean"} & needs)
        places = stack.enter_context(places_for(weights, memory, len(wanted) + reads))
        for chunk in chunks:
            sums = {need: Sums(chunk, place) for need, place in zip(wanted, places, strict=False)}
            if wanted:
                with as_floats(model, chunk) as plain, undisturbed(model):
                    _accumulate_(sums, model, plain, batches)
            if reads:
                sums["kept_squared_gradient"] = _information(model, chunk, kept, places[-1])
                if "kept_mean" in needs and mean is None:
                    mean = _mean(sums["kept_squared_gradient"])
            for name in chunk:
                found = {need: distributed.whole(parts.take(name)) for need, parts in sums.items()}
                found |= moved[name] if warm else {}
                if grid:
                    room = found["gradient"] if "grid_room" in needs else None
                    found |= step_and_room(weights[name], room, grid(name))
                norm, kept_norm = norms.pop(name, None), kept_norms.pop(name, None)
                yield name, Statistics(**found, input_norm=norm, kept_mean=mean, kept_input_norm=kept_norm)


def _information(
    model: nn.Module, weights: Mapping[str, nn.Parameter], kept: Sequence[Batch], place: Path | None = None
) -> Sums:
    """The mean squared gradient of a token: of one example's summed loss, squared, over all labels there are.

    Where labels are drawn from the model, gradients of different tokens are independent with mean 0, and the square of
    a sum has the sum of the squares as its expectation.
    """
    sums = Sums(weights, place)
    examples = [example for batch in kept for example in split(batch)]
    with as_floats(model, weights) as plain, undisturbed(model):
        _accumulate_({"squared_gradient": sums}, model, plain, examples)
    every = counts_every_label(model, kept)
    factor = len(examples) / sum(label_count(example, every) for example in examples)
    for name in weights:
        with sums.changing(name) as part:
            part.mul_(factor)
    return sums


def _kept_mean(
    model: nn.Module, weights: Mapping[str, nn.Parameter], chunks: Sequence[Mapping[str, nn.Parameter]],
    kept: Sequence[Batch],
) -> Tensor:  # fmt: skip
    """The mean Fisher information of all weights, where not all of it is held at a time: a pass of its own."""
    return _mean_of([total for chunk in chunks for total in _totals(_information(model, chunk, kept))], weights)


def _mean(sums: Sums) -> Tensor:
    """The mean over all entries: (), float32 or float64."""
    return _mean_of(_totals(sums), sums.weights)


def _totals(sums: Sums) -> list[Tensor]:
    """Of each weight the sum over its entries: ()."""
    found = []
    for name in sums.weights:
        with sums.reading(name) as part:
            found.append(part.sum())
    return found


def _mean_of(totals: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    whole = sum(float(distributed.whole(total)) for total in totals)
    mean = whole / sum(weight.numel() for weight in weights.values())
    return torch.tensor(mean, dtype=totals[0].dtype, device=totals[0].device)


def _chunks(weights: Mapping[str, nn.Parameter], memory: float | str) -> Iterator[dict[str, nn.Parameter]]:
    """Consecutive weights, as many as fit into `memory` x all entries, at least one; all where sums are on disk."""
    if isinstance(memory, str):
        if memory != DISK:
            raise FinepointError(f"scoring_memory is {memory!r}; it is a share of the weights, in (0, 1], or {DISK}")
        yield dict(weights)
        return
    if not 0 < memory <= 1:
        raise FinepointError(f"scoring_memory is {memory}; it is a share of the weights, in (0, 1]")
    room = memory * sum(weight.numel() for weight in weights.values())
    chunk: dict[str, nn.Parameter] = {}
    held = 0
    for name, weight in weights.items():
        if chunk and held + weight.numel() > room:
            yield chunk
            chunk, held = {}, 0
        chunk[name] = weight
        held += weight.numel()
    yield chunk


def _accumulate_(
    sums: Mapping[str, Sums], model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Sequence[Batch]
) -> None:
    """Adds up the mean gradient and the mean squared per-example gradient of the weights over the batches.

    The mean gradient is that of the loss summed over all labels of all batches and divided once by their number, so
    it does not depend on how the examples were batched. The squared gradient is made from batches of one: the
    gradient of the example's log-likelihood (the sum over its labels), squared, averaged over the examples.
    """
    per_example = "squared_gradient" in sums
    if per_example and any(batch.get("return_loss") for batch in batches):
        raise FinepointError("this rule squares the gradient of one example at a time, and a loss over pairs "
                             "(return_loss) has none; take another, e.g. gradient")  # fmt: skip
    if per_example:
        batches = [example for batch in batches for example in split(batch)]
    counts = [label_count(batch, counts_every_label(model, batches)) for batch in batches]
    total = sum(counts)
    if not total:
        raise FinepointError("every label of the scoring examples is ignored (-100): nothing to compute a gradient of")
    device = next(model.parameters()).device
    sharded = distributed.is_sharded(next(iter(weights.values())))
    share = None

    def collect(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        assert share is not None
        # The model's loss is a mean over its labels: times their number, it is the sum.
        gradient = wide(weight.grad)
        if "gradient" in sums:
            with sums["gradient"].changing(name) as total:
                total.add_(gradient, alpha=share.factor)
        if per_example:
            scaled = gradient * share.count
            with sums["squared_gradient"].changing(name) as total:
                total.addcmul_(scaled, scaled, value=1 / len(batches))
        weight.grad = None

    with ExitStack() as stack:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            # Collected as soon as it is made, so that one dense gradient exists at a time beside the sums.
            stack.callback(weight.register_post_accumulate_grad_hook(partial(collect, name)).remove)
        for share in tracked("scoring examples", _shares(batches, counts, sharded, per_example)):
            loss = loss_of(model, on_device(share.batch, device))
            if not torch.isfinite(loss):
                raise FinepointError(f"the loss of a scoring batch is {loss.item()}; is --dtype too narrow?")
            (loss if share.scale is None else loss * share.scale).backward()
    if not sharded and distributed.count() > 1:
        for parts in sums.values():
            for name in weights:
                with parts.changing(name) as part:
                    distributed.add_up_(part)


@dataclass(frozen=True)
class _Share:
    """A batch that this process scores on."""

    batch: Batch
    count: int
    """of its labels"""
    factor: float
    """of its gradient in the mean over all labels of all batches"""
    scale: float | None = None
    """of its loss"""


def _shares(batches: Sequence[Batch], counts: Sequence[int], sharded: bool, per_example: bool) -> list[_Share]:
    """The batches of this process: every n-th of those that have a label, with n processes.

    The layers of a sharded model run in all processes together: all get equally many batches, the last of them perhaps
    one that counts nothing. FSDP2 averages their gradients as they are made, so squares are taken of one example
    after the other, by all processes alike.
    """
    total = sum(counts)
    scored = [(batch, count) for batch, count in zip(batches, counts, strict=True) if count]
    if sharded and not per_example:
        scored += [(scored[0][0], 0)] * (-len(scored) % distributed.count())
        mine = scored[distributed.rank() :: distributed.count()]
        return [_Share(batch, count, distributed.count() / total, scale=count) for batch, count in mine]
    mine = scored if sharded else scored[distributed.rank() :: distributed.count()]
    return [_Share(batch, count, count / total) for batch, count in mine]


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one weight: equal seeds and names give equal numbers, equal shapes do not."""
    return torch.Generator().manual_seed(seed_of(seed, name) >> 1)


def seed_of(seed: int, name: str) -> int:
    """64 bits that depend on both."""
    return int.from_bytes(sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
