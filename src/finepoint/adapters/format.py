"""The adapter folder: one safetensors file that says everything, and a readable copy of its configuration.

`finepoint.safetensors` holds for each weight `<name>.indices` (int32 where they fit, else int64), the `<name>.gaps`
between them (since format version 2), or, where they are whole `<name>.rows` or `<name>.columns` of a matrix, these
(int32, since version 5, which only such files have), with `<name>.delta` or `<name>.value`; or `<name>.full`. A merged
change that has no checksum over all its entries adds the indices of its parts, `<name>.parts.<number>.indices` or
`.gaps` (since version 3); the configuration lists their checksums. The file's metadata holds the configuration, and in
it (since version 4) the form of the base and a digest over the configuration and all tensors. With the form lies the
base's fingerprint, which files of earlier finepoints lack. Since that is all one file, replacing it is atomic.
`finepoint_config.json` repeats the configuration for people and hubs; `load` does not read it.

A file is read from the outside in, so that a hostile one costs neither time nor memory: its header first, then what the
configuration announces against the header, then the tensors.
"""

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from finepoint.adapters.change import Change, Contents
from finepoint.adapters.entries import every, lines_of
from finepoint.adapters.fingerprint import FINGERPRINT, is_fingerprint
from finepoint.adapters.hub import card, fetch, is_hub_id, refuse_no_adapter
from finepoint.errors import FinepointError
from finepoint.runtime.files import claim_folder, read_whole, refuse_version, write_atomic, write_json, write_text
from finepoint.runtime.tensor_files import DTYPES, LONGEST_HEADER, Form, forms, header_bytes, opened

logger = logging.getLogger(__name__)
DIGESTED = 4  # the first version with a digest over all
NEWEST = 5  # 2: some indices are gaps; 3: some changes have parts; 4: a digest over all; 5: some indices are lines
TENSORS = "finepoint.safetensors"
CONFIG = "finepoint_config.json"
KINDS = ("delta", "value", "full")
LINES = ("rows", "columns")
INT32_ENTRIES = 1 << 31
MOST_LABELS = 1 << 16  # classes: a model is given a head of so many rows before the adapter is applied
STORED = {dtype: stored for stored, dtype in DTYPES.items()}
SLICE = 1 << 22  # numbers looked at in one go

Need = Callable[[bool, str], None]
"""Refuses a file, saying what is wrong with which of its weights, unless the condition holds."""


def save(adapter: Contents, folder: str | Path, overwrite: bool = False, compact: bool = False) -> Path:
    """See `SparseAdapter.save`."""
    if adapter.changes_nothing():
        logger.warning("the adapter changes nothing: no value differs from the base; has it been trained?")
    with claim_folder(folder, overwrite) as claimed:
        write(adapter, claimed, compact)
    return Path(folder)


def write(adapter: Contents, folder: Path, compact: bool = False) -> None:
    """`save` into a folder that is this process's already, over whatever adapter is there."""
    tensors: dict[str, Tensor] = {}
    for name, change in adapter.changes.items():
        if change.kind != "full":
            lines = _lines(name, change.indices, change.shape)
            tensors |= lines or _written(name, change.indices, change.shape, compact)
        for i, (indices, _) in enumerate(change.parts):
            tensors |= _written(f"{name}.parts.{i}", indices, change.shape, compact)
        tensors[f"{name}.{change.kind}"] = change.numbers.detach().cpu().contiguous()
    version = NEWEST if any(f"{name}.{line}" in tensors for name in adapter.changes for line in LINES) else DIGESTED
    config = _as_json({"format_version": version} | _config(adapter))
    config["digest"] = _digest(config, tensors)
    metadata = {"finepoint": json.dumps(config)}  # one key: their order in the file is not defined
    write_atomic(folder / TENSORS, partial(_write, tensors, metadata))
    write_json(folder / CONFIG, config)
    write_text(folder / "README.md", card(adapter))


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    save_file(tensors, path, metadata)
    if header_bytes(path) > LONGEST_HEADER:
        raise FinepointError(f"the adapter changes so many weights ({len(tensors)} tensors) that its header would be "
                             f"longer than {LONGEST_HEADER:,} bytes; choose fewer --targets")  # fmt: skip


def say_unfinished(folder: str | Path, info: Mapping[str, Any]) -> None:
    """Says of an adapter that was left before the end of its training that it was."""
    if left := info.get("unfinished"):
        logger.warning("%s is unfinished: its training was left at %s", folder, left)


