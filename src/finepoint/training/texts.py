"""Text whose predictions are to be kept: read from files, made by recipes, or written by the base itself."""

import json
import logging
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from finepoint.adapters.adapter import applied_to, as_before_latest, base_beneath
from finepoint.data.batches import context_length
from finepoint.data.examples import Example, Labelled, read_examples, some
from finepoint.data.recipes.table import OWN, text_file
from finepoint.data.sources import Given, share_of
from finepoint.data.tokens import MUCH, Row, Tally, around, cut, encode_part, learned
from finepoint.errors import FinepointError, reason_of
from finepoint.models.packages import cache_folder
from finepoint.models.probing import REFUSED
from finepoint.runtime import distributed
from finepoint.runtime.files import alone, read_json, write_json, write_json_lines
from finepoint.runtime.progress import progress
from finepoint.training.samples import passes, texts_and_conversations
from finepoint.training.settings import EXAMPLES, READ

logger = logging.getLogger(__name__)
TOKENS_KEPT = 256  # tokens of an example: what is kept is how text goes on, not how far
TOKENS_READ = 64  # tokens of a text that its Fisher information is measured on: passes count, not their length
APART = 4  # one in so many of the protected texts is measured on, where there is a budget
CLASSIFIERS = "--protect keeps what a model writes next, and classifiers write nothing; leave it out"
CLASSES = '--protect keeps what a model writes next, and these texts have classes; give them alone, as {"text"}'
WRITTEN = 32  # texts that the base writes: so many were measured, all of them read
TOKENS = TOKENS_READ  # of each of these, and of each answer: what is not read need not be written
HELD_OUT = 1  # the seed of texts to measure on; what training holds is of seed 0
FACTS = "own.json"  # beside texts that a base has written, once they are whole
FORMAT = 1


