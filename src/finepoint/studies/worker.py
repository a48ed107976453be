"""The life of a process that runs cells, a worker. What is heavy is imported once its log is set up."""

import os
import threading
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait

from finepoint.runtime.progress import log_to_stderr


def serve(line: Connection, threads: int) -> None:
    """The study comes first, then jobs; outcomes go back, until the line or the parent is gone."""
    _leave_with_parent()
    log_to_stderr(quiet=True)
    import torch

    from finepoint.studies.cells import work

    torch.set_num_threads(threads)
    worker = None
    try:
        study = line.recv()
        while True:
            worker, outcome = work(worker, study, line.recv())
            line.send(outcome)
    except EOFError:
        return


def _leave_with_parent() -> None:
    """Ends this process as soon as its parent has, however that ended."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