def read(folder: str | Path) -> Contents:
    """What an adapter folder holds, all of it checked; see `SparseAdapter.load`."""
    if isinstance(folder, str) and is_hub_id(folder):
        folder = fetch(folder)
    path = Path(folder) / TENSORS
    refuse_no_adapter(folder)
    adapter = read_whole(path, partial(_read, path))
    if FINGERPRINT not in adapter.base:
        _say_what_is_not_known(str(path.absolute().parent), str(folder))
    return adapter


@cache
def _say_what_is_not_known(_: str, folder: str) -> None:
    """Once for each folder."""
    logger.warning("%s knows its base by the values at its entries alone (an earlier finepoint wrote it): another base "
                   "that differs elsewhere would not be noticed", folder)  # fmt: skip


def _read(path: Path) -> Contents:
    with opened(path) as file:
        config = _parsed(path, file.metadata() or {})
        known = forms(file)
        for name, facts in config["weights"].items():
            _check_announced(_refusal(path, name), name, facts, known)
        if known:
            raise FinepointError(f"{path} holds {min(known)!r}, which its configuration does not mention")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        changes = {
            name: _change(_refusal(path, name), name, facts, tensors) for name, facts in config["weights"].items()
        }
        digest = config.pop("digest", None)
        if digest != (_digest(config, tensors) if config["format_version"] >= DIGESTED or digest else None):
            raise FinepointError(f"{path} is damaged: its digest is not that of what it holds; fetch it or train again")
    return Contents(changes, config.get("info", {}), config.get("base", {}))


def _refusal(path: Path, name: str) -> Need:
    def need(condition: bool, what: str) -> None:
        if not condition:
            raise FinepointError(f"{path}: {name}: {what}")

    return need


def _written(name: str, indices: Tensor, shape: tuple[int, ...], compact: bool) -> dict[str, Tensor]:
    if compact:
        return {f"{name}.gaps": to_gaps(indices.cpu())}
    narrow = torch.int32 if prod(shape) <= INT32_ENTRIES else torch.int64
    return {f"{name}.indices": indices.to("cpu", narrow)}


