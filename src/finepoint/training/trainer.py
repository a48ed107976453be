"""transformers.Trainer for any tuner: what it is told, the order of its batches, its loss, and its checkpoints."""

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finepoint.data.batches import Packer, learned, real_tokens
from finepoint.data.store import BATCHES_SORTED, StoredRows, lengths
from finepoint.errors import FinepointError
from finepoint.runtime import distributed
from finepoint.runtime.files import write_atomic, writing
from finepoint.runtime.tensor_files import DTYPES, forms, opened
from finepoint.selection.passes import evaluating, label_count
from finepoint.training.callbacks import Tokens, validation_losses
from finepoint.training.callbacks import Watch as Watch  # its former place
from finepoint.training.checkpoints import seal
from finepoint.training.loss import Measure, completion_loss, nll
from finepoint.training.resolve import CHECKPOINTS, RunSpec, warmup_of
from finepoint.tuner.finite import NotFiniteError
from finepoint.tuner.interface import Method
from finepoint.tuner.optimizers import scale_steps_

DELTAS = "deltas.safetensors"
# transformers renamed it in 5.x and warns about the old name.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


def shared_arguments(spec: RunSpec[Any], folder: Path, steps: int) -> dict[str, Any]:
    """The settings of `TrainingArguments` that follow from a run's own, for so many steps; its folder has the rest."""
    config = spec.config
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "max_steps": steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": spec.lr,
        "lr_scheduler_type": "constant_with_warmup" if config.schedule == "constant" else config.schedule,
        "warmup_steps": warmup_of(config.warmup, steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.clip,
        CHECKPOINTING: config.gradient_checkpointing,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if config.save_every else "no",
        "save_steps": config.save_every or 500,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "seed": config.seed,
    }


