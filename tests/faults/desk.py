"""Real commands on a tiny model, what one types after a fault, and what must hold of the files they leave."""

import json
import shutil
import time
from dataclasses import dataclass
from hashlib import sha256

import yaml
from safetensors import safe_open

import quantised_file

ON_WORDS = ("--model", "my-model", "--data", "words.jsonl", "--batch-size", "4")
SHORT = ("train", *ON_WORDS, "--lr", "0.01", "--steps")
TRAIN = (*SHORT, "8", "--save-every", "2", "--validation", "few.jsonl", "--eval-every", "3")
GALLOP = ("--rule", "gallop", "--scoring-examples", "8")
ENTRIES = (*GALLOP, "--density", "0.05")
EXPORT = ("export", "--model", "my-model", "--adapter")
NEW, ON = ("--overwrite",), ("--resume",)
QUANTISED = "out/model.gguf"


@dataclass(frozen=True)
class Command:
    """A command that writes the folder `out`."""

    words: tuple[str, ...]
    after: tuple[tuple[str, ...], ...] = (NEW,)
    """what is added after a fault; the next where one is refused"""
    over: tuple[str, ...] = ()
    """an earlier command whose result it writes over"""
    says: str = ""
    """the file without which a result that is written over is none"""
    into: str = "out"
    """what --output says"""
    in_place: bool = False
    """whether that is the command's own to know"""

    @property
    def line(self):
        return ("finepoint", *self.words, *(() if self.in_place else ("--output", self.into)))


COMMANDS = {
    "train": Command((*TRAIN, *ENTRIES), (ON, NEW)),
    "train, keep best": Command((*TRAIN, *ENTRIES, "--keep", "best", "--compact"), (ON, NEW)),
    "train, over another": Command((*TRAIN, *ENTRIES, *NEW), (ON, NEW), over=(*TRAIN, *ENTRIES, "--seed", "5")),
    "train, lora": Command((*TRAIN, "--baseline", "lora"), (ON, NEW)),
    "train, full": Command((*TRAIN, "--baseline", "full"), (ON, NEW)),
    "train, density auto": Command(
        (*SHORT, "24", "--validation", "few.jsonl", *GALLOP, "--density", "auto"), (ON, NEW)
    ),
    "select": Command(("select", *ON_WORDS, *ENTRIES, *NEW), over=("select", *ON_WORDS, "--density", "0.1")),
    "merge": Command(("merge", "a", "b", *NEW), over=("merge", "a", "b", "--weights", "1", "0.5")),
    "extract": Command(("extract", "--base", "my-model", "--tuned", "tuned", "--all", *NEW),
                       over=("extract", "--base", "my-model", "--tuned", "tuned", "--density", "0.01")),
    "export": Command((*EXPORT, "a", "--format", "merged", *NEW), over=(*EXPORT, "b", "--format", "merged"),
                      says="config.json"),
    "export, shira": Command((*EXPORT, "a", "--format", "shira", *NEW), over=(*EXPORT, "b", "--format", "shira"),
                             says="adapter_config.json"),
    "patch": Command(("patch", "base.gguf", "one", *NEW), over=("patch", "base.gguf", "two"), into=QUANTISED),
    "patch, in place": Command(("patch", QUANTISED, "one"), ((),), over=("unpatch", "patched.gguf", "--patch", "two"),
                               into=QUANTISED, in_place=True),
    "unpatch": Command(("unpatch", QUANTISED), ((),), over=("patch", "base.gguf", "one"), into=QUANTISED,
                       in_place=True),
    "compare": Command(("compare", "--config", "study.yaml"), ((),)),
    "sequence": Command(("sequence", "--config", "sequence.yaml"), ((),)),
}  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    """What a command leaves when nothing disturbs it, over what, and how long that took."""

    before: dict
    after: dict
    seconds: float


