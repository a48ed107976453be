"""Which weights text never reaches: those of a vision tower, while a model of pictures and text is given text alone."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.errors import FinepointError
from finepoint.selection.passes import Batch, undisturbed

logger = logging.getLogger(__name__)
TEXT = {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids", "logits_to_keep",
        "decoder_input_ids", "decoder_attention_mask"}  # fmt: skip


def is_text(batches: Sequence[Batch]) -> bool:
    """Whether batches hold text and nothing else."""
    return bool(batches) and all(TEXT.issuperset(batch) for batch in batches)


def reached_by_text(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The weights that take part when the model is given text; the others are named in a warning.

    Raises:
        FinepointError: none of them does.
    """
    lost = unreached_by_text(model, weights)
    found = {name: weight for name, weight in weights.items() if name not in lost}
    if lost:
        places = ", ".join(dict.fromkeys(lost.values()))
        if not found:
            raise FinepointError(f"text never reaches the targets, which all belong to {places}; give other --targets")
        logger.warning("text never reaches %s: its %d target weights are left out, entries are chosen of the other %d",
                       places, len(lost), len(found))  # fmt: skip
    return found


def name_unreached(model: nn.Module, chosen: Mapping[str, Tensor]) -> None:
    """Warns of chosen entries that text would never reach, by the parts of the model that they lie in."""
    if lost := unreached_by_text(model, chosen):
        logger.warning("text never reaches %s, where %d entries are chosen: give targets, unless it is trained on more "
                       "than text", ", ".join(dict.fromkeys(lost.values())),
                       sum(len(chosen[name]) for name in lost))  # fmt: skip


def unreached_by_text(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The weights that no gradient reaches from a text, with the part of the model that each belongs to.

    A few tokens are run through a model whose configuration has parts of its own for text and others. Layers within a
    list (experts, which a router may pass over this time) count as reached. Nothing is said of a model that does not
    take tokens alone.
    """
    config: Any = getattr(model, "config", None)
    names = list(names)
    if not names or config is None or not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return {}
    ran: set[nn.Module] = set()
    ids = torch.arange(3, 7, device=next(model.parameters()).device)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})
    with undisturbed(model):
        try:
            with ExitStack() as stack:
                for module in model.modules():
                    hook = module.register_forward_pre_hook(lambda module, _: ran.add(module), prepend=True)
                    stack.callback(hook.remove)
                with torch.no_grad():
                    model(**inputs)
            idle = {name: place for name in names if (place := _idle_part(model, name, ran))}
            return {name: idle[name] for name in _without_gradient(model, list(idle), inputs)}
        except Exception:  # a model that takes no tokens alone may fail in any way of its own
            return {}


def _idle_part(model: nn.Module, name: str, ran: set[nn.Module]) -> str | None:
    """The outermost module on the way to a weight that did not run; None where all did, or within a list."""
    module, path = model, ""
    for part in name.split(".")[:-1]:
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            return None
        module = getattr(module, part)
        path = f"{path}.{part}" if path else part
        if module not in ran and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            return path
    return None


def _without_gradient(model: nn.Module, names: Sequence[str], inputs: Mapping[str, Tensor]) -> list[str]:
    """Those of the weights that the output of a pass does not depend on: a module need not run for its weight to."""
    weights = {name: model.get_parameter(name) for name in names}
    used = [name for name, weight in weights.items() if not weight.is_floating_point()]
    with ExitStack() as stack:
        for name, weight in weights.items():
            if weight.is_floating_point():
                weight.requires_grad_(True)

                def see(weight: Tensor, name: str = name) -> None:
                    used.append(name)
                    weight.grad = None

                stack.callback(weight.register_post_accumulate_grad_hook(see).remove)
        logits = model(**inputs).logits
        if logits.requires_grad:
            logits.sum().backward()
    return [name for name in names if name not in used]
