"""The deltas of a model, all together: whether the weights hold them; and as several processes train them, compared
before the first batch, averaged by k numbers.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.adapters.entries import gather
from finepoint.adapters.fingerprint import (
    FINGERPRINT,
    Fingerprint,
    contents_of,
    is_fingerprint,
    part,
    shown,
    total_of,
    unlike,
)
from finepoint.errors import FinepointError
from finepoint.models.quantised import float_values
from finepoint.runtime import distributed
from finepoint.runtime.devices import capturing
from finepoint.tuner.kernels import all_weights
from finepoint.tuner.optimizer_hooks import follow_after_steps
from finepoint.tuner.sparse_weight import SparseWeight, refuse_transforms
from finepoint.tuner.spot_checks import SpotChecks
from finepoint.tuner.table import Table

logger = logging.getLogger(__name__)


class Deltas(nn.ModuleDict):
    """The trained entries of a model, by weight name with slashes for dots, and the fingerprint of its base."""

    def __init__(self, entries: Mapping[str, SparseWeight], base: Fingerprint) -> None:
        super().__init__(entries)
        self.base = base
        self.met = False
        self.averaging = False
        self.by_hand = False
        """whether somebody else calls `average_`"""
        self.beside_shards = any(member.sharded for member in entries.values())
        self.spot_checks: SpotChecks | None = None
        self.wanted: tuple[float, str] | None = None
        """until the first step: the learning rate that these entries usually want, and what they are"""
        self.table: Table | None = None
        """all weights as they were written last, where one call can do it"""
        self.running = 0
        """the id of the module, out of those that tell, in whose forward we are"""
        for member in entries.values():
            member.looked_at = self.is_running
        self.attend()
        follow_after_steps(self)

    def __repr__(self) -> str:
        return f"Deltas({sum(len(each.indices) for each in self.members()):,} entries of {len(self)} weights)"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "table": None}  # it knows where the original lies

    def __setstate__(self, state: Any) -> None:
        """Of a deep copy, or of what was pickled: its weights follow steps as well."""
        super().__setstate__(state)
        self.running = 0
        follow_after_steps(self)

    def refuse_other_base(self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Before a state dict is loaded into the model: its weights have to be the base's, beside the trained entries.

        Raises:
            FinepointError: one is not; it is named, and nothing is loaded.
        """
        trained = {id(entries.weight): entries for entries in self.members()}
        for name, weight in contents_of(model).items():
            given, known = state_dict.get(prefix + name), self.base.weights.get(name)
            if not known or not isinstance(given, Tensor) or given.is_meta or given.shape != weight.shape:
                continue
            if distributed.is_sharded(given) or distributed.is_sharded(weight):
                continue
            given, shift = float_values(given).to(weight.dtype), 0
            if entries := trained.get(id(weight)):
                held = entries.known()
                shift = part(held.indices, held.base, self.base.one_in)
                shift -= part(held.indices, gather(given, held.indices), self.base.one_in)
            if shown(tuple(given.shape), total_of(given, self.base.one_in) + shift) != known:
                raise FinepointError(f"{name} of the state dict is not that of the base in training, beside the "
                                     "entries that are trained; load it into a model of its own")  # fmt: skip

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Where the deltas say what they lie on, it has to be this base.

        Raises:
            FinepointError: it is another; nothing is loaded.
        """
        kept = state_dict.pop(f"{prefix}{FINGERPRINT}", None)
        if kept is not None:
            known = _read(kept)
            if others := unlike(known, self.base):
                raise FinepointError(f"the deltas to be loaded were trained on another base: {others[0][0]} differs; "
                                     "give the model they were trained on")  # fmt: skip
        elif any(name.endswith(".indices") for name in state_dict):
            logger.warning("the deltas to be loaded know nothing of their base (an earlier finepoint wrote them): "
                           "another base would not be noticed")  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def kept(self) -> dict[str, Tensor]:
        """What tells the base where deltas are kept as tensors."""
        return {FINGERPRINT: torch.tensor(list(json.dumps(self.base.as_json()).encode()), dtype=torch.uint8)}

    def forward(self, x: Any) -> Any:
        """The input: a model that is an `nn.Sequential` runs every child that it has, this one too."""
        return x

    def attend(self) -> None:
        """Hooks onto the deltas what averages them where nobody else does; once for every new parameter."""
        if self.beside_shards:
            for member in self.members():
                member.delta.register_post_accumulate_grad_hook(self.gradient_made)

    def members(self) -> list[SparseWeight]:
        return list(self.values())  # type: ignore[arg-type]

    @torch.compiler.disable
    def enter(self, module: nn.Module, args: Any) -> None:
        """Before the forward of the whole model: its weights follow deltas that were changed in whatever way.

        To be followed by `leave`. Until then modules need not look for themselves; where an interruption has left it
        out, the next forward of the whole model looks all the same.
        """
        self.catch_up_()
        self.running = self.running or id(module)

    @torch.compiler.disable
    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.running == id(module):
            self.running = 0

    def is_running(self) -> bool:
        return self.running != 0

    def catch_up_(self) -> None:
        """Has the weights follow that do not hold base + delta; nothing is written where all do.

        Not while a CUDA graph is captured, when nothing can be asked: the weights have followed the last step.
        """
        if capturing():
            return
        table = self.holding()
        if table is None or not table.unchanged():
            self.write_(lagging([member for member in self.members() if member.follows]))

    def write_(self, members: Iterable[Any]) -> None:
        """Has the weights of some of the entries hold base + delta, all in one call where that can be."""
        members = list(members)
        if len(members) == len(self) and (table := self.holding()):
            table.write_()
            return
        rows = []
        for member in members:
            row = member.row()
            if row is None:
                member.follow_()
            else:
                rows.append((member, row))
        all_weights.write_([row for _, row in rows])
        for member, row in rows:
            member.is_written(row)
        if len(rows) == len(self):
            self.table = Table.of(rows)

    def holding(self) -> Table | None:
        """The table, where all is as it was then; else it is forgotten, with the tensors that it knows."""
        if self.table is not None and not self.table.holds():
            self.table = None
        return self.table

    def check_fit(self, members: Iterable[Any]) -> None:
        """Refuses weights that are no longer those whose entries are trained.

        Raises:
            FinepointError: as for `SparseWeight.check_fit`.
        """
        members = list(members)
        if members and self.holding() is None:
            for member in members:
                member.check_fit()

    def follow_(self) -> None:
        """Writes base + delta into all weights; past autograd's version counters where the deltas are as they were."""
        changed = {id(member) for member in lagging(self.members())}
        for member in self.members():
            member.write_(member.weight if id(member) in changed else member.weight.data)

    def look(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the forward of the whole model: whether its last step gave the deltas their gradient, now and then."""
        if self.spot_checks and not (torch.compiler.is_compiling() or self.beside_shards or distributed.is_fsdp(model)):
            self.spot_checks.before_forward((args, kwargs))

    def meet(self, model: nn.Module, args: Any) -> None:
        """Before the first forward of a model that several processes train: they compare what they train.

        Raises:
            FinepointError: other entries, or other weights there, in another process; FSDP1 or ZeRO-3.
        """
        if torch.compiler.is_compiling() or self.met or distributed.count() == 1:
            return
        refuse_flattened(model, self.members())
        if within_ddp() or distributed.is_fsdp(model):
            for entries in self.members():
                entries.sharded = distributed.is_fsdp(model)
            self.compare()

    def compare(self) -> None:
        """Has all processes compare what they train.

        Raises:
            FinepointError: other entries, or other weights there, in another process.
        """
        parts = (part for entries in self.members() for part in entries.identity())
        distributed.check_alike("the choice of entries", parts)
        self.met = True

    def chosen_anew(self) -> None:
        """To be told that the entries have other deltas.

        Raises:
            FinepointError: DDP has made its messages for the old ones; other entries in another process.
        """
        if self.met and not (self.by_hand or self.beside_shards):
            raise FinepointError("within DDP entries cannot be chosen anew; train with several processes by "
                                 "`finepoint train`, which averages the deltas itself")  # fmt: skip
        self.attend()
        self.table = None
        if self.spot_checks:
            self.spot_checks.cancel()
        if self.met:
            self.compare()

    def gradient_made(self, delta: Tensor) -> None:
        """Has the deltas beside a sharded model averaged when this backward pass is over, which happens once."""
        if not (self.averaging or self.by_hand):
            self.averaging = True
            torch.autograd.Variable._execution_engine.queue_callback(self.average_)

    def average_(self) -> None:
        """Every gradient becomes the mean over all processes. What earlier batches added is alike everywhere: it stays.

        In one message and one order: which gradients a batch made, and when, may differ from process to process.
        """
        self.averaging = False
        deltas = [member.delta for member in self.members()]
        gradients = [torch.zeros_like(delta) if delta.grad is None else delta.grad for delta in deltas]
        joined = torch.cat(gradients)
        distributed.add_up_(joined)
        joined /= distributed.count()
        for delta, mean in zip(deltas, joined.split([len(delta) for delta in deltas]), strict=True):
            delta.grad = mean.to(delta.dtype)


def _read(kept: Tensor) -> Fingerprint:
    try:
        found = json.loads(bytes(kept.cpu().tolist()))
    except ValueError:
        found = None
    if not is_fingerprint(found):
        raise FinepointError("the deltas to be loaded are damaged: what they say of their base cannot be read")
    return Fingerprint.of_json(found)


def lagging(members: Iterable[SparseWeight]) -> list[SparseWeight]:
    """Those whose deltas were changed since they were written; of an accelerator one answer is waited for, for all."""
    members = list(members)
    pairs = [pair for member in members if (pair := _compared(member)) is not None]
    if len(pairs) == len(members) and all_weights.same_bits(pairs):
        return []
    return [member for member in members if member.lags()]


def _compared(member: SparseWeight) -> tuple[Tensor, Tensor] | None:
    """Deltas and those written last, whose bits tell whether the weight lags; None where more has to be asked."""
    delta, known = member.delta, member.written
    refuse_transforms(member.name, delta)
    if known is None or known.device != delta.device or known.dtype != delta.dtype or known.shape != delta.shape:
        return None
    if delta.is_meta or distributed.is_sharded(delta) or member.overwritten():
        return None
    return delta.detach(), known


def within_ddp() -> bool:
    """Whether the forward that is running is that of a model wrapped in DistributedDataParallel."""
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None


class LeftOutOfDDP:
    """Has DDP keep its hands off buffers that no checkpoint holds, which it would send along before every forward.

    They are constants: the positions and base values of the trained entries, the frequencies of rotary embeddings.
    """

    LIST = "_ddp_params_and_buffers_to_ignore"  # where DDP looks, on the model

    def __init__(self, model: nn.Module) -> None:
        names = [f"{prefix}.{name}" if prefix else name for prefix, module in model.named_modules()
                 for name in module._non_persistent_buffers_set]  # fmt: skip
        self.model = model
        self.earlier = vars(model).get(self.LIST)
        ignored = {*(self.earlier or ()), *names}
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)

    def remove(self) -> None:
        if self.earlier is None:
            vars(self.model).pop(self.LIST, None)
        else:
            vars(self.model)[self.LIST] = self.earlier


def refuse_flattened(model: nn.Module, members: Iterable[SparseWeight]) -> None:
    """Refuses a model whose weights have lost their entries.

    Raises:
        FinepointError: FSDP1 or ZeRO-3 has taken them.
    """
    for entries in members:
        owner = entries._owner[0]
        weight = owner._parameters.get(entries.attribute)
        if hasattr(weight, "ds_id"):  # DeepSpeed marks what ZeRO-3 has partitioned
            raise FinepointError(distributed.ZERO3)
        # Both kinds of FSDP leave this mark, for torch.compile; the second one is told by the class.
        if getattr(owner, "_is_fsdp_managed_module", False) and not distributed.is_fsdp(model):
            raise FinepointError(distributed.FSDP1)
