"""A trained change as a patch of the quantised GGUF file itself: k codes, old and new, and the file's digests.

`gguf-patch.safetensors` holds for each tensor of the file the gaps between the changed entries' flat positions there
(as adapters write them), and their codes before and after. Its metadata names the tensors' formats and the SHA-256 of
the whole file before and after. Exclusive-or takes a file from either to the other, so that a patch is its own way
back; a copy is written beside the file, and moved into its place when it has the digest that it must have.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from finepoint.adapters.format import ascending_gaps, from_gaps, to_gaps
from finepoint.adapters.peft import is_peft
from finepoint.errors import FinepointError
from finepoint.exchange.checkpoint import open_checkpoint
from finepoint.exchange.layouts import Source, layout
from finepoint.exchange.overlay import Patch
from finepoint.models.gguf import GGUFFile, Place, float_values, loaded, not_the_files, open_gguf, places
from finepoint.models.grids import FLOATS, FORMS, EntryGrid, Numbers, changed_bytes, codes_at
from finepoint.models.loading import PACKAGED, gguf_file
from finepoint.runtime.files import LOCK, PARTIAL, alone, claim_file, refuse_version, writing
from finepoint.runtime.tensor_files import forms, opened

logger = logging.getLogger(__name__)
FILE = "gguf-patch.safetensors"
BESIDE = ".finepoint"  # how the file beside a patched one is called, by which it is taken back
TOLD: dict[str, type] = {"adapter": str, "entries": int, "changed": int, "lost": float, "clamped": int}
"""what a patch says of where it comes from"""
NEW = "new"  # what is being written, before it takes a file's place
KEY = "finepoint_gguf_patch"
VERSION = 1
PIECE = 1 << 24  # bytes of a file in memory at a time
MOST_LOST = 0.5  # of the change, as a share of its length, before a warning says so


class Codes(NamedTuple):
    """What changes in a tensor of a file: flat positions, ascending, and codes, each (k,) int64."""

    type: str
    positions: Numbers
    old: Numbers
    new: Numbers


@dataclass(frozen=True)
class GGUFPatch:
    """What changes in a file, with its digests before and after."""

    tensors: dict[str, Codes]
    before: str
    after: str
    info: dict[str, Any]

    def __repr__(self) -> str:
        return f"GGUFPatch({self.count:,} codes of {len(self.tensors)} tensors)"

    @property
    def count(self) -> int:
        """Changed codes."""
        return sum(len(codes.positions) for codes in self.tensors.values())


# From an adapter.


def patch_of(file: GGUFFile, source: Source) -> tuple[GGUFPatch, dict[str, Any]]:
    """What an adapter changes in the file that is its base, and what of its change the file's codes cannot hold.

    Returns:
        The patch, and JSON-ready: `entries` of the adapter, `changed` codes, `lost` (the length of what is lost, as a
        share of that of the change), `clamped` (entries that would leave their block's range).

    Raises:
        FinepointError: the adapter is of another base; a tensor has no known grid; no code would change.
    """
    patches = source.patches
    if new := next((name for name, patch in patches.items() if patch.base is None), None):
        raise FinepointError(f"{new} is new, and the file has no place for it; export as merged")
    found, data = {}, file.bytes()
    wanted = lost = 0.0
    clamped = 0
    where = places(file, source.checkpoint.outline, {name: patch.indices for name, patch in patches.items()})
    for name, patch in patches.items():
        codes, missed, ends = _codes(name, file, data, where[name], patch)
        wanted, lost = wanted + float(patch.delta.double().square().sum()), lost + missed
        clamped += ends
        if len(codes.positions):
            found[where[name].tensor.name] = codes
    if not found:
        raise FinepointError(f"no code of {file.path} changes: all entries of {source.adapter} have moved by less than "
                             "half a step of its grid; train with --on-grid, or with a larger --lr")  # fmt: skip
    report = {"entries": source.sparse.count, "changed": sum(len(codes.positions) for codes in found.values()),
              "lost": sqrt(lost / wanted) if wanted else 0.0, "clamped": clamped}  # fmt: skip
    if report["lost"] > MOST_LOST:
        logger.warning("most of the change is lost (%.0f %% of its length): what moves by less than half a step of the "
                       "file's grid stays where it is; train with --on-grid", 100 * report["lost"])  # fmt: skip
    return finished(file, found, {"adapter": source.adapter} | report), report


def finished(file: GGUFFile, tensors: dict[str, Codes], info: dict[str, Any]) -> GGUFPatch:
    """A patch that knows what it makes of the file."""
    made = GGUFPatch(tensors, file.digest, "", info)
    after = sha256()
    for piece in _flipped(file, made):
        after.update(piece)
    return replace(made, after=after.hexdigest())


def _codes(name: str, file: GGUFFile, data: Numbers, place: Place, patch: Patch) -> tuple[Codes, float, int]:
    """A tensor's codes that change, the square of what is lost, and how many entries are held at an end."""
    tensor, form = place.tensor, place.tensor.form
    assert patch.base is not None
    if tensor.type in FLOATS:
        old = float_values(data, place)
        if not torch.equal(loaded(old, place.shift).to(patch.base.dtype), patch.base):
            raise FinepointError(not_the_files(name, file.path))
        new = torch.where(patch.values == patch.base, old, (patch.values.double() - place.shift).to(old.dtype))
        before = torch.from_numpy(codes_at(data, form, tensor.start, place.positions))
        after = torch.where(new == old, before, _as_codes(new))
        missed = patch.delta.double() - (new.double() - old.double())
        missed[(loaded(new, place.shift).to(patch.values.dtype) == patch.values)] = 0
        ends = 0
    else:
        grid = EntryGrid.read(data, form, tensor.start, place.positions)
        if place.shift or not torch.equal(grid.rounded(grid.codes).to(patch.base.dtype), patch.base):
            raise FinepointError(not_the_files(name, file.path))
        before, after = grid.codes, snap(grid, patch)
        missed = patch.delta.double() - (grid.values(after).double() - grid.values(before).double())
        missed[grid.rounded(after).to(patch.values.dtype) == patch.values] = 0
        ends = int((missed.abs() > 0.51 * grid.step.abs()).sum())
    moved = (before != after).numpy()
    order = np.argsort(place.positions[moved])
    changed = (part[moved][order] for part in (place.positions, before.numpy(), after.numpy()))
    return Codes(tensor.type, *changed), float(missed.square().sum()), ends


def snap(grid: EntryGrid, patch: Patch) -> Tensor:
    """The codes that come nearest to a change: (k,) int64.

    Counted in steps from the base's code, since the loaded base is rounded; where a code stands for the very value that
    was trained, as after training on the grid, it is that one.
    """
    codes, exact = grid.moved(patch.delta), grid.nearest(patch.values.float())
    hits = [grid.rounded(each).to(patch.values.dtype) == patch.values for each in (codes, exact)]
    return torch.where(~hits[0] & hits[1], exact, codes)


def _as_codes(values: Tensor) -> Tensor:
    """The bits of floats, (k,) int64, not negative."""
    bits = values.contiguous().view({2: torch.int16, 4: torch.int32}[values.itemsize]).long()
    return bits & (1 << 8 * values.itemsize) - 1


# To a file, and back.


def save_patch(patch: GGUFPatch, path: Path) -> None:
    """Writes a patch as one safetensors file."""
    tensors: dict[str, Tensor] = {}
    for name, codes in patch.tensors.items():
        tensors[f"{name}.gaps"] = to_gaps(torch.from_numpy(codes.positions))
        narrow = np.uint8 if FORMS[codes.type].width <= 8 else np.int64
        tensors[f"{name}.old"], tensors[f"{name}.new"] = (torch.from_numpy(each.astype(narrow)) for each in codes[2:])
    told = {"format_version": VERSION, "before": patch.before, "after": patch.after, "info": patch.info,
            "types": {name: codes.type for name, codes in patch.tensors.items()}}  # fmt: skip
    save_file(tensors, path, {KEY: json.dumps(told)})


def read_patch(path: Path) -> GGUFPatch:
    """What `save_patch` wrote, checked by itself; whether it fits a file its digests tell.

    Raises:
        FinepointError: there is no such file, it is damaged, or of a later version.
    """
    if not path.is_file():
        raise FinepointError(f"there is no patch {path}")
    with opened(path) as file:
        try:
            told = json.loads((file.metadata() or {})[KEY])
            version, types, digests = told["format_version"], dict(told["types"]), (told["before"], told["after"])
            info = dict(told["info"])
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise FinepointError(f"{path} is no patch of a GGUF file, or is damaged ({error!r})") from error
        refuse_version(path, version, VERSION)
        known = forms(file)
        tensors = {}
        for name, type_ in types.items():
            sound = isinstance(type_, str) and type_ in FORMS
            keys = [f"{name}.{part}" for part in ("gaps", "old", "new")]
            if not sound or any(key not in known or len(known[key][1]) != 1 for key in keys):
                raise FinepointError(f"{path} is damaged: {name} is not what a patch holds")
            tensors[name] = _checked(path, name, type_, *(file.get_tensor(key) for key in keys))
    if not tensors or not all(isinstance(each, str) and len(each) == 64 for each in digests):
        raise FinepointError(f"{path} is damaged: it changes nothing, or knows no file")
    if any(type(info.get(key)) is not kind for key, kind in TOLD.items()):
        raise FinepointError(f"{path} is damaged: what it says of its adapter")
    return GGUFPatch(tensors, *digests, info)


def _checked(path: Path, name: str, type_: str, gaps: Tensor, old: Tensor, new: Tensor) -> Codes:
    most = 1 << FORMS[type_].width
    if gaps.dtype not in (torch.uint8, torch.uint16) or not ascending_gaps(gaps):
        raise FinepointError(f"{path} is damaged: the positions in {name} do not ascend")
    positions = from_gaps(gaps).numpy()
    if old.dtype not in (torch.uint8, torch.int64) or not 0 < len(positions) == len(old) == len(new):
        raise FinepointError(f"{path} is damaged: {name} has {len(positions)} positions, {len(old)} and {len(new)} "
                             "codes")  # fmt: skip
    codes = [each.to(torch.int64).numpy() for each in (old, new)]
    if any(((each < 0) | (each >= most)).any() for each in codes):
        raise FinepointError(f"{path} is damaged: a code in {name} is out of range (0 to {most - 1} in {type_})")
    return Codes(type_, positions, *codes)


@layout("gguf-patch")
def write_gguf_patch(source: Source, into: Path) -> dict[str, Any]:
    """Writes the patch of the GGUF file that is the base.

    Raises:
        FinepointError: as for `patch_of`; the base is no GGUF file.
    """
    path = gguf_file(source.checkpoint.name)
    if path is None:
        raise FinepointError(f"{source.checkpoint.name} is no GGUF file, which a patch is of; give --model FILE.gguf, "
                             "or another --format")  # fmt: skip
    patch, report = patch_of(open_gguf(path), source)
    save_patch(patch, into / FILE)
    return report


# A file patched, and taken back.


def patch_file(name: str, adapter: str, output: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Changes the codes of a GGUF file that an adapter, or a patch of it, changes; in place, or in a copy.

    Beside the patched file lies its patch, by which `unpatch_file` takes it back, bit for bit. A killed process leaves
    the old file or the new.

    Args:
        name: the file, or a name of `--model` that stands for one.
        adapter: folder of an adapter, or of `finepoint export --format gguf-patch`.
        output: the copy to write; the file itself is changed where not given.
        overwrite: allow a copy that exists already.

    Returns:
        What was done, JSON-ready.

    Raises:
        FinepointError: the file is not the one that the adapter was trained on, is patched already, or cannot be
            written; nothing is changed then.
    """
    if output is None and name in PACKAGED:
        raise FinepointError(f"{name} is finepoint's own copy, which stays as it is; give --output COPY.gguf")
    path = gguf_file(name) or Path(name)
    target = path if output is None else _copy(path, output, overwrite)
    with _at_work(target) as work:
        file = open_gguf(path)
        own = file.digest
        _refuse_patched(path, own)
        if (Path(adapter) / FILE).is_file():
            patch = read_patch(Path(adapter) / FILE)
        elif is_peft(adapter):
            raise FinepointError(f"{adapter} is PEFT's, and low-rank factors move every entry by less than a step; "
                                 "train chosen entries with --on-grid")  # fmt: skip
        else:
            patch, _ = patch_of(file, Source(adapter, open_checkpoint(name), None))
        if own == patch.after:
            raise FinepointError(f"{path} is patched with it already; finepoint unpatch {path} takes it back")
        if own != patch.before:
            raise FinepointError(f"{path} is not the file that the patch in {adapter} was made for; give that one "
                                 f"(SHA-256 {patch.before[:16]}..)")  # fmt: skip
        with _taken_back(_beside(target)):
            kept = _write(work, _beside(target), lambda into: save_patch(patch, into))
            _rewrite(work, file, patch, target, patch.after)
    told = {key: patch.info[key] for key in TOLD}
    return {"file": str(path), "output": str(target), **told, "changed": patch.count, "patch_bytes": kept}


def unpatch_file(
    name: str, patch: str | None = None, output: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Takes a patched GGUF file back to what it was, bit for bit; in place, or in a copy.

    Args:
        name: the file.
        patch: folder of `finepoint export --format gguf-patch`, where the file beside the patched one is gone.
        output, overwrite: as for `patch_file`.

    Returns:
        What was done, JSON-ready.

    Raises:
        FinepointError: it is not patched, or was changed since, or cannot be written; nothing is changed then.
    """
    path = gguf_file(name) or Path(name)
    target = path if output is None else _copy(path, output, overwrite)
    with _at_work(target) as work:
        file = open_gguf(path)
        place = Path(patch) / FILE if patch else _beside(path)
        if not place.is_file():
            raise FinepointError(f"{path} is not patched, as far as is known: there is no {place}; give --patch DIR, "
                                 "what finepoint export --format gguf-patch wrote")  # fmt: skip
        known, own = read_patch(place), file.digest
        if own not in (known.before, known.after):
            raise FinepointError(f"{path} is neither the file that {place} is a patch of, nor that file patched")
        if own == known.after:
            _rewrite(work, file, known, target, known.before)
        elif output is not None:
            raise FinepointError(f"{path} is not patched; it is the file as it was")
        if output is None and not patch:
            _beside(path).unlink(missing_ok=True)  # killed here, the file is taken for what it is again
    return {"file": str(path), "output": str(target), "changed": known.count}


def _refuse_patched(path: Path, own: str) -> None:
    """Refuses a file that the patch beside it was written into."""
    if _beside(path).is_file():
        known = read_patch(_beside(path))
        if own == known.after:
            raise FinepointError(f"{path} is patched with {known.info.get('adapter', 'another adapter')} already; "
                                 f"finepoint unpatch {path} takes it back")  # fmt: skip


def _copy(path: Path, output: str, overwrite: bool) -> Path:
    target = claim_file(output, overwrite)
    if target.exists() and path.exists() and target.samefile(path):
        raise FinepointError(f"{output} is the file itself; leave out --output to change it in place")
    return target


def _beside(path: Path) -> Path:
    """Beside the file itself, by whatever link it is named."""
    path = path.resolve()
    return path.with_name(path.name + BESIDE)


@contextmanager
def _at_work(target: Path) -> Iterator[Path]:
    """A folder beside a file to write in, which no other process does; what a killed one left there goes."""
    target = target.resolve()
    work = target.with_name(f".{target.name}{PARTIAL}")
    try:
        with alone(work, busy=f"another finepoint is writing {target}; wait for it"):
            try:
                yield work
            finally:
                # All of it: safetensors writes beside what it is told to, and one that was killed has left that.
                for left in work.iterdir():
                    if left.name != LOCK:
                        left.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # another process is at work there now
            work.rmdir()


@contextmanager
def _taken_back(place: Path) -> Iterator[None]:
    """A small file is what it was before, if what is done inside fails."""
    before = place.read_bytes() if place.is_file() else None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            place.unlink(missing_ok=True) if before is None else place.write_bytes(before)
        raise


def _write(work: Path, target: Path, write: Callable[[Path], None], mode: Path | None = None) -> int:
    """Has `write` fill a file, which then takes the target's place, whole; returns its bytes."""
    target = target.resolve()
    with writing(target):
        made = work / NEW
        write(made)
        with made.open("rb") as written:
            os.fsync(written.fileno())
        made.chmod(0o644)
        if mode:
            shutil.copymode(mode, made)
        size = made.stat().st_size
        made.replace(target)
    return size


def _rewrite(work: Path, file: GGUFFile, patch: GGUFPatch, target: Path, wanted: str) -> None:
    """Writes the file with a patch put in, or taken out, which has to have this digest."""

    def write(into: Path) -> None:
        found = sha256()
        with into.open("wb") as copy:
            for piece in _flipped(file, patch):
                found.update(piece)
                copy.write(piece)
        if found.hexdigest() != wanted:
            raise FinepointError(f"{file.path} with the patch is not what it must be: the patch is damaged, or the "
                                 "file was changed meanwhile; it stays as it is")  # fmt: skip

    _write(work, target, write, file.path)


def _flipped(file: GGUFFile, patch: GGUFPatch) -> Iterator[bytes]:
    """The file's bytes with every changed code the other one of old and new, piece by piece.

    Raises:
        FinepointError: the file has no such tensor, or none of that form or size.
    """
    addresses, masks = [np.empty(0, np.int64)], [np.empty(0, np.uint8)]
    for name, codes in patch.tensors.items():
        tensor = file.tensors.get(name)
        if tensor is None or tensor.type != codes.type or int(codes.positions[-1]) >= prod(tensor.shape):
            raise FinepointError(f"{file.path} has no tensor {name} of {codes.type} as the patch knows it; the patch "
                                 "was made for another file")  # fmt: skip
        at, bits = changed_bytes(tensor.form, tensor.start, codes.positions, codes.old ^ codes.new)
        addresses.append(at)
        masks.append(bits)
    at, bits = np.concatenate(addresses), np.concatenate(masks)
    order = np.argsort(at, kind="stable")
    at, bits = at[order], bits[order]
    with file.path.open("rb") as whole:
        start = 0
        while piece := bytearray(whole.read(PIECE)):
            here = slice(*np.searchsorted(at, [start, start + len(piece)]))
            np.bitwise_xor.at(np.frombuffer(piece, dtype=np.uint8), at[here] - start, bits[here])
            start += len(piece)
            yield bytes(piece)