class LengthBuckets(Sampler[int]):
    """A random order in which each batch holds examples of about the same length, so that little is padding.

    A function of seed and epoch alone, so that a resumed run sees the order it would have seen.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed}:{self.epoch}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        pool = self.batch_size * BATCHES_SORTED
        return self.mixed([batch for at in range(0, len(order), pool) for batch in self.alike(order[at : at + pool])],
                          draw)  # fmt: skip

    def alike(self, places: Sequence[int]) -> list[list[int]]:
        """These places in batches of about one length."""
        part = sorted(places, key=lambda place: self.lengths[place])
        return [part[at : at + self.batch_size] for at in range(0, len(part), self.batch_size)]

    def mixed(self, batches: list[list[int]], draw: random.Random) -> Iterator[int]:
        """The places of batches in a random order."""
        # A short one must stay last, or it would shift the rest.
        short = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        draw.shuffle(batches)
        return chain.from_iterable(batches + short)


class Stretches(LengthBuckets):
    """The same of rows on disk, stretch by stretch: what comes first does not depend on rows that are not read yet."""

    def __init__(self, rows: StoredRows, batch_size: int, seed: int) -> None:
        super().__init__(rows.lengths, batch_size, seed)
        self.rows = rows

    def __len__(self) -> int:
        return self.rows.an_epoch

    def __iter__(self) -> Iterator[int]:
        draw, drawn = random.Random(f"{self.seed}:{self.epoch}:batches"), self.rows.drawn(self.seed, self.epoch)
        while stretch := list(islice(drawn, self.batch_size * BATCHES_SORTED)):
            yield from self.mixed(self.alike(stretch), draw)


def kept_at(file: Path) -> int | None:
    """The step after which `keep` wrote; None where an earlier finepoint did, which did not say."""
    with opened(file) as kept:
        step = (kept.metadata() or {}).get("step")
    return int(step) if step else None


class SparseCheckpoints(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Before a Trainer of transformers' or TRL's: it does what the method asks for beside the loss, and its checkpoints
    hold what the method trains, not the model."""

    method: Method
    control: Any
    settings: Mapping[str, Any] = {}
    """what decides the bits of the run, kept with its checkpoints"""
    keep_adapter: Callable[[Path, int], object] | None = None
    """writes the adapter of a step into its checkpoint, so that it can be evaluated; called by all processes"""
    tokens = Tokens()
    """trained on so far, where they are counted, and the seconds"""
    news: Mapping[str, float] = {}
    """what is logged with the loss of the step that is under way"""

    def tell(self, told: Mapping[str, float]) -> None:
        """Has this logged with the next loss."""
        self.news = {**self.news, **told}

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's; at a step's last batch the gradient becomes all processes' mean, and the penalty is added."""
        loss = super().training_step(*args, **kwargs)
        # With several processes the gradient tells, which all of them see, so that all stop at the same step.
        if not torch.isfinite(loss) and distributed.count() == 1:
            raise NotFiniteError(f"the loss became {loss.item()} at step {self.state.global_step + 1}")
        if self.accelerator.sync_gradients:
            if distributed.count() > 1:
                self.method.tuner.average_()
            for term in (self.method.penalty, *self.method.anchors):
                if term:
                    term.add_(self.state.global_step)
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, of whose steps the method may take a share."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.method.steps:
            scale_steps_(optimizer, self.method.tuner.trained(), self.method.steps)
        return optimizer

    def keep(self, file: Path) -> None:
        """Writes what is trained, as it stands; where other entries may be chosen, also which they are."""
        tuner = self.method.tuner
        tensors = {**tuner.trained(), **(tuner.places() if self.method.refresh else {})}
        tensors |= self.method.average.kept() if self.method.average else {}
        kept = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        write_atomic(file, lambda path: save_file(kept, path, {"step": str(self.state.global_step)}))

    def restore_(self, file: Path) -> None:
        """Puts back what `keep` wrote; one tensor at a time is in memory twice.

        Raises:
            FinepointError: the file is of other parameters, or damaged; nothing is changed then.
        """
        with torch.no_grad(), opened(file) as kept:
            known = forms(kept)
            if self.method.refresh:
                self._place_(file, kept)
            elif any(name.endswith(".settled_indices") for name in known):
                raise FinepointError(f"{file.parent} was trained with --refresh; go on with it")
            trained = self.method.tuner.trained()
            average = self.method.average.kept() if self.method.average else {}
            for name, parameter in {**trained, **average}.items():
                dtype, shape = known.get(name, ("", ()))
                if dtype not in DTYPES or shape != tuple(parameter.shape):
                    raise FinepointError(f"{file.parent} was trained on other entries; start afresh")
                if not bool(torch.isfinite(kept.get_tensor(name)).all()):
                    raise FinepointError(f"{file} is damaged: a number is not finite; go on from an earlier checkpoint")
            for name, parameter in trained.items():
                parameter.copy_(kept.get_tensor(name))
            if self.method.average:
                self.method.average.restore_({name: kept.get_tensor(name) for name in average})
        self.method.tuner.follow_()

    def _place_(self, file: Path, kept: Any) -> None:
        """Has the tuner train the entries that it trained when the file was written."""
        wanted = set(self.method.tuner.places())
        if not wanted <= set(kept.keys()):
            raise FinepointError(f"{file.parent} was trained without --refresh, or on other --targets; start afresh")
        self.method.tuner.place_({name: kept.get_tensor(name) for name in wanted}, self.optimizer)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if distributed.is_first():
            self.keep(Path(output_dir or self.args.output_dir) / DELTAS)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with writing(checkpoint), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "mtime may")  # checkpoints written in less than a second
                super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:  # torch.save's, in words of its own
            raise FinepointError(f"cannot write {checkpoint}; is the disk full? ({error})") from error
        if self.keep_adapter:
            self.keep_adapter(checkpoint, self.state.global_step)
        distributed.on_first(partial(seal, checkpoint, self.settings))

    def _load_rng_state(self, checkpoint: Any) -> None:
        try:
            super()._load_rng_state(checkpoint)
        except UnpicklingError as error:
            raise FinepointError(f"{checkpoint} was written with other versions of numpy or torch, whose random state "
                                 "cannot be read here; start afresh with --overwrite") from error  # fmt: skip

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.restore_(Path(resume_from_checkpoint) / DELTAS)


