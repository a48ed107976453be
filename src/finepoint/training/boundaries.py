"""Whether a model keeps the examples of a packed row apart: tried on the model itself, with a negative control."""

from typing import Any

import torch

from finepoint.probing import agrees, states_of, undisturbed

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
