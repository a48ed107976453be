"""The code blocks of a page, run as a reader would: in order, in one folder, Python in one process, sh in bash.

python tests/documents.py PAGE
"""

import json
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

MARKS = ("# needs a network", "# needs a GPU", "# takes minutes")
"""First lines of blocks that a reader runs and a test does not."""


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    """of the page, where the code begins"""

    @property
    def is_marked(self):
        return self.code.startswith(MARKS)


def blocks(text, *languages):
    """The fenced blocks of a page in these languages, also those inside a list or a note."""
    found = re.finditer(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [
        Block(match[2], textwrap.dedent(match[3]), text[: match.start(3)].count("\n") + 1)
        for match in found
        if match[2] in languages
    ]


def run(page):
    """Runs the unmarked blocks of a page in the current folder."""
    names = {"__name__": "__main__"}
    sys.path.insert(0, "")  # as in a session of Python's
    for block in blocks(Path(page).read_text(), "python", "sh"):
        print(f"-- {page}, line {block.line}{': left out' if block.is_marked else ''}", flush=True)
        if block.is_marked:
            continue
        if block.language == "python":
            # Empty lines before it, so that a traceback names the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)


def prepare(folder):
    """What the pages take as given: a model in `my-model`, and small files in place of `finepoint data`'s."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from conftest import VOCABULARY, make_tokenizer

    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder / "my-model")
    make_tokenizer().save_pretrained(folder / "my-model")
    reviews = [{"prompt": f"{words} film, {i}\nA", "choices": [" good", " bad"], "answer": int("poor" in words)}
               for i in range(8) for words in ("a fine", "a poor", "a warm", "a cold and poor")]  # fmt: skip
    words = [{"prompt": f"a {kind} with {i} legs:", "choices": [" chair", " dog", " sea", " day"], "answer": i % 4}
             for i in range(8) for kind in ("thing", "beast", "place", "time")]  # fmt: skip
    sums = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(5) for b in range(6)]
    news = [{"text": "the town has a fine old bridge and a new one, which is said to be a good deal wider"}] * 3
    for name, rows in {
        "vader": dict.fromkeys(("movies-train", "movies-validation", "movies-test", "amazon", "tweets", "nyt"), reviews)
                 | {"news": news},
        "wordnet": dict.fromkeys(("wordnet-train", "wordnet-validation", "wordnet-test"), words),
        "arithmetic": dict.fromkeys(("arithmetic-train", "arithmetic-validation", "arithmetic-test"), sums),
    }.items():  # fmt: skip
        (folder / name).mkdir()
        for file, lines in rows.items():
            (folder / name / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


if __name__ == "__main__":
    run(sys.argv[1])
