"""What finepoint promises of every family, as checks. Run as a script, they write docs/supported-models.md."""

import copy
import re
import tempfile
import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import finepoint
from conftest import assert_same_bits, make_tokenizer, snapshot
from families import FAMILIES, Batch, Family, tokens
from finepoint.data.batches import IGNORED, Collator, Packer, Row, accepted
from finepoint.data.examples import Choices
from finepoint.errors import FinepointError
from finepoint.evaluation.scoring import choice_likelihoods
from finepoint.models.probing import keeps_apart
from finepoint.training.loss import completion_loss
from finepoint.training.writing import written
from reference import dense_masked_training

PAGE = Path(__file__).parent.parent / "docs" / "supported-models.md"
COLUMNS = ("family", "default targets", "all weights", "batches", "merged")


def generic(model: Any) -> Any:
    """In eval mode, with a little noise everywhere, so that no weight is 0 or 1 by construction."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0  # as some models have it whenever they are loaded
    model.config._experts_implementation = "eager"  # the grouped product of CPUs knows no float64
    return model.eval()


@dataclass(frozen=True)
class Trained:
    """What became of the target weights; all that the loss reaches were trained, saved and reverted exactly."""

    reached: int = 0
    unreached: int = 0
    """weights whose entries stay as they are, since the loss of the batches does not depend on them"""
    refused: str = ""
    """why the family cannot be trained, in one line"""


def check_training(family: Family, targets: str = "linear") -> Trained:
    """Selects, trains three steps, saves, reverts: equal to dense training in float64, and exact to the bit.

    Raises:
        AssertionError: something is wrong that was not refused.
    """
    model = generic(family.build()).double()
    generator = torch.Generator().manual_seed(1)
    batches = [family.batch(generator) for _ in range(3)]
    before, dense = snapshot(model), copy.deepcopy(model)
    try:
        indices = dict(finepoint.select(
            model, batches, rule="gradient", density=0.1, targets=targets, scope="weight"
        ))  # fmt: skip
        tuner = finepoint.SparseTuner(model, indices)
    except FinepointError as error:
        return Trained(refused=one_line(error))
    optimizer = sgd(tuner.parameters())
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = tuner.adapter()
    tuner.close()
    dense_masked_training(dense, indices, [[batch] for batch in batches], sgd)
    reached = compare(snapshot(model), snapshot(dense), before, indices)
    check_saving(model, before, adapter)
    return Trained(reached, len(indices) - reached)


def one_line(error: FinepointError) -> str:
    assert "\n" not in str(error)
    return str(error)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """A step in proportion to the gradient, so that nothing is made of what is only rounding."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def compare(found: Batch, expected: Batch, before: Batch, indices: dict[str, torch.Tensor]) -> int:
    """Every chosen entry is where dense training brings it, every other has its bits; how many weights moved.

    What moved a millionth of the furthest way has no gradient but rounding, which every processor does in its own
    way (biases of keys: at most 3e-8 of it over all families; the least that is reached moves 1e-4 of it).
    """
    ways, wrong = [], []
    for name, positions in indices.items():
        start = before[name].reshape(-1)
        others = torch.ones(len(start), dtype=torch.bool)
        others[positions] = False
        assert torch.equal(found[name].reshape(-1)[others], start[others]), f"{name} moved where it was not chosen"
        way = float((expected[name].reshape(-1) - start)[positions].abs().max())
        off = float((found[name] - expected[name]).abs().max())
        ways.append(way)
        if not off <= 1e-7 * way + 1e-12:  # many models compute norms, routers or scans in float32 whatever they are in
            wrong.append(f"{name} is off by {off:.1g} of {way:.1g}")
    assert not wrong, f"{len(wrong)} of {len(indices)} weights: {', '.join(wrong[:3])}"
    assert max(ways) > 0, "nothing moved"
    return sum(way > 1e-6 * max(ways) for way in ways)


def check_saving(model: Any, before: Batch, adapter: Any) -> None:
    """The adapter, written and read, makes the trained model of the base, and gives the base back, to the bit."""
    trained = snapshot(model)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder, overwrite=True)
        loaded = finepoint.SparseAdapter.load(folder)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(before[name])
    with loaded.applied(model):
        assert_same_bits(trained, snapshot(model))
    assert_same_bits(before, snapshot(model))


