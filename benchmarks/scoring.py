"""Scoring multiple choice on SmolLM2-135M beside lm-evaluation-harness (`HFLM`): same items and model, same answers.

Items are real text: sentiment of movie reviews in one word (one token a choice), and which of four continuations
follows a news paragraph (many tokens a choice). Both sides take turns; HFLM runs with the best of three batch sizes.

    python benchmarks/scoring.py
"""

import random
import time

from common import options, report, text_file

BATCH_SIZES = (1, 8, 32)


def main() -> None:
    given = options(__doc__, items=64)
    from finepoint.data.examples import Choices, read_examples
    from finepoint.models.loading import load_model, load_tokenizer

    count = 16 if given.quick else given.items
    model, tokenizer = load_model("smollm2", "float32"), load_tokenizer("smollm2")
    reviews = [example for example in read_examples(text_file("movies-test"))[:count] if isinstance(example, Choices)]
    sizes = BATCH_SIZES[1:2] if given.quick else BATCH_SIZES
    rows = [
        compared("one word, 2 choices", model, tokenizer, reviews, sizes),
        compared("continuation, 4 choices", model, tokenizer, continuations(count), sizes),
    ]
    report("scoring", given.output,
           ["items", "count", "lm-eval s", "batch size", "finepoint s", "ratio", "same answers", "largest difference"],
           rows)  # fmt: skip


def continuations(count: int):
    """Which of four endings follows a paragraph: its own, or those of three others."""
    from finepoint.data.examples import Choices, Text, read_examples

    texts = [e.text.split() for e in read_examples(text_file()) if isinstance(e, Text)]
    spans = [words[at : at + 100] for words in texts for at in range(0, len(words) - 100, 100)]
    draw = random.Random(0)
    draw.shuffle(spans)
    endings = [" " + " ".join(words[80:]) for words in spans]
    items = []
    for i, words in enumerate(spans[:count]):
        choices = [endings[i], *draw.sample(endings[:i] + endings[i + 1 :], 3)]
        draw.shuffle(choices)
        items.append(Choices(" ".join(words[:80]), choices, choices.index(endings[i])))
    return items


def compared(name: str, model, tokenizer, items, sizes) -> dict[str, object]:
    """Seconds of both, whether the likeliest choices are the same, and by how much likelihoods differ at most."""
    theirs = {size: lm_eval(model, tokenizer, items, size) for size in sizes}
    size = min(theirs, key=lambda size: theirs[size][0])
    ours = finepoint(model, tokenizer, items)
    again = lm_eval(model, tokenizer, items, size)
    their_seconds, their_values = min(theirs[size][0], again[0]), again[1]
    our_seconds, our_values = min(ours[0], finepoint(model, tokenizer, items)[0]), ours[1]
    answers = [[max(range(len(row)), key=row.__getitem__) for row in by_item(values, items)]
               for values in (their_values, our_values)]  # fmt: skip
    return {"items": name, "count": len(items), "lm-eval s": their_seconds, "batch size": size,
            "finepoint s": our_seconds, "ratio": our_seconds / their_seconds,
            "same answers": f"{sum(a == b for a, b in zip(*answers, strict=True))} of {len(items)}",
            "largest difference": max(abs(a - b) for a, b in zip(their_values, our_values, strict=True))}  # fmt: skip


def lm_eval(model, tokenizer, items, batch_size: int) -> tuple[float, list[float]]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=(item.prompt, choice), idx=i)
                for item in items for i, choice in enumerate(item.choices)]  # fmt: skip
    started = time.perf_counter()
    found = wrapped.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - started, [value for value, _ in found]


def finepoint(model, tokenizer, items) -> tuple[float, list[float]]:
    from finepoint.evaluation.scoring import choice_likelihoods

    started = time.perf_counter()
    found = choice_likelihoods(model, tokenizer, items, 8192)
    return time.perf_counter() - started, [value for row in found for value in row]


def by_item(values, items):
    rows, start = [], 0
    for item in items:
        rows.append(values[start : start + len(item.choices)])
        start += len(item.choices)
    return rows


if __name__ == "__main__":
    main()
