"""Whatever a user gives to score on, as batches: a file, examples, rows of tokens, ready batches."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from numbers import Integral
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from finepoint.data.batches import Collator, context_length
from finepoint.data.examples import EXTRAS, as_examples, read_examples
from finepoint.data.sources import is_place, of_memory
from finepoint.data.tokens import IGNORED, Row, cut, encode_all, learned, padding_id, refuse_beyond, warn_of_truncation
from finepoint.errors import FinepointError
from finepoint.training.context import scoring_rows

LEARNED = {"completion_mask", "assistant_masks"}  # for the loss alone, not for the model
MASKS = LEARNED | {"attention_mask"}
KNOWN = MASKS | EXTRAS | {"input_ids", "labels", "token_type_ids"}


def scoring_batches(
    model: Any, rule: str, data: Any, tokenizer: Any, amount: float, size: int, max_length: int | None, seed: int
) -> list[Any]:
    """Batches for a rule that looks at gradients; see `sparsify` for what `data` may be.

    Raises:
        FinepointError: no data, texts without a tokenizer, or rows of tokens that cannot be read; see `token_row`.
    """
    if data is None:
        raise FinepointError(f"rule {rule!r} scores by examples and needs some; give data=.., or a rule without")
    rows: Iterable[Any] = read_examples(data) if is_place(data) else of_memory(data)
    first = next(iter_rows := iter(rows), None)
    if first is None:
        raise FinepointError("data holds nothing to score on")
    given = chain([first], iter_rows)
    if _is_batch(first):
        return [_masked(model, tokenizer, batch) for batch in given]
    limit = context_length(model, max_length)
    apart = bool(getattr(model.config, "is_encoder_decoder", False))
    texts = not (isinstance(first, Mapping) and "input_ids" in first)
    if not texts:
        tokens = [token_row(row, f"data, row {number}", apart) for number, row in enumerate(given)]
        refuse_beyond(model, tokenizer, [row.ids for row in tokens])
        _refuse_labels(model, tokenizer, [row.labels for row in tokens])
        warn_of_truncation([len(row.ids) for row in tokens], limit, "row")
        tokens = [cut(row, limit) for row in tokens]
        if not any(learned(row) for row in tokens):
            raise FinepointError("no row of data has a token to learn: its masks or labels leave out every one")
    else:
        if tokenizer is None:
            raise FinepointError("data are texts; give tokenizer=.. as well, or rows of input_ids")
        names = getattr(model.config, "id2label", None) or {}
        tokens = encode_all(tokenizer, as_examples(given), limit, [str(names[i]) for i in sorted(names)], model=model)
    lines = [row.ids for row in tokens]
    if texts:
        collator = Collator.of(model, tokenizer, lines)
    else:  # what the labels of ready rows mean is the model's affair
        told = tokenizer or SimpleNamespace(pad_token_id=getattr(model.config, "pad_token_id", None), eos_token_id=None)
        collator = Collator.of_any(model, padding_id(told, model), lines)
    return collator.batches(scoring_rows(tokens, amount, seed), size)


def _refuse_labels(model: Any, tokenizer: Any, labels: Sequence[list[int] | int]) -> None:
    """Refuses labels that are no token of the model, or no class."""
    refuse_beyond(model, tokenizer, [[label for label in row if label != IGNORED]
                                     for row in labels if not isinstance(row, int)])  # fmt: skip
    count = getattr(model.config, "num_labels", None)
    for row in labels:
        if isinstance(row, int) and count and not 0 <= row < count:
            raise FinepointError(f"a row of data has the class {row}, and the model has {count}")


def _masked(model: Any, tokenizer: Any, batch: Any) -> Any:
    """A ready batch, what its masks leave out labelled -100: a model's loss looks at labels alone."""
    if "input_ids" not in batch:
        return batch
    refuse_beyond(model, tokenizer, batch["input_ids"].tolist())
    labels = batch.get("labels")
    apart = getattr(model.config, "is_encoder_decoder", False)  # whose labels are a text of their own
    if apart or not isinstance(labels, Tensor) or labels.shape != batch["input_ids"].shape:
        return batch
    _refuse_labels(model, tokenizer, labels.tolist())
    kept = {key: value for key, value in batch.items() if key not in LEARNED}
    for key in MASKS & set(batch):
        if batch[key].shape == labels.shape:
            labels = labels.masked_fill(batch[key] == 0, IGNORED)
        elif key in LEARNED:
            raise FinepointError(f"a batch of data has a {key!r} of {tuple(batch[key].shape)} for labels of "
                                 f"{tuple(labels.shape)}")  # fmt: skip
    return kept | {"labels": labels}