@dataclass
class Writer:
    """A base that writes text of its own where `--protect` says so. Several processes ask together."""

    model: Any
    tokenizer: Any
    seed: int = 0
    held: Path | None = None
    """the folder of a run that is resumed, where its texts lie"""
    told: dict[str, Any] = field(default_factory=dict)
    """of what it has written, for the record"""

    def texts(self, count: int) -> list[Example]:
        """So many texts at most, half of them conversations where there is a chat template.

        They lie in the cache from then on, by the base's content, the tokenizer and whatever else decides them.

        Raises:
            FinepointError: the model does not write, or is sharded over several processes.
        """
        started = time.perf_counter()
        folder = self.held if self.held and (self.held / FACTS).is_file() else None
        if folder is None:
            key = self._key(count)  # of all processes, which may hold a part of the base each
            folder = distributed.on_first(partial(self._made, cache_folder() / "texts" / OWN / key, count))
        facts = read_json(folder / FACTS)
        self.told = {"folder": str(folder), **facts["rows"], "seconds": round(time.perf_counter() - started, 2)}
        return [example for name in facts["rows"] for example in read_examples(str(folder / f"{name}.jsonl"))]

    @property
    def purpose(self) -> str:
        return "to measure on" if self.seed == HELD_OUT else "to be kept by"

    def _key(self, count: int) -> str:
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        tokens = fast.to_str() if fast else sorted(self.tokenizer.get_vocab().items())
        decides = [FORMAT, base_beneath(self.model).as_json(), type(self.tokenizer).__name__, tokens,
                   self.tokenizer.chat_template, str(self.model.dtype), self.model.device.type, count, TOKENS,
                   self.seed]  # fmt: skip
        return sha256(json.dumps(decides, default=str).encode()).hexdigest()[:32]

    def _made(self, folder: Path, count: int) -> Path:
        with alone(folder):  # who comes meanwhile waits, and finds it
            if not _is_whole(folder):
                rows = self._written(count)
                for name, found in rows.items():
                    write_json_lines(folder / f"{name}.jsonl", found)
                write_json(folder / FACTS, {"rows": {name: len(found) for name, found in rows.items()}})
                logger.info("the base has written %s, %s; they lie in %s", _counted(rows), self.purpose, folder)
        return folder

    def _written(self, count: int) -> dict[str, list[dict[str, Any]]]:
        """Rows by the name of their file, from the model without the adapters that are applied to it."""
        name = type(self.model).__name__
        if any(map(distributed.is_sharded, self.model.parameters())):
            raise FinepointError(f"--protect {OWN} has a whole model write, and this one is sharded; write the texts "
                                 "once without a launcher: finepoint data samples")  # fmt: skip
        with (as_before_latest(self.model, len(applied_to(self.model))),
              progress(f"writing text {self.purpose}", passes(self.tokenizer, count, TOKENS)) as advance):  # fmt: skip
            counting = self.model.register_forward_hook(lambda *_: advance(1))
            try:
                rows = texts_and_conversations(self.model, self.tokenizer, count, self.seed, TOKENS)
            except REFUSED as error:
                raise FinepointError(f"{name} writes no text ({reason_of(error)}); give text of yours: --protect "
                                     "FILE.jsonl") from error  # fmt: skip
            finally:
                counting.remove()
        if not any(rows.values()):
            raise FinepointError(f"{name} has written nothing but ends of text; give text of yours: --protect "
                                 "FILE.jsonl")  # fmt: skip
        return {name: found for name, found in rows.items() if found}

    def keep(self, folder: Path) -> None:
        """Lays what was written into a run's folder, for `held`; nothing where nothing was."""
        if self.told:
            shutil.copytree(self.told["folder"], folder, dirs_exist_ok=True)


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds all that its facts say it does."""
    try:
        rows = read_json(folder / FACTS)["rows"]
        return all((folder / f"{name}.jsonl").read_text("utf-8").count("\n") == rows[name] for name in rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, FinepointError):
        return False


def to_measure(model: Any, tokenizer: Any) -> Writer:
    """Who writes text to measure on: other text than training holds."""
    return Writer(model, tokenizer, seed=HELD_OUT)


def _counted(rows: dict[str, list[dict[str, Any]]]) -> str:
    return " and ".join(f"{len(found)} {name}" for name, found in rows.items())


def names_own(sources: Any) -> bool:
    """Whether `--protect` names text that the base is to write; a file or folder of that name goes first."""
    given = [sources] if isinstance(sources, str) else sources or []
    return OWN in given and not Path(OWN).exists()


def texts_kept(sources: Any, amount: int | None) -> int:
    """How many texts are kept at most: `--protect-examples`, or what stands for it."""
    alone = names_own(sources) and (isinstance(sources, str) or len(sources) == 1)
    return amount if amount is not None else WRITTEN if alone else EXAMPLES


def texts_read(sources: Any, amount: int | None) -> int:
    """How many of them are read for what they need: `--protect-read`, or what stands for it."""
    return amount if amount is not None else WRITTEN if names_own(sources) else READ


def rows_to_read(rows: Sequence[Row], tokenizer: Any, amount: int) -> list[Row]:
    """The rows that Fisher information is measured on: few and short ones do, and cost little beside a short run."""
    # All over the file, which may be in some order.
    rows = [rows[at * len(rows) // amount] for at in range(amount)] if len(rows) > amount else rows
    front = around(tokenizer)[0] if any(len(row.ids) > TOKENS_READ for row in rows) else []
    return [row for row in (cut(row, TOKENS_READ, front) for row in rows) if learned(row)] or list(rows)


def examples_to_keep(sources: str | Sequence[str], amount: int | None, writer: Writer | None = None) -> list[Example]:
    """So many examples of `--protect`, in equal parts of what it names; always the same.

    Args:
        writer: of text that the base is to write itself.

    Raises:
        FinepointError: there are fewer than the sources; or as for `read_examples` and `Writer.texts`.
    """
    files, amount = protected_files(sources), texts_kept(sources, amount)
    if amount < len(files):
        raise FinepointError(f"--protect-examples is {amount}, and --protect names {len(files)} files; give one each")
    parts = [amount // len(files) + (place < amount % len(files)) for place in range(len(files))]
    found: list[Example] = []
    for file, part in zip(files, parts, strict=True):
        if names_own(file):
            assert writer is not None
            found += writer.texts(part)
        else:
            found += some(read_examples(file), part)
    return found


def protected_files(sources: str | Sequence[str]) -> list[str]:
    """The files of `--protect`, those of named texts made the first time; `own` stays a word.

    Raises:
        FinepointError: one has a share, or is given twice.
    """
    given = [sources] if isinstance(sources, str) else sources
    named = [(each, None) if isinstance(each, Given) else share_of(each) for each in given]
    if shared := next((source for source, share in named if share is not None), None):
        raise FinepointError(
            f"--protect takes equal parts of its files, and {shared} has a share; give the names alone"
        )
    names = [str(source) for source, _ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FinepointError(f"--protect names {twice} twice; give it once")
    return [source if names_own(source) else text_file(source) for source, _ in named]


def apart(config: Any, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Protected texts in two: those that choose and hold back, and those that a budget of disturbance is measured on.

    Raises:
        FinepointError: there are fewer than two, and there is a budget.
    """
    if getattr(config, "disturb_at_most", None) is None:
        return rows, []
    if len(rows) < 2:
        raise FinepointError("--disturb-at-most measures on protected texts that are kept out of training; give at "
                             "least two with --protect")  # fmt: skip
    measured = set(random.Random(config.seed).sample(range(len(rows)), max(1, len(rows) // APART)))
    return [row for at, row in enumerate(rows) if at not in measured], [rows[at] for at in sorted(measured)]


def rows_to_keep(examples: Sequence[Example], model: Any, tokenizer: Any, max_length: int | None = None) -> list[Row]:
    """Examples whose predictions are to be kept in tokens, at most `TOKENS_KEPT` of each; they may be of several forms.

    Raises:
        FinepointError: they have classes, or nothing in them has a label.
    """
    if labelled := next((example for example in examples if isinstance(example, Labelled)), None):
        raise FinepointError(labelled.place + CLASSES)
    limit = min(TOKENS_KEPT, context_length(model, max_length))
    forms: dict[type, list[Example]] = defaultdict(list)
    for example in examples:
        forms[type(example)].append(example)
    rows = []
    for alike in forms.values():
        tally = Tally()
        rows += encode_part(tokenizer, alike, limit, (), tally, model, whole=False)
        ours = all(example.where.startswith(str(cache_folder())) for example in alike)
        if tally.lost_share() >= MUCH and not ours:  # texts of our own are long, and their beginning will do
            tally.tell(limit, "protected example")
    if not (found := [row for row in rows if learned(row) > 0]):
        place = examples[0].place if examples else ""
        raise FinepointError(f"{place}the protected texts have no token to keep the prediction of, which takes two "
                             "tokens; give longer ones to --protect")  # fmt: skip
    return found
