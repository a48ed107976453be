"""What packages say of themselves when another one imports them, needed or not: kernels that they have not found.

Only these messages are dropped, by their beginnings; whatever else the same packages say is heard, and so is everything
that finepoint and the user's own code say.
"""

import logging
import warnings

# By logger: transformers and PEFT import these packages where they are installed.
KERNELS = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("%s is an Enum subclass", "<enum "),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community",),
}
WIDGETS = "IProgress not found"  # tqdm.auto, imported in a notebook that has no widgets


class Dropped(logging.Filter):
    """Drops the messages that begin so."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


def drop() -> None:
    """From now on these messages are not heard in this process."""
    for name, beginnings in KERNELS.items():
        log = logging.getLogger(name)
        if not any(isinstance(known, Dropped) for known in log.filters):
            log.addFilter(Dropped(beginnings))
    warnings.filterwarnings("ignore", WIDGETS)
