"""Definition to word: multiple choice from the nouns of WordNet 3.0 (Fellbaum 1998; Princeton University).

The wrong choices are siblings of the right one, under the same hypernym, so the choices are of one kind. WordNet's
licence asks that its notice stays with what is derived from it; it is written beside the data.
"""

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finepoint.data.recipes.splits import split_by_group, without_near_duplicates, write_files
from finepoint.models.packages import debian_file, fetch_debian
from finepoint.runtime.files import write_text

PACKAGE = "wordnet-base=1:3.0-37"
SHA256 = "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"
NOUNS, NOTICE = "usr/share/wordnet/data.noun", "usr/share/doc/wordnet-base/copyright"
CHOICES = 4
SHORTEST = 4  # letters of a choice
PER_GROUP = 3  # so that no hypernym weighs much, and errors are nearly independent
ROWS = {"train": 6000, "validation": 500, "test": 1000}
SEED = 0


@dataclass(frozen=True)
class Synset:
    """A noun sense: its words, its whole gloss, and the offset of its first hypernym ("" where it has none)."""

    offset: str
    words: tuple[str, ...]
    gloss: str
    hypernym: str

    @property
    def clause(self) -> str:
        """The definition proper: the gloss up to its first semicolon."""
        return self.gloss.split(";")[0].strip()


def write_wordnet(folder: Path) -> dict[str, int]:
    """Writes wordnet-train, -validation and -test (.jsonl) and WordNet's notice (NOTICE.txt); rows by file."""
    package = fetch_debian(PACKAGE, SHA256)
    items = questions(parse(debian_file(package, NOUNS).decode("latin-1")), SEED)
    parts = split(items, SEED)
    write_text(folder / "NOTICE.txt", debian_file(package, NOTICE).decode("utf-8"))
    return write_files(folder, {f"wordnet-{part}": rows for part, rows in parts.items()})


def parse(text: str) -> list[Synset]:
    """The synsets of a WordNet data file: `offset .. words .. pointers | gloss` a line, the notice indented."""
    found = []
    for line in text.split("\n"):
        if line.strip() and not line.startswith("  "):
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            after = 4 + 2 * int(fields[3], 16)  # each word is followed by a number
            words = tuple(word.replace("_", " ") for word in fields[4:after:2])
            pointers = zip(fields[after + 1 :: 4], fields[after + 2 :: 4], strict=False)  # kind, offset, ..
            hypernym = next((offset for kind, offset in pointers if kind == "@"), "")
            found.append(Synset(fields[0], words, gloss.strip(), hypernym))
    return found


def questions(synsets: Sequence[Synset], seed: int) -> list[dict[str, Any]]:
    """Multiple-choice rows with the hypernym as group, at most three a group and one a definition."""
    children = defaultdict(list)
    for synset in synsets:
        if synset.hypernym:
            children[synset.hypernym].append(synset)
    names = {synset.offset: f"{synset.words[0]} {synset.offset}" for synset in synsets}
    generator = random.Random(seed)
    rows, seen = [], set()
    for hypernym in sorted(children):
        family = generator.sample(children[hypernym], len(children[hypernym]))
        fitting = 0
        for synset in family:
            row = question(synset, family, generator) if fitting < PER_GROUP else None
            if row and row["prompt"].lower() not in seen:
                rows.append(row | {"group": names[hypernym]})
                seen.add(row["prompt"].lower())
                fitting += 1
    return rows


def question(synset: Synset, family: Sequence[Synset], generator: random.Random) -> dict[str, Any] | None:
    """Definition and four words, the right one at a random place; None where no fair question can be made.

    No choice shares a word with the definition: else `a seat in a car` gives `car seat` away, or a wrong choice itself.
    Wrong choices with as many words as the right one go first, so that length says nothing.
    """
    right, own = synset.words[0], {word.lower() for word in synset.words}
    told = beginnings(synset.clause)
    whole = synset.clause and synset.clause.count("(") == synset.clause.count(")")  # no semicolon inside of brackets
    if not whole or len(right) < SHORTEST or beginnings(right) & told:
        return None
    wrong = {
        other.words[0].lower(): other.words[0]
        for other in family
        if len(other.words[0]) >= SHORTEST
        and not own & {word.lower() for word in other.words}
        and not beginnings(other.words[0]) & told
    }
    if len(wrong) < CHOICES - 1:
        return None
    drawn = generator.sample(list(wrong.values()), len(wrong))
    choices = sorted(drawn, key=lambda word: abs(len(word.split()) - len(right.split())))[: CHOICES - 1]
    answer = generator.randrange(CHOICES)
    choices.insert(answer, right)
    prompt = f"Definition: {synset.clause}\nWord:"
    return {"prompt": prompt, "choices": [f" {word}" for word in choices], "answer": answer}


def beginnings(text: str) -> set[str]:
    """The first four letters of each word, which other forms of the word share."""
    return {word[:4] for word in re.findall(r"\w+", text.lower())}


def split(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Train, validation and test by hypernym, shuffled, cut to size; train without near-duplicates of the others."""
    shares = tuple(1.05 * ROWS[part] / len(rows) for part in ("validation", "test"))  # groups differ in size
    train, validation, test = split_by_group(rows, lambda row: row["group"], (shares[0], shares[1]), seed)
    train = without_near_duplicates(train, [*validation, *test], lambda row: row["prompt"])
    generator = random.Random(seed)
    parts = {"train": train, "validation": validation, "test": test}
    return {part: generator.sample(part_rows, min(ROWS[part], len(part_rows))) for part, part_rows in parts.items()}
