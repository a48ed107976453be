"""A short training of whole weights, only to see where they go; afterwards the model is the base again, bit for bit."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finepoint.errors import FinepointError
from finepoint.models.quantised import is_quantised
from finepoint.models.weights import Master
from finepoint.runtime import distributed
from finepoint.runtime.files import writing
from finepoint.runtime.progress import tracked
from finepoint.selection.passes import Batch, counts_every_label, label_count, loss_of, on_device, undisturbed
from finepoint.selection.targets import DELTAS

STEPS, LR = 50, 1e-5


@contextmanager
def warmed_up(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    wanted: Sequence[str],
    options: Mapping[str, float],
) -> Iterator["Kept"]:
    """Trains the weights for some steps of AdamW without decay, each on the next batch, in eval mode; then undoes it.

    Memory, beside the model: for each entry of all the weights 12 bytes while it trains (gradient and Adam's two
    moments), 4 more for half-precision weights (a float32 master) and 4 for `movement`; double for float64. The base
    and what is found wait in a temporary file (TMPDIR), so afterwards one weight at a time is held.

    Args:
        wanted: `movement`, the sum over the steps of -w g, both taken before the step (movement pruning,
            arXiv:2005.07683); `change`, what the weight is afterwards minus what it was (LT-SFT, arXiv:2110.07560;
            LoTA, arXiv:2406.16797).
        options: `steps` (50 where not given) and `lr` (1e-5).

    Returns:
        What is wanted, by weight name, float32 (float64 over float64 weights); readable inside the `with`.

    Raises:
        FinepointError: several processes, a model in training, a quantised weight, a loss or gradient that is not
            finite, options out of range.
    """
    steps, lr = int(options.get("steps", STEPS)), float(options.get("lr", LR))
    if steps < 1 or not (isfinite(lr) and lr > 0):
        raise FinepointError(f"steps is {steps} and lr {lr:g}; give at least one step and a rate above 0")
    if distributed.count() > 1:
        raise FinepointError("a warm-up trains whole weights and runs in one process; choose entries there with "
                             "`finepoint select` and train them with --indices")  # fmt: skip
    if any(name.startswith(DELTAS) for name, _ in model.named_parameters()):
        raise FinepointError("a warm-up trains whole weights, which a model in training has not to spare: rules that "
                             "need one cannot choose anew; leave out --refresh")  # fmt: skip
    if quantised := [name for name, weight in weights.items() if is_quantised(weight)]:
        raise FinepointError(f"{quantised[0]} is quantised: a warm-up trains whole weights, so load it in bfloat16")
    with tempfile.TemporaryDirectory(prefix="finepoint-") as folder:
        base = Path(folder) / "base.safetensors"
        with writing(base):
            save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, base)
        kept = Kept(Path(folder), tuple(wanted))
        try:
            with undisturbed(model), safe_open(base, framework="pt") as file:
                for place, (name, total, value) in enumerate(warm_up_(model, weights, batches, steps, lr, wanted)):
                    found = {"movement": total, "change": value - file.get_tensor(name).to(value)}
                    kept.keep(place, name, {what: found[what] for what in wanted})
        finally:
            with torch.no_grad(), safe_open(base, framework="pt") as file:
                for name, weight in weights.items():
                    weight.copy_(file.get_tensor(name))
        yield kept


class Kept:
    """What a warm-up found, on disk: read weight by weight."""

    def __init__(self, folder: Path, wanted: tuple[str, ...]) -> None:
        self.folder = folder
        self.places: dict[str, tuple[Path, torch.device]] = {}

    def keep(self, place: int, name: str, found: Mapping[str, Tensor | None]) -> None:
        file = self.folder / f"{place}.safetensors"
        tensors = {what: tensor.detach().cpu().contiguous() for what, tensor in found.items() if tensor is not None}
        with writing(file):
            save_file(tensors, file)
        self.places[name] = file, next(tensor.device for tensor in found.values() if tensor is not None)

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        path, device = self.places[name]
        with safe_open(path, framework="pt") as file:
            return {what: file.get_tensor(what).to(device, copy=True) for what in file.keys()}  # noqa: SIM118


def warm_up_(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    steps: int,
    lr: float,
    wanted: Sequence[str],
) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """Trains; then yields each weight's name, its sum of -w g where wanted, and its trained value (of half-precision
    weights the float32 master), and forgets them."""
    batches = [batch for batch in batches if label_count(batch, counts_every_label(model, batches))]
    if not batches:
        raise FinepointError("every label of the scoring examples is ignored (-100): nothing to train on")
    for weight in weights.values():
        weight.requires_grad_(True)
    masters = {name: Master(weight) for name, weight in weights.items() if weight.itemsize == 2}
    trained = {name: masters[name].value if name in masters else weight for name, weight in weights.items()}
    sums = {name: torch.zeros_like(value) for name, value in trained.items()} if "movement" in wanted else {}
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0, foreach=False)
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for master in masters.values():
            stack.callback(master.handle.remove)
        for step in tracked("warming up", range(steps)):
            loss = loss_of(model, on_device(batches[step % len(batches)], device))
            loss.backward()
            grads = {name: value.grad for name, value in trained.items() if value.grad is not None}
            if not (torch.isfinite(loss) and all(bool(torch.isfinite(grad).all()) for grad in grads.values())):
                raise FinepointError(f"the loss or a gradient is not finite at step {step + 1} of the warm-up; "
                                     f"give a smaller --rule-options lr than {lr:g}")  # fmt: skip
            with torch.no_grad():
                for name, total in sums.items():
                    if name in grads:
                        total.addcmul_(trained[name].detach(), grads[name], value=-1)
            optimizer.step()
            optimizer.zero_grad()
            del grads, loss  # or the next backward pass would find them still in memory
            for master in masters.values():
                master.follow_()
    del optimizer, masters  # and the moments; the values are forgotten one by one
    for name in weights:
        yield name, sums.pop(name, None), trained.pop(name).detach()
