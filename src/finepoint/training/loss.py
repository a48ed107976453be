"""The loss of a causal model from the states its head sees: the head runs only where a label is, a chunk at a time.

Logits are positions x vocabulary, and computing a loss also needs a float32 copy of the logits and their gradient:
with a large vocabulary they take more memory than everything else. Here the logits of at most `CHUNK` positions exist
at a time: a chunk's gradient is taken as soon as its loss is known, within the forward pass, so nothing is computed
twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finepoint.data.batches import IGNORED, accepted
from finepoint.errors import FinepointError
from finepoint.runtime import distributed
from finepoint.selection.passes import label_count, undisturbed
from finepoint.training.losses import LOSSES as LOSSES  # its former place
from finepoint.training.losses import Measure, loss_named, nll
from finepoint.tuner.autograd import AS_IT_IS

CHUNK = 256  # positions whose logits are alive at a time: fewer cost time, more only memory
# What makes logits more than their head's output, by the names it has in configurations.
CHANGED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "logits_scale", "lm_head_multiplier")


def completion_loss(
    model: Any, batch: Mapping[str, Any], items: Tensor | int | None = None, measure: Measure = nll
) -> Tensor:
    """The mean loss over the labels of a batch: where it is the cross-entropy, the model's own in less memory.

    Works on any causal model whose logits are its head's output, wrapped by PEFT or not; for all others (soft-capped or
    scaled logits, classifiers) it is the model's own loss, and for sharded ones, whose head is whole
    only while the model runs.

    Args:
        batch: what the model's forward takes; `labels` may be those of the last positions only.
        items: labels to divide by, where a step has several batches; those of this batch if None.
        measure: one of `LOSSES`; for others than the cross-entropy see `refuse_unweighable`.
    """
    head = plain_head(model)
    labels = batch["labels"]
    if measure is nll and (head is None or labels.ndim != 2):
        # Some models ignore `num_items_in_batch`, so we never pass it and always rescale here.
        loss = model(**batch).loss
        return loss if items is None else loss * (label_count(batch) / items)
    states = states_of(model, head, batch)
    wanted = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][wanted]
    if "median" in signature(measure).parameters:
        measure = partial(measure, median=median_loss(head, states[wanted], targets, examples_of(batch)[wanted]))
    return summed_loss(head, states, wanted, targets, measure) / (len(targets) if items is None else items)


@torch.no_grad()
def median_loss(head: nn.Module | None, states: Tensor, targets: Tensor, examples: Tensor) -> Tensor:
    """The median over examples of the mean cross-entropy of their labels, a scalar; of two in the middle the lower.

    Args:
        states: what the head is given before each label, (n, width), or without a head the logits.
        examples: of which example each label is, (n,).
    """
    losses = torch.cat([_losses(head or nn.Identity(), *part) for part in _chunks(states, targets)])
    _, places, counts = examples.unique(return_inverse=True, return_counts=True)
    return (losses.new_zeros(len(counts)).index_add_(0, places, losses) / counts).median()


def examples_of(batch: Mapping[str, Any]) -> Tensor:
    """A number of its own for each example of a batch, packed or a row each, at its labels: (rows, labels - 1)."""
    ids = batch["input_ids"]
    if "position_ids" in batch:
        numbers = (batch["position_ids"] == 0).flatten().cumsum(0).view_as(ids)
    else:
        numbers = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    return numbers[:, -batch["labels"].shape[1] :][:, 1:]


def refuse_unweighable(model: Any, loss: str, labels: Sequence[str]) -> None:
    """Refuses to weigh the tokens of a model whose own loss is not the sum of its tokens' losses.

    Raises:
        FinepointError: the model's loss has further terms, or it is a classifier or an encoder-decoder.
    """
    if loss_named(loss).measure is nll:
        return
    if labels or model.config.is_encoder_decoder:
        raise FinepointError(f"--loss {loss} weighs the tokens of a causal model's answers; leave it out")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise FinepointError(f"{type(model).__name__}'s own loss has another term, for its experts, that --loss {loss} "
                             "would lose; leave it out, or set output_router_logits to false")  # fmt: skip


def drawn_loss(model: Any, batch: Mapping[str, Any], draw: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
    """The summed cross-entropy of labels that are drawn from the model's own predictions, where the batch has any.

    Args:
        batch: what a causal model's forward takes, with labels.
        draw: labels, (n,), from logits, (n, vocabulary); at most `CHUNK` positions at a time.

    Returns:
        The loss, and how many labels were drawn.
    """
    head, targets = plain_head(model), batch["labels"][:, 1:]
    wanted = targets != IGNORED
    states = states_of(model, head, batch)

    def measure(logits: Tensor, _: Tensor) -> Tensor:
        return nll(logits, draw(logits.detach()))

    return summed_loss(head, states, wanted, targets[wanted], measure), int(wanted.sum())


def states_of(model: Any, head: nn.Module | None, batch: Mapping[str, Any]) -> Tensor:
    """What the head is given, or without a plain one the logits, before each label: (rows, labels - 1, width)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    found: Tensor = model(**inputs).logits if head is None else head_states(model, head, inputs)
    return found[:, -batch["labels"].shape[1] : -1]


