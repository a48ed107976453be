"""What is added up over examples for each weight: held in memory, or in a file from one example to the next."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy
import torch
from torch import Tensor

from finepoint.errors import FinepointError
from finepoint.models.quantised import is_quantised
from finepoint.runtime import distributed

DISK = "disk"  # instead of a share of the weights


class Sums:
    """A sum for each weight: zeros at first, of its shape and device, at least float32.

    Args:
        folder: where the sums wait; in memory if None. What is computed is the same, to the bit.
    """

    def __init__(self, weights: Mapping[str, Tensor], folder: Path | None = None) -> None:
        self.weights, self.folder = dict(weights), folder
        self.held = {} if folder else {name: zeros(weight) for name, weight in weights.items()}
        self.files: dict[str, Path] = {}

    @contextmanager
    def changing(self, name: str) -> Iterator[Tensor]:
        """The sum of one weight, which may be written to inside."""
        total = self.held[name] if self.folder is None else self._read(name)
        yield total
        if self.folder is not None and not total.is_meta:
            self.files.setdefault(name, self.folder / str(len(self.files)))
            total.cpu().numpy().tofile(self.files[name])

    @contextmanager
    def reading(self, name: str) -> Iterator[Tensor]:
        """The sum of one weight, to look at."""
        yield self.held[name] if self.folder is None else self._read(name)

    def take(self, name: str) -> Tensor:
        """The sum of one weight, which is forgotten."""
        if self.folder is None:
            return self.held.pop(name)
        total = self._read(name)
        if name in self.files:
            self.files.pop(name).unlink()
        return total

    def _read(self, name: str) -> Tensor:
        total = zeros(self.weights[name])
        if name in self.files:
            kind = numpy.float64 if total.dtype == torch.float64 else numpy.float32
            total.copy_(torch.from_numpy(numpy.fromfile(self.files[name], kind)).view(total.shape))
        return total


@contextmanager
def places_for(weights: Mapping[str, Tensor], memory: float | str, kinds: int) -> Iterator[list[Path | None]]:
    """Where so many kinds of sums are held: a temporary folder each, which is gone afterwards, or None for memory.

    Raises:
        FinepointError: there is no room in the folder; or weights are sharded or quantised, which have no sums there.
    """
    if memory != DISK:
        yield [None] * kinds
        return
    unfit = (name for name, weight in weights.items() if is_quantised(weight) or distributed.is_sharded(weight))
    if other := next(unfit, None):
        raise FinepointError(f"{other} is quantised or sharded, and sums on disk are of whole float weights; give "
                             "--scoring-memory 0.25, or another share")  # fmt: skip
    needed = kinds * sum(max(4, weight.itemsize) * weight.numel() for weight in weights.values() if not weight.is_meta)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="finepoint-")))
        if needed > (free := shutil.disk_usage(root).free):
            raise FinepointError(
                f"what scoring adds up takes {needed / 2**30:.1f} GiB, and {root.parent} has "
                f"{free / 2**30:.1f}; set TMPDIR to another folder, or give --scoring-memory 0.25"
            )
        folders = [root / str(kind) for kind in range(kinds)]
        for folder in folders:
            folder.mkdir()
        yield [*folders]


def zeros(weight: Tensor) -> Tensor:
    """The weight's shape and device, `wide`'s dtype; an ordinary tensor also where the weight is quantised."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if distributed.is_sharded(weight):  # as it is: each process adds up its own rows
        return torch.zeros_like(weight.detach(), dtype=dtype)
    return torch.zeros(weight.shape, dtype=dtype, device=weight.device)
