"""Which weights of a model may be trained: presets, short names and glob patterns."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from finepoint.errors import FinepointError
from finepoint.models.bitsandbytes import check_weight
from finepoint.models.loading import block_of
from finepoint.selection.patterns import PRESET_NAMES, example, no_weight, pattern_list, stands_for

Targets = str | Sequence[str] | Mapping[str, float]
"""`"linear"`, `"v,o"`, `["*.v_proj", "*.o_proj"]`, or a density for each pattern: `{"*.v_proj": 0.01}`."""

LINEAR_LAYERS = (nn.Linear, Conv1D)
DELTAS = "finepoint."  # prefix of what a SparseTuner hangs on a model: no weights of the model's own


def target_weights(model: nn.Module, targets: Targets = "linear") -> dict[str, nn.Parameter]:
    """The weights whose entries may be chosen, by qualified name, in the model's own order.

    A pattern is a preset (`linear`: every linear layer of the decoder blocks, expert weights included, of models that
    see or hear as well those of the part that writes; `attention`, `mlp`: its two halves; `linear-everywhere`: those of
    all blocks; `all`: every floating-point parameter), a short name (`v` or `v_proj`: the weight of every module called
    that), or a glob over parameter names (`*.bias`) or over modules (`*.v_proj`, their weights). A tied weight appears
    once, under its first name.

    Raises:
        FinepointError: a pattern matches no weight (close names are offered), or only weights that are not floating
            point (a quantised model), or of bitsandbytes' own layers.
    """
    parameters = dict(model.named_parameters())
    chosen: set[str] = set()
    for pattern in pattern_list(targets):
        chosen |= set(match(model, pattern))
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


def match(model: nn.Module, pattern: str) -> list[str]:
    """Names of the floating-point parameters that one pattern stands for, in the model's order.

    Raises:
        FinepointError: nothing matches, or weights of bitsandbytes' own layers.
    """
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith(DELTAS)}
    matches = partial(PRESETS[pattern], model) if pattern in PRESETS else stands_for(pattern)
    names = [name for name in parameters if matches(name)]
    if not names:
        if pattern in PRESETS:
            raise FinepointError(f"the model has no weight that {pattern!r} stands for (linear layers of its blocks); "
                                 f"give patterns: names look like {example(list(parameters))}")  # fmt: skip
        raise no_weight(pattern, list(parameters))
    for name in names:
        check_weight(name, parameters[name])
    trainable = [name for name in names if parameters[name].is_floating_point()]
    if not trainable:
        kind = str(parameters[names[0]].dtype).removeprefix("torch.")
        raise FinepointError(
            f"weights that match {pattern!r} are {kind}, not floating point: a quantised weight cannot be trained in "
            "place; load the model in bfloat16 or float32"
        )
    return trainable


def _writer(model: nn.Module) -> nn.Module | None:
    """The part that writes, of a model that sees or hears as well; None where there is no other part."""
    transformer: Any = model
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "get_decoder") or not hasattr(config, "get_text_config"):
        return None  # no model of transformers
    if config.is_encoder_decoder or config.get_text_config() is config:
        return None
    if transformer.get_output_embeddings() is None:  # which compares texts and pictures, or tells classes
        return None
    decoder: nn.Module = transformer.get_decoder()
    return None if decoder is model else decoder


def _writes(model: nn.Module, name: str) -> bool:
    """Whether a weight is a linear layer's, of the part that writes where there is another."""
    if not _is_linear(model, name):
        return False
    writer = _writer(model)
    above = accumulate(name.split(".")[:-1], lambda path, part: f"{path}.{part}")
    return writer is None or any(model.get_submodule(path) is writer for path in above)


def _is_linear(model: nn.Module, name: str) -> bool:
    if block_of(model, name) is None:
        return False
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, LINEAR_LAYERS):
        return attribute == "weight"
    # Mixture-of-experts layers stack their linear weights in one parameter: (experts, out, in), or one under the other.
    # Convolutions are 3-D as well, and so are vectors that are shaped to be multiplied with states, (1, 1, n).
    shape, of_experts = model.get_parameter(name).shape, "experts" in owner_name.split(".")
    if len(shape) == 3:
        return (min(shape) > 1 or of_experts) and not isinstance(owner, nn.modules.conv._ConvNd | nn.Embedding)
    return len(shape) == 2 and of_experts and not name.endswith("bias")


def _is_attention(model: nn.Module, name: str) -> bool:
    return _writes(model, name) and "attn" in name.replace("attention", "attn")


PRESETS: dict[str, Callable[[nn.Module, str], bool]] = dict(zip(PRESET_NAMES, (
    _writes, _is_attention, lambda model, name: _writes(model, name) and not _is_attention(model, name), _is_linear,
    lambda model, name: True), strict=True))  # fmt: skip
