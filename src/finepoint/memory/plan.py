"""Peak memory of selection and training, predicted from shapes: the real code on a model without numbers.

The model, its SparseTuner, the loss, the backward pass, the optimizer and the scoring of the gradients run on torch's
meta device, where tensors have shapes and no memory, and a tracker counts what would be held. What cannot run there has
a stand-in of the same shapes: fused attention (the fused operator itself, which torch does not choose on the meta
device), the product of stacked experts, the sampled gradient, and the top-k, whose sizes depend on the scores.

The loss is the model's own, over whole logits: more than `finepoint train` holds, which takes them in chunks.
Not counted: memory inside single operators, an allocator's fragmentation, the data and the tokenizer.
"""

import math
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from finepoint.data.batches import Collator, context_length
from finepoint.data.tokens import IGNORED, Row
from finepoint.errors import FinepointError, reason_of
from finepoint.memory.tracker import MemoryTracker
from finepoint.models.loading import shape_of
from finepoint.models.quantised import quantise_
from finepoint.runtime.devices import resident_bytes
from finepoint.runtime.settings import Quantise
from finepoint.selection.passes import on_device, undisturbed
from finepoint.selection.rules import FROM_GRID, Rule, rule_named
from finepoint.selection.select import SLICE, budgets, score
from finepoint.selection.statistics import stream_statistics
from finepoint.selection.structure import Tiling, columns_within, share_within, tilings
from finepoint.selection.sums import zeros
from finepoint.selection.targets import target_weights
from finepoint.selection.warmup import warm_up_
from finepoint.training.keep import protection_named
from finepoint.training.run import CHECKPOINTING  # the process that trains has it in memory, and this one stands for it
from finepoint.training.settings import EXAMPLES, PlanConfig, TrainConfig
from finepoint.training.texts import TOKENS_KEPT, TOKENS_READ
from finepoint.tuner.anchor import Anchor
from finepoint.tuner.kernels import KERNELS, numba_kernels
from finepoint.tuner.optimizers import scale_steps_
from finepoint.tuner.tuner import SparseTuner

PARTS = {
    "process": "interpreter and libraries",
    "weights": "weights",
    "scoring_gradients": "gradients held for scoring",
    "top_k": "scores and candidates of the top-k",
    "trained_entries": "trained entries: indices, base, delta, gradient",
    "optimizer": "optimizer state (AdamW)",
    "activations": "saved activations",
    "logits_and_loss": "logits and loss",
    "kept": "what is held of text to keep",
    "backward": "backward pass: gradients, recomputed activations",
}
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """What selection and training hold at the moment of their peaks: bytes by part (see `PARTS`), adding up to them."""

    parameters: int
    entries: int
    """Those that may be chosen."""
    trained: int
    dtype: str
    device: str
    selection: dict[str, int] | None
    """None where the rule looks at no example."""
    training: dict[str, int]


def plan(config: PlanConfig) -> Plan:
    """Predicts the peaks of selection and of training.

    On the CPU the memory this process has now stands for that of the process that will train: call it in a fresh one.

    Raises:
        FinepointError: an unknown model, rule or target; a number out of range; a model that needs numbers to run.
    """
    rule = rule_named(config.rule)
    if config.protect_by:
        protection_named(config.protect_by)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = shape_of(config.model, config.dtype, device, config.quantise)
    _check(config, context_length(model, None))
    share_within(config.within, config.structure, config.density)
    weights = target_weights(model, config.targets)
    cut = tilings(model, weights, config.structure)
    # Spread by size: where the rule would put them does not change the sum.
    sizes = {name: tiling.count for name, tiling in cut.items()}
    spread = budgets(
        model, sizes, {}, density=config.density, count=config.count, scope="weight", targets=config.targets
    )
    chosen = _FirstEntries({budget.names[0]: budget.k for budget in spread}, cut,
                           tilings(model, weights, "column"), share_within(config.within))  # fmt: skip
    scoring, stepping = process_bytes(config.quantise) if device == "cpu" else (0, 0)
    selection = None
    try:
        if rule.needs_data:
            selection = {"process": scoring} | _selection(config, rule, model, weights, chosen, device)
        training = {"process": stepping} | _training(config, model, chosen, device)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise FinepointError(f"the memory of {config.model!r} cannot be planned: its code ({type(model).__name__}) "
                             f"does not run on shapes alone ({reason_of(error)})") from error  # fmt: skip
    return Plan(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        entries=sum(weight.numel() for weight in weights.values()),
        trained=chosen.trained,
        dtype=str(model.dtype).removeprefix("torch."),
        device=device,
        selection=selection,
        training=training,
    )


