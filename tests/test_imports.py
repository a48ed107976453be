"""Imports run downwards from room to room, within a room in no circle; heavy ones come late."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import finepoint
import finepoint.data
import finepoint.models
from finepoint import moved
from finepoint.baselines.registry import BASELINES
from finepoint.training.keep import PROTECTIONS
from finepoint.training.loss import LOSSES

ROOT = Path(finepoint.__file__).parent
# The rooms from top to bottom; whoever stands in one line knows nothing of each other.
ORDER = (
    {"cli"}, {"reporting", "memory"}, {"studies"}, {"alignment"}, {"evaluation", "huggingface", "exchange", "sync"},
    {"training"}, {"baselines"}, {"tuner"}, {"adapters", "selection"}, {"data"}, {"models"}, {"runtime"},
)  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
GROUND = {"errors", "version", "moved"}
PATHS = sorted(ROOT.rglob("*.py"))


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("finepoint", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {module_of(path): path for path in PATHS}


def imported(path):
    """The modules of ours that a file imports anywhere, within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] == "finepoint":
                yield name if name in MODULES else name.rpartition(".")[0]


def room_of(module):
    return [*module.split("."), "cli"][1].replace("__main__", "cli")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    if path == ROOT / "__init__.py":
        return  # the public names, each imported when first used
    here = room_of(module_of(path))
    for module in imported(path):
        there = room_of(module)
        if there != here and there not in GROUND:
            assert here not in GROUND
            assert LEVEL[here] < LEVEL[there], f"{module} stands above or beside"


def test_no_circle():
    left = {name: set(imported(path)) & set(MODULES) - {name, "finepoint"} for name, path in MODULES.items()}
    # The command line's first file knows the commands by name, and they know it no more than to print.
    left.pop("finepoint")
    while free := {name for name, needs in left.items() if not needs & set(left)}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert sorted(left) == []


def test_nothing_heavy_is_imported_before_a_command_needs_it():
    code = (
        "import sys; from finepoint.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "import finepoint\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_every_public_name_exists():
    for name in finepoint.__all__:
        assert getattr(finepoint, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = finepoint.nonsense


def test_functions_fit_on_a_screen():
    lengths = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > 80} == {}


def test_completion_shows_what_is_public_and_old_names_still_work(caplog):
    assert dir(finepoint) == sorted(finepoint.__all__)
    for room in (finepoint.data, finepoint.models, finepoint.sync):
        assert len(dir(room)) < 6
        assert all(getattr(room, name).__doc__ for name in dir(room))
    for old, new in finepoint._RENAMED.items():
        caplog.clear()
        assert getattr(finepoint, old) is getattr(finepoint, new)
        assert caplog.messages == [f"finepoint.{old} is called finepoint.{new} now"]


FORMER = """
import sys
from finepoint import ranks
from finepoint.adapters.verification import verify
from finepoint.batches import Collator, encode_all
from finepoint.cli.import_ import CONFIG, ImportConfig
from finepoint.cli.train import print_search, run
from finepoint.choosing.rules import RULES
from finepoint.config import CompareConfig, EvalConfig, TrainConfig
from finepoint.data import as_examples, read_examples
from finepoint.measuring.generation import written
from finepoint.models import load_model, load_tokenizer
from finepoint.recipes.table import recipe
from finepoint.training import kernels
from finepoint.training.kernels import plain
from finepoint.reporting.intervals import interval
from finepoint.runtime.extras import needing
from finepoint.runtime.peak import peak_bytes
from finepoint.training.run import fit
from finepoint.training.tuner import SparseTuner
from finepoint.training.workplace import prepare
import finepoint.selection.rules, finepoint.tuner.kernels.plain, finepoint.tuner.tuner
assert finepoint.selection.rules.RULES is RULES and finepoint.tuner.kernels.plain is plain
assert finepoint.tuner.tuner.SparseTuner is SparseTuner is finepoint.SparseTuner
assert plain.__spec__.name == "finepoint.tuner.kernels.plain"
assert CONFIG is ImportConfig and run.__name__ == "run_train"
print("done")
"""


def test_modules_are_found_under_their_former_names_and_are_the_same_ones():
    done = subprocess.run([sys.executable, "-W", "error", "-c", FORMER], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
    assert "finepoint.training.tuner is called finepoint.tuner.tuner now" in done.stderr


@pytest.mark.parametrize("old", sorted(moved.FILES))
def test_no_former_name_hides_a_file_and_each_leads_to_one(old):
    assert f"finepoint.{old}" not in MODULES
    assert moved.new_name(f"finepoint.{old}") in MODULES


def test_whatever_a_user_meets_prints_in_one_line(llama):
    indices = finepoint.select(llama, rule="random", density=0.1, seed=0)
    with finepoint.SparseTuner(llama, indices, audit=False) as tuner:
        adapter = tuner.adapter()
        met = [indices, tuner, adapter, adapter.fingerprint, *adapter.changes.values()]
        assert f"{indices.count:,} entries" in repr(adapter)
        met += [llama.finepoint, *tuner.entries.values(), BASELINES["lora"], PROTECTIONS["kl"], LOSSES["dft"]]
        assert repr(llama.finepoint) == f"Deltas({indices.count:,} entries of {len(indices)} weights)"
    kept = finepoint.AdapterSet(llama)
    kept.add("a", adapter)
    assert repr(kept) == "AdapterSet(a)"
    assert all(len(repr(each)) < 150 and "\n" not in repr(each) for each in (*met, kept))
    assert adapter._repr_html_().count("<tr>") == 1 + len({name.split(".", 4)[-1] for name in adapter})
