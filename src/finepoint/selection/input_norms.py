"""How large the inputs are that every column of a weight multiplies: what Wanda weighs magnitudes with."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finepoint.errors import FinepointError
from finepoint.runtime import distributed
from finepoint.runtime.devices import home_of_float64
from finepoint.runtime.progress import tracked
from finepoint.selection.passes import Batch, on_device, split, undisturbed

# A forward pass does without.
FOR_A_LOSS = {"labels", "logits_to_keep", "return_loss", "start_positions", "end_positions"}


class InputSquares:
    """Adds up the squares of what one module multiplies a weight by, over all tokens: a hook before its forward.

    `total` has the form that broadcasts against the weight: (1, in) for a linear layer, (in, 1) for GPT-2's Conv1D,
    (rows, 1) for an embedding, whose input is 1 at the token's row and 0 elsewhere.
    """

    def __init__(self, module: nn.Module, weight: nn.Parameter) -> None:
        rows, columns = weight.shape
        self.is_embedding = isinstance(module, nn.Embedding)
        shape = (1, columns) if isinstance(module, nn.Linear) else (rows, 1)
        self.total = torch.zeros(shape, dtype=torch.float64, device=home_of_float64(weight.device))
        self.ran = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran = True
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        if self.is_embedding:
            tokens = given.reshape(-1).to(self.total.device)
            self.total.view(-1).index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.float64))
        else:
            wide = given.reshape(-1, given.shape[-1]).to(torch.promote_types(given.dtype, torch.float32))
            squares = wide.square().to(self.total.device)
            self.total += squares.sum(0, dtype=torch.float64).view_as(self.total)


def input_norms(model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The Euclidean norm of every input of a weight, over all tokens of the scoring examples.

    Wanda, arXiv:2306.11695. Examples are run one by one without their padding, forward only, so that the norms do not
    depend on how examples are batched. A weight that several modules use (a tied embedding and head) adds up the
    squares of all its uses: what a change of an entry does to the outputs of all of them.

    Returns:
        By weight name, float32 (float64 over float64 weights), of a shape that broadcasts against the weight's.

    Raises:
        FinepointError: a weight that is no matrix of a linear layer or an embedding, or whose layer does not run.
    """
    uses = {name: _uses(model, name, weight) for name, weight in weights.items()}
    with ExitStack() as stack, undisturbed(model), torch.no_grad():
        for hooked in uses.values():
            for module, squares in hooked:
                handle = module.register_forward_pre_hook(squares, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
        _run(model, batches, weights)
    found = {}
    for name, weight in weights.items():
        if not all(squares.ran for _, squares in uses[name]):
            raise FinepointError(f"the layer of {name} did not run on the scoring examples, so that its inputs are "
                                 "not known; leave it out of --targets")  # fmt: skip
        total: Tensor = sum(squares.total for _, squares in uses[name])  # type: ignore[assignment]
        distributed.add_up_(total)
        found[name] = total.sqrt().to(torch.promote_types(weight.dtype, torch.float32)).to(weight.device)
    return found


def _uses(model: nn.Module, name: str, weight: nn.Parameter) -> list[tuple[nn.Module, InputSquares]]:
    """Every module that multiplies by the weight, with what will watch its inputs."""
    owners = [module for module in model.modules() if any(own is weight for own in module._parameters.values())]
    for module in owners:
        known = isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        if not known or module._parameters.get("weight") is not weight:
            raise FinepointError(f"{name} belongs to {type(module).__name__}, no linear layer or embedding, so that it "
                                 "has no inputs to take the norm of; leave it out of --targets")  # fmt: skip
    return [(module, InputSquares(module, weight)) for module in owners]


def _run(model: nn.Module, batches: Sequence[Batch], weights: Mapping[str, nn.Parameter]) -> None:
    """This process's share of the examples, each alone; of a sharded model all processes run equally many."""
    examples = [trimmed(example) for batch in batches for example in _rows(model, batch)]
    if distributed.count() > 1 and any(distributed.is_sharded(weight) for weight in weights.values()):
        raise FinepointError("the norms of inputs are not taken over a sharded model; choose entries in one process "
                             "with `finepoint select` and train them with --indices")  # fmt: skip
    device = next(model.parameters()).device
    for example in tracked("looking at inputs", examples[distributed.rank() :: distributed.count()]):
        model(**on_device(example, device))


def _rows(model: nn.Module, batch: Batch) -> Iterator[dict[str, Any]]:
    """The batch as batches of one example, without what only a loss needs."""
    # An encoder-decoder is given its labels, of which it makes the decoder's inputs.
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    left_out = FOR_A_LOSS - ({"labels"} if decodes else set())
    for row in split(batch):
        yield {key: value for key, value in row.items() if key not in left_out}


def trimmed(example: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of one example without the places that its attention masks leave out, or at its end its labels."""
    found = dict(example)
    for mask_name, belongs in (("attention_mask", _to_the_encoder), ("decoder_attention_mask", _to_the_decoder)):
        mask = example.get(mask_name)
        if mask is None or mask.ndim != 2 or mask.is_meta or bool(mask.all()):
            continue
        kept = mask[0].bool()
        for key, value in found.items():
            if isinstance(value, Tensor) and belongs(key) and value.shape[:2] == mask.shape:
                found[key] = value[:, kept]
            elif key == "position_ids" and belongs(key) and value.ndim == 3:
                found[key] = value[:, :, kept]
    labels = found.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_meta and "decoder_attention_mask" not in found:
        learned = (labels[0] != -100).nonzero()
        end = int(learned[-1]) + 1 if len(learned) else 1
        found |= {key: found[key][:, :end] for key in ("labels", "decoder_input_ids") if key in found}
    return found


def _to_the_decoder(key: str) -> bool:
    return key.startswith("decoder_") or key == "labels"


def _to_the_encoder(key: str) -> bool:
    return not _to_the_decoder(key)