def process_bytes(quantise: Quantise | None) -> tuple[int, int]:
    """Resident memory of a process once it has scored a toy, and once it has trained one: of this one, where it has
    found the compiled kernels on disk; where it had to compile them itself, which leaves some 80 megabytes behind, of
    a new one, that finds them.

    Libraries, threads and kernels are then in place.
    """
    found = _process_bytes(quantise)
    kernels = numba_kernels()
    if not kernels or not kernels.compiled_here():
        return found
    code = f"from finepoint.memory import plan; print(*plan._process_bytes({quantise!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return found
    scoring, stepping = done.stdout.split()[-2:]
    return int(scoring), int(stepping)


def _process_bytes(quantise: Quantise | None) -> tuple[int, int]:
    toy = nn.ModuleDict({"layer": nn.Linear(64, 64)})
    if quantise:
        quantise_(toy, quantise, ["layer"])

    def backward() -> None:
        query, key, value = toy["layer"](torch.ones(3, 1, 1, 256, 64, requires_grad=True))
        scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    backward()
    scoring = resident_bytes()
    with SparseTuner(toy, {"layer.weight": torch.arange(64)}, audit=False) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), fused=True)
        backward()
        optimizer.step()
    rows = torch.ones(64, 64)
    for sampled_gradient in KERNELS["cpu"].values():  # a layer takes the one that is the fastest for it
        sampled_gradient(rows, rows, torch.arange(64))
    return scoring, resident_bytes()


def _check(config: PlanConfig, context: int) -> None:
    if not 2 <= config.tokens <= context:
        raise FinepointError(f"tokens is {config.tokens}; give 2 to {context}, the model's context")
    if config.learned is not None and not 1 <= config.learned <= config.tokens:
        raise FinepointError(f"learned is {config.learned}; give 1 to {config.tokens}, the tokens of an example")
    if config.batch_size < 1:
        raise FinepointError(f"batch_size is {config.batch_size}; give at least 1")


def _training(config: PlanConfig, model: Any, entries: "_FirstEntries", device: str) -> dict[str, int]:
    """The peak of a training step with the optimizer's state in place, by part."""
    with MemoryTracker() as tracker, _stand_ins(device), _parts(model, tracker):
        tracker.hold([*model.parameters(), *model.buffers()], "weights")
        tracker.enter("trained_entries")
        # The selection stays in RAM for the adapter's description.
        chosen = torch.empty(entries.trained, dtype=torch.long, device="meta") if device == "cpu" else None
        with SparseTuner(model, entries, audit=False) as tuner:
            model.config.use_cache = False  # as transformers.Trainer does
            model.train()
            if config.gradient_checkpointing:
                getattr(model, f"{CHECKPOINTING}_enable")()
            for delta in tuner.parameters():
                delta.register_post_accumulate_grad_hook(lambda d: tracker.hold([d.grad], "trained_entries"))
            optimizer = torch.optim.AdamW(tuner.parameters())
            pull = _pull(config, model, tuner, tracker)
            if config.protect_steps:
                scale_steps_(optimizer, tuner.trained(), {n: torch.empty_like(d) for n, d in tuner.trained().items()})
            for _ in range(2):  # the first has no state yet
                tracker.reset_peak()
                tracker.enter("activations")  # a mask over pairs of tokens is held like them
                batch = on_device(_batch(config, model, config.batch_size), model.device)
                model(**batch).loss.backward()
                pull()
                tracker.enter("optimizer")
                optimizer.step()
                optimizer.zero_grad()
                tracker.hold([entries.written for entries in tuner.entries.values()], "trained_entries")
        del chosen
        return _by_part(tracker)


def _pull(config: PlanConfig, model: Any, tuner: SparseTuner, tracker: MemoryTracker) -> Callable[[], None]:
    """What holds a training to its base, at each step; what it keeps is held from now on."""
    tracker.enter("kept")
    if config.protect_by is None:
        return lambda: None
    known = protection_named(config.protect_by)
    if not known.beside:
        read = known.reads
        fisher = {name: torch.empty_like(value if read else value[:1]) for name, value in tuner.trained().items()}
        anchor = Anchor(tuner.trained, fisher, known.strength)

        def pull() -> None:
            tracker.enter("kept")
            anchor.add_()

        return pull
    text = replace(config, tokens=min(TOKENS_KEPT, context_length(model, None)), learned=None)
    width = model.get_input_embeddings().embedding_dim
    # The states that the base's head is given, of all texts.
    states = torch.empty(EXAMPLES, text.tokens, width, dtype=model.dtype, device=model.device)
    some = max(1, round(TrainConfig.protect_share * config.batch_size))

    def beside(states: Tensor | None = states if config.protect_by == "kl" else None) -> None:
        model(**on_device(_batch(text, model, some), model.device)).loss.backward()

    return beside


