"""Live models: what a tuner trains is sent to models in other processes and machines, exact new values at known places.

    sender = finepoint.sync.Sender(tuner, "127.0.0.1:5555")       # beside the training
    receiver = finepoint.sync.Receiver(model, "127.0.0.1:5555")   # beside a copy of the base, in another process

Positions are sent once, then, each step, two bytes for each trained entry of a half-precision model (four of a float32
one). A message is written as a whole or not at all, and only over the base that it belongs to.
"""

from finepoint.sync.callback import SendEachStep
from finepoint.sync.lines import GroupLine, Line
from finepoint.sync.receiver import Receiver
from finepoint.sync.sender import Sender

__all__ = ["GroupLine", "Line", "Receiver", "SendEachStep", "Sender"]


def __dir__() -> list[str]:
    return __all__
