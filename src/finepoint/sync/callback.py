"""Sending from inside of a trainer of transformers' or TRL's."""

from typing import Any

from transformers import TrainerCallback

from finepoint.sync.sender import Sender


class SendEachStep(TrainerCallback):
    """Sends what is trained when training begins, and after every step of the optimizer.

    Args:
        sender: of the tuner of the model that is trained (`finepoint.tuner_of(model)`).
        wait: whether the next step waits until so many receivers, and all that are there, hold the values; 0: it
            does not wait.
        timeout: seconds that it waits at most.
    """

    def __init__(self, sender: Sender, wait: int = 0, timeout: float = 60.0) -> None:
        self.sender, self._wait, self._timeout = sender, wait, timeout

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._send(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._send(state)

    def _send(self, state: Any) -> None:
        if state.is_world_process_zero:
            self.sender.send()
            if self._wait:
                self.sender.wait(receivers=self._wait, timeout=self._timeout)
