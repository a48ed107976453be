"""What the examples share: where their model and data come from. The defaults are real and small: SmolLM2-135M, VADER's
reviews and WordNet's definitions, fetched out of packages at first use."""

import argparse
from pathlib import Path

from finepoint.data.recipes.table import recipe


def options(doc: str, **defaults: int) -> argparse.Namespace:
    """--model, --data (a folder that holds `vader/` and `wordnet/`), --output, and a number for each default."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id or smollm2")
    parser.add_argument("--data", default="runs/data")
    parser.add_argument("--output", default="runs/examples")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def fetched(folder: str, name: str) -> Path:
    """The folder with a recipe's files, written where it is not there yet: `finepoint data NAME`."""
    place = Path(folder) / name
    if not place.is_dir():
        recipe(name).write(str(place), False)
    return place
