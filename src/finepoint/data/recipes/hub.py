"""Benchmarks from the Hugging Face hub, by the package `datasets`: one entry a task, one writer for all.

Ids are of copies without loading scripts, which `datasets` no longer runs. Where the labels of the test split are kept
secret, the hub's validation split is our test, as is usual, and our validation is drawn from train, by group.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finepoint.data.recipes.splits import split_by_group, write_files
from finepoint.errors import FinepointError, needing, reason_of

logger = logging.getLogger(__name__)

Row = dict[str, Any]
HIDDEN_TEST = {"train": "train", "test": "validation"}
THREE_PARTS = {"train": "train", "validation": "validation", "test": "test"}
DRAWN = 1000  # validation rows drawn from train, or a tenth of it where that is less
SEED = 0


@dataclass(frozen=True)
class HubTask:
    """A benchmark on the hub.

    Args:
        what: the task, in a line.
        hub: id of the data set.
        licence: as its authors state it.
        source: whom to cite.
        convert: a row of the hub to a row of ours.
        config: of the data set, where it has several.
        parts: our part -> the hub's split.
        group: what rows may share and must not be split over; each row its own where not given.
        caveat: what to know before using it.
    """

    what: str
    hub: str
    licence: str
    source: str
    convert: Callable[[Row], Row]
    config: str | None = None
    parts: dict[str, str] = field(default_factory=lambda: HIDDEN_TEST)
    group: Callable[[Row], str] | None = None
    caveat: str = ""

    @property
    def written(self) -> list[str]:
        """Our parts, in order; a validation part is drawn from train where the hub's is our test."""
        drawn = ["train", "validation"] if "train" in self.parts else []
        return list(dict.fromkeys([*drawn, *self.parts]))


def write_hub(name: str, folder: Path) -> dict[str, int]:
    """Writes NAME-train, -validation and -test (.jsonl), as far as the task has them; rows by file.

    Rows without an answer, or with two equal choices, are dropped and counted.
    """
    task = TASKS[name]
    found = {part: load(task, split) for part, split in task.parts.items()}
    given = sum(len(rows) for rows in found.values())
    parts = {part: examples(task, rows) for part, rows in found.items()}
    counts = {"dropped": given - sum(len(rows) for rows in parts.values())}
    if set(task.written) - set(parts):
        parts = drawn_validation(parts)
    return write_files(folder, {f"{name}-{part}": rows for part, rows in parts.items()}) | counts


def load(task: HubTask, split: str) -> list[Row]:
    """A split of a task, as it is on the hub.

    Raises:
        FinepointError: `datasets` is not installed, or it cannot load the split.
    """
    with needing(task.hub, "hub"):
        from datasets import load_dataset
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of every retry
    logger.info("%s: %s, from the hub", task.hub, split)
    try:
        return list(load_dataset(task.hub, task.config, split=split))
    except Exception as error:  # of half a dozen libraries, whose classes have no common base
        raise FinepointError(
            f"cannot load {task.hub} ({split}) from the hub: {reason_of(error)}; it must be reachable once "
            "(HF_ENDPOINT names a mirror), later runs take it from the cache"
        ) from error


def examples(task: HubTask, rows: list[Row]) -> list[Row]:
    """Our rows for those of the hub that have an answer and different choices."""
    found = []
    for row in rows:
        example = task.convert(row)
        choices, answer = example["choices"], example["answer"]
        if 0 <= answer < len(choices) == len(set(choices)) and all(choice.strip() for choice in choices):
            found.append(example | ({"group": task.group(row)} if task.group else {}))
    return found


def drawn_validation(parts: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Train divided into train and validation; no group in both."""
    rows = parts["train"]
    share = min(DRAWN / max(len(rows), 1), 0.1)
    train, validation, _ = split_by_group(rows, lambda row: str(row.get("group", row["prompt"])), (share, 0), SEED)
    return {"train": train, "validation": validation, **{part: parts[part] for part in parts if part != "train"}}


def chosen(prompt: str, choices: list[str], answer: int) -> Row:
    """A multiple-choice row; each choice follows the prompt after a space."""
    return {"prompt": prompt, "choices": [f" {choice.strip()}" for choice in choices], "answer": answer}


def asked(question: str) -> str:
    return f"Question: {question.strip()}\nAnswer:"


def number(label: str | int | None) -> int:
    """A label that may be written as text; -1 where it is kept secret."""
    return -1 if label in ("", None) else int(label)


def boolq(row: Row) -> Row:
    question = row["question"].strip().removesuffix("?")
    return chosen(f"{row['passage'].strip()}\n{asked(question + '?')}", ["no", "yes"], int(row["answer"]))


def piqa(row: Row) -> Row:
    return chosen(asked(row["goal"]), [row["sol1"], row["sol2"]], number(row["label"]))


def siqa(row: Row) -> Row:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return chosen(asked(f"{row['context'].strip()} {row['question']}"), choices, number(row["label"]) - 1)


def hellaswag(row: Row) -> Row:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return chosen(without_marks(context), [without_marks(text) for text in row["endings"]], number(row["label"]))


def without_marks(text: str) -> str:
    """WikiHow's text as a reader would see it: `[title]` ends a sentence, other marks in brackets go."""
    return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())


def winogrande(row: Row) -> Row:
    """Each choice is an option with the rest of the sentence, so that the whole sentence counts."""
    before, _, after = row["sentence"].partition("_")
    prompt = f"Sentence: {before}".rstrip()
    space = "" if before and not before[-1].isspace() else " "  # an option may follow an opening quote
    choices = [f"{space}{option}{after}" for option in (row["option1"], row["option2"])]
    return {"prompt": prompt, "choices": choices, "answer": number(row["answer"]) - 1}


