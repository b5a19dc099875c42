"""A real SLURM of two nodes on this machine, for as long as a test run needs it.

    with Cluster(folder) as cluster:
        job = cluster.submit("slurm/job.sh", ["--argument"], options=["--nodes=2", "--gres=gpu:8"])
        (ended,) = cluster.wait(job)
        assert ended.state == "COMPLETED", cluster.output(ended)

Both nodes declare 128 CPUs, 1 TB of memory and 8 GPUs of type a800, and jobs are scheduled by these numbers
but run on what the machine has: nothing limits a job. It needs root, and no systemd: the jobs run as root
too. There is no accounting database, so ``sacct`` does not work; ``scontrol`` remembers jobs for an hour.

A requeued job starts again after 11 to 15 s. Jobs, also array tasks, are named as SLURM does: ``12`` or
``12_3``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

from keeper import descendants, kill_descendants
from slurm_config import NODES, PortBlock, write_config
from slurm_job import Job, parse_jobs

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "squeue")
PACKAGES = "slurmctld slurmd slurm-client munge"
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"})
_START_S = 30
_STOP_S = 15
_COMMAND_S = 60
_POLL_S = 0.2
_OWN_PREFIXES = ("SLURM_", "SLURMD_", "SBATCH_", "SQUEUE_", "SCANCEL_", "SINFO_", "SRUN_")


class ClusterError(AssertionError):
    """The cluster did not do what it should; the message has what it said."""


def why_not() -> str | None:
    """Why no cluster can start here and what to do, or ``None``."""
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return f"{', '.join(missing)} not found; as root: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "a SLURM of one's own needs root"
    return None


class Cluster:
    """A running SLURM; a context manager.

    Args:
        folder: empty, on a short path; everything the cluster writes goes here.

    Attributes:
        nodes: their names.
        environment: for a child process that is to call SLURM's commands itself.

    Raises:
        ClusterError: it does not start; with the ends of the daemons' logs.
    """

    nodes = NODES

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = PortBlock()
        config = write_config(folder, self._ports.first)
        # The test run may be a SLURM job itself.
        kept = {key: value for key, value in os.environ.items() if not key.startswith(_OWN_PREFIXES)}
        self.environment = kept | {"SLURM_CONF": str(config)}
        self._keepers: list[subprocess.Popen[bytes]] = []
        self._of_node: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._start()
        except BaseException:
            self._stop_daemons()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all jobs, then all daemons, then whatever is left of either."""
        with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
            self.command("scancel", "--full", "--user=root")
            self.command("scancel", "--user=root")
            _until(lambda: not self.command("squeue", "--noheader").strip(), _STOP_S)
        self._stop_daemons()

    # Jobs

    def submit(
        self,
        script: Path | str,
        arguments: Sequence[str] = (),
        options: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        cwd: Path | str = ".",
    ) -> str:
        """``sbatch OPTIONS SCRIPT ARGUMENTS`` in ``cwd``; the number of the job.

        The job inherits this process's environment and ``environment``, as sbatch does.
        """
        printed = self.command(
            "sbatch", "--parsable", *options, str(script), *arguments, environment=environment, cwd=cwd
        )
        return printed.strip().partition(";")[0]

    def jobs(self, name: str) -> list[Job]:
        """The job, or the tasks of the array in order."""
        return parse_jobs(self.command("scontrol", "--oneliner", "show", "job", name))

    def wait(self, name: str, states: Iterable[str] = ENDED, timeout_s: float = 120) -> list[Job]:
        """Waits until the job, or all tasks of the array, are in one of ``states``; returns :meth:`jobs`."""
        states = frozenset(states)
        return self.wait_until(name, lambda jobs: all(job.state in states for job in jobs), timeout_s)

    def wait_until(
        self, name: str, condition: Callable[[list[Job]], bool], timeout_s: float = 120
    ) -> list[Job]:
        """Waits until ``condition`` of :meth:`jobs` holds, and returns them.

        Raises:
            ClusterError: it did not in time; with the queue, the job's output and the daemons' logs.
        """
        jobs: list[Job] = []

        def holds() -> bool:
            jobs[:] = self.jobs(name)
            return condition(jobs)

        if _until(holds, timeout_s):
            return jobs
        outputs = "".join(f"\n--- output of {job.name}:\n{self.output(job)}" for job in jobs)
        raise ClusterError(
            f"job {name} was not as expected after {timeout_s} s: {jobs}\n{self.command('squeue')}"
            f"{outputs}\n{self.log_tails()}"
        )

    def output(self, job: Job | str) -> str:
        """What the job, given as such or by name, wrote so far."""
        if isinstance(job, str):
            (job,) = self.jobs(job)
        return job.output.read_text(errors="replace") if job.output.is_file() else ""

    def processes(self, name: str) -> list[int]:
        """The process numbers of a running job or array task, on all nodes; the batch script's comes
        first."""
        job, _, task = name.partition("_")
        wanted = (
            {f"SLURM_ARRAY_JOB_ID={job}", f"SLURM_ARRAY_TASK_ID={task}"} if task else {f"SLURM_JOB_ID={job}"}
        )
        found: list[int] = []

        def any_found() -> bool:
            for process in [process for node in self._of_node.values() for process in descendants(node.pid)]:
                with contextlib.suppress(OSError):  # it may just have ended
                    environment = Path(f"/proc/{process}/environ").read_text(errors="replace")
                    if wanted <= set(environment.split("\0")):
                        found.append(process)
            return bool(found)

        if not _until(any_found, _START_S):  # RUNNING begins a moment before the script does
            raise ClusterError(f"job {name} has no processes: {self.jobs(name)}\n{self.log_tails()}")
        return found

    def cancel(self, name: str, *options: str) -> None:
        """``scancel``; with ``--signal=USR1``, for example, only a signal to the steps."""
        self.command("scancel", *options, name)

    def signal_script(self, name: str, signal_name: str) -> None:
        """A signal to the batch script alone, as ``#SBATCH --signal=B:USR1@300`` sends it before the end."""
        self.command("scancel", "--batch", f"--signal={signal_name}", name)

    def requeue(self, name: str) -> None:
        """Ends the job if it runs, and puts it back into the queue."""
        self.command("scontrol", "requeue", name)

    # Nodes

    def cut_power(self, node: str) -> None:
        """SIGKILL to the node's slurmd and to all processes of jobs on it.

        The controller notices after about 30 s, and requeues those jobs that allow it.
        """
        keeper = self._of_node.pop(node)
        _until(lambda: (kill_descendants(keeper.pid), keeper.poll() is not None)[1], _STOP_S)

    def power_on(self, node: str, timeout_s: float = _START_S) -> None:
        """Starts the node again after :meth:`cut_power`, and waits until it takes jobs."""
        self._start_node(node)
        if not _until(lambda: self.node_states()[node] in ("idle", "mixed", "allocated"), timeout_s):
            raise ClusterError(f"node {node} does not come back: {self.node_states()}\n{self.log_tails()}")

    def node_states(self) -> dict[str, str]:
        """State of every node, as ``idle``; with a ``*`` where it does not answer."""
        lines = self.command("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    # The machinery

    def command(
        self, program: str, *arguments: str, environment: dict[str, str] | None = None, cwd: Path | str = "."
    ) -> str:
        """Output of one of SLURM's commands; a :class:`ClusterError` where it fails."""
        done = subprocess.run(
            [_program(program) or program, *arguments],
            env=self.environment | (environment or {}), cwd=cwd, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=_COMMAND_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ClusterError(f"{program} {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def log_tails(self, lines: int = 15) -> str:
        """The ends of all logs of the daemons, with what those that ended said on standard error."""
        parts = []
        ended = [
            self.folder / f"{keeper.pid}.stderr" for keeper in self._keepers if keeper.poll() is not None
        ]
        for log in sorted(self.folder.glob("*.log")) + ended:
            tail = log.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"--- {log.name}:", *tail]))
        return "\n".join(parts)

    def _start(self) -> None:
        socket = self.folder / "munge.socket"
        self._keep(
            "munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key", f"--socket={socket}",
            f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munge.seed",
        )  # fmt: skip
        if not _until(lambda: socket.exists() or self._some_daemon_ended(), _START_S) or not socket.exists():
            raise ClusterError(f"munged does not start\n{self.log_tails()}")
        self._keep("slurmctld", "-D")
        for node in self.nodes:
            self._start_node(node)
        states: dict[str, str] = {}

        def all_idle() -> bool:
            with contextlib.suppress(ClusterError):  # the controller is not there yet
                states.update(self.node_states())
            return set(states.values()) == {"idle"}

        if not _until(lambda: all_idle() or self._some_daemon_ended(), _START_S) or not all_idle():
            raise ClusterError(f"the nodes do not become idle: {states}\n{self.log_tails()}")

    def _some_daemon_ended(self) -> bool:
        return any(keeper.poll() is not None for keeper in self._keepers)

    def _start_node(self, node: str) -> None:
        self._of_node[node] = self._keep("slurmd", "-D", "-N", node)

    def _keep(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        path = _program(program)
        assert path is not None
        with (self.folder / "stderr").open("wb") as errors:
            keeper = subprocess.Popen(
                [sys.executable, "-S", "-E", str(Path(__file__).with_name("keeper.py")), path, *arguments],
                env=self.environment, cwd=self.folder, stdin=subprocess.PIPE, stdout=errors, stderr=errors,
                start_new_session=True,  # Ctrl-C is for the test run, which then ends the cluster in order
            )  # fmt: skip
        (self.folder / "stderr").rename(self.folder / f"{keeper.pid}.stderr")
        self._keepers.append(keeper)
        return keeper

    def _stop_daemons(self) -> None:
        for keeper in reversed(self._keepers):
            assert keeper.stdin is not None
            keeper.stdin.close()
            keeper.wait()
        self._ports.release()


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return held
