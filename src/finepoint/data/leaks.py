"""Training examples among those that measure: what is learned by heart there is no measure of what was learned."""

import logging
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

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


@dataclass(frozen=True, eq=False)
class Seen:
    """Digests of examples, each once, ascending, int64: of their texts as they are, and without case, spaces and
    punctuation."""

    exact: np.ndarray
    normalised: np.ndarray

    @staticmethod
    def of(examples: Iterable[Example | Preference]) -> "Seen":
        return Seen.of_digests(digests_of(example) for example in examples)

    @staticmethod
    def of_digests(digests: Iterable[tuple[int, int]]) -> "Seen":
        """What has these digests, both of each example; a million take little memory."""
        exact, alike = array("q"), array("q")
        for one, other in digests:
            exact.append(one)
            alike.append(other)
        return Seen(*(np.unique(np.frombuffer(found, np.int64)) for found in (exact, alike)))

    @staticmethod
    def together(found: "Iterable[Seen | None]") -> "Seen | None":
        """All that several have seen, where it is known of any."""
        known = [seen for seen in found if seen]
        exact, alike = ([getattr(seen, kind) for seen in known] for kind in ("exact", "normalised"))
        return Seen(*(np.unique(np.concatenate(kind)) for kind in (exact, alike))) if known else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seen) and all(map(np.array_equal, *((seen.exact, seen.normalised)
                                                                     for seen in (self, other))))  # fmt: skip

    __hash__ = None  # type: ignore[assignment]

    def among(self, examples: Sequence[Example | Preference]) -> dict[str, int]:
        """How many of the examples were seen: `exact` word for word, `normalised` more only but for case, spaces and
        punctuation, of `n`."""
        digests = np.array([digests_of(example) for example in examples], np.int64).reshape(-1, 2)
        exact, alike = (int(np.isin(digests[:, at], known).sum()) for at, known in
                        enumerate((self.exact, self.normalised)))  # fmt: skip
        return {"exact": exact, "normalised": alike - exact, "n": len(examples)}

    def save(self, folder: Path) -> None:
        """Writes the digests into a folder: 16 bytes for each different example."""
        from safetensors.numpy import save_file

        tensors = {"exact": self.exact, "normalised": self.normalised}
        write_atomic(folder / TRAINED_ON, lambda path: save_file(tensors, path))

    @staticmethod
    def beside(adapter: str | Path) -> "Seen | None":
        """What the run of an adapter folder, or of a checkpoint in one, has seen; None where that is not known."""
        folder = Path(adapter)
        for place in (folder, folder.parent.parent):
            if (place / TRAINED_ON).is_file():
                with opened(place / TRAINED_ON) as file:
                    return Seen(*(np.unique(file.get_tensor(name).numpy()) for name in ("exact", "normalised")))
        return None


def digests_of(example: Example | Preference) -> tuple[int, int]:
    """An example's digests: of its text as it is, and of its words alone."""
    text = text_of(example)
    return _digest(text), _digest(normalised(text))


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
