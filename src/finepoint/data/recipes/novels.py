"""Excerpts of Jane Austen's novels (public domain), from the R package janeaustenr (Silge 2022, MIT): text for NLL.

A pretrained model has probably seen them, so this measures the loss of known text.
"""

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from finepoint.data.recipes.rdata import read_database
from finepoint.models.packages import debian_file, fetch_debian
from finepoint.runtime.files import claim_folder, write_json_lines

PACKAGE = "r-cran-janeaustenr=1.0.0-1"
SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata"
FILES = {
    "novels": ("emma", "mansfieldpark", "prideprejudice", "sensesensibility"),
    "novels-other": ("northangerabbey", "persuasion"),
}
WORDS = range(200, 601)  # of an excerpt
HEADING = re.compile(r"(chapter|volume) \w+$|(the end|finis|a note on the text)$", re.IGNORECASE)
SEED = 0


def write_novels(output: str | Path, overwrite: bool = False) -> dict[str, int]:
    """Writes novels (four of them) and novels-other (two, held apart), excerpts in random order; rows by file.

    Raises:
        FinepointError: the package cannot be fetched, or the folder is not empty.
    """
    with claim_folder(output, overwrite) as folder:
        package = fetch_debian(PACKAGE, SHA256)
        lines = read_database(debian_file(package, f"{DATA}.rdx"), debian_file(package, f"{DATA}.rdb"))
        counts = {}
        for file, titles in FILES.items():
            rows = [{"text": text, "group": title} for title in titles for text in excerpts(paragraphs(lines[title]))]
            random.Random(SEED).shuffle(rows)
            write_json_lines(folder / f"{file}.jsonl", rows)
            counts[file] = len(rows)
        return counts


def paragraphs(lines: Sequence[str]) -> Iterator[str]:
    """The paragraphs of a novel, each on one line, headings among them; empty lines stand between them.

    Rows of asterisks are dropped, and the underscores around stressed words.
    """
    for paragraph in "\n".join(lines).split("\n\n"):
        joined = " ".join(paragraph.replace("_", "").split())
        if re.search(r"\w", joined):
            yield joined


def excerpts(paragraphs: Iterator[str]) -> Iterator[str]:
    """Neighbouring paragraphs of one chapter, 200 to 600 words together.

    What a chapter has left over is dropped, a very long paragraph too, and what stands before the first heading: that
    is the title page.
    """
    taken: list[str] | None = None
    for paragraph in paragraphs:
        if HEADING.match(paragraph):
            taken = []
        elif taken is not None:
            taken.append(paragraph)
            length = sum(len(text.split()) for text in taken)
            if length in WORDS:
                yield "\n\n".join(taken)
            if length >= WORDS.start:
                taken = []
