"""A small input for a model whose own data are not at hand, of the kind that its configuration tells of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finepoint.data.batches import accepted

ROWS = 2
LENGTH = 12
FRAMES = 16  # more than the ten that are masked at a time


def made_up(model: Any) -> dict[str, Any] | None:
    """What the model's forward takes: a few random tokens, an image or a sound; None if the config does not say what.

    No state of any random generator is touched.
    """
    make = MAKE.get(getattr(model, "main_input_name", ""))
    if make is None or getattr(model, "config", None) is None:
        return None
    draw = torch.Generator().manual_seed(0)
    taken = accepted(model)
    try:
        inputs: dict[str, Any] = make(model, draw)
        if model.config.is_encoder_decoder and "decoder_input_ids" in taken:
            inputs["decoder_input_ids"] = _tokens(model, draw)["input_ids"]
    except (AttributeError, NotImplementedError, TypeError):  # this config uses other field names
        return None
    place = next(model.parameters())
    inputs = {name: _like(value, place) for name, value in inputs.items()}
    return inputs | ({"use_cache": False} if "use_cache" in taken else {})


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)


def _tokens(model: Any, draw: torch.Generator) -> dict[str, Tensor]:
    """Ordinary tokens, the last of each row the end token, which some models look for."""
    config = model.config.get_text_config()
    size = getattr(config, "vocab_size", None) or len(model.get_input_embeddings().weight)
    kept = {**model.config.to_dict(), **config.to_dict()}
    special = {value for name, value in kept.items() if name.endswith(("token_id", "token_index"))
               if isinstance(value, int)}  # fmt: skip
    ordinary = torch.tensor([token for token in range(min(size, 10_000)) if token not in special])
    ids = ordinary[torch.randint(len(ordinary), (ROWS, LENGTH), generator=draw)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < size:
        ids[:, -1] = end
    return {"input_ids": ids}


def _image(model: Any, draw: torch.Generator) -> dict[str, Tensor]:
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
    return {"pixel_values": torch.randn(ROWS, config.num_channels, *size, generator=draw)}


def _sound(model: Any, draw: torch.Generator) -> dict[str, Tensor]:
    length = FRAMES * model.config.inputs_to_logits_ratio + 400  # a convolution or two more than the strides
    return {"input_values": torch.randn(ROWS, length, generator=draw)}


def _spectrum(model: Any, draw: torch.Generator) -> dict[str, Tensor]:
    length = 2 * model.config.max_source_positions
    return {"input_features": torch.randn(ROWS, model.config.num_mel_bins, length, generator=draw)}


MAKE: dict[str, Callable[[Any, torch.Generator], dict[str, Tensor]]] = {
    "input_ids": _tokens, "pixel_values": _image, "input_values": _sound, "input_features": _spectrum,
}  # fmt: skip
