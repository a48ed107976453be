"""Train, validation and test that share nothing: no group in two, no training row that repeats a held-out one."""

import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from finepoint.runtime.files import write_json_lines

NEAR_DUPLICATE = 0.6
Row = TypeVar("Row")


def split_by_group(
    rows: Sequence[Row], group: Callable[[Row], str], shares: tuple[float, float], seed: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """Train, validation and test; all rows of a group go to the same one.

    Args:
        rows: what to split.
        group: of a row.
        shares: of the groups that become validation and test.
        seed: of the draw.
    """
    groups = sorted({group(row) for row in rows})
    random.Random(seed).shuffle(groups)
    test_end = round(len(groups) * shares[1])
    validation_end = test_end + round(len(groups) * shares[0])
    place = {name: 2 if i < test_end else 1 if i < validation_end else 0 for i, name in enumerate(groups)}
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row in rows:
        parts[place[group(row)]].append(row)
    return parts


def without_near_duplicates(rows: Sequence[Row], held_out: Sequence[Row], text: Callable[[Row], str]) -> list[Row]:
    """The rows whose words have a Jaccard similarity below 0.6 with every held-out row."""
    held_out_words = [words(text(row)) for row in held_out]
    containing = defaultdict(list)
    for i, bag in enumerate(held_out_words):
        for word in bag:
            containing[word].append(i)
    kept = []
    for row in rows:
        bag = words(text(row))
        # Two sets that share 60 % share one of the rarest 40 % + 1 words of either.
        rare = sorted(bag, key=lambda word: len(containing.get(word, ())))
        rare = rare[: len(bag) - math.ceil(NEAR_DUPLICATE * len(bag)) + 1]
        candidates = {i for word in rare for i in containing.get(word, ())}
        if all(jaccard(bag, held_out_words[i]) < NEAR_DUPLICATE for i in candidates):
            kept.append(row)
    return kept


def words(text: str) -> frozenset[str]:
    """The different words of a text, in lower case."""
    return frozenset(re.findall(r"\w+", text.lower()))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared words over all words."""
    return len(a & b) / len(a | b) if a or b else 1.0


def write_files(folder: Path, files: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, int]:
    """Writes NAME.jsonl for each; rows by name."""
    for name, rows in files.items():
        write_json_lines(folder / f"{name}.jsonl", list(rows))
    return {name: len(rows) for name, rows in files.items()}
