"""A process that has imported all that is heavy and forks a child for every command, which so starts in milliseconds.

It never computes anything itself: threads do not survive a fork. `client` is what stands on the PATH as `finepoint` and
as `python`; commands, folders, output, environment and exit status are those of the caller.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from select import select

HEAVY = ("torch", "transformers", "peft", "matplotlib.figure", "finepoint.cli.options", "finepoint.training.run",
         "finepoint.baselines.peft", "finepoint.studies.compare", "finepoint.studies.sequence",
         "finepoint.evaluation.evaluate", "finepoint.exchange.formats", "finepoint.reporting.report",
         "transformers.models.llama.modeling_llama")  # fmt: skip
CLIENT = f"""#!{sys.executable} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect(os.environ["FINEPOINT_WARM"])
    message = json.dumps([[os.path.basename(sys.argv[0]), *sys.argv[1:]], os.getcwd(), dict(os.environ)])
    socket.send_fds(server, [message.encode()], [0, 1, 2])
    server.recv(16)  # its process id
    sys.exit(int(server.recv(16) or 1))
"""


@dataclass(frozen=True)
class Started:
    """A command under way."""

    pid: int
    line: socket.socket

    def wait(self):
        """Its exit status; None where it was killed."""
        with self.line:
            said = self.line.recv(16)
        with suppress(ProcessLookupError):
            while True:  # its other files, locks among them, may be closed after the line
                os.kill(self.pid, 0)
                time.sleep(0.001)
        return int(said) if said else None

    def kill(self, signal_number=signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal_number)


class Warm:
    """The warm process with the folder in which its clients lie."""

    def __init__(self, folder: Path):
        self.place, self.bin = folder / "socket", folder / "bin"
        self.bin.mkdir(parents=True)
        for name in ("finepoint", "python"):
            (self.bin / name).write_text(CLIENT)
            (self.bin / name).chmod(0o755)
        # More threads cost more than they give where all is tiny. Both are read by what is imported.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, self.place]
        # A session of its own, so that all it started ends with it; and it leaves when our end of its stdin closes.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        assert self.process.stdout.readline() == b"ready\n"

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def run(self, *command, folder, timeout=300, stderr=subprocess.STDOUT, **environment):
        """What `python FILE ..` or `finepoint ..` does in a folder: the status and all output."""
        return subprocess.run([self.bin / command[0], *command[1:]], cwd=folder, env=self._environment() | environment,
                              stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, text=True,
                              timeout=timeout)  # fmt: skip

    def start(self, *command, folder, said, **environment):
        """The same without waiting for it, as a process that can be killed; its output goes to the file `said`."""
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line.connect(str(self.place))
        message = json.dumps([[str(word) for word in command], str(folder), self._environment() | environment])
        with said.open("wb") as output, open(os.devnull, "rb") as nothing:
            socket.send_fds(line, [message.encode()], [nothing.fileno(), output.fileno(), output.fileno()])
        return Started(int(line.recv(16)), line)

    def _environment(self):
        path = f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return os.environ | {"PATH": path, "FINEPOINT_WARM": str(self.place), "HF_HUB_OFFLINE": "1"}


def serve(place):
    for name in HEAVY:
        with suppress(ImportError):  # an extra
            __import__(name)
    with suppress(ImportError):
        from numba.core.registry import cpu_target

        cpu_target.typing_context.refresh()
        cpu_target.target_context.refresh()
    gc.freeze()  # a collection in a child need not look through all this
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(place)
        server.listen()
        print("ready", flush=True)
        while server in select([server, sys.stdin], [], [])[0]:
            caller, _ = server.accept()
            message, descriptors, *_ = socket.recv_fds(caller, 1 << 20, 3)
            if os.fork() == 0:
                server.close()
                child(caller, *json.loads(message), descriptors)
            caller.close()
            for descriptor in descriptors:
                os.close(descriptor)


def child(caller, command, folder, environment, descriptors):
    """Is the command, from beginning to end; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    caller.send(str(os.getpid()).encode())
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        status = executed(command)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        caller.send(str(status).encode())
        os._exit(status)


def executed(command):
    name, *arguments = command
    sys.path[0] = str(Path(__file__).parent / "bin")  # as it is to a script on the PATH: nothing to import from
    if name == "finepoint":
        from finepoint.cli import main

        return main(arguments)
    if not arguments or arguments[0].startswith("-"):
        return subprocess.run([sys.executable, *arguments]).returncode
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
