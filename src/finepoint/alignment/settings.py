"""What `finepoint align` takes.

Nothing heavy is imported here, so that help is instant.
"""

from dataclasses import dataclass
from typing import Literal

from finepoint.runtime.settings import setting
from finepoint.training.settings import Training

# fmt: off


@dataclass(frozen=True, kw_only=True, repr=False)
class AlignConfig(Training):
    """Align a model by preferences (DPO) or rewards (GRPO) through TRL, on chosen entries; measured on both sides."""

    RATES = (1e-4, 3e-3)
    FACTORS = 1e-4

    method: Literal["dpo", "grpo"] = setting(
        "dpo learns from pairs of answers, grpo from a reward for answers the model samples itself",
        decides="bits", section="alignment")
    data: str | list[str] | None = setting(
        '{"prompt", "chosen", "rejected"} (texts or conversations) for dpo, {"prompt", "completion"} for grpo, in '
        "a file or several, as for train",
        None, "statistics", "files", file=True)
    validation: str | list[str] | None = setting(
        "held-out rows of the same form, to measure on; those of --data where not given",
        None, "length", "files", file=True)
    validation_limit: int | None = setting("at most so many of them, always the same", 200, "length", "files", least=1)
    baseline: str | None = setting(
        "instead of chosen entries: lora or dora, to compare with", None, "bits", "instead of entries")
    reward: str = setting(
        "for grpo: number, line, exact, or module:function of (answer, reference)", "number", "bits", "alignment")
    beta: float | None = setting(
        "how strongly the base holds back; 0.1 for dpo, 0 for grpo, where not given", None, "bits", "alignment")
    generations: int = setting(
        "for grpo: answers sampled to each prompt, which are compared with each other", 8, "bits", "alignment")
    new_tokens: int = setting("for grpo: most tokens of an answer", 32, "bits", "alignment", least=1)
    temperature: float = setting("for grpo: of the sampling", 1.0, "bits", "alignment", above=0)
    lr: float | None = setting(
        "learning rate; 1e-4 for rules that look at gradients, 3e-3 for the others; a baseline has its own",
        None, "bits", "training")
    steps: int = setting("optimizer steps", 50, "length", "training", least=1)
    batch_size: int = setting(
        "pairs (dpo) or answers (grpo: a multiple of generations) a batch; examples a scoring batch",
        16, "statistics", "training", least=1)
