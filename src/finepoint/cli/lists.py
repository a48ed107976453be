"""Commands that tell what there is: data, rules, schema, doctor."""

import json
import logging
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from finepoint.cli.output import print_json, print_marked, print_table
from finepoint.errors import FinepointError
from finepoint.models.packages import cache_folder
from finepoint.runtime.files import write_json
from finepoint.runtime.settings import JSON, OVERWRITE, default_of, did_you_mean, json_schema, setting
from finepoint.selection.plugins import offered
from finepoint.selection.settings import DEFAULT_RULE
from finepoint.version import __version__

# fmt: off


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Fetch the data of a recipe and write it as JSON Lines; or `preview FILE ..`: what files are read as.

    Or `samples`: texts that a model itself writes, to keep it by (--protect) without text of your own.
    """

    name: str | list[str] | None = setting(
        "the recipe, also without its flag: `finepoint data vader`; or samples; or preview, and files; all recipes "
        "where not given",
        None, positional=True)
    output: str | None = setting("folder to write; required with a recipe, and with samples", None)
    model: str | None = setting(
        "for preview: the model to be trained, in whose tokens lengths are told; for samples: the model that writes",
        None)
    columns: dict[str, str] = setting(
        "for preview: what the files' columns are called: prompt=question completion=answer", {})
    max_length: int | None = setting(
        "for preview: longest example in tokens; the model's context where not given", None, least=1)
    examples: int | None = setting(
        "for preview: so many examples of each file are shown, 3 where not given; for samples: so many are written, 64",
        None, least=0)
    overwrite: bool = setting(OVERWRITE, False)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """List the rules, those of installed plug-ins too, the baselines and the schedules, with formulas and sources."""

    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class SchemaConfig:
    """Print the JSON schema of a command's YAML file, for editors that complete and check it."""

    name: str = setting("the command, also without its flag: `finepoint schema train`", positional=True)
    json: bool = setting("print one JSON object on stdout, as it does in any case", False)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Say what this machine has, which kernels are the fastest on it (measured: some seconds), and what is slow."""

    json: bool = setting(JSON, False)


# fmt: on


def help_data() -> str:
    """The recipes, for `--help`."""
    from finepoint.data.recipes.table import RECIPES

    return "\n".join(["recipes:", *(f"  {name:<24} {recipe.what}" for name, recipe in RECIPES.items())])


def run_data(config: DataConfig) -> None:
    from finepoint.data.recipes.table import recipe

    name, *files = [config.name] if isinstance(config.name, str) else config.name or [""]
    if not name:
        _list(config.json)
        return
    if name == "preview":
        _preview(config, files)
        return
    if name == "samples":
        _samples(config, files)
        return
    found = recipe(name)
    _refuse_unused(config, name, "output", "overwrite")
    if files:
        raise FinepointError(
            f"{files[0]!r} belongs to no recipe; give one at a time, or `finepoint data preview` files"
        )
    if config.output is None:
        raise FinepointError(f"--output is required: the folder that {name} shall be written to")
    counts = found.write(config.output, config.overwrite)
    if config.json:
        print_json({
            "output": config.output, "rows": counts, "recipe": name,
            "licence": found.licence, "source": found.source, "caveat": found.caveat,
        })  # fmt: skip
        return
    print(f"source: {found.source}\nlicence: {found.licence}" + (f"\nnote: {found.caveat}" if found.caveat else ""))
    print_table(["file", "rows"], list(counts.items()), title=config.output)


def _refuse_unused(config: DataConfig, what: str, *used: str) -> None:
    """Refuses settings that are for other data."""
    for known in fields(config):
        value = getattr(config, known.name)
        if known.name not in ("name", "json", *used) and value != default_of(known):
            flag = known.name.replace("_", "-")
            raise FinepointError(f"`finepoint data {what}` does not look at --{flag}, which is {value}; leave it out")


def _preview(config: DataConfig, files: list[str]) -> None:
    from finepoint.data.preview import preview

    _refuse_unused(config, "preview", "model", "columns", "max_length", "examples")
    tokenizer, limit = None, config.max_length
    if config.model:
        from types import SimpleNamespace

        from finepoint.data.batches import context_length
        from finepoint.models.loading import load_config, load_tokenizer

        tokenizer = load_tokenizer(config.model)
        limit = context_length(SimpleNamespace(config=load_config(config.model)), limit)
    found = preview(files, config.columns, tokenizer, limit, 3 if config.examples is None else config.examples)
    if config.json:
        print_json(found)
        return
    for file in found["files"]:
        _show_file(file)
    for source, leaked in found["leaks"].items():
        for other, counts in leaked.items():
            more = f", {counts['normalised']} more but for case, spaces and punctuation" if counts["normalised"] else ""
            print(f"{counts['exact']} of {counts['n']} examples of {other} are in {source}{more}")


def _samples(config: DataConfig, files: list[str]) -> None:
    from finepoint.data.recipes.splits import write_files
    from finepoint.models.loading import load_model, load_tokenizer
    from finepoint.runtime.files import claim_folder
    from finepoint.training.samples import texts_and_conversations

    if files or not config.model or not config.output:
        raise FinepointError("samples are written by a model to a folder: `finepoint data samples --model MODEL "
                             "--output DIR`")  # fmt: skip
    if config.examples == 0:
        raise FinepointError("examples is 0; give how many texts the model is to write")
    _refuse_unused(config, "samples", "output", "model", "examples", "overwrite")
    with claim_folder(config.output, config.overwrite) as folder:
        model, tokenizer = load_model(config.model), load_tokenizer(config.model)
        counts = write_files(folder, texts_and_conversations(model, tokenizer, config.examples or 64))
    if config.json:
        print_json({"output": config.output, "rows": counts, "model": config.model})
        return
    print_table(["file", "rows"], list(counts.items()), title=config.output)


def _show_file(file: dict[str, Any]) -> None:
    """A file in some lines, and examples of it: what is learned is in colour, or in double brackets."""
    form = f" by {', '.join(file['form'])}" if file["form"] else ""
    ignored = f"; ignored: {', '.join(file['ignored'])}" if file["ignored"] else ""
    taken = f"{file['rows']:,} {KINDS.get(file['kind'], file['kind'])} examples{form}{ignored}"
    print(f"{file['source']}: {taken}")
    for key, what in (("skipped", "rows hold nothing to learn: skipped"), ("trimmed", "conversations lose turns before "
                      "the first question or behind the last answer")):  # fmt: skip
        if key in file:
            print(f"  {file[key]:,} {what}")
    for unit in ("characters", "tokens"):
        if found := file.get(unit):
            learned = f", {found['learned']:,} learned" if found.get("learned") else ""
            of = f" (of {found['counted']:,} examples)" if found.get("counted", file["rows"]) < file["rows"] else ""
            print(f"  {unit}: {found['median']:,} in the middle, nine in ten up to {found['most']:,}, longest "
                  f"{found['longest']:,}; {found['total']:,} in all{of}{learned}")  # fmt: skip
    if (longer := file.get("longer")) and longer["examples"]:
        more = (f"which are taken in {longer['rows']:,} rows; nothing is lost" if "rows" in longer
                else f"{longer['tokens']:,} tokens beyond ({longer['share']:.1%})")  # fmt: skip
        print(f"  longer than {longer['limit']:,} tokens: {longer['examples']:,} examples, {more}")
    if file["duplicates"]["normalised"]:
        print(f"  twice: {file['duplicates']['exact']:,} examples, {file['duplicates']['normalised']:,} but for case, "
              "spaces and punctuation")  # fmt: skip
    if file["classes"]:
        print(f"  classes: {', '.join(f'{name} {count:,}' for name, count in file['classes'].items())}")
    for pieces in file["examples"]:
        print_marked(pieces)


KINDS = {"labelled": "labelled", "chatpair": "pair (conversations)"}


def _list(as_json: bool) -> None:
    from finepoint.data.recipes.table import RECIPES

    if as_json:
        print_json({
            name: {"what": recipe.what, "files": recipe.files, "licence": recipe.licence, "source": recipe.source,
                   "caveat": recipe.caveat, "needs_hub": recipe.needs_hub}
            for name, recipe in RECIPES.items()
        })  # fmt: skip
        return
    rows = [
        [name, recipe.what, recipe.licence, "hub" if recipe.needs_hub else "packages"]
        for name, recipe in RECIPES.items()
    ]
    print_table(["recipe", "what", "licence", "from"], rows)


logger = logging.getLogger(__name__)


def run_rules(config: RulesConfig) -> None:
    listed, problems = _listed()
    for problem in problems:
        logger.warning("left out: %s", " ".join(problem.split()))
    if config.json:
        print_json(listed)
        return
    rules = {name: rule for name, rule in listed.items() if name not in ("baselines", "schedules")}
    rows = [
        [", ".join([name, *rule["also"]]), rule["formula"],
         rule["source"] if rule["package"] == "finepoint" else f"plug-in: {rule['package']}", _options(rule["options"]),
         "yes" if rule["needs_data"] else "no"]
        for name, rule in rules.items()
    ]  # fmt: skip
    print_table(["rule", "score (higher = train it)", "source", "options", "needs data"], rows)
    print(f"where no rule is given: {DEFAULT_RULE}\n")
    rows = [
        [name, baseline["formula"], baseline["source"], _options(baseline["options"]), f"{baseline['lr']:g}"]
        for name, baseline in listed["baselines"].items()
    ]
    print_table(["baseline", "what is trained", "source", "options", "default lr"], rows)
    print()
    schedules = [[name, each["formula"], each["source"]] for name, each in listed["schedules"].items()]
    print_table(["--refresh", "what is chosen anew while training", "source"], schedules)


def _listed() -> tuple[dict[str, Any], list[str]]:
    """The rules, baselines and schedules, JSON-ready, and what is wrong with rules of plug-ins.

    They are found by importing all there is, which takes seconds. Where nobody else can have brought any, the list is
    kept until finepoint's own files change.
    """
    if offered() or "finepoint.selection.rules" in sys.modules:
        return _found()
    place, now = cache_folder() / "rules.json", _sources()
    with suppress(OSError, ValueError, LookupError, TypeError):
        kept = json.loads(place.read_text("utf-8"))
        if kept["of"] == now and {"baselines", "schedules"} <= kept["listed"].keys():
            return kept["listed"], []
    listed, problems = _found()
    with suppress(FinepointError, OSError):
        write_json(place, {"of": now, "listed": listed})
    return listed, problems


def _sources() -> str:
    """What tells one state of finepoint's own files from another."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    told = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return sha256(repr((__version__, told)).encode()).hexdigest()


