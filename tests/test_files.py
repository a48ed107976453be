"""What a killed process leaves half written, and who takes it away."""

import subprocess
import sys

from finepoint.runtime.files import claim_folder, contents

KILLED = """
import os, sys
from pathlib import Path
from finepoint.runtime.files import write_atomic

def write(path):
    path.write_text("half")
    (path.parent / ".tmpHIH6fb").write_text("half")  # where safetensors writes before it moves the file to its name
    os._exit(9)

write_atomic(Path(sys.argv[1]) / "adapter.safetensors", write)
"""


def test_what_a_killed_writer_leaves_is_taken_away_whatever_it_called_its_own_files(tmp_path):
    (tmp_path / "adapter.safetensors").write_text("earlier")
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False).returncode == 9
    assert len(list(tmp_path.rglob("*"))) == 4, "the writer was to be killed before it had taken its files away"
    assert contents(tmp_path) == {"adapter.safetensors"}
    with claim_folder(tmp_path, overwrite=True):
        pass
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("adapter.safetensors", "earlier")]
