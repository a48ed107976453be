"""What `--loss` knows: a loss a token, each one decorated function; torch is imported by what computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finepoint.runtime.settings import REGISTRIES, Cited, named

if TYPE_CHECKING:
    from torch import Tensor

LIKELY = 20  # tokens, the likeliest, whose entropy EAFT takes for all
FLOOR = 0.01  # what a label counts for in TALR at least
Measure = Callable[..., "Tensor"]
"""From logits, (n, vocabulary), at least float32, and what is wanted there, (n, ..), to losses, (n,).

With a parameter `median` it is also told the median over the batch's examples of the mean cross-entropy of their
labels, a scalar tensor.
"""


@dataclass(frozen=True, repr=False)
class TokenLoss(Cited):
    """What `--loss` names, with its formula and where it comes from."""

    name: str
    measure: Measure
    formula: str
    source: str


LOSSES: dict[str, TokenLoss] = {}


def token_loss(formula: str, source: str) -> Callable[[Measure], Measure]:
    """Makes a function what training minimises, by its name: from logits and labels, (n,), to losses, (n,)."""

    def register(measure: Measure) -> Measure:
        LOSSES[measure.__name__] = TokenLoss(measure.__name__, measure, formula, source)
        return measure

    return register


@token_loss("-log p(y)", "cross-entropy")
def nll(logits: Tensor, labels: Tensor) -> Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, labels, reduction="none")


@token_loss("-p(y) log p(y), p(y) a constant to the gradient", "DFT, arXiv:2508.05629")
def dft(logits: Tensor, labels: Tensor) -> Tensor:
    losses = nll(logits, labels)
    return losses * (-losses.detach()).exp()


@token_loss("-H log p(y), H the entropy of the 20 likeliest tokens among themselves / 3, a constant to the gradient",
            "EAFT, arXiv:2601.02151")  # fmt: skip
def eaft(logits: Tensor, labels: Tensor) -> Tensor:
    likeliest = logits.detach().topk(min(LIKELY, logits.shape[-1])).values
    told = likeliest.log_softmax(-1)
    # The authors' code divides by 3, about log 20.
    return nll(logits, labels) * (-(told.exp() * told).sum(-1) / 3)


@token_loss("-max(p(y)^(1/m), 0.01) log p(y), the weight a constant to the gradient; m the median, over the examples "
            "that are computed together, of their mean -log p(y)", "TALR, arXiv:2509.20758")  # fmt: skip
def talr(logits: Tensor, labels: Tensor, median: Tensor) -> Tensor:
    # Not divided by the weights' sum, and with this floor, as the code of arXiv:2602.16093 has it: the authors have
    # published none.
    losses = nll(logits, labels)
    return losses * (-losses.detach() / median.clamp(min=1e-6)).exp().clamp(min=FLOOR)


def loss_named(name: str) -> TokenLoss:
    """The loss called `name`.

    Raises:
        FinepointError: there is none; the known ones are listed.
    """
    return named(LOSSES, name, *REGISTRIES["token_loss"])