def _lines(name: str, indices: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The rows or columns of a matrix that the indices are all of, if they are: one number for each."""
    if 1 not in shape and (found := lines_of(indices, shape)):
        return {f"{name}.{found[0]}": found[1].to("cpu", torch.int32)}
    return {}


def _config(adapter: Contents) -> dict[str, Any]:
    weights = {
        name: {"shape": list(change.shape), "dtype": change.dtype, "kind": change.kind, "count": len(change),
               **({"part_checksums": [digest for _, digest in change.parts]} if change.parts
                  else {"base_checksum": change.base})}
        for name, change in adapter.changes.items()
    }  # fmt: skip
    return {"count": adapter.count, "base": adapter.base, "info": adapter.info, "weights": weights}


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    """What will be read again: numbers that JSON does not have become null, half characters a question mark."""
    text = json.dumps(config, ensure_ascii=False).encode("utf-8", "replace")
    found: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return found


def _digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A digest over the configuration and the tensors with their names, dtypes and shapes."""
    found = sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _parsed(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "finepoint" not in metadata:
        raise FinepointError(f"{path} was not written by finepoint: its metadata has no 'finepoint' entry")
    try:
        config = json.loads(metadata["finepoint"])
        version, weights = config["format_version"], config["weights"]
        shaped = isinstance(weights, dict) and all(isinstance(facts, dict) for facts in weights.values())
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode()  # what cannot be shown or written again
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FinepointError(f"{path}: its finepoint configuration is damaged ({error})") from error
    refuse_version(path, version, NEWEST)
    if not shaped or not _is_form(config.get("base", {})):
        raise FinepointError(f"{path}: its finepoint configuration is damaged (weights or base)")
    if not weights:
        raise FinepointError(f"{path} holds no change at all")
    check_info(path, config.get("info", {}))
    return config


def _is_form(base: Any) -> bool:
    """Whether this is what `form_of` keeps of a model."""
    if not isinstance(base, dict) or type(base.get("vocabulary", 0)) is not int:
        return False
    tied = base.get("tied", [])
    groups = isinstance(tied, list) and all(isinstance(group, list) for group in tied)
    if FINGERPRINT in base and not is_fingerprint(base[FINGERPRINT]):
        return False
    return groups and all(isinstance(name, str) for group in tied for name in group)


def check_info(path: Path, info: Any) -> None:
    """Refuses an `info` whose entries that finepoint itself reads are not what it wrote.

    Raises:
        FinepointError: the entry is named.
    """
    if not isinstance(info, dict):
        raise FinepointError(f"{path}: its finepoint configuration is damaged (info)")
    labels = info.get("labels", [])
    fit = {
        "labels": isinstance(labels, list) and len(labels) <= MOST_LABELS and all(isinstance(x, str) for x in labels),
        "task": isinstance(info.get("task", ""), str),
        "unfinished": isinstance(info.get("unfinished", ""), str),
        "selection": isinstance(info.get("selection", {}), dict),
    }
    for key, fits in fit.items():
        if not fits:
            raise FinepointError(f"{path}: its finepoint configuration is damaged (info: {key})")


def _check_announced(need: Need, name: str, facts: dict[str, Any], known: dict[str, Form]) -> None:
    """What the configuration says of a weight, by itself and against the file's header; takes its tensors out."""
    shape, dtype, kind, count = (facts.get(key) for key in ("shape", "dtype", "kind", "count"))
    valid = isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 < n < 1 << 48 for n in shape)
    valid = valid and prod(shape) < 1 << 62  # type: ignore[arg-type]  # positions have 64 bits
    need(valid, f"shape {shape!r} is not a list of sizes")
    need(isinstance(kind, str) and kind in KINDS, f"kind {kind!r} is none of {', '.join(KINDS)}")
    need(isinstance(dtype, str) and dtype in STORED, f"dtype {dtype!r} is none of {', '.join(STORED)}")
    need(type(count) is int, f"{count!r} entries announced")
    assert isinstance(shape, list)
    need(f"{name}.{kind}" in known, f"{name}.{kind} is missing from the file")
    stored, form = known.pop(f"{name}.{kind}")
    if kind == "full":
        need(form == tuple(shape) and stored == STORED[str(dtype)], "the stored weight has another form")
        need(count == prod(shape), f"{count} entries announced of {prod(shape)}")
        return
    wide = "F64" if dtype == "float64" else "F32"
    need(stored == (STORED[str(dtype)] if kind == "value" else wide), f"{kind} is stored as {stored}")
    if lines := [line for line in LINES if f"{name}.{line}" in known]:
        _check_lines(need, shape, lines[0] == "rows", *known.pop(f"{name}.{lines[0]}"), count)
    else:
        _check_positions(need, name, known, form, prod(shape))
    need((count,) == form, f"{count} entries announced, {form} in the file")
    digests = facts.get("part_checksums", [facts.get("base_checksum")])
    sound = isinstance(digests, list) and len(digests) > 0 and all(isinstance(d, str) and d for d in digests)
    need(sound, "the checksum of the base values is missing")
    need(not facts.keys() >= {"part_checksums", "base_checksum"}, "it has checksums of parts and one over all")
    for i in range(len(digests) if "part_checksums" in facts else 0):
        _check_positions(need, f"{name}.parts.{i}", known, None, prod(shape))


def _check_lines(need: Need, shape: list[int], rows: bool, stored: str, form: tuple[int, ...], count: Any) -> None:
    """Rows or columns of a possible form, so many as give that many entries."""
    need(len(shape) == 2, "rows or columns of what is no matrix")
    lines, length = shape if rows else shape[::-1]
    need(stored == "I32" and len(form) == 1, "rows or columns are not a list of integers")
    need(form[0] <= lines and form[0] * length == count, f"{form[0]} rows or columns, {count} entries announced")


def _check_positions(
    need: Need, name: str, known: dict[str, Form], numbers: tuple[int, ...] | None, entries: int
) -> None:
    """Indices or gaps of a possible form, for numbers of this shape where it is known; takes them out of `known`."""
    if f"{name}.gaps" in known:
        stored, form = known.pop(f"{name}.gaps")
        need(stored in ("U8", "U16") and len(form) == 1, "gaps are not a list of small integers")
        count = form[0] if numbers is None or len(numbers) != 1 else numbers[0]
        fits = count <= form[0] <= most_gaps(min(count, entries), entries, stored)
        need(fits, f"{form[0]} gaps, numbers of shape {numbers}")
    else:
        need(f"{name}.indices" in known, f"{name}.indices is missing from the file")
        stored, form = known.pop(f"{name}.indices")
        need(stored in ("I32", "I64") and len(form) == 1, "indices are not a list of integers")
        need(form[0] <= entries, "an index lies outside the weight")
        need(numbers is None or form == numbers, f"{form[0]} indices, numbers of shape {numbers}")


def _change(need: Need, name: str, facts: dict[str, Any], tensors: Mapping[str, Tensor]) -> Change:
    """One weight's change, its numbers checked."""
    shape, dtype, kind = tuple(facts["shape"]), facts["dtype"], facts["kind"]
    numbers = tensors[f"{name}.{kind}"]
    indices = torch.empty(0, dtype=torch.long) if kind == "full" else _positions(need, name, tensors, shape)
    need(all(bool(torch.isfinite(part).all()) for part in numbers.reshape(-1).split(SLICE)), "a number is not finite")
    if kind == "full":
        return Change(shape, dtype, "full", indices, numbers)
    need(len(indices) == len(numbers), f"{len(indices)} indices, numbers of shape {tuple(numbers.shape)}")
    numbers = numbers.clone()  # the file may be cut short while it is still mapped into memory
    if "part_checksums" not in facts:
        return Change(shape, dtype, kind, indices, numbers, facts["base_checksum"])
    digests = facts["part_checksums"]
    places = [_indices(need, f"{name}.parts.{i}", tensors, prod(shape)) for i in range(len(digests))]
    return Change(shape, dtype, kind, indices, numbers, "", tuple(zip(places, digests, strict=True)))


def _positions(need: Need, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The positions of a change, (k,) int64: of rows, of columns, or its indices."""
    for line in LINES:
        if f"{name}.{line}" in tensors:
            lines, rows = tensors[f"{name}.{line}"].long(), line == "rows"
            need(bool((lines[1:] > lines[:-1]).all()), f"{line} are not ascending and unique")
            need(not len(lines) or (int(lines[0]) >= 0 and int(lines[-1]) < shape[0 if rows else 1]),
                 f"one of the {line} lies outside the weight")  # fmt: skip
            whole = torch.arange(shape[1] if rows else shape[0])
            return every(lines, whole, shape[1]) if rows else every(whole, lines, shape[1])
    return _indices(need, name, tensors, prod(shape))


def _indices(need: Need, name: str, tensors: Mapping[str, Tensor], entries: int) -> Tensor:
    """Indices written as they are or as gaps, (k,) int64, checked before they are made wide."""
    unordered = "indices are not ascending and unique"
    if f"{name}.gaps" in tensors:
        need(ascending_gaps(tensors[f"{name}.gaps"]), unordered)
        indices = from_gaps(tensors[f"{name}.gaps"])
    else:
        narrow = tensors[f"{name}.indices"]
        parts = (narrow[at : at + SLICE + 1] for at in range(0, len(narrow), SLICE))
        need(all(bool((part[1:] > part[:-1]).all()) for part in parts), unordered)
        indices = narrow.to(torch.long, copy=True)
    need(not len(indices) or (int(indices[0]) >= 0 and int(indices[-1]) < entries), "an index lies outside the weight")
    return indices


# Ascending indices as the gaps between them, in one or two bytes each. A gap of the largest number that the width
# holds, or more, is written as so many skips of that number and the rest: every element but a skip ends one index.
WIDTHS = (np.uint8, np.uint16)


def to_gaps(indices: Tensor) -> Tensor:
    """(k,) ascending, unique, not negative -> uint8 or uint16, whichever takes fewer bytes; at least k elements."""
    gaps = np.diff(indices.numpy(), prepend=0)
    # Counted before it is written: a wide gap takes many skips of one byte.
    return torch.from_numpy(_encoded(gaps, min(WIDTHS, key=lambda width: _bytes(gaps, width))))


def from_gaps(gaps: Tensor) -> Tensor:
    """The indices, (k,) int64. Whether they make sense is for the caller to check."""
    array = gaps.numpy()
    skip = np.iinfo(array.dtype).max
    return torch.from_numpy(np.cumsum(array, dtype=np.int64)[array != skip])


def ascending_gaps(gaps: Tensor) -> bool:
    """Whether every gap but the first is above 0, as it is between different indices; little memory, whatever the size.

    A rest of 0 behind a skip is a gap of just that number.
    """
    skip = int(torch.iinfo(gaps.dtype).max)
    for at in range(0, len(gaps), SLICE):
        part = gaps[at : at + SLICE + 1].numpy()
        if bool(((part[1:] == 0) & (part[:-1] != skip)).any()):
            return False
    return True


def most_gaps(count: int, entries: int, stored: str) -> int:
    """The most elements that `count` indices below `entries` can take; stored: U8 or U16."""
    return count + entries // {"U8": 255, "U16": 65535}[stored]


def _bytes(gaps: np.ndarray, width: type) -> int:
    return (len(gaps) + int((gaps // np.iinfo(width).max).sum())) * np.dtype(width).itemsize


def _encoded(gaps: np.ndarray, width: type) -> np.ndarray:
    skip = np.iinfo(width).max
    skips, rest = np.divmod(gaps, skip)
    encoded: np.ndarray = np.full(len(gaps) + int(skips.sum()), skip, dtype=width)
    encoded[np.cumsum(skips + 1) - 1] = rest
    return encoded
