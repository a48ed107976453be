"""Training examples among those that measure: what is learned by heart there is no measure of what was learned."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finepoint.data.examples import (
    Chat,
    ChatPair,
    Choices,
    Completion,
    Example,
    Labelled,
    Pair,
    Preference,
    Text,
)
from finepoint.runtime.files import write_atomic
from finepoint.runtime.tensor_files import opened

logger = logging.getLogger(__name__)
TRAINED_ON = "trained_on.safetensors"
"""beside an adapter, not in it: who has an adapter alone cannot ask whether a text was trained on"""


@dataclass(frozen=True)
class Seen:
    """Digests of examples: of their texts as they are, and without case, spaces and punctuation."""

    exact: frozenset[int]
    normalised: frozenset[int]

    @staticmethod
    def of(examples: Iterable[Example | Preference]) -> "Seen":
        texts = [text_of(example) for example in examples]
        return Seen(frozenset(map(_digest, texts)), frozenset(_digest(normalised(text)) for text in texts))

    @staticmethod
    def together(found: "Iterable[Seen | None]") -> "Seen | None":
        """All that several have seen, where it is known of any."""
        known = [seen for seen in found if seen]
        exact, alike = ([getattr(seen, kind) for seen in known] for kind in ("exact", "normalised"))
        return Seen(frozenset().union(*exact), frozenset().union(*alike)) if known else None

    def among(self, examples: Sequence[Example | Preference]) -> dict[str, int]:
        """How many of the examples were seen: `exact` word for word, `normalised` more only but for case, spaces and
        punctuation, of `n`."""
        texts = [text_of(example) for example in examples]
        exact = [_digest(text) in self.exact for text in texts]
        alike = [_digest(normalised(text)) in self.normalised for text in texts]
        return {"exact": sum(exact), "normalised": sum(alike) - sum(exact), "n": len(texts)}

    def save(self, folder: Path) -> None:
        """Writes the digests into a folder: 16 bytes for each different example."""
        from safetensors.torch import save_file

        tensors = {"exact": _tensor(self.exact), "normalised": _tensor(self.normalised)}
        write_atomic(folder / TRAINED_ON, lambda path: save_file(tensors, path))

    @staticmethod
    def beside(adapter: str | Path) -> "Seen | None":
        """What the run of an adapter folder, or of a checkpoint in one, has seen; None where that is not known."""
        folder = Path(adapter)
        for place in (folder, folder.parent.parent):
            if (place / TRAINED_ON).is_file():
                with opened(place / TRAINED_ON) as file:
                    return Seen(*(frozenset(file.get_tensor(name).tolist()) for name in ("exact", "normalised")))
        return None


def text_of(example: Example | Preference) -> str:
    """All that is learned from an example and what it is learned after, whatever its form."""
    match example:
        case Completion(prompt, completion):
            return prompt + completion
        case Choices(prompt, choices, answer):
            return prompt + choices[answer]
        case Chat(messages, more, given):
            return "\n".join([*(content for _, content in messages), *filter(None, [*more, given])])
        case Text(text):
            return text
        case Labelled(text):
            return text
        case Pair(prompt, chosen):
            return prompt + chosen
        case ChatPair(conversation):
            return text_of(conversation)


def normalised(text: str) -> str:
    """The words of a text, in small letters, one space apart; a text without any stays as it is."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold())) or text


def leaks(seen: Seen, sets: Mapping[str, Sequence[Example | Preference]]) -> dict[str, dict[str, int]]:
    """The sets that hold examples which were trained on, with how many; see `Seen.among`."""
    found = {name: seen.among(examples) for name, examples in sets.items()}
    return {name: counts for name, counts in found.items() if counts["exact"] + counts["normalised"]}


def warn_of_leaks(found: Mapping[str, Mapping[str, Any]], who: str = "training") -> None:
    """Says in one line which sets hold examples that were trained on."""
    told = [
        f"{counts['exact'] + counts['normalised']} of {counts['n']} of {name}"
        + (f" ({counts['normalised']} but for case, spaces and punctuation)" if counts["normalised"] else "")
        for name, counts in found.items()
    ]
    if told:
        logger.warning("%s has seen what it is measured on: %s; scores there say little of new examples", who,
                       ", ".join(told))  # fmt: skip


def _digest(text: str) -> int:
    """64 bits, as torch holds them."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True)


def _tensor(digests: frozenset[int]) -> Tensor:
    return torch.tensor(sorted(digests), dtype=torch.long)
