"""A process that has imported what training needs, and forks instead of starting interpreters; see
``forked.py``.

It has one thread, so that a fork lacks nothing. A request is a message with the words after ``python``, a
folder and an environment, and four descriptors: standard input, output, error, and a pipe for the exit code.
The answer is the number of the new process, which leaves this file by ``main``'s end and then does what a new
interpreter would.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import types
from pathlib import Path

MESSAGE_BYTES = 160_000


def serve(requests: socket.socket) -> list[str] | None:
    """Fork for each request until nobody can send one.

    Returns:
        in a forked process, the words after ``python``; in the server, when it is to end, None.
    """
    running: dict[int, int] = {}  # process: the descriptor for its exit code
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _tell_ended(running)
        if requests not in ready:
            continue
        text, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 4)
        if not text:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            return None
        *streams, code = descriptors
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for descriptor in (woken, wake, code, requests.detach(), *running.values()):
                os.close(descriptor)
            return _become(json.loads(text), streams)
        running[pid] = code
        for descriptor in streams:
            os.close(descriptor)
        requests.send(str(pid).encode())


def _tell_ended(running: dict[int, int]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            descriptor = running.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # nobody asks any more
                os.write(descriptor, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(descriptor)


def _become(request: dict, streams: list[int]) -> list[str]:
    from fault_injection.launches import die_with_parent

    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.orig_argv = [sys.executable, *request["words"]]
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
        os.close(descriptor)
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    for folder in reversed([folder for folder in folders if folder not in before]):
        sys.path.insert(0, folder)
        if Path(folder, "sitecustomize.py").exists():
            sys.modules.pop("sitecustomize", None)
            importlib.import_module("sitecustomize")
    return request["words"]


def run_as_interpreter(words: list[str]) -> None:
    """What ``python WORDS`` does: ``-m MODULE``, ``-c CODE`` or a file, each with arguments."""
    kind, *rest = words
    if kind == "-m":
        sys.argv, sys.path[:0] = rest, [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        module.__builtins__ = builtins  # type: ignore[attr-defined]
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(kind).resolve().parent)]
        runpy.run_path(kind, run_name="__main__")


def main(requests: socket.socket) -> list[str] | None:
    """Import, say so, and serve."""
    own = sys.path.pop(0)  # this file's folder, which a new interpreter would not have
    sys.path.append(str(Path(own).parents[1]))
    from fault_injection.launches import import_training, refuse_threads

    sys.path.pop()
    import_training()
    # Compiled in a fresh clone; and DeepSpeed keeps what it has loaded, so that no process here takes the
    # compiler's lock.
    importlib.import_module("deepspeed.comm.torch").build_shm_op()
    refuse_threads()
    requests.send(b"ready")
    return serve(requests)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test run, whose end is this one's
    mine = main(socket.socket(fileno=int(sys.argv[1])))
    if mine is not None:
        run_as_interpreter(mine)
