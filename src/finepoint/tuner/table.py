"""All trained weights of a model as they were written last: asked and written again in one call, as long as nobody has
exchanged a tensor. What every weight is asked one by one otherwise (`SparseWeight`) costs more than all numbers do."""

from collections.abc import Sequence

from finepoint.tuner.kernels.all_weights import Kept, Row
from finepoint.tuner.sparse_weight import SparseWeight


class Table:
    """Members with the rows that they were written by, and what would tell another tensor in one's place."""

    def __init__(self, rows: Sequence[tuple[SparseWeight, Row]], kept: Kept) -> None:
        self.kept = kept
        self.members = [member for member, _ in rows]
        self.known = [
            (member, member._owner[0], member.attribute, row.weight, member.delta, row.indices, row.base, row.written,
             row.weight.data_ptr(), row.delta.data_ptr(), row.weight.dtype, row.delta.dtype, row.weight.numel(),
             row.delta.numel())
            for member, row in rows
        ]  # fmt: skip

    @classmethod
    def of(cls, rows: Sequence[tuple[SparseWeight, Row]]) -> "Table | None":
        """None where not all weights can be written in one call."""
        kept = Kept.of([row for _, row in rows])
        return None if kept is None or any(member.weight is not row.weight for member, row in rows) else cls(rows, kept)

    def holds(self) -> bool:
        """Whether every tensor is the one that it was, where it was, and nobody else has written to a weight."""
        for (member, owner, attribute, weight, delta, indices, base, written, address, place, dtype, wide, numbers,
             count) in self.known:  # fmt: skip
            buffers = member._buffers
            if (
                owner._parameters.get(attribute) is not weight
                or member._parameters["delta"] is not delta
                or buffers["indices"] is not indices
                or buffers["base"] is not base
                or member.written is not written
                or member.shown is not None
                or member.sharded
                or weight.data_ptr() != address
                or delta.data_ptr() != place
                or weight.dtype is not dtype
                or delta.dtype is not wide
                or weight.numel() != numbers
                or delta.numel() != count
                or weight._version != member._stamp[2]
            ):
                return False
        return True

    def unchanged(self) -> bool:
        """Whether the deltas have the bits of those written last."""
        return self.kept.unchanged()

    def write_(self) -> None:
        """Has all weights hold base + delta."""
        self.kept.write_()
        for member, weight in zip(self.members, self.kept.weights, strict=True):
            vars(member)["_stamp"] = (id(weight), weight.data_ptr(), weight._version)
