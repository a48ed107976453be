"""Runs generators of reasoning-gym out of its wheel: `python generator_process.py WHEEL`, pools as JSON on stdin.

A process of its own, because it puts empty packages in the place of those whose `__init__` imports every generator, and
with them libraries that nobody here needs. Imports nothing of finepoint.
"""

import json
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def main(wheel: str) -> None:
    pools = json.load(sys.stdin)
    for pool in pools:
        parent = f"reasoning_gym.{pool['module'].split('.')[0]}"
        for name in ("reasoning_gym", parent):
            if name not in sys.modules:
                sys.modules[name] = package = ModuleType(name)
                package.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        import_module(f"reasoning_gym.{pool['module']}")
    json.dump([rows(pool) for pool in pools], sys.stdout)


def rows(pool: dict[str, Any]) -> list[dict[str, Any]]:
    factory = sys.modules["reasoning_gym.factory"]
    data = factory.create_dataset(pool["name"], seed=pool["seed"], size=pool["size"], **pool["options"])
    templates = getattr(data, "task_indices", None)  # gsm_symbolic: which problem the numbers were put into
    found = []
    for i in range(pool["size"]):
        row = data[i]
        found.append({
            "question": question(row),
            "answer": row["answer"],
            "score": data.score_answer(row["answer"], row),
            "group": f"{pool['name']}-{templates[i]}" if templates else "",
        })  # fmt: skip
    return found


def question(row: dict[str, Any]) -> str:
    """The question, without the sentence around it where it is a sum."""
    expression = row["metadata"].get("expression")
    return f"{expression} =" if expression else row["question"].strip()


if __name__ == "__main__":
    main(sys.argv[1])
