"""Who runs the cells of a study: this process, several of this machine, or a Ray cluster.

An executor has `size` places. `start` gives a job to a free place; `wait` hands back a job that is finished, with its
outcome: a result, a `Failure`, or `LOST` where the process that had it is gone. Each process keeps its model.
"""

import logging
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from finepoint.errors import FinepointError, needing
from finepoint.runtime import interruption
from finepoint.runtime.progress import log_to_stderr
from finepoint.studies.cells import Job, Outcome, WorkerState, work
from finepoint.studies.study import Study
from finepoint.studies.worker import serve

LOST = "lost"


class Executor(Protocol):
    size: int

    def start(self, job: Job) -> None: ...

    def wait(self) -> tuple[Job, Outcome]: ...

    def close(self) -> None: ...


class InProcess:
    """This process: a job runs while it is waited for."""

    size = 1

    def __init__(self, study: Study) -> None:
        self.study = study
        self.worker: WorkerState | None = None
        self.job: Job | None = None

    def start(self, job: Job) -> None:
        self.job = job

    def wait(self) -> tuple[Job, Outcome]:
        assert self.job is not None
        self.worker, outcome = work(self.worker, self.study, self.job)
        return self.job, outcome

    def close(self) -> None:
        self.worker = None


class LocalProcesses:
    """Processes of this machine, each with its share of the threads."""

    def __init__(self, study: Study, size: int) -> None:
        self.study = study
        self.size = size
        self.idle: list[tuple[Any, Connection]] = []
        self.busy: dict[Connection, tuple[Any, Job]] = {}

    def start(self, job: Job) -> None:
        process, line = self.idle.pop() if self.idle else self._hire()
        self.busy[line] = process, job
        with suppress(OSError):  # a process that is gone already: `wait` will find it so
            line.send(job)

    def wait(self) -> tuple[Job, Outcome]:
        line = wait(list(self.busy))[0]
        assert isinstance(line, Connection)
        process, job = self.busy.pop(line)
        try:
            outcome: Outcome = line.recv()
        except (EOFError, OSError):  # its end closes with the process, with the job unread perhaps
            return job, LOST
        self.idle.append((process, line))
        return job, outcome

    def close(self) -> None:
        processes = [process for process, _ in self.busy.values()] + [process for process, _ in self.idle]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()

    def _hire(self) -> tuple[Any, Connection]:
        mine, theirs = multiprocessing.Pipe()
        threads = max(1, (os.cpu_count() or 1) // self.size)
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, threads), daemon=True)
        # The number of threads is read when the libraries are loaded.
        with _environment(OMP_NUM_THREADS=str(threads)), interruption.deaf():
            process.start()
        theirs.close()  # or its end would outlive the process
        with suppress(OSError):  # it is gone already: `wait` will find it so
            mine.send(self.study)
        return process, mine


class Ray:
    """Actors on a Ray cluster; the folder that the command runs in must be the same on all its machines."""

    def __init__(self, study: Study, size: int, address: str | None) -> None:
        with needing("--executor ray", "ray"):
            import ray
        self.ray = ray
        self.study = study
        try:
            ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False,
                     logging_level=logging.ERROR)  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise FinepointError(f"no Ray cluster answers at {address!r}: {error}; one that wants a token is reached "
                                 "with RAY_AUTH_MODE=token in the environment") from error  # fmt: skip
        cores = int(ray.cluster_resources().get("CPU", 1))
        self.threads = max(1, cores // size) if size > 1 else 1
        self.size = size if size > 1 else cores
        self.idle: list[Any] = []
        self.busy: dict[Any, tuple[Any, Job]] = {}

    def start(self, job: Job) -> None:
        actor = self.idle.pop() if self.idle else self._hire()
        self.busy[actor.work.remote(job)] = actor, job

    def wait(self) -> tuple[Job, Outcome]:
        ready, _ = self.ray.wait(list(self.busy), num_returns=1)
        actor, job = self.busy.pop(ready[0])
        try:
            outcome: Outcome = self.ray.get(ready[0])
        except self.ray.exceptions.RayError:
            return job, LOST
        self.idle.append(actor)
        return job, outcome

    def close(self) -> None:
        self.ray.shutdown()

    def _hire(self) -> Any:
        # Not restarted by Ray: what becomes of a lost job is decided in one place for all executors.
        worker = self.ray.remote(num_cpus=self.threads, max_restarts=0)(RayWorker)
        return worker.remote(self.study, self.threads, os.getcwd())


class RayWorker:
    """One process of a Ray cluster, with its model."""

    def __init__(self, study: Study, threads: int, folder: str) -> None:
        import torch

        os.chdir(folder)  # the study's files are named from where the command runs
        torch.set_num_threads(threads)
        log_to_stderr(quiet=True)
        self.study = study
        self.worker: WorkerState | None = None

    def work(self, job: Job) -> Outcome:
        self.worker, outcome = work(self.worker, self.study, job)
        return outcome


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Inside, the environment holds these values too: what a process started there inherits."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
