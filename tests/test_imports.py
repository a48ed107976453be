"""Imports run one way: cli -> reporting -> studies -> measuring -> training -> adapters, choosing -> data, models.

Heavy ones come late.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import finepoint

ROOT = Path(finepoint.__file__).parent
# What each room may import from; `choosing` and `adapters` know nothing of each other.
ALLOWED = {
    "cli": {
        "integrations",
        "reporting",
        "studies",
        "measuring",
        "training",
        "exchange",
        "adapters",
        "choosing",
        "recipes",
        "ground",
    },
    # A report reads what a study left, and inspects adapters; of how a study runs it knows nothing.
    "reporting": {"studies", "adapters", "choosing", "ground"},
    "studies": {"measuring", "training", "adapters", "choosing", "ground"},
    "measuring": {"training", "adapters", "choosing", "recipes", "ground"},
    # Other people's trainers: beside studies, below the command line.
    "integrations": {"measuring", "training", "adapters", "choosing", "ground"},
    "exchange": {"adapters", "choosing", "ground"},
    "training": {"adapters", "choosing", "ground"},
    "adapters": {"ground"},
    "choosing": {"ground"},
    "recipes": {"ground"},
    "ground": {"ground"},
}


def room(path):
    parts = path.relative_to(ROOT).parts
    return "cli" if parts == ("__main__.py",) else parts[0] if len(parts) > 1 else "ground"


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "finepoint" and len(parts) > 1:
                yield parts[1] if (ROOT / parts[1]).is_dir() else "ground"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    if path == ROOT / "__init__.py":
        return  # the public names, each imported when first used
    here = room(path)
    assert set(imported_rooms(path)) <= ALLOWED[here] | {here}


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


def test_completion_shows_what_is_public_and_old_names_still_work():
    assert dir(finepoint) == sorted(finepoint.__all__)
    for old, new in {"lines": "scale_by_depth", "report": "trainable_parameters", "widened": "in_wider_dtype"}.items():
        with pytest.warns(FutureWarning, match=f"is called finepoint.{new} now"):
            assert getattr(finepoint, old) is getattr(finepoint, new)


def test_whatever_a_user_meets_prints_in_one_line(llama):
    indices = finepoint.select(llama, rule="random", density=0.1, seed=0)
    with finepoint.SparseTuner(llama, indices, audit=False) as tuner:
        adapter = tuner.adapter()
        met = [indices, tuner, adapter, adapter.fingerprint, *adapter.changes.values()]
        assert f"{indices.count:,} entries" in repr(adapter)
    kept = finepoint.AdapterSet(llama)
    kept.add("a", adapter)
    assert repr(kept) == "AdapterSet(a)"
    assert all(len(repr(each)) < 150 and "\n" not in repr(each) for each in (*met, kept))
    assert adapter._repr_html_().count("<tr>") == 1 + len({name.split(".", 4)[-1] for name in adapter})
