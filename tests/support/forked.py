"""Python processes that are ready at once: forked from one that has imported torch, DeepSpeed and the
package.

    process = Forked(["-m", "megatron_lpa.pretrain", *arguments], folder, {}, out, err)

Starting an interpreter and importing costs each process about five seconds of a processor. What tests the
start of the interpreter, a launcher, or what is imported when, uses ``subprocess``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

FIXED = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""What the environment of every such process has to hold: libraries read it when they are loaded."""

_READ_BY_LIBRARIES = (
    "LD_",
    "OMP_",
    "MKL_",
    "ONEDNN_",
    "ATEN_",
    "DS_",
    "CUDA_",
    "TORCH_EXTENSIONS_",
    "TRITON",
)
_ENVIRONMENT = os.environ | FIXED


class Forked:
    """A process, with the methods of ``subprocess.Popen`` that tests use.

    Args:
        words: after ``python``: ``-m`` and a module, ``-c`` and code, or a file; then arguments.
        cwd: where it runs.
        environment: its changes to this process's one, which ``FIXED`` goes before.
        stdout: a file or descriptor.
        stderr: likewise.
        stdin: likewise; None gives nothing to read.

    Raises:
        ValueError: the environment changes what the process that is forked has read already.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        cwd: Path,
        environment: Mapping[str, str],
        stdout: IO | int,
        stderr: IO | int,
        stdin: IO | socket.socket | None = None,
    ) -> None:
        whole = {**os.environ, **FIXED, **environment}
        for name in {*whole, *_ENVIRONMENT}:
            if name.startswith(_READ_BY_LIBRARIES) and whole.get(name) != _ENVIRONMENT.get(name):
                raise ValueError(f"{name} is read when libraries are loaded: start an interpreter")
        request = {"words": [str(word) for word in words], "cwd": str(cwd), "environment": whole}
        self.returncode: int | None = None
        self._code, code = os.pipe()
        server = _server()
        with open(os.devnull) as nothing:
            files = (stdin or nothing, stdout, stderr, code)
            descriptors = [file if isinstance(file, int) else file.fileno() for file in files]
            socket.send_fds(server, [json.dumps(request).encode()], descriptors)
        os.close(code)
        answer = server.recv(64)
        if not answer:
            raise RuntimeError("the process that tests fork from is gone")
        self.pid = int(answer)

    def poll(self) -> int | None:
        """The exit code, negative for a signal that killed it, or None."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended; ``subprocess.TimeoutExpired`` if it has not after seconds."""
        if self.returncode is None:
            if not select.select([self._code], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(os.read(self._code, 64))
            os.close(self._code)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run(
    words: Sequence[str | Path], cwd: Path, environment: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` with ``capture_output`` and ``text``."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = Forked(words, cwd, environment or {}, out, err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(list(words), code, out.read(), err.read())


@functools.cache
def _server() -> socket.socket:
    """Where requests go; the server ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(theirs.fileno())],
            env=_ENVIRONMENT | {"TORCH_CPP_LOG_LEVEL": "ERROR"},
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    if ours.recv(64) != b"ready":
        raise RuntimeError("no process to fork from could be started; its error is on standard error")
    return ours