def _found() -> tuple[dict[str, Any], list[str]]:
    from finepoint.baselines.registry import BASELINES
    from finepoint.selection.rules import ALIASES, every_rule
    from finepoint.training.refresh import SCHEDULES

    rules, problems = every_rule()
    listed: dict[str, Any] = {
        rule.name: {"formula": rule.formula, "source": rule.source, "package": rule.package, "options": rule.options,
                    "also": [alias for alias, name in ALIASES.items() if name == rule.name],
                    "needs_data": rule.needs_data}
        for rule in rules
    }  # fmt: skip
    baselines = {
        each.name: {"formula": each.formula, "source": each.source, "options": each.options, "lr": each.lr}
        for each in BASELINES.values()
    }
    schedules = {name: {"formula": formula, "source": source} for name, (formula, source) in SCHEDULES.items()}
    return listed | {"baselines": baselines, "schedules": schedules}, problems


def _options(options: dict[str, float]) -> str:
    return ", ".join(f"{option}={default:g}" for option, default in options.items()) or "-"


def run_schema(config: SchemaConfig) -> None:
    from finepoint.cli import COMMANDS, command_named

    if config.name not in COMMANDS:
        raise FinepointError(f"no command {config.name!r}{did_you_mean(config.name, COMMANDS)}")
    print_json(json_schema(command_named(config.name).config, f"finepoint {config.name}"))


def run_doctor(config: DoctorConfig) -> None:
    from finepoint.tuner.doctor import SHAPE, diagnosis

    found = diagnosis()
    if config.json:
        print_json(found)
        return
    print_table(["package", "version"], [[name, known or "not installed"] for name, known in found["versions"].items()])
    print()
    words = {True: "yes", False: "no", None: "none"}
    facts = [[name, words[value] if value is None or isinstance(value, bool) else value]
             for name, value in found["machine"].items()]  # fmt: skip
    print_table(["machine", ""], facts)
    print()
    columns = list(dict.fromkeys(name for row in found["kernels"] for name in row))
    rows = [[row.get(name, "-") for name in columns] for row in found["kernels"]]
    print_table(columns, rows, title="Gradients of chosen entries: the kernel that is taken; milliseconds of each")
    print(
        f"\nof a weight of {SHAPE[0]:,} x {SHAPE[1]}; tiles: a dot product for each entry, compiled; gather: the same "
        "in PyTorch; dense, turned: the whole product, from one side or the other; half: in bfloat16 as it is"
    )
    for sentence in found["slow"] or ["nothing that is known to be slow"]:
        print(f"\n{sentence}")