def _selection(
    config: PlanConfig,
    rule: Rule,
    model: Any,
    weights: Mapping[str, nn.Parameter],
    entries: "_FirstEntries",
    device: str,
) -> dict[str, int]:
    """The peak of scoring all weights by gradient, by part."""
    # Some are made from batches of one.
    alone = {"squared_gradient", "input_norm"} & set(rule.needs)
    batch = _batch(config, model, 1 if alone else config.batch_size)
    with MemoryTracker() as tracker, _stand_ins(device), _parts(model, tracker):
        tracker.hold([*model.parameters(), *model.buffers()], "weights")
        tracker.enter("scoring_gradients")
        if warm := {"movement", "change"} & set(rule.needs):
            with undisturbed(model):
                deque(warm_up_(model, weights, [batch], 2, 1e-5, list(warm)), maxlen=0)
            return _by_part(tracker)
        top = _TopK(sum(entries.counts.values()), in_memory=device == "cpu")
        text = replace(config, tokens=min(TOKENS_READ, config.tokens), learned=None)
        kept = [_batch(text, model, 1)] if rule.needs_kept else []
        needs = {*rule.needs} - {*FROM_GRID} | ({"gradient"} if "grid_room" in rule.needs else set())
        for name, statistics in stream_statistics(model, weights, [batch], needs, config.scoring_memory, kept=kept):
            tracker.enter("top_k")
            if rule.needs_grid:  # what the file says is not there
                statistics = replace(statistics, **{part: zeros(weights[name]) for part in FROM_GRID})
            values = entries.cut[name].pooled(score(rule, name, weights[name], statistics, 0, {}), "mean")
            gradient = None if statistics.gradient is None else statistics.gradient.abs()
            top.add(values)
            del values, gradient
            tracker.enter("scoring_gradients")
        return _by_part(tracker)


def _by_part(tracker: MemoryTracker) -> dict[str, int]:
    return {part: tracker.peak[part] for part in PARTS if tracker.peak[part]}


def _batch(config: PlanConfig, model: Any, rows: int) -> dict[str, Any]:
    """A batch as training makes it."""
    learned = config.learned or config.tokens
    row = Row([1] * config.tokens, [IGNORED] * (config.tokens - learned) + [1] * learned)
    batch = Collator.of(model, SimpleNamespace(pad_token_id=0, eos_token_id=None))([row] * rows)
    if config.padded and config.batch_size > 1:
        # The mask the model makes where something is padded; without numbers it would find nothing padded.
        made = torch.ones(rows, 1, config.tokens, config.tokens, dtype=torch.bool, device="meta")
        batch["attention_mask"] = made if _takes(model, batch, made) else batch["attention_mask"].to("meta")
    return batch


def _takes(model: Any, batch: Mapping[str, Any], mask: Tensor) -> bool:
    """Whether the model takes a mask over pairs of tokens: state space models and ALiBi want one over tokens."""
    given = on_device(batch, model.device) | {"attention_mask": mask}
    try:
        with undisturbed(model), torch.no_grad():
            model(**given)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return False
    return True


@dataclass(frozen=True)
class _FirstEntries(Mapping[str, Tensor]):
    """The first so many indices, or groups, of every weight, made when asked for: together they may not fit."""

    counts: Mapping[str, int]
    cut: Mapping[str, Tiling]
    """the weights as groups"""
    columns: Mapping[str, Tiling]
    share: float | None
    """of the columns, that all entries lie in"""

    @property
    def trained(self) -> int:
        """How many entries that is; of groups at an edge as if they were whole."""
        return sum(min(count * self.cut[name].height * self.cut[name].width, prod(self.cut[name].shape))
                   for name, count in self.counts.items())  # fmt: skip

    def __getitem__(self, name: str) -> Tensor:
        indices, columns = torch.arange(self.counts[name]), self.columns[name]
        if not self.cut[name].is_entries:
            return self.cut[name].indices(indices)
        if self.share is None or columns.matrix[1] == 1:
            return indices
        few, features = columns_within(columns, self.share) // columns.grid[0] or 1, columns.matrix[1]
        return indices // few * features + indices % few

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)