def check_batches(family: Family) -> str:
    """The loss of each example is the model's own on this example alone, in any company.

    Returns:
        Why finepoint makes no batches for it, in one line; nothing if it does.

    Raises:
        AssertionError: an example counts otherwise than alone.
    """
    model = generic(family.build())
    generator = torch.Generator().manual_seed(2)
    rows = [example(family, length, generator) for length in (4, 9, 23)]
    try:
        collator = Collator.of(model, make_tokenizer())
        with torch.no_grad():
            alone = [plain_loss(model, row) for row in rows]
            for company in ([0], [1], [2], [0, 2], [2, 1], [0, 1, 2]):
                batch = collator([rows[place] for place in company])
                same(float(completion_loss(model, batch)), [alone[place] for place in company])
            if "classifier" not in family.kind:
                if "position_ids" in accepted(model) and keeps_apart(model):
                    same(float(completion_loss(model, Packer(collator, 16)(rows))), alone)
                check_choices(model)
                check_generation(model)
    except FinepointError as error:
        return one_line(error)
    return ""


def same(loss: float, alone: list[tuple[float, int]]) -> None:
    total, count = map(sum, zip(*alone, strict=True))
    assert abs(loss - total / count) < 1e-5 * loss, f"{len(alone)} rows: a loss of {loss:.6f}, not {total / count:.6f}"


def check_choices(model: Any) -> None:
    """Choices that may share the row of their prompt, which is longer than the window, are as likely as alone."""
    tokenizer = make_tokenizer()
    questions = [
        Choices("what is the answer to abc?", (" yes", " not at all", " no"), 0),
        Choices("so:", ("ab", "bcd"), 1),
    ]
    for question, found in zip(questions, choice_likelihoods(model, tokenizer, questions, 64), strict=True):
        for choice, likelihood in zip(question.choices, found, strict=True):
            prompt, ids = tokenizer(question.prompt)["input_ids"], tokenizer(question.prompt + choice)["input_ids"]
            loss, _ = plain_loss(model, Row(ids, [IGNORED] * len(prompt) + ids[len(prompt) :]))
            assert abs(loss + likelihood) < 1e-5 * loss, f"{choice!r} has {likelihood:.6f}, alone {-loss:.6f}"


def check_generation(model: Any) -> None:
    """Prompts that are gone on with together are gone on with as alone: by the likeliest token after token."""
    tokenizer = make_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("ab:", "say it again, and again:", "1 2 3")]
    for prompt, found in zip(prompts, written(model, tokenizer, prompts, 64, 5), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 5 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(plain_logits(model, ids)[-1].argmax()))
        expected = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert found.text == expected, f"generated {found.text!r}, alone {expected!r}"


def example(family: Family, length: int, generator: torch.Generator) -> Row:
    ids = tokens(generator, 1, length)[0].tolist()
    if "classifier" in family.kind:
        return Row([1, *ids, 2], length % 3)
    return Row(ids, [IGNORED, IGNORED, *ids[2:]])


