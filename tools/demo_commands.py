"""How the demo runs commands: printed, found without an activated environment, stopped as a whole."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_lpa.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
STOP_SECONDS = 40.0
"""Longest wait for processes told to stop; training writes a checkpoint first."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal arrived and the running command has been stopped."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def say(line: str) -> None:
    """Print at once: commands write to the same terminal."""
    print(line, flush=True)


class Commands:
    """Runs this project's tools and DeepSpeed's launcher.

    Args:
        environment: of this process.
        has_gpu: without a GPU, DeepSpeed builds a small C++ extension for its processes to talk.

    Raises:
        UserError: DeepSpeed's launcher or, without a GPU, a C++ compiler is missing.
    """

    def __init__(self, environment: Mapping[str, str], has_gpu: bool) -> None:
        scripts = Path(sys.executable).parent  # of the environment, activated or not
        self._launcher = scripts / "deepspeed"
        if not self._launcher.exists():
            raise UserError(f"{self._launcher}: no such program; install the package into this environment")
        compiler = environment.get("CXX", "c++")
        if not has_gpu and shutil.which(compiler) is None:
            raise UserError(
                f"no C++ compiler ({compiler}), which DeepSpeed needs on a CPU; install one, such as the "
                "packages build-essential or gcc-c++, or name yours in the environment variable CXX"
            )
        # The build also looks for ninja on the PATH.
        self._environment = {
            **environment,
            "PATH": os.pathsep.join((str(scripts), environment.get("PATH", os.defpath))),
        }
        if not has_gpu:
            self._environment["DS_ACCELERATOR"] = "cpu"

    def python(self, tool: str, *arguments: str | Path) -> None:
        """Run one of the project's tools.

        Raises:
            UserError: it fails.
            Stopped: by a signal.
        """
        words = [str(word) for word in arguments]
        self._run([sys.executable, str(ROOT / tool), *words], ["python", tool, *words])

    def deepspeed(self, processes: int, module: str, *arguments: str | Path) -> None:
        """Run a module in several processes of this machine.

        Raises:
            UserError: it fails.
            Stopped: by a signal.
        """
        words = ["--module", module, *(str(word) for word in arguments)]
        count = ["--num_gpus", str(processes)]
        # The launcher's own port is fixed, and may be taken.
        quietly = ["--quiet", "--master_port", str(_free_port())]
        self._run([str(self._launcher), *quietly, *count, *words], ["deepspeed", *count, *words])

    def _run(self, command: list[str], shown: list[str]) -> None:
        say(f"  $ {shlex.join(shown)}")
        received: list[int] = []
        # Remembered, not raised: an exception just as the process starts would lose track of it.
        previous = {
            signum: signal.signal(signum, lambda number, _: received.append(number))
            for signum in STOP_SIGNALS
        }
        try:
            # A group of its own: the launcher alone would die of Ctrl-C and leave the training behind.
            process = subprocess.Popen(command, env=self._environment, start_new_session=True)
            while process.poll() is None and not received:
                time.sleep(0.1)
            if received:
                _stop_group(process, received)
                raise Stopped(received[0])
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        if process.returncode:
            raise UserError(
                f"the command above failed with exit code {process.returncode}; its messages say why. The "
                "demo goes on from there when it is started again; --start-over begins afresh"
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stop_group(process: subprocess.Popen[bytes], received: list[int]) -> None:
    """Ask all processes of a command to stop and wait until they have; a second signal ends the patience."""
    say("  stopping")
    deadline = time.monotonic() + STOP_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline and len(received) < 2:
            process.poll()  # a launcher nobody asked after stays in the group
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