class Desk:
    """A folder with all that the commands read, and a warm process that runs them."""

    def __init__(self, warm, given, folder):
        self.warm, self.folder = warm, folder
        self.inputs = folder / "inputs"
        self.known = {}
        rows = [json.loads(line) for line in (given / "wordnet" / "wordnet-train.jsonl").read_text().splitlines()]
        self.inputs.mkdir()
        for name, kept in (("words", rows), ("few", rows[:4])):
            (self.inputs / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        shutil.copytree(given / "my-model", self.inputs / "my-model")
        task = {"train": "words.jsonl", "validation": "few.jsonl", "test": "few.jsonl"}
        train = {"steps": 2, "batch_size": 4, "scoring_examples": 4}
        arms = [{"rule": "gallop", "density": 0.05, "lrs": [1e-3]}, {"baseline": "lora", "lrs": [1e-3]}]
        study = {"model": "my-model", "tasks": {"words": task}, "seeds": [0, 1], "generate": 0}
        parts = {part: task[part] for part in ("train", "test")}
        sequence = {"model": "my-model", "tasks": {"one": parts, "two": parts}, "rule": "gallop", "density": 0.05}
        for name, content in (("study", study | {"arms": arms}), ("sequence", sequence)):
            (self.inputs / f"{name}.yaml").write_text(yaml.safe_dump(content | {"train": train}))
        for name, seed in (("a", "1"), ("b", "2")):
            self.run(self.inputs, (*SHORT, "4", *ENTRIES, "--seed", seed, "--output", name))
        self.run(self.inputs, (*EXPORT, "a", "--format", "merged", "--output", "tuned"))
        quantised_file.write_gguf(self.inputs / "base.gguf")
        for seed, name in enumerate(("one", "two")):
            quantised_file.write_patch(self.inputs / "base.gguf", self.inputs / name, seed)
        self.run(self.inputs, ("patch", "base.gguf", "two", "--output", "patched.gguf"))

    def run(self, folder, words, status=(0,), **environment):
        """Runs a command to its end; what it said."""
        done = self.warm.run("finepoint", *words, folder=folder, **environment)
        assert done.returncode in status, done.stdout
        assert "Traceback" not in done.stdout, done.stdout
        return done.stdout

    def place(self, folder, name=""):
        """A new folder to run a command in: its inputs are there, and what it is to write over."""
        folder.mkdir(parents=True)
        for path in self.inputs.iterdir():
            (folder / path.name).symlink_to(path)
        if name and COMMANDS[name].over:
            self.undisturbed(name)
            shutil.copytree(self.folder / name / "earlier", folder / "out")
        return folder

    def undisturbed(self, name):
        if name not in self.known:
            command = COMMANDS[name]
            folder = self.place(self.folder / name)
            if command.over:
                self.run(folder, (*command.over, "--output", command.into))
                shutil.copytree(folder / "out", folder / "earlier")
            before = results(folder / "out")
            started = time.perf_counter()
            self.run(folder, command.line[1:])
            self.known[name] = Undisturbed(before, results(folder / "out"), time.perf_counter() - started)
        return self.known[name]

    def killed(self, folder, words, after):
        """Starts a command and kills it after so many seconds; whether it was still running."""
        started = self.warm.start("finepoint", *words, folder=folder, said=folder / "said")
        time.sleep(after)
        started.kill()
        return started.wait() is None

    def check(self, folder, name):
        """What must hold right after a fault: no file is torn, and what is written over is the old or the new."""
        command, whole = COMMANDS[name], self.undisturbed(name)
        found = results(folder / "out")
        if command.over and command.words[0] != "train":
            for file, content in found.items():
                assert content in (whole.before.get(file), whole.after.get(file)), f"{file} is neither old nor new"
            if command.says in found:
                assert any(all(found[file] == side.get(file) for file in found) for side in vars(whole).values()
                           if isinstance(side, dict)), "old files and new ones are together"  # fmt: skip

    def finish(self, folder, name):
        """What a person types after a fault, until the command is done; the results are those without the fault."""
        command = COMMANDS[name]
        said = ""
        for more in command.after:
            said += self.run(folder, (*command.line[1:], *more), status=(0, 2))
            last = said.splitlines()[-1]
            if not last.startswith(f"finepoint {command.words[0]}: ") or is_done(last):
                break
        else:
            raise AssertionError(f"{name} cannot be finished: {said}")
        assert results(folder / "out") == self.undisturbed(name).after
        assert leftovers(folder) == []
        return said


def is_done(said):
    """Whether a command says that there is nothing left to do: it was killed when all was written."""
    done = (
        "has done its 8 steps",
        "the search in out is done",
        "is patched with one already",
        "is not patched, as far",
    )
    return any(words in said for words in done)


TIMES = ("seconds", "date", "finished", "runtime", "per_second", "peak_bytes", "versions", "machine", "config")
APART = ("run.json", "study.json", "log.jsonl", "checkpoints", "statistics", "search", "seconds.json")
"""what says how a run went, and what is kept for the next: another run need not leave the same"""


def timeless(value):
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {key: timeless(found) for key, found in value.items() if not any(time in key for time in TIMES)}
    return [timeless(found) for found in value] if isinstance(value, list) else value


def results(folder):
    """What another run must leave the same: the bytes of files, JSON without times."""
    found = {}
    for path in whole(folder):
        if set(path.relative_to(folder).parts) & set(APART):
            continue
        is_record = path.suffix == ".json" and path.name != "finepoint_config.json"
        content = timeless(json.loads(path.read_text())) if is_record else sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = content
    return found


def whole(folder):
    """The files of a folder, each read to its end; temporary ones, whose names begin with a dot, are passed over."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    for path in files:
        # A checkpoint that was killed has no seal, and nobody takes it.
        if path.parent.parent.name == "checkpoints" and not (path.parent / "sealed.json").is_file():
            continue
        try:
            read(path)
        except Exception as error:
            raise AssertionError(f"{path} is torn: {error}") from error
    return files


def read(path):
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        for line in path.read_text().splitlines():
            json.loads(line)
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            assert file.keys()


def leftovers(folder):
    """Temporary files and locks, which a finished command should not leave."""
    return [str(path) for path in folder.rglob(".*")]
