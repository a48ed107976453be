"""A Hugging Face folder read weight by weight: its safetensors shards, never the whole model at once."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.adapters.fingerprint import FINGERPRINT, Fingerprint, contents_of, fingerprint_of, form_of, one_in_for
from finepoint.errors import FinepointError
from finepoint.models.loading import model_folder, outline
from finepoint.models.weights import names_of_weights
from finepoint.runtime.files import read_json
from finepoint.runtime.tensor_files import DTYPES, forms, opened

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class OtherLayoutError(FinepointError):
    """The files of a checkpoint name or cut its weights in another way than its model does."""


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies, and its form."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """torch's name for floating-point numbers, safetensors' for others"""

    @property
    def is_float(self) -> bool:
        return self.dtype in DTYPES.values()


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a model folder, by the names they have in its files, and the model they belong to."""

    name: str
    """as the user gave it"""
    folder: Path
    tensors: dict[str, Stored]
    """shard after shard, in the files' order"""
    outline: nn.Module
    """the model on the meta device: shapes without numbers"""
    ties: dict[str, tuple[str, ...]]
    """all names of a weight of the model, by each of them; the first is the one adapters use"""
    any_base: bool = False
    """whether to accept an adapter whose base differs outside the changed entries"""
    prints: dict[tuple[int, str | None], Fingerprint] = field(default_factory=dict)
    """what `fingerprint` has found, by its arguments"""

    def read(self, tensor: str) -> Tensor:
        """One tensor, by its name in the files: a copy, on the CPU.

        Raises:
            FinepointError: its shard cannot be read.
        """
        with opened(self.folder / self.tensors[tensor].file) as file:
            return file.get_tensor(tensor).clone()

    def weight(self, name: str) -> Tensor:
        """A weight of the model, under whichever of its tied names it is stored.

        Raises:
            FinepointError: it is not stored, or its shard cannot be read.
        """
        return self.read(self.stored(name)[0])

    def stored(self, name: str) -> list[str]:
        """The names under which a weight of the model lies in the files: several where copies of a tied weight do.

        Raises:
            FinepointError: the model has no such weight.
            OtherLayoutError: its files store it in another form.
        """
        if name not in self.ties:
            raise FinepointError(f"{self.name} has no weight {name!r}")
        if found := self._spelled(name):
            return found
        raise OtherLayoutError(
            f"{self.name} does not store {name!r} under this name: its files have another layout than the model, which "
            "transformers translates; export as merged, or apply the adapter to the loaded model and save_pretrained it"
        )

    def _spelled(self, name: str) -> list[str]:
        spelled = [one for tied in self.ties.get(name, (name,)) for one in (tied, tied.removeprefix(self._prefix))]
        return [one for one in dict.fromkeys(spelled) if one in self.tensors]

    def fingerprint(self, one_in: int | None = None, dtype: str | None = None) -> Fingerprint:
        """The fingerprint of the model in these files, by its own names; read once, one weight after the other.

        Weights that the files store in another layout than the model stay unknown.

        Args:
            one_in: as for `fingerprint.fingerprint`.
            dtype: that of the model when it is loaded; None for the files' own.
        """
        contents = contents_of(self.outline)
        one_in = one_in or one_in_for(sum(weight.numel() for weight in {id(w): w for w in contents.values()}.values()))
        if (one_in, dtype) not in self.prints:
            readers = {id(weight): self._reader(name, weight, dtype) for name, weight in contents.items()}
            named = {name: readers[id(weight)] for name, weight in contents.items()}
            self.prints[one_in, dtype] = fingerprint_of(named, one_in)
        return self.prints[one_in, dtype]

    def base(self, dtype: str | None = None) -> dict[str, Any]:
        """What an adapter of this model keeps of it: form and fingerprint."""
        return form_of(self.outline) | {FINGERPRINT: self.fingerprint(dtype=dtype).as_json()}

    def _reader(self, name: str, weight: Tensor, dtype: str | None) -> Callable[[], Tensor] | None:
        """What reads a weight, or a buffer that is stored."""
        stored = self._spelled(name)
        if not stored or self.tensors[stored[0]].shape != tuple(weight.shape):
            return None
        kept: str = dtype if dtype and self.tensors[stored[0]].is_float else ""
        return lambda: self.read(stored[0]).to(getattr(torch, kept)) if kept else self.read(stored[0])

    def weight_of(self, tensor: str) -> str | None:
        """The weight that a tensor of the files is, by the name adapters use; None where it is none of the model."""
        group = self.ties.get(tensor) or self.ties.get(f"{self._prefix}{tensor}")
        return group[0] if group else None

    @property
    def _prefix(self) -> str:
        """What files of older models leave out of the names: `wte.weight` for `transformer.wte.weight`."""
        return f"{getattr(self.outline, 'base_model_prefix', '')}."

    @property
    def dtype(self) -> str:
        """The dtype of most of its numbers."""
        sizes: dict[str, int] = defaultdict(int)
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += torch.Size(tensor.shape).numel() if tensor.is_float else 0
        return max(sizes, key=lambda dtype: sizes[dtype])


def open_checkpoint(name: str) -> Checkpoint:
    """Reads the headers of all shards and checks that they are whole and agree with the index.

    Args:
        name: as `--model` takes it; a hub id is fetched.

    Raises:
        FinepointError: no such model, no safetensors files, a missing or truncated shard, an index that does not fit
            its shards, quantised weights.
    """
    folder = model_folder(name)
    if "quantization_config" in read_json(folder / "config.json"):
        raise FinepointError(f"{name} is quantised; its weights have no exact counterpart here, so give its base model")
    index = _index(folder)
    tensors: dict[str, Stored] = {}
    for shard in dict.fromkeys(index.values()) if index else [WHOLE]:
        for tensor, stored in _header(folder, shard).items():
            if index and index.get(tensor) != shard:
                raise FinepointError(f"{folder / shard} holds {tensor!r}, which {INDEX} places elsewhere or nowhere")
            tensors[tensor] = stored
    if missing := set(index) - set(tensors):
        raise FinepointError(f"{folder / INDEX} lists {min(missing)!r}, which its shard {index[min(missing)]} lacks")
    model = outline(folder)
    ties = {name: tuple(group) for group in names_of_weights(model) for name in group}
    return Checkpoint(name, folder, tensors, model, ties)


def _index(folder: Path) -> dict[str, str]:
    """Tensor to shard; empty where everything is in one file."""
    if (folder / WHOLE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        raise FinepointError(
            f"{folder} has neither {WHOLE} nor {INDEX}; load the model with transformers and save_pretrained it"
        )
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise FinepointError(f"{folder / INDEX} has no weight_map")
    for shard in found.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise FinepointError(f"{folder / INDEX} names the shard {shard!r}, which is no file of this folder")
        if not (folder / shard).is_file():
            raise FinepointError(f"{folder / INDEX} names the shard {shard}, which is missing")
    return found


def _header(folder: Path, shard: str) -> dict[str, Stored]:
    with opened(folder / shard) as file:
        return {key: Stored(shard, shape, DTYPES.get(dtype, dtype)) for key, (dtype, shape) in forms(file).items()}
