"""What `finepoint eval`, `generate`, `chat` and `demo` take.

Nothing heavy is imported here, so that help is instant.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from finepoint.errors import FinepointError
from finepoint.runtime.settings import (
    ANY_BASE,
    ANY_DTYPE,
    AS_TRAINED,
    CHAT_TURNS,
    DTYPE,
    JSON,
    LARGEST_SEED,
    MODEL,
    OVERWRITE,
    ChatTurns,
    DType,
    Quantise,
    refuse_without,
    setting,
)

# fmt: off


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure a model, and adapters on it: in distribution, out of distribution, and what was forgotten."""

    model: str = setting(MODEL)
    adapter: list[str] = setting("adapter folders, each measured on its own against the base", [])
    id: list[str] = setting("in-distribution sets, each NAME=FILE (or a folder, or org/name:split of the hub)", [])
    ood: list[str] = setting("out-of-distribution sets, each NAME=FILE", [])
    probe: list[str] = setting("texts whose likelihood shows forgetting, each NAME=FILE", [])
    columns: dict[str, str] = setting(
        "what the columns of these sets are called: prompt=question completion=answer; one without any of them is read "
        "as it is", {})
    protect: str | list[str] | None = setting(
        "text whose predictions were to be kept, a file like the others, news, novels, or own (the base writes other "
        "texts than training holds): how far each adapter has moved them (KL)",
        None)
    protect_examples: int | None = setting(
        "at most so many of these texts, always the same, up to 256 tokens of each; 64, of own alone 32 where not "
        "given", None, least=1)
    tasks: list[str] = setting("tasks of lm-evaluation-harness, by name; needs the extra lm-eval", [])
    include_path: str | None = setting("folder with tasks of your own for lm-evaluation-harness, as YAML", None)
    output: str | None = setting("JSON file to write", None)
    limit: int | None = setting(
        "at most so many examples of each set, always the same; of each task the first", None, least=1)
    max_length: int | None = setting("longest example in tokens; the model's context where not given", None, least=1)
    chat_turns: ChatTurns = setting(CHAT_TURNS, "all")
    scale: list[float] = setting(
        "strengths at which each adapter is measured too (WiSE-FT), e.g. 0.25 0.5: base + strength x change", [])
    generate: int = setting(
        "at most so many examples of each set are answered by generation as well; 0 for none", 0, least=0)
    new_tokens: int = setting("most tokens to generate where an answer is written", 64, least=1)
    dtype: DType = setting(DTYPE, "auto")
    any_dtype: bool = setting(ANY_DTYPE, False)
    any_base: bool = setting(ANY_BASE, False)
    quantise: Quantise | None = setting(AS_TRAINED, None)
    overwrite: bool = setting("replace the output file", False)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What asking a model, once or in a conversation, has in common."""

    model: str = setting(MODEL)
    temperature: float = setting("0 takes the likeliest token after token, more draws them", 0.0, least=0)
    seed: int = setting("of what is drawn", 0, least=0, most=LARGEST_SEED)
    dtype: DType = setting(DTYPE, "auto")
    any_dtype: bool = setting(ANY_DTYPE, False)
    any_base: bool = setting(ANY_BASE, False)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Asking):
    """Ask a model, and adapters on it, and print what they write."""

    adapter: list[str] = setting("adapter folders, each asked on its own; the model as it is where none is given", [])
    prompt: list[str] = setting("texts to answer", [])
    prompts: str | None = setting(
        "prompts from whatever --data takes, or a text file, a line each; - for the lines of stdin", None)
    columns: dict[str, str] = setting("what their columns are called: prompt=question", {})
    limit: int | None = setting("at most so many prompts of the file, the first", None, least=1)
    base: bool = setting("ask the model without adapters as well", False)
    raw: bool = setting(
        "give texts as they are; else they go through the chat template, where there is one and the adapter was not "
        "trained without it", False)
    new_tokens: int = setting("most tokens to write", 64, least=1)
    max_length: int | None = setting(
        "prompt and answer in tokens; the model's context where not given", None, least=1)
    quantise: Quantise | None = setting(AS_TRAINED, None)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Asking):
    """Talk to a model, and switch adapters on and off in the middle of it."""

    adapter: list[str] = setting("adapter folders, called by the last part of their names; the last is asked first", [])
    system: str | None = setting("a system turn, before the first", None)
    raw: bool = setting(
        "every text is a prompt of its own, without the chat template, as it is in any case where there is none or the "
        "adapter was trained without it", False)
    new_tokens: int = setting("most tokens of an answer", 256, least=1)
    max_length: int | None = setting(
        "the conversation in tokens, of which the beginning is lost; the model's context where not given", None,
        least=1)
    quantise: Quantise | None = setting(AS_TRAINED, None)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Fine-tune SmolLM2-135M on movie reviews: LoRA, random entries, and columns held to what it writes itself."""

    output: str = setting("folder to write", "runs/demo")
    steps: int = setting("optimizer steps of each run", 40, least=1)
    limit: int = setting("at most so many examples of the ID set, three eighths as many of each OOD set", 200, least=1)
    overwrite: bool = setting(OVERWRITE, False)
    json: bool = setting(JSON, False)


# fmt: on


def files_by_name(named_files: Sequence[str], kind: str) -> dict[str, str]:
    """Files by name, from `NAME=FILE` strings.

    Args:
        kind: the flag.

    Raises:
        FinepointError: a string of another form, or a name given twice.
    """
    found: dict[str, str] = {}
    for text in named_files:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise FinepointError(f"--{kind} {text!r}: expected NAME=FILE, e.g. {kind}=test.jsonl")
        if name in found:
            raise FinepointError(f"--{kind} names {name!r} twice; give every set its own name")
        found[name] = path
    return found


def refuse_unmeasurable(config: EvalConfig, sets: bool, adapters: bool) -> None:
    """Refuses to measure nothing, or what has nothing to be compared with.

    Args:
        sets, adapters: whether there are any.

    Raises:
        FinepointError: it is so.
    """
    refuse_without(config, "protect", ["protect_examples"])
    if not sets and not config.tasks and not config.protect:
        raise FinepointError("there is nothing to evaluate on; give --id, --ood or --probe NAME=FILE, or --tasks NAME")
    if config.protect and not adapters:
        raise FinepointError("--protect shows how far an adapter has moved the base; give the --adapter")
    if config.include_path and not config.tasks:
        raise FinepointError("include_path is where tasks lie; give --tasks NAME of one of them")
