"""The real peak memory of a selection or of three training steps, in a process of its own.

python measured_peak.py FOLDER PHASE JSON, with PHASE `selection` or `training` and JSON the settings of a plan;
prints the bytes of the peak.
"""

import json
import sys

import torch

from finepoint.data.batches import Collator, Row
from finepoint.models.loading import load_model
from finepoint.runtime.devices import peak_bytes, reset_peak
from finepoint.selection.passes import on_device
from finepoint.selection.select import select
from finepoint.selection.targets import target_weights
from finepoint.training.run import CHECKPOINTING
from finepoint.tuner.tuner import SparseTuner


class NoPadding:
    pad_token_id = 0
    eos_token_id = 0


def batch_of(model, settings):
    """Random tokens; where padded, the other rows are shorter than the first."""
    tokens, learned = settings["tokens"], settings.get("learned") or settings["tokens"]
    rows = []
    for i in range(settings["batch_size"]):
        length = tokens - i if settings.get("padded", True) else tokens
        ids = torch.randint(3, model.config.vocab_size, (length,)).tolist()
        rows.append(Row(ids, [-100] * (length - min(learned, length)) + ids[-learned:]))
    return Collator.of(model, NoPadding)(rows)


def train(model, settings):
    indices = {}
    groups = {name: settings[name] for name in ("structure", "within") if name in settings}
    if groups:
        indices = select(model, rule="random", density=settings["density"], **groups)
    for name, weight in target_weights(model).items() if not groups else ():
        count = round(weight.numel() * settings["density"])
        indices[name] = torch.randperm(weight.numel())[:count].sort().values
    model.config.use_cache = False
    model.train()
    if settings.get("gradient_checkpointing"):
        getattr(model, f"{CHECKPOINTING}_enable")()
    with SparseTuner(model, indices) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-4, fused=True)
        for _ in range(3):
            loss = model(**on_device(batch_of(model, settings), model.device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    folder, phase, text = sys.argv[1:]
    settings = json.loads(text)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = load_model(folder, "float32", device="cpu", quantise=settings.get("quantise"))
    reset_peak()
    if phase == "training":
        train(model, settings)
    else:
        batches = [batch_of(model, settings) for _ in range(2)]
        select(model, batches, rule=settings.get("rule", "gallop"), density=settings["density"],
               scoring_memory=settings.get("scoring_memory", 1.0))  # fmt: skip
    print(peak_bytes())
