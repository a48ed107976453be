"""What transformers' Trainer is told, alike whether it trains by a loss, by preferences or by rewards."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from finepoint.training.checkpoints import CHECKPOINTS
from finepoint.training.resolve import RunSpec, warmup_of

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
