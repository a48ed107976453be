"""Rows of tokens to batches: labels on what is learned, left padding.

Padding is on the left so that what is learned ends every row: the logits of the last positions are all a loss needs
(`logits_to_keep`), and generation continues where the prompt ends.
"""

import inspect
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finepoint.tokens import (  # those of the beginning are public here
    IGNORED,
    Row,
    chat_text,
    encode,
    encode_all,
    encode_pair,
    learned,
    padding_id,
    warn_of_truncation,
)

__all__ = [
    "IGNORED", "Collator", "Packer", "Row", "accepted", "by_length", "chat_text", "context_length", "encode",
    "encode_all", "encode_pair", "learned", "left", "packed_rows", "pad_left", "padding_id", "real_tokens",
    "token_labels", "warn_of_truncation",
]  # fmt: skip
SIMILAR = 0.8  # of the longest row's length
CONTEXTS = ("max_position_embeddings", "max_seq_len")  # what configurations call the longest text they take
WORTH_A_PASS = 512  # tokens: fewer leave the arithmetic of a pass waiting for the weights


@dataclass(frozen=True)
class Collator:
    """Rows to a batch the model's forward takes."""

    padding: int
    positions: bool
    """the model takes `position_ids`"""
    trims: bool
    """the model takes `logits_to_keep`: logits are computed only where something is learned"""

    @staticmethod
    def of(model: nn.Module, tokenizer: Any) -> "Collator":
        taken = accepted(model)
        return Collator(padding_id(tokenizer, model), "position_ids" in taken, "logits_to_keep" in taken)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` (batch, tokens), `labels` (batch, kept tokens) or (batch,), all int64."""
        batch = pad_left([row.ids for row in rows], self.padding, self.positions)
        if isinstance(rows[0].labels, int):
            return batch | {"labels": torch.tensor([row.labels for row in rows])}
        return batch | self.labels([token_labels(row) for row in rows])

    def labels(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """`labels`, of the last positions alone where the model can be told how many logits to compute."""
        labels = left(rows, IGNORED)
        width = labels.shape[1]
        # The logits that predict the first learned token lie one position before it.
        first = (labels != IGNORED).any(0).nonzero()
        keep = width - int(first[0]) + 1 if len(first) else 1
        if self.trims and keep < width:
            return {"labels": labels[:, -keep:], "logits_to_keep": keep}
        return {"labels": labels}


@dataclass(frozen=True)
class Packer:
    """Rows to a batch in which several examples share a row, each as if it were alone.

    A batch holds the examples it would hold without packing, so that a step means what it meant; they share as few or
    as many rows as cost least arithmetic: fewer rows need less padding, shorter rows less attention. The model
    sees the boundaries in `position_ids`, which start at 0 with every example (and with every token of padding).
    """

    collator: Collator
    width: int
    """of the model's embeddings; beside the tokens of a row it tells what attention costs"""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """`input_ids`, `position_ids` (rows, tokens), `labels` (rows, kept tokens), int64; no `attention_mask`."""
        packed = [[rows[i] for i in places] for places in packed_rows([len(row.ids) for row in rows], self.width)]
        batch = {
            "input_ids": left([[token for row in rows for token in row.ids] for rows in packed], self.collator.padding),
            "position_ids": left([[i for row in rows for i in range(len(row.ids))] for rows in packed], 0),
            "use_cache": False,  # with a cache, models do not look for boundaries
        }
        # Nothing predicts the first token of an example: what lies before it is another example's.
        return batch | self.collator.labels(
            [[label for row in rows for label in (IGNORED, *token_labels(row)[1:])] for rows in packed]
        )


def packed_rows(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Positions of examples that share a row: the longest first, each into the row that is shortest so far.

    Of all numbers of rows the cheapest is taken. In a decoder of `width` a token costs about 24 width^2 operations in
    the linear layers and 4 width in attention for every position of its row, padding included.
    """
    longest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    best: tuple[int, list[list[int]]] | None = None
    for count in range(1, len(sizes) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        lengths = [0] * count
        for place in longest_first:
            shortest = lengths.index(min(lengths))
            rows[shortest].append(place)
            lengths[shortest] += sizes[place]
        cost = count * max(lengths) * (6 * width + max(lengths))
        if best is None or cost < best[0]:
            best = cost, rows
    assert best is not None
    return best[1]


def token_labels(row: Row) -> list[int]:
    """The labels of a row that has one for each token."""
    assert isinstance(row.labels, list)
    return row.labels


def real_tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch belong to examples, not to padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    # Packed: padding stands alone at position 0; an example has two tokens at least, or there were nothing to learn.
    positions = batch["position_ids"]
    following = torch.nn.functional.pad(positions[:, 1:], (0, 1))
    return int(((positions > 0) | (following == 1)).sum())


def accepted(model: Any) -> Set[str]:
    """What a model's forward takes, by name; of a model wrapped by PEFT, what the model inside takes."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(inside.forward).parameters.keys()


def pad_left(rows: Sequence[Sequence[int]], padding: int, positions: bool) -> dict[str, Any]:
    """Token ids padded on the left, with their mask and, where asked for, positions that start at the first token."""
    mask = left([[1] * len(row) for row in rows], 0)
    batch = {"input_ids": left(rows, padding), "attention_mask": mask}
    if positions:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def left(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    """Rows of unequal length as one tensor, (rows, longest) int64, filled on the left."""
    width = max(len(row) for row in rows)
    found = torch.full((len(rows), width), filler)
    for row, line in zip(rows, found, strict=True):
        line[width - len(row) :] = torch.tensor(row)
    return found


def by_length(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Positions in batches of similar length, longest first, each of at most `budget` padded tokens (at least one).

    A row much shorter than the longest of a batch opens the next one, if the batch is large enough to be worth a pass.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if batches:
            longest, padded = sizes[batches[-1][0]], len(batches[-1]) * sizes[batches[-1][0]]
            similar = sizes[place] >= SIMILAR * longest or padded < WORTH_A_PASS
            if padded + longest <= budget and similar:
                batches[-1].append(place)
                continue
        batches.append([place])
    return batches


def context_length(model: Any, max_length: int | None) -> int:
    """How many tokens a row may have: the model's context, or less where the user says so.

    Of a model of several parts (vision and text) it is that of the part that reads text.
    """
    text = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    known = (getattr(part, name, None) for part in (text, model.config) for name in CONTEXTS)
    context = next((length for length in known if isinstance(length, int) and length > 0), 1 << 30)
    return min(context, max_length or context)
