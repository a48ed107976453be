"""Without any extra the core imports, chooses, trains, evaluates, merges; what needs an extra names it in one line.

All in one process that cannot see the extras' packages: for `import`, `find_spec` and `importlib.metadata` alike they
are not installed.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import write_lines
from studies import write_study

EXTRAS = {
    "numba", "llvmlite", "peft", "datasets", "ray", "matplotlib", "jinja2", "trl", "lm_eval", "torchao",
    "bitsandbytes", "tensorboard", "tensorboardX", "trackio", "wandb", "mlflow", "gguf",
}  # fmt: skip

SCRIPT = """
import contextlib, importlib.metadata, io, json, sys

EXTRAS = set(json.loads(sys.argv[1]))


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in EXTRAS else self.finder.find_spec(name, path, target)

    def find_distributions(self, *args, **kwargs):
        found = self.finder.find_distributions(*args, **kwargs) if hasattr(self.finder, "find_distributions") else ()
        return (one for one in found if (one.name or "").lower().replace("-", "_") not in EXTRAS)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from finepoint.cli import main

for line in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(line)
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
print(json.dumps(sorted(EXTRAS & set(sys.modules))))
"""


def without_extras(commands):
    """Status, stdout and stderr of each command; last the packages that were imported after all."""
    arguments = [json.dumps(sorted(EXTRAS)), json.dumps([[str(word) for word in line] for line in commands])]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def place(model_folder, choice_file, tmp_path):
    text = write_lines(tmp_path / "text.jsonl", [{"text": "hello you"}, {"text": "abc"}])
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for method in ("bitsandbytes", "torchao"):
        folder = shutil.copytree(model_folder, tmp_path / method)
        settings = json.loads((folder / "config.json").read_text())
        settings["quantization_config"] = {
            "quant_method": method,
            "load_in_4bit": True,
            "quant_type": "int4_weight_only",
        }
        (folder / "config.json").write_text(json.dumps(settings))
    write_study(tmp_path / "study")
    return {"model": model_folder, "data": choice_file, "text": text, "tmp": tmp_path}


def test_the_core_needs_no_extra_and_every_extra_is_named(place):
    model, data, tmp = ["--model", place["model"]], ["--data", place["data"]], place["tmp"]
    train = ["train", *model, *data, "--steps", "3", "--density", "0.05", "--batch-size", "8"]
    works = [
        ["rules"],
        ["select", *model, *data, "--density", "0.01", "--output", tmp / "s"],
        [*train, "--output", tmp / "a", "--save-every", "2", "--validation", place["data"]],
        [*train, "--output", tmp / "c", "--exclude", tmp / "a"],
        ["merge", tmp / "a", tmp / "c", "--output", tmp / "m"],
        ["eval", *model, "--adapter", tmp / "m", "--id", f"own={place['data']}", "--probe", f"t={place['text']}",
         "--limit", "8", "--generate", "2", "--new-tokens", "2"],
        ["inspect", tmp / "m"],
        ["verify", *model, tmp / "a"],
        ["export", *model, "--adapter", tmp / "a", "--format", "merged", "--output", tmp / "merged"],
        ["plan", *model, "--tokens", "32"],
    ]  # fmt: skip
    arms = json.dumps([{"rule": "random"}])
    tasks = json.dumps({"x": {"train": place["data"], "validation": place["data"], "test": place["data"]}})
    needs = {
        "peft": ["train", *model, *data, "--steps", "3", "--output", tmp / "l", "--baseline", "lora"],
        "hub": ["data", "boolq", "--output", tmp / "boolq"],
        "ray": ["compare", *model, "--tasks", tasks, "--arms", arms, "--output", tmp / "r", "--executor", "ray"],
        "report": ["report", tmp / "study"],
        "lm-eval": ["eval", *model, "--tasks", "hellaswag"],
        "gguf": ["eval", "--model", tmp / "model.gguf", "--id", f"own={place['data']}"],
        "quantised": [*train, "--output", tmp / "q", "--quantise", "int8"],
        "bitsandbytes": [*train, "--output", tmp / "n", "--quantise", "nf4"],
        "tracking": [*train, "--output", tmp / "t", "--report-to", "tensorboard"],
        "wandb": [*train, "--output", tmp / "w", "--report-to", "wandb"],
        "mlflow": [*train, "--output", tmp / "f", "--report-to", "mlflow"],
    }
    wanted = [*needs.items()]
    for method, extra in {"bitsandbytes": "bitsandbytes", "torchao": "quantised"}.items():  # checkpoints of theirs
        wanted.append((extra, ["eval", "--model", tmp / method, "--id", f"own={place['data']}"]))
    *found, imported = without_extras([*works, *(line for _, line in wanted)])
    for line, (status, _, err) in zip(works, found, strict=False):
        assert status == 0, (line, err)
    for (extra, _), (status, out, err) in zip(wanted, found[len(works) :], strict=True):
        assert status == 2, (extra, err)
        assert out == ""
        (line,) = [line for line in err.splitlines() if line.startswith("finepoint ")]  # beside the log
        assert line.endswith(f"pip install 'finepoint[{extra}]'"), err
        assert "Traceback" not in err
    assert imported == []


def test_the_packages_are_hidden_in_this_test():
    code = SCRIPT.partition("from finepoint")[0] + (
        "import importlib.util\n"
        "print([name for name in sorted(EXTRAS) if importlib.util.find_spec(name)])\n"
        "try: importlib.metadata.version('peft'); print('there')\n"
        "except importlib.metadata.PackageNotFoundError: print('hidden')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(sorted(EXTRAS))], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["[]", "hidden"]