def plain_loss(model: Any, row: Row) -> tuple[float, int]:
    """The summed loss of one example by the model's own forward, without finepoint, and the labels it is over."""
    logits = plain_logits(model, row.ids)
    if isinstance(row.labels, int):
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels))), 1
    labels = torch.tensor(row.labels)[1:]
    return float(torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum")), int((labels >= 0).sum())


def plain_logits(model: Any, ids: list[int]) -> torch.Tensor:
    plainly = {"use_cache": False} if "use_cache" in accepted(model) else {}
    return model(input_ids=torch.tensor([ids]), **plainly).logits[0]


def check_export(family: Family) -> str:
    """A base in files, merged with an adapter of all its weights, loads as the base with the adapter applied.

    Returns:
        Why it cannot be merged, in one line; nothing if it can.
    """
    with tempfile.TemporaryDirectory() as place:
        made = generic(family.build())
        made.save_pretrained(f"{place}/base")
        kind = type(made)
        model = kind.from_pretrained(f"{place}/base")
        indices = finepoint.select(
            model, rule="random", density=0.1, targets="all", scope="weight", exclude=[padding_rows(model)]
        )
        with finepoint.SparseTuner(model, indices) as tuner:
            for delta in tuner.parameters():
                torch.nn.init.normal_(delta, std=0.1)
            tuner.adapter().save(f"{place}/adapter")
        try:
            finepoint.export(f"{place}/base", f"{place}/adapter", "merged", f"{place}/merged")
        except FinepointError as error:
            return one_line(error)
        assert_same_bits(snapshot(model), snapshot(kind.from_pretrained(f"{place}/merged")))
    return ""


def padding_rows(model: Any) -> dict[str, torch.Tensor]:
    """The entries of the rows of padding, which some models set to 0 whenever they are loaded."""
    own = dict(model.named_parameters())
    found = {f"{at}.weight": module for at, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    return {name: module.padding_idx * module.embedding_dim + torch.arange(module.embedding_dim)
            for name, module in found.items() if module.padding_idx is not None and name in own}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What works of a family."""

    linear: Trained
    all: Trained
    batches: str | None
    """why finepoint makes no batches for it; None where the batches are the user's own"""
    export: str


def check(family: Family) -> Result:
    return Result(
        check_training(family), check_training(family, "all"), check_batches(family) if family.padded else None,
        check_export(family),
    )  # fmt: skip


def row(family: Family, result: Result) -> list[str]:
    """The cells of a family's row in the table."""
    batches = "yours" if result.batches is None else "refused" if result.batches else "as alone"
    return [family.name, weights(result.linear), weights(result.all), batches, "refused" if result.export else "yes"]


def weights(trained: Trained) -> str:
    if trained.refused:
        return "refused"
    return f"{trained.reached} of {trained.reached + trained.unreached}"


HEAD = """# Supported models

finepoint knows no list of architectures: it works on the modules and parameters of any PyTorch model, tries on
the model itself what it cannot know, and refuses in one line what does not hold. This table says what was found
when {count} families of transformers' models were tried, each built tiny with random weights. `make families`
makes it anew; this one is of {date}, with torch {torch} and transformers {transformers}, on a CPU.

- **Default targets, all weights**: of how many weights entries were chosen by their gradient, trained for three
  steps in float64, and ended where dense training with a masked gradient ends (to 1e-7 of their way, since many
  models compute parts in float32 whatever they are in), with all other entries untouched. `12 of 14` says that the
  loss of the batches did not reach the other two, whose entries stay as they are. The adapter was saved, loaded,
  applied and reverted, to the bit. Of models that see or hear and write, the default targets are linear layers of
  the part that writes; `--targets linear-everywhere` takes those of the other parts as well.
- **Batches**: `as alone` says that each example has the loss that it has by itself: in batches of unequal rows, in
  packed rows where the model keeps examples apart, and as choices that share their prompt. `yours`: batches of such
  a model come from your own data loader.
- **Merged**: what `finepoint export --format merged` writes loads as the base with the adapter applied, to the
  bit, all weights being targets.
"""


def page(results: dict[str, Result]) -> str:
    """docs/supported-models.md."""
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    lines = [HEAD.format(count=len(results), date=date.today().isoformat(), **versions)]
    for kind in dict.fromkeys(FAMILIES[name].kind for name in results):
        lines += [f"## {kind[0].upper()}{kind[1:]}", "", f"| {' | '.join(COLUMNS)} |",
                  "| --- | --- | --- | --- | --- |"]  # fmt: skip
        of_kind = [name for name in results if FAMILIES[name].kind == kind]
        lines += [f"| {' | '.join(row(FAMILIES[name], results[name]))} |" for name in of_kind] + [""]
    return "\n".join([*lines, *refusals(results)]).rstrip() + "\n"


def told(name: str, column: str) -> str | None:
    """What the page says of a family; None where it is of other versions than those installed."""
    text = PAGE.read_text()
    if f"torch {torch.__version__.split('+')[0]} and transformers {transformers.__version__}," not in text:
        return None
    cells = next(line for line in text.splitlines() if line.startswith(f"| {name} |")).strip("| ").split(" | ")
    return dict(zip(COLUMNS, cells, strict=True))[column]


def refusals(results: dict[str, Result]) -> list[str]:
    """What was refused, in its own words, with the families of which it was."""
    found: dict[str, list[str]] = {}
    for name, result in results.items():
        texts = {result.linear.refused, result.all.refused, result.batches or "", result.export} - {""}
        for text in sorted(texts):
            found.setdefault(re.sub(r"^/\S+: ", "", text), []).append(name)
    if not found:
        return []
    return ["## What is refused", ""] + [f"- {', '.join(names)}: {text}" for text, names in found.items()]


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    results = {}
    for name, family in FAMILIES.items():
        results[name] = check(family)
        print(" | ".join(row(family, results[name])), flush=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
