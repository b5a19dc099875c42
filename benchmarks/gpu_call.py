"""One call on a GPU machine without network: checks, installs the missing wheels, and runs the GPU suite.

Runs with the machine's own Python and nothing but its standard library. All that is refused is refused before
anything is measured: one line on stderr and exit code 2. Wheels are unpacked into a temporary folder.
Results, the tuning table, logs and traces go into one folder, at most eight files of at most 16 MiB, and are
there after every figure, however the call ends. SIGTERM and SIGINT end it with all that it started.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.descendants import adopt_orphans, end_descendants, end_with_parent
from benchmarks.gpu_packages import CAPABILITIES, installed, to_install, wheels_by_name
from megatron_lpa.errors import EXIT_REFUSED, UserError

ROOT = Path(__file__).resolve().parents[1]
RESULT = "gpu_suite.json"
LOG = "gpu_suite.log"
MOST_BYTES = 16 * 2**20
"""Of one file that stays in the output folder."""

GRACE_S = 15.0
"""What the suite gets after its limit, and again after SIGTERM, before it is ended."""

PROBE = """
import json, torch
found = {}
if torch.cuda.is_available():
    found = {"capability": torch.cuda.get_device_capability(), "name": torch.cuda.get_device_name(), "compiler": ""}
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(4096, device="cuda"))
    except Exception as error:
        found["compiler"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
print(json.dumps(found))
"""  # noqa: E501
"""What the GPU is, and why nothing can be compiled for it, if so: Triton needs a C compiler and Python's
headers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wheels", type=Path, required=True, metavar="FOLDER", help="what python -m benchmarks.gpu_wheels made")  # fmt: skip  # noqa: E501
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for results, logs and traces")  # fmt: skip  # noqa: E501
    parser.add_argument("--minutes", type=float, default=8.5, metavar="N", help="no figure is begun after this, the installation included (default: 8.5); half a minute later all has ended")  # fmt: skip  # noqa: E501
    parser.add_argument("--continue", dest="earlier", type=Path, metavar="FILE.json", help="an earlier result: measure only what is missing in it")  # fmt: skip  # noqa: E501
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, to try the call without a GPU")
    parser.add_argument("suite", nargs="*", metavar="-- OPTION", help="after --: further options of benchmarks.gpu_suite, as -- --parts gate steps")  # fmt: skip  # noqa: E501


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_call",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    end = time.monotonic() + 60 * arguments.minutes
    try:
        check_output(arguments.output, arguments.earlier is not None)
        wheels = to_install(installed(), wheels_by_name(arguments.wheels))
        gpu = {} if arguments.dry_run else check_gpu()
        with tempfile.TemporaryDirectory(prefix="gpu_call_") as work:
            environment = prepared(wheels, Path(work))
            return SuiteProcess(arguments, gpu, environment, end).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def check_output(folder: Path, goes_on: bool) -> None:
    """Creates the folder and writes a file into it.

    Args:
        folder: for the results.
        goes_on: whether an earlier result may be there.

    Raises:
        UserError: one of the two failed, or the folder holds a result that nobody said is to be gone on with.
    """
    if not goes_on and (folder / RESULT).exists():
        raise UserError(
            f"--output {folder}: holds a result already; go on with it (--continue {folder / RESULT}) or "
            "choose another folder"
        )
    probe = folder / "probe.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error


def check_gpu() -> dict[str, Any]:
    """What ``PROBE`` tells of the GPU, by a process of its own: this one must not hold memory on it.

    Raises:
        UserError: PyTorch finds none, or one that no kernel is written for.
    """
    probed = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if probed.returncode:
        raise UserError(f"PyTorch cannot look for a GPU: {last_line(probed.stderr)}")
    gpu: dict[str, Any] = json.loads(probed.stdout.splitlines()[-1])
    if not gpu:
        raise UserError(
            "PyTorch finds no GPU (nvidia-smi shows whether the driver does); --dry-run needs none"
        )
    if tuple(gpu["capability"]) not in CAPABILITIES:
        known = " and ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        major, minor = gpu["capability"]
        raise UserError(
            f"{gpu['name']} has compute capability {major}.{minor}, and kernels are written for {known}: use "
            "such a GPU (A100, A800, H100, H200); python -m benchmarks.gpu_suite measures any other without "
            "this check"
        )
    if gpu.get("compiler"):
        print(
            f"warning: nothing can be compiled for the GPU ({gpu['compiler']}): whole steps run with "
            "kernels.elementwise=eager, and what needs Triton fails",
            file=sys.stderr,
        )
    return gpu


def prepared(wheels: Sequence[Path], work: Path) -> dict[str, str]:
    """Unpacks the wheels into a folder, and returns the environment that finds them. Without DeepSpeed all
    but the engine can be measured, so a failing import is told, and no more.

    Raises:
        UserError: a wheel cannot be unpacked.
    """
    site = work / "site"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # DeepSpeed compiles an operator on CPUs. Never where another Python's build lies.
        "TORCH_EXTENSIONS_DIR": str(work / "extensions"),
        # And looks for ninja on the path.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
    }
    for wheel in wheels:  # archives that need no more than unpacking; not every machine has pip
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{wheel}: cannot be unpacked ({error}); fetch the wheels again") from error
    print(f"unpacked: {', '.join(wheel.name for wheel in wheels)}", flush=True)
    tried = subprocess.run(
        [sys.executable, "-c", "import deepspeed"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if tried.returncode:
        print(
            f"warning: DeepSpeed cannot be imported ({last_line(tried.stderr)}): the engine is not measured",
            file=sys.stderr,
        )
    return environment


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


class SuiteProcess:
    """The suite as a child process, watched until it ends or has to.

    Args:
        arguments: of the call.
        gpu: its capability and name; empty in a dry run.
        environment: of the child.
        end: when all has to be done, on the clock of ``time.monotonic``.
    """

    def __init__(
        self, arguments: argparse.Namespace, gpu: dict[str, Any], environment: dict[str, str], end: float
    ) -> None:
        self.folder: Path = arguments.output.resolve()
        self.environment, self.end = environment, end
        # The clock is the machine's, so that the suite's own start counts too.
        self.command = [sys.executable, "-m", "benchmarks.gpu_suite", "--until", f"{end:.3f}"]
        self.goes_on = arguments.earlier is not None
        self.command += ["--output", str(self.folder / RESULT), *arguments.suite]
        if arguments.earlier is not None:
            self.command += ["--continue", str(arguments.earlier.resolve())]
        if arguments.dry_run:
            self.command.append("--dry-run")
            self.environment["OMP_NUM_THREADS"] = "1"  # more only get into each other's way at tiny shapes
        else:  # what is measured after tuning uses this machine's table
            table = "sm_{}{}.json".format(*gpu["capability"])
            self.command += ["--table", str(ROOT / "megatron_lpa" / "ops" / "tuning" / table)]
            if gpu.get("compiler"):
                self.command += ["--set", "kernels.elementwise=eager"]

    def run(self) -> int:
        """The suite's exit code; 143 or 130 after a signal, 1 where it had to be killed.

        Raises:
            UserError: the suite refused to start; nothing was written.
        """
        log, result = self.folder / LOG, self.folder / RESULT
        before_log = log.stat().st_size if log.exists() else None
        before_result = result.stat().st_mtime_ns if result.exists() else None
        adopt_orphans()
        stopped_by: list[int] = []

        def stop(number: int, frame: FrameType | None) -> None:
            stopped_by.append(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with log.open("ab" if self.goes_on else "wb") as printed:
                # A session of its own, so that Ctrl-C reaches this process alone, which tells the suite.
                child = subprocess.Popen(
                    self.command, cwd=ROOT, env=self.environment, stdout=printed, stderr=subprocess.STDOUT,
                    start_new_session=True, preexec_fn=end_with_parent,
                )  # fmt: skip
            self.watch(child, log, (before_log or 0) if self.goes_on else 0, stopped_by)
        finally:
            end_descendants()
            for number, handler in before.items():
                signal.signal(number, handler)
        text = log.read_text(errors="replace")
        unwritten = (result.stat().st_mtime_ns if result.exists() else None) == before_result
        if child.returncode == 2 and unwritten:  # refused: nothing has changed
            if before_log is None:
                log.unlink()
            else:
                os.truncate(log, before_log)
            told = [line for line in text.splitlines() if "error: " in line]
            raise UserError((told or [last_line(text)])[-1].partition("error: ")[2] or last_line(text))
        tidy(self.folder)
        if stopped_by:
            return 128 + stopped_by[0]
        if child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            print(f"the suite was ended by {name}; --continue goes on with what it measured", file=sys.stderr)
            return 1
        return child.returncode

    def watch(self, child: subprocess.Popen[bytes], log: Path, start: int, stopped_by: Sequence[int]) -> None:
        """Shows the log as it grows beyond ``start``, until the suite ends, is told to, or does not heed its
        limit."""
        kill_at: float | None = None
        with log.open("rb") as shown:
            shown.seek(start)
            while child.poll() is None:
                sys.stdout.write(shown.read().decode(errors="replace"))
                sys.stdout.flush()
                now = time.monotonic()
                if kill_at is None and (stopped_by or now > self.end + GRACE_S):
                    child.terminate()
                    kill_at = now + GRACE_S
                elif kill_at is not None and now > kill_at:
                    child.kill()
                time.sleep(0.2)
            if child.returncode != 2:
                print(shown.read().decode(errors="replace"), end="", flush=True)


def tidy(folder: Path) -> None:
    """Removes what a killed process left half written, and files that are too large to be brought back."""
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        if path.suffix == ".partial":
            path.unlink()
        elif path.is_file() and size > MOST_BYTES:
            path.unlink()
            print(f"{path.name}: left out, {size / 2**20:.0f} MiB", flush=True)
    print(f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
