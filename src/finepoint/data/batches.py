"""Rows of tokens to batches: labels on what is learned, padding.

Padding is on the left where the model then gives what it gives without (see `probing`): what is learned ends every row,
the logits of the last positions are all a loss needs (`logits_to_keep`), and generation continues where prompts end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finepoint.data.chats import chat_text
from finepoint.data.tokens import (  # those of the beginning are public here
    IGNORED,
    Row,
    encode,
    encode_all,
    encode_pair,
    learned,
    padding_id,
    warn_of_truncation,
)
from finepoint.errors import FinepointError
from finepoint.models.probing import CONTEXTS, Layout, Side, accepted, laid_out, layout_of, padded

__all__ = [
    "IGNORED", "Collator", "Packer", "Row", "accepted", "by_length", "chat_text", "context_length", "encode",
    "encode_all", "encode_pair", "learned", "packed_rows", "padding_id", "real_tokens",
    "token_labels", "warn_of_truncation",
]  # fmt: skip
SIMILAR = 0.8  # of the longest row's length
WORTH_A_PASS = 512  # tokens: fewer leave the arithmetic of a pass waiting for the weights


@dataclass(frozen=True)
class Collator:
    """Rows to a batch the model's forward takes, in the layout in which each gives what it gives alone."""

    padding: int
    positions: bool
    """the model is given `position_ids`"""
    trims: bool
    """the model takes `logits_to_keep`: logits are computed only where something is learned"""
    side: Side = "left"
    """where rows are padded; `none`: the model sees padding, and a batch holds rows of one length"""
    mask: bool = True
    """the model takes an `attention_mask`"""
    causal: bool = True
    """labels are predicted by the token before them, so that the first of a row is never learned"""

    @staticmethod
    def of(model: nn.Module, tokenizer: Any, rows: Sequence[Sequence[int]] = ()) -> "Collator":
        """The collator of a causal model or a classifier, tried on it; see `layout_of`.

        Args:
            rows: the token ids that are to come, of which the longest is tried.

        Raises:
            FinepointError: the model is neither: it is an encoder or an encoder-decoder that predicts tokens.
        """
        found = Collator.of_any(model, padding_id(tokenizer, model), rows)
        if not found.causal:
            raise FinepointError(
                f"{type(model).__name__} is no causal language model: it sees later tokens where it predicts earlier "
                "ones; give a causal model, or texts with labels for a classifier"
            )
        return found

    @staticmethod
    def of_any(model: Any, padding: int, rows: Sequence[Sequence[int]] = ()) -> "Collator":
        """The collator of any kind of model."""
        trims = "logits_to_keep" in accepted(model)
        if getattr(model.config, "is_encoder_decoder", False) and has_language_head(model):
            return Collator(padding, False, trims, "right", causal=False)
        layout = layout_of(model, padding, rows)
        return Collator(padding, layout.positions, trims, layout.side, layout.mask, layout.causal)

    @property
    def layout(self) -> Layout:
        return Layout(self.side, self.positions, self.mask, self.causal)

    def inputs(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Token ids as a batch, (rows, tokens) int64 each: `input_ids`, `attention_mask` and `position_ids`.

        Raises:
            FinepointError: rows of several lengths for a model that sees padding.
        """
        if self.side == "none" and len({len(row) for row in rows}) > 1:
            raise FinepointError("the model sees padding, so that a batch must hold examples of one length; "
                                 "give a batch size of 1, and more accumulation")  # fmt: skip
        return laid_out(rows, self.padding, self.layout)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` (batch, tokens), `labels` (batch, kept tokens) or (batch,), all int64."""
        batch = self.inputs([row.ids for row in rows])
        if isinstance(rows[0].labels, int):
            return batch | {"labels": torch.tensor([row.labels for row in rows])}
        return batch | self.labels([token_labels(row) if self.causal else row.labels for row in rows])  # type: ignore[misc]

    def batches(self, rows: Sequence[Row], size: int) -> list[dict[str, Any]]:
        """The rows in order as batches of `size`, or of one where the model sees padding."""
        size = 1 if self.side == "none" else size
        return [self(rows[at : at + size]) for at in range(0, len(rows), size)]

    def labels(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """`labels`, of the last positions alone where the model can be told how many logits to compute."""
        labels = padded(rows, IGNORED, self.side)
        width = labels.shape[1]
        # The logits that predict the first learned token lie one position before it.
        first = (labels != IGNORED).any(0).nonzero()
        keep = width - int(first[0]) + 1 if len(first) else 1
        if self.trims and self.causal and keep < width:
            return {"labels": labels[:, -keep:], "logits_to_keep": keep}
        return {"labels": labels}

    def by_length(self, sizes: Sequence[int], budget: int) -> list[list[int]]:
        """Positions in batches, as by `by_length`; of one length each where the model sees padding."""
        batches = by_length(sizes, budget)
        if self.side != "none":
            return batches
        return [[at for at in batch if sizes[at] == size] for batch in batches
                for size in dict.fromkeys(sizes[at] for at in batch)]  # fmt: skip


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
        side = self.collator.side
        packed = [[rows[i] for i in places] for places in packed_rows([len(row.ids) for row in rows], self.width)]
        batch = {
            "input_ids": padded([[t for row in rows for t in row.ids] for rows in packed], self.collator.padding, side),
            "position_ids": padded([[i for row in rows for i in range(len(row.ids))] for rows in packed], 0, side),
            "use_cache": False,  # with a cache, models do not look for boundaries
        }
        return batch | self.collator.labels([[label for row in rows for label in token_labels(row)] for rows in packed])


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
    """The labels of a row that has one for each token; the first is never learned.

    Nothing predicts it: what lies before it in a batch is padding, or another example.
    """
    assert isinstance(row.labels, list)
    return [IGNORED, *row.labels[1:]]


def real_tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch belong to examples, not to padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    if "position_ids" not in batch:
        return int(batch["input_ids"].numel())
    # Packed: padding stands alone at position 0; an example has two tokens at least, or there were nothing to learn.
    positions = batch["position_ids"]
    following = torch.nn.functional.pad(positions[:, 1:], (0, 1))
    return int(((positions > 0) | (following == 1)).sum())


def has_language_head(model: Any) -> bool:
    """Whether the model puts out logits of a vocabulary."""
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


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
