"""What `finepoint plan` takes.

Nothing heavy is imported here, so that help is instant.
"""

from dataclasses import dataclass
from typing import Literal

from finepoint.runtime.settings import DType, Quantise, TargetsOption, setting
from finepoint.selection.settings import DEFAULT_RULE

# fmt: off


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Predict the peak memory of selection and of training, from the model's shapes alone."""

    model: str = setting(
        "a folder, hub id, .gguf file, smollm2, gemma3-270m, llama-3-8b or gemma-2b; only its shape is read")
    rule: str = setting("a rule that looks at no example has no selection pass", DEFAULT_RULE)
    density: float | None = setting(
        "share of the target entries to train, in (0, 1]; 0.001 where no count is given", None)
    count: int | None = setting("how many entries to train, instead of density", None)
    targets: TargetsOption = setting(
        "linear (default), all, attention, mlp, short names (v,o), patterns, or a density for each pattern", "linear")
    scoring_memory: float = setting("share of the weights whose gradients are held at a time", 1.0)
    tokens: int = setting("length of every example", 512)
    learned: int | None = setting("how many tokens at the end of every example carry a loss; all where not given", None)
    batch_size: int = setting("examples a batch", 16, least=1)
    padded: bool = setting(
        "examples differ in length (the longest has so many tokens), so that attention needs a mask", True)
    gradient_checkpointing: bool = setting("recompute activations in the backward pass", False)
    dtype: DType = setting("of the weights; auto keeps the checkpoint's, float32 on a CPU without bfloat16", "auto")
    quantise: Quantise | None = setting(
        "the linear layers of the base are held in int8 or int4 (torchao) or nf4 (bitsandbytes)", None)
    device: Literal["cpu", "cuda"] | None = setting(
        "cpu (which counts the process with its libraries) or cuda; where not given, what training would use", None)
    json: bool = setting("print one JSON object on stdout", False)
