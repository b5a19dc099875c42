"""The processes of one start: forked from this one, watched, signalled, and waited for.

This process has imported torch and DeepSpeed and started no threads, so a fork is a process that is ready at
once; a start of its own costs each seconds of imports. ``fresh`` starts interpreters all the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As the entry point does, and before torch is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

ROOT = Path(__file__).resolve().parents[1]
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl.h
GRACE_S = 20.0
"""Seconds for the others to leave by themselves when a process is gone; a launcher would end them at once."""


def remove_compile_locks() -> int:
    """Remove what killed processes left, now that none is alive; how many there were."""
    locks = [path for path in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("lock") if path.is_file()]
    for lock in locks:
        lock.unlink()
    return len(locks)


@dataclass
class Event:
    """What a process told.

    Args:
        rank: who.
        seconds: when it arrived, on the monotonic clock.
        content: as ``rank.Places.tell`` has it.
    """

    rank: int
    seconds: float
    content: dict[str, Any]


def prepare(folder: Path) -> None:
    """Import what the processes need, once; no threads may come of it.

    Args:
        folder: as ``own_extensions``.
    """
    importlib.import_module("fault_injection.rank")
    import_training()
    own_extensions(folder)
    _build_operator()
    refuse_threads()


def import_training() -> None:
    """All that a process of a run imports."""
    # DeepSpeed imports it when an engine is made, and all of PyTorch's compiler with it.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    importlib.import_module("megatron_lpa.train.start")


def refuse_threads() -> None:
    """Forked processes would lack them."""
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"{threads} threads: forked processes would lack them")


def own_extensions(folder: Path) -> None:
    """Have compiled operators in a folder that no other run uses.

    A process that is killed while DeepSpeed loads its operator leaves PyTorch's lock behind, for which every
    later start of every run on the machine waits ten minutes.

    Args:
        folder: for them.
    """
    from torch.utils.cpp_extension import get_default_build_root

    own = folder / "extensions"
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    version = f"py{sys.version_info.major}{sys.version_info.minor}_*"
    for built in [Path(named)] if named else sorted(Path(get_default_build_root()).glob(version)):
        if built.is_dir():  # compiling it again would take half a minute
            shutil.copytree(built, own, ignore=shutil.ignore_patterns("lock"), dirs_exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(own)


def _build_operator() -> None:
    """Compile DeepSpeed's operator where no copy fits, or every start would begin with that: in a process
    that ends."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            from deepspeed.comm.torch import build_shm_op

            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            build_shm_op()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError("DeepSpeed's operator for the CPU cannot be built; see above")


def die_with_parent() -> None:
    """Have this process killed when the one that forked it ends."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


class Ranks:
    """The processes of one start.

    Args:
        arguments: of ``megatron_lpa.pretrain``.
        specs: for each rank, what ``rank.Places`` takes; ``arguments`` there go before those of all.
        cwd: where they run.
        logs: a folder for what they print, ``rank_N.out`` and ``rank_N.err``.
        fresh: start interpreters instead of forking.
    """

    def __init__(
        self, arguments: list[str], specs: list[dict[str, Any]], cwd: Path, logs: Path, fresh: bool = False
    ) -> None:
        logs.mkdir(parents=True)
        self.logs, self.size = logs, len(specs)
        self.codes: dict[int, int] = {}
        """Exit codes of those that have ended; negative for a signal that killed them."""
        self.ended_by_us: set[int] = set()
        """Ranks that did not leave by themselves and were ended as a launcher does."""
        self.pids: list[int] = []
        self._links: list[socket.socket] = []
        self._first_gone_s: float | None = None
        port = free_port()
        for rank, spec in enumerate(specs):
            for ending in ("out", "err"):  # a process may be killed before it could
                (logs / f"rank_{rank}.{ending}").touch()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }  # fmt: skip
            pid = os.fork()
            if pid == 0:
                self._become({"arguments": arguments, **spec}, environment, theirs, cwd, rank, fresh)
            theirs.close()
            self.pids.append(pid)
            self._links.append(ours)

    def _become(
        self,
        spec: dict[str, Any],
        environment: dict[str, str],
        link: socket.socket,
        cwd: Path,
        rank: int,
        fresh: bool,
    ) -> None:
        try:
            os.setsid()
            die_with_parent()
            for other in self._links:
                other.close()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for descriptor, ending in ((1, "out"), (2, "err")):
                file = os.open(
                    self.logs / f"rank_{rank}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
                )
                os.dup2(file, descriptor)
            os.environ.update(environment)
            os.chdir(cwd)
            if fresh:
                link.set_inheritable(True)
                os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
                words = [sys.executable, "-m", "fault_injection.rank", json.dumps(spec), str(link.fileno())]
                os.execv(sys.executable, words)
            from fault_injection.rank import run

            run(spec, link)
        except BaseException as error:
            os.write(2, f"chaos: {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(99)

    @property
    def alive(self) -> list[int]:
        """Ranks that have not ended."""
        return [rank for rank in range(self.size) if rank not in self.codes]

    def events(self, timeout_s: float) -> list[Event]:
        """What the processes have told; waits for the first of it."""
        links = [self._links[rank] for rank in self.alive]
        ready, _, _ = select.select(links, [], [], timeout_s)
        found = []
        for link in ready:
            try:
                message = link.recv(4096)
            except OSError:
                continue
            if message:
                found.append(Event(self._links.index(link), time.monotonic(), json.loads(message)))
        self._reap()
        if ready and not found:
            time.sleep(0.005)  # a link of a process that is about to be gone is always ready
        return found

    def _reap(self) -> None:
        for rank in self.alive:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
                self._first_gone_s = self._first_gone_s or time.monotonic()

    def signal(self, rank: int, signum: int) -> None:
        """Send a signal, if the process is still there."""
        if rank in self.alive:
            os.kill(self.pids[rank], signum)

    def go(self, rank: int) -> None:
        """Let a process that stands still go on."""
        with contextlib.suppress(OSError):  # it is gone
            self._links[rank].send(b"g")

    def end_survivors(self, grace_s: float = GRACE_S) -> None:
        """What a launcher does when a process is gone, but with patience: SIGTERM, then SIGKILL."""
        if self._first_gone_s is None or not self.alive:
            return
        waited_s = time.monotonic() - self._first_gone_s
        if waited_s > grace_s:
            late = waited_s > grace_s + 10
            for rank in self.alive:
                if late or rank not in self.ended_by_us:
                    self.signal(rank, signal.SIGKILL if late else signal.SIGTERM)
                self.ended_by_us.add(rank)

    def kill_all(self) -> None:
        """Leave nothing behind."""
        for rank in self.alive:
            self.signal(rank, signal.SIGKILL)
            _, status = os.waitpid(self.pids[rank], 0)
            self.codes[rank] = os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """Kill what is left, with all that it has started, and close the links."""
        self.kill_all()
        for pid in self.pids:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        for link in self._links:
            link.close()

    def text(self, ending: str) -> list[str]:
        """What each rank printed: ``out`` or ``err``."""
        return [
            (self.logs / f"rank_{rank}.{ending}").read_text(errors="replace") for rank in range(self.size)
        ]


_next_port = 0


def free_port() -> int:
    """One below those that the system gives to connections, which could take it before the first process
    does."""
    global _next_port
    _next_port = _next_port or 10_000 + os.getpid() * 101 % 9_000
    while True:
        _next_port += 1
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", _next_port))
            return _next_port