def arc(row: Row) -> Row:
    return chosen(asked(row["question"]), row["choices"]["text"], place(row))


def obqa(row: Row) -> Row:
    """The stem is a question or the beginning of a sentence, so nothing is put around it."""
    return chosen(row["question_stem"].strip(), row["choices"]["text"], place(row))


def place(row: Row) -> int:
    """Which choice the answer's letter (or number) stands for; -1 for none."""
    labels, key = list(row["choices"]["label"]), row["answerKey"].strip()
    return labels.index(key) if key in labels else -1


def mmlu(row: Row) -> Row:
    lettered = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
    return chosen(f"{row['question'].strip()}\n{lettered}\nAnswer:", list("ABCD"), int(row["answer"]))


def sst2(row: Row) -> Row:
    return chosen(f"Text: {row['sentence'].strip()}\nSentiment:", ["negative", "positive"], row["label"])


def cola(row: Row) -> Row:
    prompt = f"{row['sentence'].strip()}\nQuestion: Is this sentence grammatical?\nAnswer:"
    return chosen(prompt, ["no", "yes"], row["label"])


def pair(first: str, second: str, question: str, *choices: str) -> Callable[[Row], Row]:
    """The converter of a task about two texts, each on its own line, under the names of their columns."""

    def convert(row: Row) -> Row:
        shown = f"{row[first].strip()}\n{row[second].strip()}"
        return chosen(f"{shown}\n{asked(question)}", list(choices), row["label"])

    return convert


def glue(what: str, config: str, convert: Callable[[Row], Row], **more: Any) -> HubTask:
    """An entry for a task of GLUE."""
    licence = "each task its own; see the GLUE page"
    return HubTask(what, "nyu-mll/glue", licence, "Wang et al. 2019", convert, config=config, **more)


def column(*names: str) -> Callable[[Row], str]:
    """Rows belong together where these columns, in any order, are equal."""
    return lambda row: " | ".join(sorted(str(row[name]) for name in names))


TASKS = {
    "boolq": HubTask(
        "yes-no questions about a passage", "google/boolq", "CC BY-SA 3.0", "Clark et al. 2019", boolq,
        group=column("passage"),
    ),
    "piqa": HubTask(
        "physical common sense, two ways to a goal", "baber/piqa", "AFL 3.0", "Bisk et al. 2020", piqa,
        group=column("goal"),
    ),
    "siqa": HubTask(
        "social common sense, three choices", "lighteval/siqa", "CC BY 4.0", "Sap et al. 2019", siqa,
        group=column("context"),
    ),
    "hellaswag": HubTask(
        "how a scene goes on, four choices", "Rowan/hellaswag", "MIT", "Zellers et al. 2019", hellaswag,
        group=column("source_id"),
    ),
    "winogrande": HubTask(
        "whom a sentence means, two choices", "allenai/winogrande", "CC BY", "Sakaguchi et al. 2020", winogrande,
        config="winogrande_xl", group=column("option1", "option2"),  # twin sentences have the same options
        caveat="scored over the whole rest of the sentence",
    ),
    "arc-e": HubTask(
        "school science, easy", "allenai/ai2_arc", "CC BY-SA 4.0", "Clark et al. 2018", arc,
        config="ARC-Easy", parts=THREE_PARTS,
    ),
    "arc-c": HubTask(
        "school science, hard", "allenai/ai2_arc", "CC BY-SA 4.0", "Clark et al. 2018", arc,
        config="ARC-Challenge", parts=THREE_PARTS,
    ),
    "obqa": HubTask(
        "science facts put to use, four choices", "allenai/openbookqa", "Apache-2.0", "Mihaylov et al. 2018", obqa,
        config="main", parts=THREE_PARTS,
    ),
    "mmlu": HubTask(
        "57 subjects, four lettered choices", "cais/mmlu", "MIT", "Hendrycks et al. 2021", mmlu,
        config="all", parts={"dev": "dev", "validation": "validation", "test": "test"}, group=column("subject"),
        caveat="no training split; subjects are in every part, as their authors divided it",
    ),
    "sst2": glue(
        "sentiment of phrases and sentences", "sst2", sst2,
        caveat="train holds phrases of one sentence several times: the validation drawn from it is too easy",
    ),
    "cola": glue("grammatical or not", "cola", cola),
    "mrpc": glue(
        "do two sentences say the same", "mrpc",
        pair("sentence1", "sentence2", "Do both sentences mean the same?", "no", "yes"),
    ),
    "qqp": glue(
        "do two questions ask the same", "qqp",
        pair("question1", "question2", "Do both questions ask the same?", "no", "yes"),
        group=column("question1"),
    ),
    "rte": glue(
        "does one sentence follow from another", "rte",
        pair("sentence1", "sentence2", "Does the second text follow from the first?", "yes", "no"),
        group=column("sentence1"),
    ),
    "qnli": glue(
        "does a sentence answer a question", "qnli",
        pair("question", "sentence", "Does the sentence answer the question?", "yes", "no"),
        group=column("sentence"),
    ),
    "mnli": glue(
        "does a sentence follow, contradict or neither", "mnli",
        pair("premise", "hypothesis", "Does the second text follow from the first?", "yes", "maybe", "no"),
        parts={"train": "train", "test": "validation_matched", "test-mismatched": "validation_mismatched"},
        group=column("premise"),
    ),
}  # fmt: skip
