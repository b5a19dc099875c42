"""Starting the real entry point, in several processes."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from support.forked import Forked

from fault_injection.launches import free_port

TIMEOUT_S = 180
SMALL = ["--config", str(Path(__file__).parent / "small.yaml")]


@dataclass
class Finished:
    """What each process of a launch left."""

    codes: list[int]
    stdout: list[str]
    stderr: list[str]

    @property
    def errors(self) -> list[str]:
        """Lines that tell the user of an error, of all ranks."""
        return [line for text in self.stderr for line in text.splitlines() if line.startswith("error:")]


class Launch:
    """Processes of ``python -m megatron_lpa.pretrain`` with a launcher's environment.

    ``faults`` are what ``faulty_pretrain.py`` does, by global batch of the order of samples. ``more`` are
    further options of single ranks.
    """

    def __init__(
        self,
        arguments: list[str],
        processes: int,
        cwd: Path,
        faults: dict[int, str] | None = None,
        more: dict[int, list[str]] | None = None,
    ) -> None:
        port = free_port()
        self.processes: list[Forked] = []
        self.outputs: list[tuple[IO[str], IO[str]]] = []
        for rank in range(processes):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            # Files, not pipes: a full pipe would stop a process that nobody reads from yet.
            self.outputs.append((tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")))  # noqa: SIM115
            entry = ["-m", "megatron_lpa.pretrain"]
            if faults is not None:
                environment["FAULTS"] = json.dumps(faults)
                entry = [str(Path(__file__).parent / "faulty_pretrain.py")]
            words = [*entry, *arguments, *(more or {}).get(rank, [])]
            self.processes.append(Forked(words, cwd, environment, *self.outputs[-1]))

    def wait(self) -> Finished:
        """Wait for all; a process that does not end in time is killed and fails the test."""
        finished = Finished([], [], [])
        try:
            for process in self.processes:
                finished.codes.append(process.wait(timeout=TIMEOUT_S))
        finally:
            for process in self.processes:
                process.kill()
        for out, err in self.outputs:
            for file, texts in ((out, finished.stdout), (err, finished.stderr)):
                file.seek(0)
                texts.append(file.read())
                file.close()
        return finished


def launch(
    arguments: list[str],
    processes: int,
    cwd: Path,
    faults: dict[int, str] | None = None,
    more: dict[int, list[str]] | None = None,
) -> Finished:
    return Launch(arguments, processes, cwd, faults, more).wait()


def records(run_folder: Path, kind: str) -> list[dict]:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
