"""When entries are chosen anew: what `--refresh` takes. Without torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from finepoint.errors import FinepointError

EVERY = 20  # steps between two rounds of drop-grow where none are given, as in SpIEL's code
SPELLING = "every:N [until:M], or drop-grow:FRACTION [every:N] [until:M]"
SCHEDULES = {
    "every:N": (
        "every N steps, up to until:M, all target entries compete again, by --rule, as the model stands",
        "any rule; LIFT, arXiv:2506.00772: --rule lift --scope weight --dropped keep",
    ),
    "drop-grow:FRACTION": (
        "every:N steps, up to until:M, FRACTION (1 - step/last) of the entries, of smallest |delta|, "
        "give way to those of largest |mean g|",
        "SpIEL, arXiv:2401.16405: --rule random --scope weight",
    ),
}
"""What `--refresh` takes, what it does, and whose methods it makes."""


@dataclass(frozen=True)
class Schedule:
    """When entries are chosen anew, and how many of them."""

    every: int
    """steps from one choice to the next"""
    until: int | None = None
    """the last step after which there is one"""
    fraction: float | None = None
    """share of the entries that gives way to others, falling to 0 at the end; None: all compete by the run's rule"""

    def due(self, done: int) -> bool:
        """Whether entries are chosen anew after so many steps, before the next."""
        return done > 0 and done % self.every == 0 and (self.until is None or done <= self.until)

    def rate(self, done: int, steps: int) -> float:
        """The share of the entries that gives way after so many steps of a run."""
        assert self.fraction is not None
        return self.fraction * max(0.0, 1 - done / (self.until or steps))


def schedule_of(refresh: str | Sequence[str]) -> Schedule:
    """The schedule that `--refresh` describes.

    Raises:
        FinepointError: it is spelled in another way, or a number is out of range.
    """
    parts = (refresh.replace(",", " ") if isinstance(refresh, str) else " ".join(refresh)).split()
    what = f"refresh is {' '.join(parts)!r}"
    given = dict(part.partition(":")[::2] for part in parts)
    try:
        every = int(given.pop("every", EVERY if "drop-grow" in given else ""))
        until = int(given.pop("until")) if "until" in given else None
        fraction = float(given.pop("drop-grow")) if "drop-grow" in given else None
    except ValueError as error:
        raise FinepointError(f"{what}; give {SPELLING}") from error
    if given or len(parts) > 3:
        raise FinepointError(f"{what}; give {SPELLING}")
    if every < 1 or (until is not None and until < every):
        raise FinepointError(f"{what}, which never comes; give every:N from 1, and until:M from N")
    if fraction is not None and not 0 < fraction <= 1:
        raise FinepointError(f"{what}; a FRACTION of the entries is in (0, 1]")
    return Schedule(every, until, fraction)