@contextmanager
def _parts(model: Any, tracker: MemoryTracker) -> Iterator[None]:
    """Tells the tracker, while the model runs, which part its tensors belong to."""

    def enter_head(head: nn.Module, args: tuple[Any, ...]) -> None:
        tracker.enter("logits_and_loss")
        if args[0].requires_grad:  # its gradient is there once the backward pass has left loss and logits behind
            args[0].register_hook(lambda gradient: tracker.enter("backward"))

    before = []

    def enter_model(module: nn.Module, args: tuple[Any, ...]) -> None:
        before.append(tracker.part)
        tracker.enter("activations")

    def leave_model(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        part = before.pop()
        if not torch.is_grad_enabled():  # no backward pass will say what comes next
            tracker.enter(part)

    handles = [
        model.register_forward_pre_hook(enter_model),
        model.register_forward_hook(leave_model),
        model.get_output_embeddings().register_forward_pre_hook(enter_head),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _stand_ins(device: str) -> Iterator[None]:
    """Has attention run by the fused operator that the device would use, since on the meta device torch chooses none,
    and products of stacked experts, which torch knows there in bfloat16 alone, by their shapes."""
    # Replaced by name: a TorchFunctionMode is off in a backward pass, where checkpointing calls it once more.
    ours = [(functional, "scaled_dot_product_attention", partial(fused_attention, device)),
            (functional, "grouped_mm", grouped_product), (torch, "_grouped_mm", grouped_product)]  # fmt: skip
    theirs = [(place, name, getattr(place, name)) for place, name, _ in ours if hasattr(place, name)]
    known = {(id(place), name) for place, name, _ in theirs}
    try:
        for place, name, stand_in in ours:
            if (id(place), name) in known:
                setattr(place, name, stand_in)
        yield
    finally:
        for place, name, function in theirs:
            setattr(place, name, function)


def grouped_product(rows: Tensor, weights: Tensor, offs: Tensor | None = None) -> Tensor:
    """The shape of `grouped_mm`, with its backward: (rows, in), (experts, in, out) -> (rows, out), on meta."""
    return _Grouped.apply(rows, weights)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return rows.new_empty(len(rows), weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(torch.empty_like(tensor) if needed else None
                     for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True))  # fmt: skip


def fused_attention(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by the operator it dispatches to; all (batch, heads, tokens, width) on meta."""
    aten = torch.ops.aten
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)  # as torch does, for each layer anew
    if device == "cpu" and query.shape[-1] == value.shape[-1]:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    if device != "cpu" and attn_mask is None and query.dtype in HALF and query.shape[-1] == value.shape[-1]:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if device != "cpu" and query.shape[1] == key.shape[1]:
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]
    # No fused operator takes float32 with fewer key heads, none on a CPU values of another width than the keys, as
    # DeepSeek-V3 has: the attention matrix is made.
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class _TopK:
    """The memory of `selection.select.TopK`, as if the scores came in random order.

    Args:
        in_memory: the candidates are kept where the model is; otherwise only a slice's temporaries count.
    """

    def __init__(self, k: int, in_memory: bool) -> None:
        self.k = k
        self.in_memory = in_memory
        self.columns: list[Tensor] = []
        self.held = 0
        self.seen = 0
        self.share = 1.0  # of the scores that pass the floor

    def add(self, scores: Tensor) -> None:
        for start in range(0, scores.numel(), SLICE):
            size = min(SLICE, scores.numel() - start)
            self.seen += size
            passing = math.ceil(size * self.share)
            columns = _columns(passing, scores.dtype)
            if self.in_memory:
                self.columns += columns
            self.held += passing
            if self.held >= 2 * self.k:
                self._prune(scores.dtype)

    def _prune(self, dtype: torch.dtype) -> None:
        if self.in_memory:
            whole = _columns(self.held, dtype)
            # torch.topk on the CPU sorts pairs of value and position in memory of its own.
            pairs = torch.empty(self.held, 2, dtype=torch.long, device="meta")
            del pairs
            self.columns = _columns(self.k, dtype)
            del whole
        self.held = self.k
        self.share = self.k / self.seen


def _columns(size: int, dtype: torch.dtype) -> list[Tensor]:
    """Value, source, position and carried gradient of so many candidates."""
    return [torch.empty(size, dtype=kind, device="meta") for kind in (dtype, torch.long, torch.long, dtype)]