class SparseTrainer(SparseCheckpoints, Trainer):
    """A stock Trainer but for its loss, which costs less memory, and its checkpoints.

    Args:
        method: what to train, and how.
        packer: makes the training batches, of several examples in a row; validation batches are never packed, so that
            their loss can be compared.
        settings: what decides the bits of the run, kept with its checkpoints.
        measure: the loss; that of validation is always the cross-entropy, so that it can be compared.
    """

    def __init__(
        self, method: Method, packer: Packer | None = None, settings: Mapping[str, Any] | None = None,
        measure: Measure = nll, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.method = method
        self.settings = settings or {}
        self.packer = packer
        self.measure = measure
        super().__init__(model=method.tuner.model, optimizers=(method.optimizer, None), **kwargs)
        if method.holding:
            method.holding.tell = self.tell
            self.add_callback(method.holding)
        # Every batch is divided by the labels of its whole step, whatever the model's own forward takes.
        self.model_accepts_loss_kwargs = True
        if distributed.count() > 1:
            # The model is taken as it is, sharded or not: what is trained is averaged here, once a step, always in one
            # order. DDP rearranges its messages after the first step, and a resumed run would add up in another order.
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
            method.tuner.train_together()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, which then has evaluated the last step in any case."""
        output = super().train(*args, **kwargs)
        if self.eval_dataset and self.state.global_step not in dict(validation_losses(self.state)):
            self.evaluate()
        return output

    def get_train_dataloader(self) -> DataLoader:
        collator: Any = self.data_collator
        self.data_collator: Any = self.packer or collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBuckets:
        size, seed = self.args.train_batch_size, self.args.seed
        if isinstance(self.train_dataset, StoredRows):
            return Stretches(self.train_dataset, size, seed)
        return LengthBuckets(lengths(self.train_dataset), size, seed)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = completion_loss(model, inputs, num_items_in_batch, self.measure)
        if num_items_in_batch is not None and distributed.count() > 1:
            loss = loss * distributed.count()  # divided by all processes' labels, and the gradients are averaged
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens += Tokens(real_tokens(inputs), inputs["input_ids"].numel())
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss over all labels of the validation examples, however they are batched; it is logged.

        Of n processes each takes every n-th batch; all get the same number.

        Raises:
            NotFiniteError: it is NaN or infinite.
        """
        started = time.perf_counter()
        with self.method.as_it_is_left():
            total, labels = self._validation_sums()
        loss = total / labels
        if not math.isfinite(loss):
            raise NotFiniteError(f"the validation loss became {loss} after step {self.state.global_step}")
        metrics = {"eval_loss": loss, "eval_runtime": round(time.perf_counter() - started, 4)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _validation_sums(self) -> tuple[float, int]:
        """The summed loss of the validation examples and the number of their labels."""
        rows = [row for row in self.eval_dataset if learned(row)]
        size, collator = self.args.per_device_eval_batch_size, self.data_collator
        starts = range(0, len(rows), size)
        sums = torch.zeros(2, dtype=torch.float64, device=distributed.device())
        with evaluating(self.model), self.compute_loss_context_manager():
            # All processes run equally often, as sharded weights need: one that has no batch left does the last again.
            for at in range(0, len(starts), distributed.count()):
                mine = at + distributed.rank()
                start = starts[min(mine, len(starts) - 1)]
                batch = self._prepare_inputs(collator(rows[start : start + size]))
                loss = completion_loss(self.model, batch)
                if mine < len(starts):
                    count = label_count(batch)
                    sums += torch.tensor([loss.item() * count, count], dtype=torch.float64, device=sums.device)
        distributed.add_up_(sums)
        total, labels = sums.tolist()
        return total, int(labels)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # a log of its own within a step would have the Trainer leave out that of the loss
            logs, self.news = {**logs, **self.news}, {}
        super().log(logs, *args, **kwargs)