def _is_batch(first: Any) -> bool:
    """Whether it is a ready batch: rows of tokens side by side, or tensors of something else (pictures, sounds)."""
    if not isinstance(first, Mapping):
        return False
    if "input_ids" in first:
        return isinstance(first["input_ids"], Tensor) and first["input_ids"].ndim > 1
    return any(isinstance(value, Tensor) and value.ndim for value in first.values())


def token_row(row: Any, where: str, apart: bool = False) -> Row:
    """A tokenised row as datasets hold it: what its masks leave out is not learned, and padding goes.

    Args:
        row: `input_ids`, and where given `labels`, `attention_mask`, `completion_mask`, `assistant_masks`: one number
            a token each; a token is learned where every mask is 1 and its label, if there is one, is not -100. Of a
            classifier's rows `labels` is the number of the class.
        apart: the labels are a text of their own, as of an encoder-decoder.

    Raises:
        FinepointError: another key, which might matter; numbers that are no list as long as the tokens, or no mask;
            padding inside the row.
    """
    known = KNOWN - LEARNED if apart else KNOWN
    keys = set(row) if isinstance(row, Mapping) else set()
    if "input_ids" not in keys or (unknown := sorted(map(str, keys - known))):
        found = f"the keys {unknown}" if "input_ids" in keys else f"a {type(row).__name__} without 'input_ids'"
        raise FinepointError(f"{where}: {found}; expected rows of {', '.join(sorted(known))}; take away what else "
                             "they hold")  # fmt: skip
    if apart and "labels" not in keys:
        raise FinepointError(f"{where}: there are no 'labels', which this model learns apart from 'input_ids'")
    label = row["labels"] if isinstance(row.get("labels"), Integral) else None
    numbers = {key: _numbers(row[key], f"{where}: {key!r}") for key in keys - EXTRAS
               if key != "labels" or label is None}  # fmt: skip
    ids, labels = numbers["input_ids"], numbers.pop("labels", numbers["input_ids"])
    _check(numbers | ({} if apart else {"labels": labels}), len(ids), where)
    real = [i for i, kept in enumerate(numbers.get("attention_mask", [1] * len(ids))) if kept]
    inside = slice(real[0], real[-1] + 1)
    if label is not None:
        return Row(ids[inside], int(label))
    if apart:
        return Row(ids[inside], labels)
    for key in MASKS & keys:
        labels = [label if kept else IGNORED for label, kept in zip(labels, numbers[key], strict=True)]
    return Row(ids[inside], labels[inside])


def _check(numbers: Mapping[str, list[int]], count: int, where: str) -> None:
    """Refuses lists of another length than the tokens, masks that are none, and padding inside a row."""
    for key, values in numbers.items():
        if len(values) != count:
            raise FinepointError(f"{where}: {key!r} has {len(values)} numbers for {count} tokens")
        allowed = {0, 1} if key in MASKS else {0} if key == "token_type_ids" else set(values)
        if wrong := set(values) - allowed:
            raise FinepointError(f"{where}: {key!r} holds {min(wrong)}; scoring knows no more than {allowed}")
    shown = "".join(map(str, numbers.get("attention_mask", [1])))
    if "1" not in shown:
        raise FinepointError(f"{where}: 'attention_mask' leaves out every token")
    if "0" in shown.strip("0"):
        raise FinepointError(f"{where}: 'attention_mask' has a gap, and padding is before or behind a row")


def _numbers(values: Any, what: str) -> list[int]:
    """One number a token."""
    flat = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(flat, list | tuple) or not flat or not all(isinstance(v, Integral) for v in flat):
        raise FinepointError(f"{what} is no list of whole numbers, one a token")
    return [int(value) for value in flat]
