"""Continuations of one prompt share a row, so that no token is computed twice.

A row is the prompt, then every continuation but its last token, each with positions that go on from the prompt's; a
mask lets a continuation see the prompt and itself alone.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from finepoint.data.batches import Collator
from finepoint.models.probing import REFUSED, Side, agrees, states_of, undisturbed

WIDEST = 2048  # tokens of a row with several continuations: its mask has the square of that


@dataclass(frozen=True)
class SharedRow:
    """A prompt and the continuations of it that are scored, by the number of their request."""

    prompt: list[int]
    continuations: dict[int, list[int]]

    def __len__(self) -> int:
        return len(self.prompt) + self.after

    @property
    def after(self) -> int:
        """How many tokens follow the prompt."""
        return sum(len(tokens) - 1 for tokens in self.continuations.values())

    @property
    def branches(self) -> bool:
        """Whether a plain causal mask would let one continuation see another."""
        return sum(len(tokens) > 1 for tokens in self.continuations.values()) > 1


def shared_rows(
    requests: Sequence[tuple[list[int], list[int]]], limit: int, branching: bool, sharing: bool = True
) -> list[SharedRow]:
    """Rows for (prompt, continuation) pairs; a pair longer than `limit` has one for itself and loses its beginning.

    Args:
        branching: whether continuations of more than one token may share a row.
        sharing: whether those of one token may, which need no place of their own.
    """
    rows: list[SharedRow] = []
    open_rows: dict[tuple[int, ...], SharedRow] = {}
    for i, (prompt, continuation) in enumerate(requests):
        if not prompt:  # nothing predicts the first token
            prompt, continuation = continuation[:1], continuation[1:]
        if not continuation:
            continue
        if len(prompt) + len(continuation) - 1 > limit:
            kept = continuation[-limit:]  # a continuation longer than the context keeps what fits
            before = (prompt + continuation)[: -len(kept)]
            rows.append(SharedRow(before[-(limit - len(kept) + 1) :], {i: kept}))
            continue
        key = tuple(prompt) if sharing else (i,)
        row = open_rows.get(key)
        fits = row is not None and (
            len(continuation) == 1 or (branching and len(row) + len(continuation) - 1 <= WIDEST) or not row.after
        )
        if row is None or not fits:
            row = open_rows[key] = SharedRow(list(prompt), {})
            rows.append(row)
        row.continuations[i] = continuation
    return rows


def shared_batch(rows: Sequence[SharedRow], collator: Collator, dtype: torch.dtype) -> dict[str, Any]:
    """What the model's forward takes; the mask is (rows, 1, tokens, tokens) of `dtype` where continuations branch."""
    after = [[token for tokens in row.continuations.values() for token in tokens[:-1]] for row in rows]
    batch = collator.inputs([row.prompt + tail for row, tail in zip(rows, after, strict=True)])
    width = batch["input_ids"].shape[1]
    ends = [_end(row, width, collator.side) for row in rows]
    if any(row.branches for row in rows):
        segments = torch.full_like(batch["input_ids"], -1)
        for line, position, row, end in zip(segments, batch["position_ids"], rows, ends, strict=True):
            at = end - row.after
            line[end - len(row) : at] = 0
            for number, tokens in enumerate(row.continuations.values(), 1):
                until = at + len(tokens) - 1
                line[at:until] = number
                position[at:until] = torch.arange(len(row.prompt), len(row.prompt) + until - at)
                at = until
        batch["attention_mask"] = branch_mask(segments, dtype)
    if collator.trims:
        batch["logits_to_keep"] = max(width - end + row.after for row, end in zip(rows, ends, strict=True)) + 1
    return batch


def _end(row: SharedRow, width: int, side: Side) -> int:
    """Where a row ends in a batch of this width."""
    return len(row) if side == "right" else width


def branch_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token may look, else the least number of `dtype`: at the prompt (segment 0), its own, not ahead.

    segments: (rows, tokens), -1 for padding, which looks at itself alone.
    """
    looking, seen = segments[:, :, None], segments[:, None, :]
    width = segments.shape[1]
    behind = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    allowed = behind & (seen >= 0) & ((seen == 0) | (seen == looking))
    allowed |= torch.eye(width, dtype=torch.bool, device=segments.device)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def spots(rows: Sequence[SharedRow], side: Side = "left") -> list[tuple[int, int, int, int]]:
    """For each token to score: its request, its row, the place that predicts it (from the end), and itself."""
    found = []
    width = max(len(row) for row in rows)
    for at, row in enumerate(rows):
        end = _end(row, width, side) - width
        start = end - row.after  # of the continuation, from the end
        for request, tokens in row.continuations.items():
            places = [end - row.after - 1, *range(start, start + len(tokens) - 1)]
            found += [(request, at, place, token) for place, token in zip(places, tokens, strict=True)]
            start += len(tokens) - 1
    return found


_PROBED: "WeakKeyDictionary[nn.Module, tuple[int, bool]]" = WeakKeyDictionary()
"""by model: the longest row it was tried with, and whether its continuations are kept apart"""


def branches_apart(model: Any, collator: Collator, rows: Sequence[SharedRow] = ()) -> bool:
    """Whether the model scores continuations in one row as it does alone: tried on the longest, with a control."""
    if not collator.positions or _has_windows(model.config.get_text_config()):
        return False
    row = max((row for row in rows if row.branches), key=len, default=None)
    if row is None and rows:
        return True
    row = row or SharedRow([0, 1, 2, 3], {0: [4, 5, 6], 1: [7, 8, 9]})
    if model not in _PROBED or len(row) > _PROBED[model][0]:
        _PROBED[model] = len(row), _probe(model, collator, row)
    return _PROBED[model][1]


def _has_windows(config: Any) -> bool:
    # A mask that is given replaces the model's own, and with it the window.
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None


def _probe(model: Any, collator: Collator, row: SharedRow) -> bool:
    """Whether the last continuation of a row that branches is predicted as after the prompt alone."""
    continuations = [tokens for tokens in row.continuations.values() if len(tokens) > 1]
    alone = SharedRow(row.prompt, {0: continuations[-1]})
    last = len(continuations[-1]) - 1

    def states(batch: dict[str, Any]) -> Tensor:
        return states_of(model, batch)[0, -last:]

    with undisturbed(model), torch.no_grad():
        try:
            shared = states(shared_batch([row], collator, model.dtype))
        except REFUSED:  # no mask of four dimensions
            return False
        expected = states(shared_batch([alone], collator, model.dtype))
        tokens = [token for continuation in continuations for token in continuation[:-1]]
        joined = states(collator.inputs([row.prompt + tokens]))
    return agrees(shared, expected, joined)


def by_request(values: Tensor, requests: Sequence[int]) -> dict[int, Tensor]:
    """(n,) values, the requests they belong to -> the values of each request, in order."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        places[request].append(place)
    return {request: values[own] for request, own in places.items()}