def summed_loss(
    head: nn.Module | None, states: Tensor, wanted: Tensor, targets: Tensor, measure: Measure = nll
) -> Tensor:
    """The loss at the wanted positions, summed; without a head the states are logits, which are there anyway."""
    if head is None or len(targets) <= CHUNK:
        return _losses(head or nn.Identity(), states[wanted], targets, measure).sum()
    if torch.is_grad_enabled():
        total: Tensor = _ChunkedLoss.apply(head, targets, measure, states[wanted], *leaves_of(head, states))
        return total
    return torch.stack([_losses(head, *part, measure).sum() for part in _chunks(states[wanted], targets)]).sum()


@torch.no_grad()
def log_likelihoods(model: Any, inputs: Mapping[str, Any], rows: Tensor, columns: Tensor, tokens: Tensor) -> Tensor:
    """The log-likelihood of each token after the position in its row and column (from the end, so negative).

    Args:
        inputs: what the model's forward takes, without labels.

    Returns:
        (len(tokens),), at least float32.
    """
    head = plain_head(model)
    # A model that changes its head's output is scored on its own logits.
    states = model(**inputs).logits if head is None else head_states(model, head, inputs)
    parts = _chunks(states[rows, columns], tokens)
    return torch.cat([-_losses(head or nn.Identity(), *part) for part in parts])


def plain_head(model: Any) -> nn.Module | None:
    """The module whose output is the model's logits as they are, or None where more happens to them."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or model.config.is_encoder_decoder or any(distributed.is_sharded(w) for w in head.parameters()):
        return None
    text = model.config.get_text_config()
    if any(getattr(text, name, None) not in (None, 1) for name in CHANGED_LOGITS):
        return None
    if getattr(text, "output_router_logits", False):  # the loss has another term
        return None
    if model not in _PROBED:
        _PROBED[model] = _puts_out_logits(model, head)
    return head if _PROBED[model] else None


def head_states(model: Any, head: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What the head is given for this batch: (rows, kept tokens, width); it is spared the work.

    Taken at the head's door, not from the decoder inside: whatever wraps the model or scales the states takes part.
    """
    found = []

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(args[0])
        return (args[0][:, :0], *args[1:])

    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if "use_cache" in accepted(model):
        inputs["use_cache"] = False  # keys and values of all layers, for a generation that does not come
    vars(head)[AS_IT_IS] = True
    try:
        with head.register_forward_pre_hook(take):
            model(**inputs)
    finally:
        vars(head).pop(AS_IT_IS, None)
    return found[0]


_PROBED: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def _puts_out_logits(model: Any, head: nn.Module) -> bool:
    """Whether the model's logits are its head's output, bit for bit, tried on three tokens."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output.clone())  # the model might change the output in place

    with undisturbed(model), torch.no_grad(), head.register_forward_hook(keep):
        logits = model(input_ids=torch.arange(3, device=model.device)[None]).logits
    return len(found) == 1 and found[0].shape == logits.shape and torch.equal(found[0].to(logits.dtype), logits)


def _chunks(states: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(states.split(CHUNK), targets.split(CHUNK), strict=True)


def _losses(head: nn.Module, states: Tensor, targets: Tensor, measure: Measure = nll) -> Tensor:
    """The loss at every position, (n,), at least float32."""
    logits = head(states)
    return measure(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss of all chunks; the gradients are made in the forward, a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, targets: Tensor, measure: Measure, states: Tensor, *leaves: Tensor
    ) -> Tensor:
        ctx.states = torch.empty_like(states) if ctx.needs_input_grad[3] else None
        gradients: list[Tensor] = []
        sums = []
        start = 0
        for part, wanted in _chunks(states.detach(), targets):
            with torch.enable_grad():
                part = part.requires_grad_() if ctx.states is not None else part
                loss = _losses(head, part, wanted, measure).sum()
            sources = [*leaves, *([part] if ctx.states is not None else [])]
            if sources:
                found = list(torch.autograd.grad(loss, sources))
                if ctx.states is not None:
                    ctx.states[start : start + len(part)] = found.pop()
                gradients = [old.add_(new) for old, new in zip(gradients, found, strict=True)] if gradients else found
            sums.append(loss.detach())
            start += len(part)
        ctx.leaves = gradients
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        states = None if ctx.states is None else ctx.states * scale.to(ctx.states.dtype)
        return None, None, None, states, *(gradient * scale.to(gradient.dtype) for gradient in ctx.leaves)


def leaves_of(head: nn.Module, states: Tensor) -> list[Tensor]:
    """The trainable tensors that the head's output depends on, found in the graph of a call on no position.

    They need not be the head's parameters: a tuner's deltas are tied to its output by a hook, LoRA wraps it.
    """
    nodes = [head(states.detach()[:, :0]).grad_fn]
    leaves: dict[int, Tensor] = {}
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # torch's AccumulateGrad: a leaf's end of the graph
            leaves[id(node.variable)] = node.variable
        nodes += [following for following, _ in node.next_functions]
    return list(leaves.values())
