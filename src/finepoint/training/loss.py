"""The loss of a causal model from the states its head sees: the head runs only where a label is, a chunk at a time.

Logits are positions x vocabulary, and a loss needs them with a float32 copy and a gradient: with a large vocabulary
they outweigh everything else in memory. Here those of at most `CHUNK` positions are alive: a chunk's gradient is taken
as soon as its loss is known, within the forward pass, so that nothing is computed twice.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from finepoint.data.batches import IGNORED, accepted
from finepoint.runtime import distributed
from finepoint.selection.passes import label_count, undisturbed

CHUNK = 256  # positions whose logits are alive at a time: fewer cost time, more only memory
# What makes logits more than their head's output, by the names it has in configurations.
CHANGED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "logits_scale", "lm_head_multiplier")


def completion_loss(model: Any, batch: Mapping[str, Any], items: Tensor | int | None = None) -> Tensor:
    """The mean cross-entropy over the labels of a batch: the model's own loss in less memory.

    Works on any causal model whose logits are its head's output, wrapped by PEFT or not; for all others (soft-capped or
    scaled logits, classifiers) it is the model's own loss, and for sharded ones, whose head is whole
    only while the model runs.

    Args:
        batch: what the model's forward takes; `labels` may be those of the last positions only.
        items: labels to divide by, where a step has several batches; those of this batch if None.
    """
    head = plain_head(model)
    labels = batch["labels"]
    if head is None or labels.ndim != 2:
        # Some models divide by the labels of a step when told how many, others do not listen: none is asked to.
        loss = model(**batch).loss
        return loss if items is None else loss * (label_count(batch) / items)
    states = head_states(model, head, batch)[:, -labels.shape[1] : -1]
    wanted = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][wanted]
    return _summed(head, states, wanted, targets) / (len(targets) if items is None else items)


def drawn_loss(model: Any, batch: Mapping[str, Any], draw: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
    """The summed cross-entropy of labels that are drawn from the model's own predictions, where the batch has any.

    Args:
        batch: what a causal model's forward takes, with labels.
        draw: labels, (n,), from logits, (n, vocabulary); at most `CHUNK` positions at a time.

    Returns:
        The loss, and how many labels were drawn.
    """
    head = plain_head(model)
    labels = batch["labels"]
    wanted = labels[:, 1:] != IGNORED
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    found = model(**inputs).logits if head is None else head_states(model, head, inputs)
    states = found[:, -labels.shape[1] : -1]
    with torch.no_grad():
        parts = states.detach()[wanted].split(CHUNK)
        targets = torch.cat([draw((head or nn.Identity())(part)) for part in parts])
    if head is None:
        return _losses(nn.Identity(), states[wanted], targets).sum(), len(targets)
    return _summed(head, states, wanted, targets), len(targets)


def _summed(head: nn.Module, states: Tensor, wanted: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy at the wanted positions, summed."""
    if len(targets) <= CHUNK:
        return _losses(head, states[wanted], targets).sum()
    if torch.is_grad_enabled():
        total: Tensor = _ChunkedLoss.apply(head, targets, states[wanted], *_leaves(head, states))
        return total
    return torch.stack([_losses(head, *part).sum() for part in _chunks(states[wanted], targets)]).sum()


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
    with head.register_forward_pre_hook(take):
        model(**inputs)
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


def _losses(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy at every position, (n,), at least float32."""
    logits = head(states)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.to(wide), targets, reduction="none")


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss of all chunks; the gradients are made in the forward, a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, head: nn.Module, targets: Tensor, states: Tensor, *leaves: Tensor) -> Tensor:
        ctx.states = torch.empty_like(states) if ctx.needs_input_grad[2] else None
        gradients: list[Tensor] = []
        sums = []
        start = 0
        for part, wanted in _chunks(states.detach(), targets):
            with torch.enable_grad():
                part = part.requires_grad_() if ctx.states is not None else part
                loss = _losses(head, part, wanted).sum()
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
        return None, None, states, *(gradient * scale.to(gradient.dtype) for gradient in ctx.leaves)


def _leaves(head: nn.Module, states: Tensor) -> list[Tensor]:
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
